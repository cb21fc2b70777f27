"""A norm and its gate in torch's operations, tile by tile: no result between two of them leaves a CPU's caches."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .tiles import in_cache


def gated_norm(
    x: Tensor, gate: Tensor, weight: Tensor, bias: Tensor | None, eps: float, kind: tuple[bool, bool, bool]
) -> Tensor:
    """y in x's type. kind: whether the gate is SiLU's, u is centred, and the gate comes first."""
    silu, _, gate_first = kind
    wide = _wide(x)

    def compute(x: Tensor, gate: Tensor) -> tuple[Tensor]:
        active = _active(gate.to(wide), silu)
        u = _centred(x.to(wide), active, kind)
        y = torch.mul(u, _scale(u, eps)).mul_(weight)
        if bias is not None:
            y.add_(bias)
        return ((y if gate_first else y.mul_(active)).to(x.dtype),)

    (y,) = in_cache(compute, _rows(weight, x, gate), 1)
    return y.view(x.shape)


def gated_norm_backward(
    dy: Tensor, x: Tensor, gate: Tensor, weight: Tensor, bias: Tensor | None, eps: float, kind: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """With n the normed and g = dn weight:  du = scale (g − n mean(g · n)),  dweight = Σ dn · n."""
    silu, centred, gate_first = kind
    wide = _wide(x)

    def compute(*given: Tensor) -> tuple[Tensor, ...]:
        dn, x, gate = (y.to(wide) for y in given)
        active = _active(gate, silu)
        u = _centred(x, active, kind)
        scale = _scale(u, eps)
        n = u * scale
        dactive = None
        if not gate_first:
            dactive = (n * weight if bias is None else torch.addcmul(bias.to(wide), n, weight.to(wide))).mul_(dn)
            dn = dn * active
        along = dn * n
        sums = [along.sum(0)] if bias is None else [along.sum(0), dn.sum(0)]
        along = along.mul_(weight).mean(-1, keepdim=True)
        du = torch.mul(dn, weight).addcmul_(n, along, value=-1.0).mul_(scale)
        if centred:
            du.sub_(du.mean(-1, keepdim=True))
        if dactive is None:
            dactive = du * x
            du.mul_(active)
        through = torch.ops.aten.silu_backward if silu else torch.ops.aten.sigmoid_backward
        dgate = through(dactive, gate if silu else active)
        return du.to(given[1].dtype), dgate.to(given[2].dtype), *sums

    dx, dgate, dweight, *dbias = in_cache(compute, _rows(weight, dy, x, gate), 2)
    of_bias = None if bias is None else dbias[0].to(bias.dtype)
    return dx.view(x.shape), dgate.view(gate.shape), dweight.to(weight.dtype), of_bias


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _rows(weight: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Rows, each of the weight's shape."""
    return tuple(x.reshape(-1, *weight.shape) for x in tensors)


def _active(gate: Tensor, silu: bool) -> Tensor:
    return F.silu(gate) if silu else torch.sigmoid(gate)


def _centred(x: Tensor, active: Tensor, kind: tuple[bool, bool, bool]) -> Tensor:
    """u: what is divided by its root mean square."""
    _, centred, gate_first = kind
    u = x * active if gate_first else x
    return u - u.mean(-1, keepdim=True) if centred else u


def _scale(u: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(u^2) + eps) of each row."""
    return u.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
