"""Grouping: rows sorted by what they are chosen for, and back; without atomic additions, so every run is the same."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..operation import Function


class Grouping(NamedTuple):
    """Which of R rows, each chosen for up to k of E groups, stand where once they are sorted by group.

    order: int64 `[M]`, the choice `row * k + which` that stands at each place; M is R·k, or without the choices of no
        group where the host knows how many these are.
    places: int64 `[R, k]`, the place of each choice; M or more for those of no group that have been left out.
    ends: int32 `[E]`, where each group ends; choices of no group come after the last.
    """

    order: Tensor
    places: Tensor
    ends: Tensor

    @classmethod
    def of(cls, groups: Tensor, count: int) -> Grouping:
        """Of the groups int64 `[R, k]` that each row is chosen for; −1 for none."""
        flat = groups.flatten()
        flat = torch.where(flat < 0, count, flat)
        order = flat.argsort(stable=True)
        places = torch.empty_like(order).scatter_(0, order, torch.arange(flat.shape[0], device=flat.device))
        sizes = flat.new_zeros(count + 1).scatter_add_(0, flat, torch.ones_like(flat))
        ends = sizes[:count].cumsum(0).int()
        made = cls(order, places.view(groups.shape), ends)
        if flat.device.type == "cpu" and not torch.compiler.is_compiling():
            return made.first(int(ends[-1]))
        return made

    def first(self, count: int) -> Grouping:
        """With the first `count` places alone: those of choices of a group, of which there are as many."""
        return self._replace(order=self.order[:count])

    @property
    def rows(self) -> Tensor:
        """int64 `[M]`: the row at each place."""
        return self.order // self.places.shape[1]


def spread(x: Tensor, grouping: Grouping) -> Tensor:
    """The rows `[R, D]` at their places, `[M, D]`; x gets its gradient.

    That of a place of no group must be 0, as `grouped_matmul` gives it.
    """
    return _Spread.call(x, grouping.order, grouping.places)


def collect(y: Tensor, weights: Tensor, grouping: Grouping) -> Tensor:
    """The sums of what stands at the places of each row, `[M, D]` to `[R, D]`; y and weights get their gradients.

        out_r = sum_c weights_rc y_(places_rc)

    weights `[R, k]`, float32 or float64, and so is out: what is added to other such sums is rounded after that. y must
    be 0 at places of no group.
    """
    return _Collect.call(y, weights, grouping.order, grouping.places)


class _Spread(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return x.index_select(0, order // places.shape[1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        (places,) = ctx.saved_tensors
        dtype = torch.promote_types(dout.dtype, torch.float32)
        return _at(dout, places).sum(1, dtype=dtype).to(dout.dtype), None, None


class _Collect(Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, weights: Tensor, order: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(y, weights, order, places)
        return (_at(y, places) * weights.unsqueeze(2)).sum(1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        y, weights, order, places = ctx.saved_tensors
        dy = dweights = None
        if ctx.needs_input_grad[0]:
            share = weights.flatten().index_select(0, order).unsqueeze(1)
            dy = (dout.index_select(0, order // places.shape[1]) * share).to(y.dtype)
        if ctx.needs_input_grad[1]:
            dweights = (_at(y, places).to(weights.dtype) * dout.unsqueeze(1)).sum(2)
        return dy, dweights, None, None


def _at(x: Tensor, places: Tensor) -> Tensor:
    """`[R, k, D]`: what stands at the places of each row; 0 at those left out."""
    rows, choices = places.shape
    if x.shape[0] == places.numel():
        return x.index_select(0, places.flatten()).view(rows, choices, x.shape[1])
    if not x.shape[0]:
        return x.new_zeros(rows, choices, x.shape[1])
    there = x.index_select(0, places.flatten().clamp(max=x.shape[0] - 1)).view(rows, choices, x.shape[1])
    return there.masked_fill_((places >= x.shape[0]).unsqueeze(2), 0.0)
