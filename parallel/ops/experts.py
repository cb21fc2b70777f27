"""Mixtures of experts on ranks that share out the experts: tokens go to the ranks that hold theirs, and come back.

A token goes to each such rank once, however many of its experts are there. The rank weighs and adds up what its experts
make of the token, and sends one row back. Which tokens go where is computed on the device; the host reads only how
many, while the device goes on with what follows, such as shared experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ...kernels.grouped_matmul import Grouping, collect, spread
from ...kernels.operation import Function, Tensors
from ..collectives import all_to_all, all_to_all_rows
from ..mesh import Experts
from ..operation import Exchange, present, tell
from ..reading import Reading
from ..sequence import Sequence

Run = Callable[[Tensor, Tensor, Tensor, int, str, int | None], Tensor]
Travel = Callable[[Tensor, Tensor, Run], Tensor]
Choices = Callable[[int], Tensor]
TRIED = 4096  # tokens by whose choices a rehearsal tells how many go to each rank


def to_experts(chosen: Tensor, count: int, *, seq: Sequence, even: Choices) -> Travel:
    """Begins to bring tokens to the `count` experts chosen for them, int64 `[N, k]`, −1 for none.

    Returns a function of x `[N, D]`, weights `[N, k]` and `run(x, chosen, weights, count, backend, choices)`, which
    gives the weighted sum of the outputs of the experts that this rank holds, numbered from 0; `choices`: how many of
    `chosen` are such experts, where ranks share them. The function returns the sum over all ranks, `[N, D]`. All inputs
    get their gradients. Every rank that shares the experts calls both, in one order.

    even: what so many tokens choose where experts have even loads, int64 `[n, k]` on the host. Without data, on `meta`,
    equal numbers of tokens travel between any two ranks, as many as of these on the average.
    """
    if seq.experts is None:
        return lambda x, weights, run: run(x, chosen, weights, count, seq.backend, None)
    plan = _Plan.of(chosen, count, seq, seq.experts, even)
    return lambda x, weights, run: plan.bring(x, weights, run)


class _Plan(NamedTuple):
    """How the tokens of this rank travel: which ones, on the device, and how many, on their way to the host.

    counts: `[3 * ranks]`, by rank: tokens that go there, tokens that come from there, and how many of these tokens'
        choices are experts of this rank. On `meta` those of an even load.
    """

    chosen: Tensor
    count: int
    seq: Sequence
    ranks: Experts
    grouping: Grouping
    counts: Reading

    @classmethod
    def of(cls, chosen: Tensor, count: int, seq: Sequence, ranks: Experts, even: Choices) -> _Plan:
        choices, goes = _holders(chosen, count, ranks.ranks)
        number = torch.arange(ranks.ranks, device=chosen.device)
        grouping = Grouping.of(torch.where(goes, number, -1), ranks.ranks)
        sends = grouping.ends.long().diff(prepend=grouping.ends.new_zeros(1, dtype=torch.int64))
        told = torch.stack([sends, choices], dim=1)
        if chosen.device.type == "meta":
            tell("forward", Counts(), (told,), seq)
            counts = _of_even_loads(chosen, even(min(TRIED, chosen.shape[0])), count, ranks.ranks)
        else:
            counts = torch.cat([sends, all_to_all(told, ranks.group).T.flatten()])
        return cls(chosen, count, seq, ranks, grouping, Reading(counts))

    def bring(self, x: Tensor, weights: Tensor, run: Run) -> Tensor:
        ranks, number = self.ranks, self.ranks.ranks
        numbers = self.counts.wait().tolist()
        sends, receives, choices = (numbers[n * number : (n + 1) * number] for n in range(3))
        grouping = self.grouping.first(sum(sends))
        rows, held = grouping.rows, ranks.held(self.count)
        there, back = Rows(tuple(sends), tuple(receives)), Rows(tuple(receives), tuple(sends))
        chosen = there.moved("forward", self.chosen.index_select(0, rows), self.seq)
        chosen = torch.where((chosen >= held.start) & (chosen < held.stop), chosen - held.start, -1)
        received = _Travel.call(spread(x, grouping), there, self.seq)
        shares = _Travel.call(spread(weights, grouping), there, self.seq)
        out = run(received, chosen, shares, len(held), self.seq.backend, sum(choices))
        ones = weights.new_ones(grouping.places.shape)
        return collect(_Travel.call(out, back, self.seq), ones, grouping)


def _holders(chosen: Tensor, count: int, ranks: int) -> tuple[Tensor, Tensor]:
    """`[ranks]`: how many choices are experts of each rank; `[N, ranks]`: whether a token has a choice there."""
    holders = torch.where(chosen < 0, -1, chosen // (count // ranks))
    there = holders.unsqueeze(2) == torch.arange(ranks, device=chosen.device)
    return there.sum((0, 1)), there.any(1)


def _of_even_loads(chosen: Tensor, tried: Tensor, count: int, ranks: int) -> Tensor:
    """The counts of a plan, on the host, for tokens that choose as those that were `tried` do on the average."""
    tokens, each = chosen.shape
    _, goes = _holders(tried, count, ranks)
    rows = round(tokens * int(goes.sum()) / (len(tried) * ranks))
    held = [tokens * each * (n + 1) // ranks - tokens * each * n // ranks for n in range(ranks)]
    return torch.tensor([rows] * 2 * ranks + held, device="cpu")


@dataclass(frozen=True)
class Counts(Exchange):
    """How many rows come, and how many choices of experts."""

    where: ClassVar[str] = "experts"
    what: ClassVar[str] = "how many tokens"

    def forward(self, inputs: Tensors, seq: Sequence) -> tuple[Tensors, Tensors]:
        (x,) = present(*inputs)
        assert seq.experts is not None
        return (all_to_all(x, seq.experts.group),), ()


@dataclass(frozen=True)
class Rows(Exchange):
    """Rows to other ranks, `gives[r]` of them to rank r, and `gets[r]` from it; their gradients come back."""

    where: ClassVar[str] = "experts"
    what: ClassVar[str] = "tokens there and back"
    gives: tuple[int, ...]
    gets: tuple[int, ...]

    def forward(self, inputs: Tensors, seq: Sequence) -> tuple[Tensors, Tensors]:
        (x,) = present(*inputs)
        return (self._move(x, seq),), ()

    def backward(
        self, gradients: Tensors, inputs: Tensors, outputs: tuple[Tensor, ...], saved: Tensors, seq: Sequence
    ) -> Tensors:
        (dout,) = present(*gradients)
        return (Rows(self.gets, self.gives)._move(dout, seq),)

    def moved(self, phase: str, x: Tensor, seq: Sequence) -> Tensor:
        """What `forward` gives of x, or `backward` of its gradient."""
        back = phase == "backward"
        if x.device.type == "meta":
            of = x.new_empty(sum(self.gives), *x.shape[1:]) if back else x
            tell(phase, self, (of,), seq)
        return (Rows(self.gets, self.gives) if back else self)._move(x, seq)

    def _move(self, x: Tensor, seq: Sequence) -> Tensor:
        assert seq.experts is not None
        return all_to_all_rows(x, list(self.gives), list(self.gets), seq.experts.group)


class _Travel(Function):
    """Rows to other ranks; their gradients come back. Nothing is kept for that."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Rows, seq: Sequence) -> Tensor:
        ctx.plan = rows, seq
        return rows.moved("forward", x, seq)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        rows, seq = ctx.plan
        return rows.moved("backward", dout, seq), None, None
