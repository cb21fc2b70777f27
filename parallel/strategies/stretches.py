"""Stretches: the segments between two neighbouring spans of a rank, reduced to few summaries, all of them at once.

Each level of a tree combines neighbours as one batch. So the number of launches grows with the logarithm of the number
of segments, and of the states only those that enter the rank's own spans are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ...kernels.recurrence import Summary
from ..layout import Layout

LEVEL = 6  # launches of a level: one that combines fewer pairs is not worth it, its segments are gone over one by one


class Stretches(NamedTuple):
    """How the segments before each span of a rank are reduced; a stretch ends just before a span.

    needed: of the gathered segments, rank after rank, those that some stretch has, in the order of the row.
    orders: for each level of the tree, which of the summaries of the level before become the first of each pair, the
        second of each pair, and those without a partner.
    pairs: how many pairs each level has.
    places: of the last level, the summaries of each stretch in the order of the row.
    """

    needed: list[int]
    orders: list[list[int]]
    pairs: list[int]
    places: list[list[int]]


@lru_cache(maxsize=64)
def stretches(layout: Layout, rank: int, *, mirrored: bool = False) -> Stretches:
    """Those of a rank. Mirrored, for gradients: those after each span, the last span first, from right to left."""
    count = layout.ranks * layout.spans
    held = [span for other in range(layout.ranks) for span in layout.spans_of(other)]
    spans = layout.spans_of(rank)
    if mirrored:
        held, spans = [count - 1 - span for span in held], tuple(count - 1 - span for span in reversed(spans))
    place = {span: number for number, span in enumerate(held)}
    members = [list(range(start, stop)) for start, stop in pairwise((0, *spans))]
    orders, pairs = [], []
    while (number := sum(len(stretch) // 2 for stretch in members)) > LEVEL:
        first, second, alone, following = [], [], [], []
        for stretch in members:
            half = len(stretch) // 2
            now = list(range(len(first), len(first) + half))
            first += stretch[0 : 2 * half : 2]
            second += stretch[1 : 2 * half : 2]
            if len(stretch) % 2:
                now.append(number + len(alone))
                alone.append(stretch[-1])
            following.append(now)
        orders.append([*first, *second, *alone])
        pairs.append(number)
        members = following
    needed = [place[span] for span in range(max(spans))]
    return Stretches(needed, orders, pairs, members)


def scan(
    summaries: Summary,
    plan: Stretches,
    orders: Iterable[Tensor],
    combine: Callable[[Summary, Summary], Summary],
    advance: Callable[[Summary, Tensor], Tensor],
    state: Tensor,
) -> list[Tensor]:
    """The states `[B, …]` that enter the rank's spans, from `state` before the first segment.

    summaries: of the segments `plan.needed`, `[segments, B, …]`.    orders: `plan.orders` as tensors on their device.
    combine(later, earlier), advance(summary, state): the op's, with batches as dimension 0.
    """
    for order, pairs in zip(orders, plan.pairs, strict=True):
        sizes = [pairs, pairs, order.numel() - 2 * pairs]
        parts = [part.index_select(0, order).split(sizes) for part in summaries]
        earlier, later = (Summary(*(part[at].flatten(0, 1) for part in parts)) for at in (0, 1))
        both = [part.unflatten(0, (pairs, -1)) for part in combine(later, earlier)]
        if sizes[2]:
            both = [torch.cat([part, alone]) for part, (_, _, alone) in zip(both, parts, strict=True)]
        summaries = Summary(*both)
    states = []
    for stretch in plan.places:
        for place in stretch:
            state = advance(Summary(*(part[place] for part in summaries)), state)
        states.append(state)
    return states
