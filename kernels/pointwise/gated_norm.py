"""A norm and its gate: one launch on an accelerator, tiles on a CPU, and one backward that keeps the inputs alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..dispatch import by_kernels
from ..operation import Function
from . import gated_tiles
from .rms_norm import rms_norm
from .tiles import on_cpu

ACTIVATIONS = ("silu", "sigmoid")


def gated_norm(
    x: Tensor,
    gate: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-6,
    activation: str = "silu",
    centred: bool = False,
    gate_first: bool = False,
) -> Tensor:
    """y = activation(gate) * norm(x), or norm(activation(gate) * x) with `gate_first`, over the last dim.

        norm(u) = n weight + bias     n = u / sqrt(mean(u^2) + eps), of u - mean(u) in place of u if `centred`

    x, gate `[..., H, D]`; weight `[D]` for all heads, or `[H, D]`; bias like weight, or None. `activation` is "silu" or
    "sigmoid". Computed in float32 (float64 for float64); y is in x's type. Raises ValueError where shapes or types do
    not fit.
    """
    if x.shape != gate.shape or x.dtype != gate.dtype:
        raise ValueError(
            f"x and gate must be alike; got {x.dtype} {tuple(x.shape)} and {gate.dtype} {tuple(gate.shape)}"
        )
    fits = tuple(weight.shape) in ((x.shape[-1],), tuple(x.shape[-2:]))
    if not fits or (bias is not None and bias.shape != weight.shape):
        raise ValueError(
            f"weight must be [D] or [H, D] for x [..., H, D], and bias like it; got {tuple(weight.shape)} and "
            f"{None if bias is None else tuple(bias.shape)} for {tuple(x.shape)}"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}")
    kernels, kind = by_kernels("gated_norm", x), (activation == "silu", centred, gate_first)
    if kernels is not None and kernels.takes_norm(x):
        return _GatedNorm.call(kernels, x, gate, weight, bias, eps, kind)
    if on_cpu(x):
        return _GatedNorm.call(gated_tiles, x, gate, weight, bias, eps, kind)
    active = F.silu if activation == "silu" else torch.sigmoid
    if not gate_first:
        return active(gate) * _norm(x, weight, bias, eps, centred).to(x.dtype)
    wide = torch.promote_types(x.dtype, torch.float32)
    return _norm(x.to(wide) * active(gate.to(wide)), weight, bias, eps, centred).to(x.dtype)


def _norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, centred: bool) -> Tensor:
    """norm(x) by torch's operations, which its compiler fuses."""
    if not centred and weight.dim() == 1 and bias is None:
        return rms_norm(x, weight, eps)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    n = F.layer_norm(wide, x.shape[-1:], eps=eps) if centred else rms_norm(wide, None, eps)
    n = n * weight
    return n if bias is None else n + bias


class _GatedNorm(Function):
    """By kernels, or in tiles; backward needs the inputs alone."""

    @staticmethod
    def forward(
        ctx: Any,
        kernels: Any,
        x: Tensor,
        gate: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        kind: tuple[bool, bool, bool],
    ) -> Tensor:
        ctx.kernels, ctx.eps, ctx.kind = kernels, eps, kind
        ctx.save_for_backward(x, gate, weight, bias)
        return kernels.gated_norm(x, gate, weight, bias, eps, kind)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.kernels.gated_norm_backward(dy, *ctx.saved_tensors, ctx.eps, ctx.kind), None, None
