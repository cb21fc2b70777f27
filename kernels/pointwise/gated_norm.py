"""A norm and its gate: one launch on an accelerator, tiles on a CPU, and one backward that keeps the inputs alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..dispatch import by_kernels, starts
from ..operation import Function
from .rms_norm import rms_norm

ACTIVATIONS = ("silu", "sigmoid")
TILE = 1 << 16  # numbers of a tile, of which a CPU's cache holds several


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
    if x.device.type in ("cpu", "meta") and not torch.compiler.is_compiling():
        return _TiledGatedNorm.call(x, gate, weight, bias, eps, (activation == "silu", centred, gate_first))
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


class _TiledGatedNorm(Function):
    """The same in torch's operations, tile by tile, so that no result between two of them leaves the cache."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gate: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        kind: tuple[bool, bool, bool],
    ) -> Tensor:
        silu, _, gate_first = ctx.kind = kind
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        wide = _wide(x)
        scales = torch.empty(*x.shape[:-1], 1, dtype=wide, device=x.device)
        for part, own_x, own_gate, own_scales in _tiles(weight, out, x, gate, scales):
            active = _active(own_gate.to(wide), silu)
            u = _normed(own_x.to(wide), active, kind)
            own_scales.copy_(u.square().mean(-1, keepdim=True).add_(eps).rsqrt_())
            y = torch.mul(u, own_scales).mul_(weight)
            if bias is not None:
                y.add_(bias)
            part.copy_(y if gate_first else y.mul_(active))
        ctx.save_for_backward(x, gate, weight, bias, scales)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """With n the normed and g = dn weight:  du = scale (g − n mean(g · n)),  dweight = Σ dn · n."""
        x, gate, weight, bias, scales = ctx.saved_tensors
        silu, centred, gate_first = ctx.kind
        dx, dgate = (torch.empty(y.shape, dtype=y.dtype, device=y.device) for y in (x, gate))
        wide = _wide(x)
        dweight, dbias = torch.zeros_like(weight, dtype=wide), torch.zeros_like(weight, dtype=wide)
        for own_dx, own_dgate, *given, scale in _tiles(weight, dx, dgate, dy, x, gate, scales):
            dn, own_x, own_gate = (y.to(wide) for y in given)
            active = _active(own_gate, silu)
            n = _normed(own_x, active, ctx.kind) * scale
            dactive = None
            if not gate_first:
                dactive = (n * weight if bias is None else torch.addcmul(bias.to(wide), n, weight.to(wide))).mul_(dn)
                dn = dn * active
            along = dn * n
            dweight += along.sum(0)
            if bias is not None:
                dbias += dn.sum(0)
            along = along.mul_(weight).mean(-1, keepdim=True)
            du = torch.mul(dn, weight).addcmul_(n, along, value=-1.0).mul_(scale)
            if centred:
                du.sub_(du.mean(-1, keepdim=True))
            if dactive is None:
                dactive = du * own_x
                du.mul_(active)
            own_dx.copy_(du)
            if silu:
                own_dgate.copy_(torch.ops.aten.silu_backward(dactive, own_gate))
            else:
                own_dgate.copy_(torch.ops.aten.sigmoid_backward(dactive, active))
        return dx, dgate, dweight.to(weight.dtype), None if bias is None else dbias.to(bias.dtype), None, None


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _tiles(weight: Tensor, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Rows, which are like the weight, some at a time; on `meta` two tiles stand for all, which are alike."""
    size = max(1, TILE // max(1, weight.numel()))
    rows = [x.reshape(-1, *x.shape[x.dim() - weight.dim() :]) for x in tensors]
    for start in starts(len(rows[0]), size, weight.device):
        yield tuple(x[start : start + size] for x in rows)


def _active(gate: Tensor, silu: bool) -> Tensor:
    return F.silu(gate) if silu else torch.sigmoid(gate)


def _normed(x: Tensor, active: Tensor, kind: tuple[bool, bool, bool]) -> Tensor:
    """What is divided by its root mean square."""
    _, centred, gate_first = kind
    u = x * active if gate_first else x
    return u - u.mean(-1, keepdim=True) if centred else u
