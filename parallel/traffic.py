"""Traffic: what one rank sends for a call of an op, from its strategy run without data and without kernels.

The strategy is the one that training runs; kernels in it give empty results of their shapes, so that a row of millions
of tokens takes no longer than a short one.
"""

from __future__ import annotations

from dataclasses import fields, replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.attend import Attend, Gradient, ListedAttend
from ..kernels.masks import Mask
from ..kernels.operation import Tensors
from ..kernels.problem import Problem, accumulator
from ..kernels.recurrence import Beginning, Recurrence, Summary
from .alone import Sending
from .operation import Exchange, Operation
from .sequence import Sequence


class Traffic(NamedTuple):
    """What a call sends in forward and in backward, in order; `listed`: it depends on values, and this is the most."""

    forward: tuple[Sending, ...]
    backward: tuple[Sending, ...]
    listed: bool = False


@torch.no_grad()
def traffic(op: Operation | Exchange, inputs: Tensors, seq: Sequence, noted: list[Sending]) -> Traffic:
    """Of the op on inputs of `seq`'s rank, on `meta`; `seq` and `noted` are made by `alone`.

    An op over listed blocks is counted as if every rank listed all that its queries can see.
    """
    if isinstance(op, Operation) and (seq.layout.ranks == 1 or not op.sends):
        return Traffic((), ())
    if isinstance(inner := getattr(op, "op", None), ListedAttend):
        return _of_lists(inner, inputs, seq)
    quick = without_kernels(op, seq.rank)
    noted.clear()
    outputs, saved = quick.forward(inputs, seq)
    forward = tuple(noted)
    noted.clear()
    results = tuple(x for x in outputs if x is not None)
    quick.backward(tuple(torch.empty_like(x) for x in results), inputs, results, saved, seq)
    backward = tuple(noted)
    noted.clear()
    return Traffic(forward, backward)


def without_kernels(op: Any, rank: int) -> Any:
    """The operation with empty results in place of those of its kernels, on the rank of a row."""
    changes: dict[str, Any] = {}
    for each in fields(op):
        value = getattr(op, each.name)
        if isinstance(value, Operation):
            changes[each.name] = without_kernels(value, rank // getattr(op, "ranks", 1))
        elif isinstance(value, Attend):
            changes[each.name] = _as(value, _quick_attend(type(value)))
        elif isinstance(value, Recurrence):
            changes[each.name] = _as(value, _quick_recurrence(type(value)))
        elif each.name == "rank":
            changes["rank"] = rank
    return replace(op, **changes)


def _of_lists(op: ListedAttend, inputs: Tensors, seq: Sequence) -> Traffic:
    """At most: every rank lists all blocks that its queries see. The numbers are those of docs/communication.md."""
    ranks, named = seq.layout.ranks, op.record(*inputs)
    members = tuple(range(ranks))
    travels = op.sent(named)
    reached = Mask().reached(seq.layout.parts(seq.documents), ranks)
    to = [peer for peer in range(ranks) if peer != seq.rank and reached[peer][seq.rank]]
    back = [peer for peer in range(ranks) if peer != seq.rank and reached[seq.rank][peer]]
    keys = sum(x.nbytes for x in travels)
    exact = sum(x.numel() * accumulator(x).itemsize for x in travels)
    blocks = seq.documents.batch * op.layout(seq.documents).count + 1
    told = Sending("gather", (ranks - 1) * blocks, members)
    sends = [Sending("exchange", keys, members, peer) for peer in to]
    home = [] if op.constant else [Sending("exchange", exact, members, peer) for peer in back]
    return Traffic((told, *sends), (*sends, *home), True)


def _as(value: Any, kind: type) -> Any:
    """A copy of an op that is of another class."""
    made = object.__new__(kind)
    made.__dict__.update(value.__dict__)
    return made


@cache
def _quick_attend(kind: type) -> type:
    """The class without its kernels."""
    return type(kind.__name__, (_QuickAttend, kind), {"__module__": kind.__module__})


@cache
def _quick_recurrence(kind: type) -> type:
    return type(kind.__name__, (_QuickRecurrence, kind), {"__module__": kind.__module__})


class _QuickAttend:
    def attend(self: Any, inputs: Any, received: tuple[Tensor, ...], tile: Any, backend: str) -> tuple[Tensor, Tensor]:
        return self.zeros(inputs)

    def attend_backward(
        self: Any, gradient: Gradient, inputs: Any, received: tuple[Tensor, ...], tile: Any, backend: str
    ) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        others = [(name, x) for name, x in inputs._asdict().items() if name not in self.travels and x is not None]
        exact = gradient.exact
        stay = {name: torch.empty_like(x, dtype=exact) for name, x in others if x.is_floating_point()}
        return stay, tuple(torch.empty_like(x, dtype=exact) for x in received)


class _QuickRecurrence:
    def begin(self: Any, problem: Problem[Any]) -> Beginning:
        out, state, transition, reads = self.empty_results(problem.inputs)
        return Beginning(out, Summary(transition, state), reads)

    def run(self: Any, problem: Problem[Any], initial_state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        out, _, _, reads = self.empty_results(problem.inputs)
        return out, reads

    def correct(self: Any, problem: Problem[Any], out: Tensor, state: Tensor, reads: Tensor | None) -> Tensor:
        return out

    def summarize_backward(self: Any, problem: Problem[Any], *rest: Any) -> Tensor:
        return self.empty_results(problem.inputs)[1]

    def backward(self: Any, problem: Problem[Any], *rest: Any) -> tuple[Tensors, Tensor]:
        dinputs = tuple(None if x is None else torch.empty_like(x) for x in problem.inputs)
        return dinputs, self.empty_results(problem.inputs)[1]

    def implementation(self: Any, backend: str) -> Any:
        return _Empty


class _Empty:
    """What serial recurrences call of an implementation."""

    @staticmethod
    def forward(problem: Problem[Any], initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
        out, state, *_ = problem.op.empty_results(problem.inputs)
        return out, state
