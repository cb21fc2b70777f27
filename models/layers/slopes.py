"""Slopes: the fixed decays of lightning attention, by head and layer."""

from __future__ import annotations

import torch
from torch import Tensor

RULES = ("geometric", "arithmetic")


class Slopes:
    """The rates at which heads forget, `[H]`, never negative: head h = 0 … H - 1 decays by exp(-slope_h) a token.

        geometric     slope_h = 2^(-8 (h + 1) / H) * (1 - layer / (depth - 1 + 1e-5) + 1e-5)
        arithmetic    slope_h = 8 h / H * (1 - layer / depth)

    Geometric is the rule of MiniMax-01's code, and to 1e-5 of that of TransNormerLLM, where the number of heads is a
    power of two; arithmetic is that of TransNormerLLM's paper (Qin et al., 2023, arXiv 2307.14995), which
    flash-linear-attention follows. `layer` counts from 0 over the whole model: later layers forget more slowly.
    Called with a tensor, slopes are on its device, in float32 or, for float64, float64. They are computed, for a cast
    would spoil a buffer. Raises ValueError for an unknown rule.
    """

    def __init__(self, rule: str, heads: int, layer: int, depth: int) -> None:
        if rule not in RULES:
            raise ValueError(f"slope_rule must be one of {', '.join(RULES)}; got {rule!r}. Choose one")
        self.rule, self.heads = rule, heads
        geometric = rule == "geometric"
        self.layer_factor = 1 - layer / (depth - 1 + 1e-5) + 1e-5 if geometric else 1 - layer / depth

    def __call__(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        head = torch.arange(self.heads, device=x.device, dtype=dtype)
        if self.rule == "geometric":
            return torch.exp2((head + 1) * (-8 / self.heads)) * self.layer_factor
        return head * (8 / self.heads * self.layer_factor)
