"""H3."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ....parallel.sequence import Sequence
from ...layers.diagonal_ssm import DiagonalSSM
from ...layers.short_convolution import ShortConvolution
from ...mixer import Mixer, head_size


class H3(Mixer):
    """Two state space models between three projections (H3, Dao, Fu et al., 2023, arXiv 2212.14052).

        q, k, v = W_q x, W_k x, W_v x          k' = shift(k) + E * k
        u_t = k'_t^T v_t          s = diagonal SSM of each entry of u          o_t = q_t (s_t + D u_t)
        y = W_o o

    The shift SSM, whose state is the last `state` keys, is a convolution of that many taps. A head has one diagonal SSM
    for all entries of its outer products. head_dim: of a head, K = V; work and state grow with its square. state:
    N, taps of the shift and real numbers per entry of u. initial, discretisation, step_range: of the diagonal SSM, see
    `DiagonalSSM`. bias: of the linear layers. Raises ValueError for a head_dim that does not divide the width.
    """

    no_weight_decay = ("model.A_log", "model.A_imaginary")

    def __init__(
        self,
        *,
        width: int,
        head_dim: int = 1,
        state: int = 64,
        initial: str = "lin",
        discretisation: str = "bilinear",
        step_range: tuple[float, float] = (1e-3, 1e-1),
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.head_dim, self.heads = head_dim, head_size("head_dim", width, head_dim)
        self.query = nn.Linear(width, width, bias=bias)
        self.key = nn.Linear(width, width, bias=bias)
        self.value = nn.Linear(width, width, bias=bias)
        self.shift = ShortConvolution(width, state)
        self.E = nn.Parameter(torch.empty(width))
        self.model = DiagonalSSM(self.heads, state, initial, discretisation, step_range)
        self.D = nn.Parameter(torch.empty(self.heads))
        self.output = nn.Linear(width, width, bias=bias)

    def forward(self, x: Tensor, seq: Sequence) -> Tensor:
        key = self.key(x)
        key = torch.addcmul(self.shift(key, seq), self.E.to(x.dtype), key)
        q, k, v = (part.unflatten(-1, (self.heads, self.head_dim)) for part in (self.query(x), key, self.value(x)))
        outer = (k.unsqueeze(-1) * v.unsqueeze(-2)).flatten(-2)  # [B, T, H, K V]
        out = torch.addcmul(self.model(outer, seq), self.D.to(x.dtype)[:, None], outer)
        return self.output((q.unsqueeze(-1) * out.unflatten(-1, (self.head_dim, -1))).sum(-2).flatten(-2))

    def mixing_flops(self, seq: Sequence) -> int:
        return self.model.mixing_flops(seq, self.heads * self.head_dim**2)

    def initialise_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> bool:
        if name not in ("D", "E"):
            return False
        tensor.normal_(generator=generator)
        return True
