"""S4D."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ....parallel.sequence import Sequence
from ...layers.diagonal_ssm import DiagonalSSM
from ...mixer import Mixer


class S4D(Mixer):
    """A state space model with a complex diagonal for each channel (S4D, Gu et al., 2022, arXiv 2206.11893).

        h_t = e^{delta A} h_(t-1) + x_t        s_t = 2 Re(C (e^{delta A} - 1) / A h_t)        one model per channel
        z = gelu(s + D * x)        y = W_o z * sigmoid(W_g z)

    Nothing in it depends on the token but x. state: N, real numbers per channel, as N / 2 complex states. initial:
    where A starts, "lin" (S4D-Lin) or "inv" (S4D-Inv). discretisation: "zoh", as above, or "bilinear". step_range:
    within which delta starts, log-uniformly. See `DiagonalSSM`. Raises ValueError for settings out of range.
    """

    no_weight_decay = ("model.A_log", "model.A_imaginary")

    def __init__(
        self,
        *,
        width: int,
        state: int = 64,
        initial: str = "lin",
        discretisation: str = "zoh",
        step_range: tuple[float, float] = (1e-3, 1e-1),
    ) -> None:
        super().__init__()
        self.model = DiagonalSSM(width, state, initial, discretisation, step_range)
        self.D = nn.Parameter(torch.empty(width))
        self.gate = nn.Linear(width, width)
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor, seq: Sequence) -> Tensor:
        out = self.model(x.unsqueeze(-1), seq).squeeze(-1)
        hidden = F.gelu(torch.addcmul(out, self.D.to(x.dtype), x))
        return self.output(hidden) * self.gate(hidden).sigmoid()

    def mixing_flops(self, seq: Sequence) -> int:
        return self.model.mixing_flops(seq, len(self.D))

    def initialise_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> bool:
        if name != "D":
            return False
        tensor.normal_(generator=generator)
        return True
