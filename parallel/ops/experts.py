"""Mixtures of experts on ranks that share out the experts: tokens go to the ranks that hold theirs, and come back.

A token goes to each such rank once, however many of its experts are there. The rank weighs and adds up what its experts
make of the token, and sends one row back. Which tokens go where is computed on the device; the host reads only how
many, while the device goes on with what follows, such as shared experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...kernels.grouped_matmul import Grouping, collect, spread
from ...kernels.operation import Function
from ..collectives import all_to_all, all_to_all_rows
from ..mesh import Experts, Group
from ..reading import Reading
from ..sequence import Sequence

Run = Callable[[Tensor, Tensor, Tensor, int, str], Tensor]
Travel = Callable[[Tensor, Tensor, Run], Tensor]


def to_experts(chosen: Tensor, count: int, *, seq: Sequence) -> Travel:
    """Begins to bring tokens to the `count` experts chosen for them, int64 `[N, k]`, −1 for none.

    Returns a function of x `[N, D]`, weights `[N, k]` and `run(x, chosen, weights, count, backend)`, which gives the
    weighted sum of the outputs of the experts that this rank holds, numbered from 0. The function returns the sum over
    all ranks, `[N, D]`. All inputs get their gradients. Every rank that shares the experts calls both, in one order.
    """
    ranks = seq.experts
    if ranks is None:
        return lambda x, weights, run: run(x, chosen, weights, count, seq.backend)
    plan = _Plan.of(chosen, count, ranks)
    return lambda x, weights, run: plan.bring(x, weights, run, seq.backend)


class _Plan(NamedTuple):
    """How the tokens of this rank travel: which ones, on the device, and how many, on their way to the host."""

    chosen: Tensor
    count: int
    ranks: Experts
    grouping: Grouping
    counts: Reading

    @classmethod
    def of(cls, chosen: Tensor, count: int, ranks: Experts) -> _Plan:
        number = torch.arange(ranks.ranks, device=chosen.device)
        holders = torch.where(chosen < 0, -1, chosen // (count // ranks.ranks))
        goes = (holders.unsqueeze(2) == number).any(1)  # [N, ranks]
        grouping = Grouping.of(torch.where(goes, number, -1), ranks.ranks)
        sends = grouping.ends.long().diff(prepend=grouping.ends.new_zeros(1, dtype=torch.int64))
        receives = all_to_all(sends.unsqueeze(1), ranks.group).squeeze(1)
        return cls(chosen, count, ranks, grouping, Reading(torch.cat([sends, receives])))

    def bring(self, x: Tensor, weights: Tensor, run: Run, backend: str) -> Tensor:
        ranks, group = self.ranks, self.ranks.group
        numbers = self.counts.wait().tolist()
        sends, receives = numbers[: ranks.ranks], numbers[ranks.ranks : 2 * ranks.ranks]
        grouping = self.grouping.first(sum(sends))
        rows, held = grouping.rows, ranks.held(self.count)
        there, back = (sends, receives, group), (receives, sends, group)
        chosen = all_to_all_rows(self.chosen.index_select(0, rows), *there)
        chosen = torch.where((chosen >= held.start) & (chosen < held.stop), chosen - held.start, -1)
        received = _Travel.call(spread(x, grouping), *there)
        out = run(received, chosen, _Travel.call(spread(weights, grouping), *there), len(held), backend)
        ones = weights.new_ones(grouping.places.shape)
        return collect(_Travel.call(out, *back), ones, grouping)


class _Travel(Function):
    """Rows to other ranks; their gradients come back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sends: list[int], receives: list[int], group: Group) -> Tensor:
        ctx.plan = sends, receives, group
        return all_to_all_rows(x, sends, receives, group)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        sends, receives, group = ctx.plan
        return all_to_all_rows(dout, receives, sends, group), None, None, None
