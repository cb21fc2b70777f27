"""Mamba."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ....kernels.pointwise import rms_norm
from ....parallel import ops
from ....parallel.sequence import Sequence
from ...layers.decay_gate import check_steps, fill_with_steps
from ...layers.normalisation import RMSNorm
from ...mixer import also_takes
from .selective import SelectiveScan

PART_NORMS = (None, "weighted", "weightless")


class Mamba(SelectiveScan):
    """A selective state space model (Mamba, Gu and Dao, 2023, arXiv 2312.00752).

        x = silu(conv(W_x u))        low, B, C = W x        delta = softplus(W_delta low + dt_bias)        u the input
        h_t = exp(-delta_t exp(A_log)) h_(t-1) + delta_t x_t B_t        y_t = sum_n h_t C_t + D x_t
        out = W_o (y * silu(W_z u))

    part_norms: RMS norms of low, B and C, "weighted" as in Jamba (arXiv 2403.19887) or "weightless" as in Falcon Mamba
    (arXiv 2410.05355). step_range, step_floor: where steps softplus(dt_bias) start, log-uniformly. Other settings are
    those of `SelectiveScan`. Raises ValueError for settings out of range.
    """

    no_weight_decay = ("A_log",)
    in_float32 = ("A_log", "dt_bias")

    @also_takes(SelectiveScan)
    def __init__(
        self,
        *,
        part_norms: str | None = None,
        step_range: tuple[float, float] = (1e-3, 1e-1),
        step_floor: float = 1e-4,
        norm_eps: float = 1e-6,
        **settings: Any,
    ) -> None:
        if part_norms not in PART_NORMS:
            raise ValueError(f"part_norms must be one of {', '.join(map(str, PART_NORMS))}; got {part_norms!r}")
        super().__init__(**settings)
        self.step_range, self.step_floor = check_steps(step_range), step_floor
        self.part_norms, self.norm_eps = part_norms, norm_eps
        if part_norms == "weighted":
            self.norms = nn.ModuleList(RMSNorm(size, norm_eps) for size in self.sizes)
        self.step = nn.Linear(self.sizes[0], self.inner, bias=False)  # delta
        self.dt_bias = nn.Parameter(torch.empty(self.inner))
        self.A_log = nn.Parameter(torch.empty(self.inner, self.sizes[-1]))

    def scan(self, x: Tensor, low: Tensor, b: Tensor, c: Tensor, seq: Sequence) -> Tensor:
        if self.part_norms == "weighted":
            low, b, c = (norm(part) for norm, part in zip(self.norms, (low, b, c), strict=True))
        elif self.part_norms == "weightless":
            low, b, c = (rms_norm(part, None, self.norm_eps) for part in (low, b, c))
        raw = self.step(low)
        wide = torch.promote_types(raw.dtype, torch.float32)  # sums of delta over many tokens are exponents
        delta = F.softplus(raw.to(wide) + self.dt_bias.to(wide))
        return ops.selective_scan(x, delta, -self.A_log.to(wide).exp(), b, c, seq=seq)

    def initialise_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> bool:
        if name == "A_log":
            tensor.copy_(torch.arange(1, tensor.shape[1] + 1).expand_as(tensor)).log_()
        elif name == "dt_bias":
            fill_with_steps(tensor, generator, self.step_range, self.step_floor)
        else:
            return super().initialise_parameter(name, tensor, generator)
        return True
