"""A norm and its gate: one launch on an accelerator, and one backward that keeps the inputs alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..dispatch import by_kernels, kind_of
from ..operation import Function
from .rms_norm import rms_norm

ACTIVATIONS = ("silu", "sigmoid")
NUMBERS = 1 << 17  # of a tile on a CPU, which stays in a core's caches from its first operation to its last


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
    kernels = by_kernels("gated_norm", x)
    if kernels is not None and kernels.takes_norm(x):
        kind = activation == "silu", centred, gate_first
        return _GatedNorm.call(kernels, x, gate, weight, bias, eps, kind)
    if kind_of(x.device) == "cpu" and not (gate_first or centred or bias is not None or torch.compiler.is_compiling()):
        return _GatedRmsNorm.call(x, gate, weight, eps, activation == "silu")
    active = F.silu if activation == "silu" else torch.sigmoid
    if not gate_first:
        return active(gate) * _norm(x, weight, bias, eps, centred).to(x.dtype)
    wide = torch.promote_types(x.dtype, torch.float32)
    return _norm(x.to(wide) * active(gate.to(wide)), weight, bias, eps, centred).to(x.dtype)


def _norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, centred: bool) -> Tensor:
    """norm(x) by torch's operations, which its compiler fuses and which a CPU runs no faster as one."""
    if not centred and weight.dim() == 1 and bias is None:
        return rms_norm(x, weight, eps)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    n = F.layer_norm(wide, x.shape[-1:], eps=eps) if centred else rms_norm(wide, None, eps)
    n = n * weight
    return n if bias is None else n + bias


class _GatedRmsNorm(Function):
    """y = activation(gate) * n * weight, tile by tile on a CPU; backward needs the inputs and a number per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, weight: Tensor, eps: float, silu: bool) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        of_rows, y = weight.to(wide), torch.empty(x.shape, dtype=x.dtype, device=x.device)
        inverse = torch.empty(*x.shape[:-1], 1, dtype=wide, device=x.device)
        for xs, gates, scales, out in _tiles(weight, x, gate, inverse, y):
            xs = xs.to(wide)
            scales.copy_(xs.square().mean(-1, keepdim=True).add_(eps).rsqrt_())
            n = torch.mul(xs, scales).mul_(of_rows)
            out.copy_(_active(gates.to(wide), silu).mul_(n))
        ctx.save_for_backward(x, gate, weight, inverse)
        ctx.silu = silu
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """With n = x inverse, a = activation(gate) and g = dy a weight:  dx = inverse (g - n mean(g n)),
        dgate = activation'(dy n weight),  dweight = sum dy a n."""
        x, gate, weight, inverse = ctx.saved_tensors
        of_rows = weight.to(inverse.dtype)
        dweight = torch.zeros_like(of_rows)
        dx, dgate = (torch.empty(each.shape, dtype=each.dtype, device=each.device) for each in (x, gate))
        for xs, gates, scales, dys, dxs, dgates in _tiles(weight, x, gate, inverse, dy, dx, dgate):
            gates, dys = gates.to(of_rows.dtype), dys.to(of_rows.dtype)
            n, active = xs * scales, _active(gates, ctx.silu)
            dactive = (dys * n).mul_(of_rows)
            if ctx.silu:
                dgates.copy_(torch.ops.aten.silu_backward(dactive, gates))
            else:
                dgates.copy_(torch.ops.aten.sigmoid_backward(dactive, active))
            g = active.mul_(dys)
            dweight += (g * n).sum(0)
            g.mul_(of_rows)
            along = torch.linalg.vecdot(g, n).unsqueeze_(-1).div_(x.shape[-1])
            dxs.copy_(g.sub_(n.mul_(along)).mul_(scales))
        return dx, dgate, dweight.to(weight.dtype), None, None


def _active(gate: Tensor, silu: bool) -> Tensor:
    return F.silu(gate) if silu else torch.sigmoid(gate)


def _tiles(weight: Tensor, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Parts of tensors `[..., D]`, as rows of the shape of the weight."""
    rows = [x.reshape(-1, *x.shape[x.dim() - weight.dim() :]) for x in tensors]
    yield from zip(*(x.split(max(1, NUMBERS // weight.numel())) for x in rows), strict=True)


class _GatedNorm(Function):
    """The kernels, of which backward needs the inputs alone."""

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
