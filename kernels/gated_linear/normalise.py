"""The division of what queries read of a state by what they read of its sum of keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..operation import Function

# Below this a divisor counts as 0, and the output is 0: nothing has been read, as where all keys so far are 0.
TINY = 1e-30


class Normalise(Function):
    """h = n / d for raw outputs (n, d) `[…, V + 1]` or, relative to a log scale m, (n, d, m) `[…, V + 2]`.

    "sum" divides by d, in which a scale cancels; "at_least_one" by max(|d|, 1), relative to a scale max(|d|, e^{−m}).
    Where the divisor is 0, h and its gradients are. The scale gets no gradient: h does not depend on it.
    """

    @staticmethod
    def forward(ctx: Any, raw: Tensor, kind: str, scaled: bool, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(raw)
        ctx.kind, ctx.scaled = kind, scaled
        inverse, _ = _inverse(raw, kind, scaled)
        return (raw[..., : -2 if scaled else -1] * inverse).to(dtype)

    @staticmethod
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (raw,) = ctx.saved_tensors
        inverse, slope = _inverse(raw, ctx.kind, ctx.scaled)
        last = -2 if ctx.scaled else -1
        dn = dh * inverse
        dd = -(dn * raw[..., :last]).sum(-1, keepdim=True) * inverse * slope
        draw = torch.cat([dn, dd, torch.zeros_like(dd)] if ctx.scaled else [dn, dd], dim=-1)
        return draw, None, None, None


def _inverse(raw: Tensor, kind: str, scaled: bool) -> tuple[Tensor, Tensor]:
    """1 / divisor, 0 for a divisor of 0, and the divisor's derivative by d: `[…, 1]`."""
    d = raw[..., -2:-1] if scaled else raw[..., -1:]
    if kind == "sum":
        divisor, slope = d, torch.ones_like(d)
    else:
        least = (-raw[..., -1:]).exp() if scaled else torch.ones_like(d)
        divisor = torch.maximum(d.abs(), least)
        slope = torch.where(d.abs() > least, d.sign(), 0.0)
    return torch.where(divisor.abs() > TINY, divisor.reciprocal(), 0.0), slope
