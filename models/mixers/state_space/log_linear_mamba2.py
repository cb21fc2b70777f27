"""Log-linear Mamba-2."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ....kernels.log_linear import flops
from ....parallel import ops
from ....parallel.sequence import Sequence
from ...mixer import also_takes
from .mamba2 import Mamba2


class LogLinearMamba2(Mamba2):
    """Mamba-2 with a state for each level of a binary tree over positions (log-linear attention, Guo et al., 2025,
    arXiv 2506.04761; as in flash-linear-attention).

        y_t = C_t sum_l w_t^(l) S_t^(l) + D x_t        w = softplus(scales * W_w u)        u the input
        S_t^(l) = sum_(s: level(s, t) = l) exp(-sum_(s < r <= t) delta_r exp(A_log)) B_s^T (delta_s x_s)
        level(s, t) = 0 for s = t, else the place of the highest bit in which s and t differ, 1 for the lowest bit

    All else is as in Mamba-2: delta, B, C and x, which are read from u, and what becomes of y. Level l holds the
    2^(l-1) tokens before those of lower levels, or none, by the bits of t, a position in the document.

    levels: how many states a head has. They suffice for documents of 2^(levels - 1) tokens; of longer ones the last
    state holds all that is further back. scales: one a head and level, 1 at the start. Other settings are Mamba-2's.
    Raises ValueError for sizes that do not divide.
    """

    no_weight_decay = ("scales",)

    @also_takes(Mamba2)
    def __init__(self, *, width: int, levels: int = 15, bias: bool = False, **mamba: Any) -> None:
        super().__init__(width=width, bias=bias, **mamba)
        if levels < 1:
            raise ValueError(f"levels must be at least 1; got {levels}. 15 are for documents of 16,384 tokens")
        self.levels = levels
        self.level_weight = nn.Linear(width, self.heads * levels, bias=bias)
        self.scales = nn.Parameter(torch.empty(self.heads, levels))

    def read(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, seq: Sequence) -> Tensor:
        raw = self.level_weight(x).unflatten(-1, (self.heads, self.levels))
        weights = F.softplus(self.scales.to(raw.dtype) * raw)
        return ops.log_linear_attention(q, k, v, log_decay, weights, seq=seq, scale=1.0)

    def mixing_flops(self, seq: Sequence) -> int:
        sizes = {"heads": self.heads, "key_dim": self.state, "value_dim": self.head_dim}
        return flops(seq.places, **sizes, levels=self.levels)

    def initialise_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> bool:
        if name != "scales":
            return super().initialise_parameter(name, tensor, generator)
        tensor.fill_(1.0)
        return True
