"""Alone: one rank of a row without the others, for tensors without data: it notes what it would send, and gets nothing.

What runs is the code of the strategies, so that bytes and peers are theirs. Bytes are those that the collectives count.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor

from ..kernels.documents import Documents
from .collectives import sent
from .layout import Layout
from .mesh import Experts, Heads
from .sequence import Sequence
from .strategy import Strategy
from .threads import Message, ThreadGroup


class Sending(NamedTuple):
    """One call of a collective: bytes that this rank sends, as rings send them, and among which ranks of the row.

    peer: of an exchange, the rank that gets it; None for a collective of all `members`.
    """

    kind: str
    bytes: int
    members: tuple[int, ...]
    peer: int | None = None


class AloneGroup(ThreadGroup):
    """A group of which this rank alone runs. Nothing is received: tensors on `meta` have no values anyway."""

    def __init__(self, members: Iterable[int], rank: int, noted: list[Sending], before: Counter[str]) -> None:
        self.members = tuple(members)
        self.rank, self.size, self.noted = self.members.index(rank), len(self.members), noted
        self._before = before  # what was counted by now, of all groups that share `noted`

    def all_gather(self, out: Tensor, x: Tensor) -> None:
        self._note("gather")

    def all_to_all(self, out: Tensor, x: Tensor) -> None:
        self._note("all to all")

    def all_to_all_rows(self, out: Tensor, x: Tensor, sends: list[int]) -> None:
        self._note("all to all")

    def all_reduce(self, x: Tensor) -> None:
        self._note("sum")

    def all_gather_object(self, value: Any) -> list[Any]:
        return [value] * self.size

    def exchange(self, sends: list[tuple[Tensor, int]], receives: list[tuple[Tensor, int]]) -> list[Message]:
        self.noted += [Sending("exchange", x.nbytes, self.members, self.members[peer]) for x, peer in sends]
        return []

    def _note(self, kind: str) -> None:
        """What the collectives have counted since the last call."""
        now = sent()[kind]
        self.noted.append(Sending(kind, now - self._before[kind], self.members))
        self._before[kind] = now


def alone(
    documents: Documents,
    layout: Layout,
    rank: int,
    strategy: Strategy,
    ulysses: int = 1,
    experts: int = 1,
    *,
    backend: str = "chunked",
) -> tuple[Sequence, list[Sending]]:
    """The sequence of one rank, and the list that what it sends is noted in.

    `ulysses` of the ranks exchange tokens for heads. `experts` ranks share out the experts; the row's first rank is the
    first of all. With a backend, ops on `meta` run their own code there.
    """
    noted, before = list[Sending](), Counter[str](sent())

    def group(members: range) -> AloneGroup:
        return AloneGroup(members, rank, noted, before)

    row, heads = None, None
    if layout.ranks > 1:
        row = group(range(layout.ranks))
    if row is not None and ulysses > 1:
        first = rank // ulysses * ulysses
        ring = group(range(rank % ulysses, layout.ranks, ulysses)) if ulysses < layout.ranks else None
        heads = Heads(ulysses, group(range(first, first + ulysses)), ring)
    shared = None
    if experts > 1:
        first = rank // experts * experts
        shared = Experts(experts, rank % experts, group(range(first, first + experts)))
    place = 0 if row is None else rank
    seq = Sequence(documents, layout, place, row, strategy=strategy, heads=heads, backend=backend, experts=shared)
    return seq, noted
