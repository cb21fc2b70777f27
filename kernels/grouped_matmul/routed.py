"""Routed SwiGLUs in one pass over the sorted rows, where the host knows the groups: on a CPU.

Rows are gathered, run and added up a slab at a time, which stays in a core's caches. What is kept for backward is
W_gate x and W_up x of each row: neither gathered rows nor what follows from the products, which a slab computes again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..operation import Function
from .chunked import groups_of
from .grouping import Grouping

ROWS = 512  # of a slab, about


def routed_swiglu(x: Tensor, weights: Tensor, grouping: Grouping, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The weighted sum of what each row's SwiGLUs make of it.

        out_r = sum_c weights_rc W_down (silu(W_gate x_r) * W_up x_r)        matrices of the group of choice c of row r

    x `[R, D]`; weights `[R, k]`, float32 or float64, and so is out `[R, N]`; gate, up `[E, H, D]` and down `[E, N, H]`
    like x; grouping of the R rows in E groups. Choices of no group add nothing. All tensors get their gradients.
    """
    return _RoutedSwiGLU.call(x, weights, gate, up, down, grouping.order, grouping.ends)


class _Piece(NamedTuple):
    """Some of a slab's rows, all of one group; `begins`: the first of the group's."""

    group: int
    rows: slice
    begins: bool


class _Slab(NamedTuple):
    """Consecutive places of sorted rows, and the pieces of groups that they are."""

    places: slice
    pieces: list[_Piece]


class _RoutedSwiGLU(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Tensor, gate: Tensor, up: Tensor, down: Tensor, order: Tensor, ends: Tensor
    ) -> Tensor:
        rows, share = _rows(order, weights)
        gates, ups = (x.new_empty(len(order), gate.shape[1]) for _ in range(2))
        out = weights.new_zeros(x.shape[0], down.shape[1])
        for slab in _slabs(ends, len(order), x.dtype):
            here = slab.places
            xs, g, u = x.index_select(0, rows[here]), gates[here], ups[here]
            _multiply(slab, xs, gate, g, transposed=True)
            _multiply(slab, xs, up, u, transposed=True)
            y = x.new_empty(len(xs), down.shape[1])
            _multiply(slab, F.silu(g).mul_(u), down, y, transposed=True)
            out.index_add_(0, rows[here], y.to(out.dtype).mul_(share[here]))
        ctx.save_for_backward(x, weights, gate, up, down, order, ends, gates, ups)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        """With s = silu(W_gate x), h = s W_up x and w the weight:  dh = w W_down^T dout,  dw = h . W_down^T dout,
        dW_down = w dout h^T,  dW_up x = dh s,  dW_gate x = silu'(dh W_up x)."""
        x, weights, gate, up, down, order, ends, gates, ups = ctx.saved_tensors
        of_x, of_weights, *of_matrices = ctx.needs_input_grad[:5]
        dgate, dup, ddown = (
            torch.empty_like(w) if need else None for w, need in zip((gate, up, down), of_matrices, strict=True)
        )
        rows, share = _rows(order, weights)
        dx = torch.zeros_like(x, dtype=weights.dtype) if of_x else None
        dshare = torch.zeros_like(weights).flatten()
        for slab in _slabs(ends, len(order), x.dtype):
            here = slab.places
            g, u, w = gates[here], ups[here], share[here].to(x.dtype)
            dy = dout.index_select(0, rows[here]).to(x.dtype)
            dh = _multiply(slab, dy, down, torch.empty_like(g))
            active = F.silu(g)
            h = active * u
            if of_weights:
                dshare[order[here]] = torch.linalg.vecdot(h.to(weights.dtype), dh.to(weights.dtype))
            if ddown is not None:
                _sum_products(slab, dy, h.mul_(w), ddown)
            du = active.mul_(dh.mul_(w))
            dg = torch.ops.aten.silu_backward(dh.mul_(u), g)
            xs = x.index_select(0, rows[here])
            if dgate is not None:
                _sum_products(slab, dg, xs, dgate)
            if dup is not None:
                _sum_products(slab, du, xs, dup)
            if dx is not None:
                _multiply(slab, dg, gate, xs)
                _multiply(slab, du, up, xs, add=True)
                dx.index_add_(0, rows[here], xs.to(dx.dtype))
        dweights = dshare.view_as(weights) if of_weights else None
        return None if dx is None else dx.to(x.dtype), dweights, dgate, dup, ddown, None, None


def _rows(order: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Of each place the row, int64 `[M]`, and its weight `[M, 1]`."""
    return order // weights.shape[1], weights.flatten().index_select(0, order).unsqueeze(1)


def _slabs(ends: Tensor, places: int, dtype: torch.dtype) -> Iterator[_Slab]:
    """All places but those of no group: several whole groups at a time, or parts of one.

    In types narrower than float32 groups stay whole, as sums over parts would be rounded in between. Each group has a
    piece, if of no rows.
    """
    first, pieces = 0, list[_Piece]()
    for group, start, end in groups_of(ends, places):
        if pieces and end - first > ROWS:
            yield _Slab(slice(first, start), pieces)
            first, pieces = start, []
        parts = max(1, round((end - start) / ROWS)) if dtype.itemsize >= 4 else 1
        for part in range(1, parts + 1):
            stop = start + (end - start) * part // parts
            done = pieces[-1].rows.stop if pieces else 0
            pieces.append(_Piece(group, slice(done, stop - first), part == 1))
            if part < parts:
                yield _Slab(slice(first, stop), pieces)
                first, pieces = stop, []
    if pieces:
        yield _Slab(slice(first, first + pieces[-1].rows.stop), pieces)


def _multiply(
    slab: _Slab, x: Tensor, weight: Tensor, out: Tensor, *, transposed: bool = False, add: bool = False
) -> Tensor:
    """Writes, or adds, to `out` the products of a slab's rows with the matrices of their groups."""
    for group, rows, _ in slab.pieces:
        matrix = weight[group].T if transposed else weight[group]
        if add:
            out[rows].addmm_(x[rows], matrix)
        else:
            torch.mm(x[rows], matrix, out=out[rows])
    return out


def _sum_products(slab: _Slab, dy: Tensor, x: Tensor, out: Tensor) -> None:
    """out_e = sum of dy_m x_m^T over the rows of group e up to the slab's end."""
    for group, rows, begins in slab.pieces:
        if begins:
            torch.mm(dy[rows].T, x[rows], out=out[group])
        else:
            out[group].addmm_(dy[rows].T, x[rows])
