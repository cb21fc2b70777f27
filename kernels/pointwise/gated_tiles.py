"""A norm and its gate in torch's operations, tile by tile: no result between two of them leaves a CPU's caches."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from ..dispatch import starts

TILE = 1 << 16  # numbers of a tile, of which a CPU's cache holds several


def gated_norm(
    x: Tensor, gate: Tensor, weight: Tensor, bias: Tensor | None, eps: float, kind: tuple[bool, bool, bool]
) -> Tensor:
    """y in x's type. kind: whether the gate is SiLU's, u is centred, and the gate comes first."""
    silu, _, gate_first = kind
    out, wide = torch.empty(x.shape, dtype=x.dtype, device=x.device), _wide(x)
    for part, own_x, own_gate in _tiles(weight, out, x, gate):
        active = _active(own_gate.to(wide), silu)
        u = _centred(own_x.to(wide), active, kind)
        y = torch.mul(u, _scale(u, eps)).mul_(weight)
        if bias is not None:
            y.add_(bias)
        part.copy_(y if gate_first else y.mul_(active))
    return out


def gated_norm_backward(
    dy: Tensor, x: Tensor, gate: Tensor, weight: Tensor, bias: Tensor | None, eps: float, kind: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """With n the normed and g = dn weight:  du = scale (g − n mean(g · n)),  dweight = Σ dn · n."""
    silu, centred, gate_first = kind
    dx, dgate = (torch.empty(y.shape, dtype=y.dtype, device=y.device) for y in (x, gate))
    wide = _wide(x)
    dweight, dbias = torch.zeros_like(weight, dtype=wide), torch.zeros_like(weight, dtype=wide)
    for own_dx, own_dgate, *given in _tiles(weight, dx, dgate, dy, x, gate):
        dn, own_x, own_gate = (y.to(wide) for y in given)
        active = _active(own_gate, silu)
        u = _centred(own_x, active, kind)
        scale = _scale(u, eps)
        n = u * scale
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
    return dx, dgate, dweight.to(weight.dtype), None if bias is None else dbias.to(bias.dtype)


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


def _centred(x: Tensor, active: Tensor, kind: tuple[bool, bool, bool]) -> Tensor:
    """u: what is divided by its root mean square."""
    _, centred, gate_first = kind
    u = x * active if gate_first else x
    return u - u.mean(-1, keepdim=True) if centred else u


def _scale(u: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(u^2) + eps) of each row."""
    return u.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
