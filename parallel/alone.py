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
from .mesh import Heads
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

    def __init__(self, members: Iterable[int], rank: int, noted: list[Sending]) -> None:
        self.members = tuple(members)
        self.rank, self.size, self.noted = self.members.index(rank), len(self.members), noted
        self._before = Counter[str](sent())

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
        now = Counter[str](sent())
        self.noted.append(Sending(kind, now[kind] - self._before[kind], self.members))
        self._before = now


def alone(
    documents: Documents, layout: Layout, rank: int, strategy: Strategy, ulysses: int = 1, *, backend: str = "chunked"
) -> tuple[Sequence, list[Sending]]:
    """The sequence of one rank, and the list that what it sends is noted in.

    `ulysses` of the ranks exchange tokens for heads. With a backend, ops on `meta` run their own code there.
    """
    noted: list[Sending] = []
    if layout.ranks == 1:
        return Sequence(documents, layout, strategy=strategy, backend=backend), noted
    heads = None
    if ulysses > 1:
        first = rank // ulysses * ulysses
        neighbours = AloneGroup(range(first, first + ulysses), rank, noted)
        ring = None
        if ulysses < layout.ranks:
            ring = AloneGroup(range(rank % ulysses, layout.ranks, ulysses), rank, noted)
        heads = Heads(ulysses, neighbours, ring)
    group = AloneGroup(range(layout.ranks), rank, noted)
    return Sequence(documents, layout, rank, group, strategy=strategy, heads=heads, backend=backend), noted
