"""Mamba."""

from __future__ import annotations

from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ....kernels.pointwise import rms_norm, swiglu
from ....kernels.selective_scan import flops
from ....parallel import ops
from ....parallel.sequence import Sequence
from ...layers.decay_gate import fill_with_steps
from ...layers.normalisation import RMSNorm
from ...layers.short_convolution import ShortConvolution
from ...mixer import Mixer

PART_NORMS = (None, "weighted", "weightless")


class Mamba(Mixer):
    """A selective state space model (Mamba, Gu and Dao, 2023, arXiv 2312.00752).

        x = silu(conv(W_x u))        low, B, C = W x        delta = softplus(W_delta low + dt_bias)        u the input
        h_t = exp(-delta_t exp(A_log)) h_(t-1) + delta_t x_t B_t        y_t = sum_n h_t C_t + D x_t
        out = W_o (y * silu(W_z u))

    expansion: channels of x over the width. state: N, the states of a channel. step_rank: of low (default: width / 16,
    rounded up). conv_size: taps of the convolution. part_norms: RMS norms of low, B and C, "weighted" as in Jamba
    (arXiv 2403.19887) or "weightless" as in Falcon Mamba (arXiv 2410.05355). step_range, step_floor: where steps
    softplus(dt_bias) start, log-uniformly. bias, conv_bias: of W_x, W_z and W_o, and of the convolution. Raises
    ValueError for settings out of range.
    """

    no_weight_decay = ("A_log",)
    in_float32 = ("A_log", "dt_bias")
    small = MappingProxyType({"step_rank": 4})

    def __init__(
        self,
        *,
        width: int,
        expansion: float = 2,
        state: int = 16,
        step_rank: int | None = None,
        conv_size: int = 4,
        part_norms: str | None = None,
        step_range: tuple[float, float] = (1e-3, 1e-1),
        step_floor: float = 1e-4,
        bias: bool = False,
        conv_bias: bool = True,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        inner, rank = int(expansion * width), -(-width // 16) if step_rank is None else step_rank
        for name, value in (("expansion * width", inner), ("state", state), ("step_rank", rank)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")
        if not 0 < step_range[0] <= step_range[1]:
            raise ValueError(f"step_range must be positive and in order; got {tuple(step_range)}")
        if part_norms not in PART_NORMS:
            raise ValueError(f"part_norms must be one of {', '.join(map(str, PART_NORMS))}; got {part_norms!r}")
        self.inner, self.sizes, self.norm_eps = inner, (rank, state, state), norm_eps
        self.step_range, self.step_floor = (step_range[0], step_range[1]), step_floor
        self.part_norms = part_norms
        self.value = nn.Linear(width, inner, bias=bias)  # x
        self.gate = nn.Linear(width, inner, bias=bias)  # z
        self.conv = ShortConvolution(inner, conv_size, bias=conv_bias, activation="silu")
        self.selection = nn.Linear(inner, sum(self.sizes), bias=False)  # low, B, C
        if part_norms == "weighted":
            self.norms = nn.ModuleList(RMSNorm(size, norm_eps) for size in self.sizes)
        self.step = nn.Linear(rank, inner, bias=False)  # delta
        self.dt_bias = nn.Parameter(torch.empty(inner))
        self.A_log = nn.Parameter(torch.empty(inner, state))
        self.D = nn.Parameter(torch.empty(inner))
        self.output = nn.Linear(inner, width, bias=bias)

    def forward(self, x: Tensor, seq: Sequence) -> Tensor:
        gate = self.gate(x)
        x = self.conv(self.value(x), seq)
        low, b, c = self.selection(x).split(self.sizes, dim=-1)
        if self.part_norms == "weighted":
            low, b, c = (norm(part) for norm, part in zip(self.norms, (low, b, c), strict=True))
        elif self.part_norms == "weightless":
            low, b, c = (rms_norm(part, None, self.norm_eps) for part in (low, b, c))
        raw = self.step(low)
        wide = torch.promote_types(raw.dtype, torch.float32)  # sums of delta over many tokens are exponents
        delta = F.softplus(raw.to(wide) + self.dt_bias.to(wide))
        out = ops.selective_scan(x, delta, -self.A_log.to(wide).exp(), b, c, seq=seq)
        return self.output(swiglu(gate, torch.addcmul(out, self.D.to(x.dtype), x)))

    def mixing_flops(self, seq: Sequence) -> int:
        return flops(seq.places, channels=self.inner, states=self.sizes[-1])

    def initialise_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> bool:
        if name == "A_log":
            tensor.copy_(torch.arange(1, tensor.shape[1] + 1).expand_as(tensor)).log_()
        elif name == "D":
            tensor.fill_(1.0)
        elif name == "step.weight":
            tensor.uniform_(-(tensor.shape[1] ** -0.5), tensor.shape[1] ** -0.5, generator=generator)
        elif name == "dt_bias":
            fill_with_steps(tensor, generator, self.step_range, self.step_floor)
        else:
            return False
        return True
