"""Epochs: documents in one order after another, end to end on an axis of tokens without end."""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

import numpy as np

TABLES_KEPT = 4  # a row lies in one epoch or, at a seam, in two; small corpora have several in a row


class Piece(NamedTuple):
    """Tokens `first` .. `first + tokens` of a document."""

    document: int
    first: int
    tokens: int


class Table(NamedTuple):
    """The documents of an epoch in order, int64, and where each ends on the epoch's own axis of tokens."""

    order: np.ndarray
    ends: np.ndarray


class Epochs:
    """Epoch e is all `members` in an order that depends on (seed, e) alone; without a seed, in their own.

    Token t of the axis is token t − e·E of epoch e = t // E, of E = `tokens`.
    """

    def __init__(self, lengths: np.ndarray, members: np.ndarray, seed: int | None) -> None:
        self.lengths, self.members, self.seed = lengths, members, seed
        self.tokens = int(lengths[members].sum())  # once over
        self._tables: OrderedDict[int, Table] = OrderedDict()

    def table(self, epoch: int) -> Table:
        if epoch not in self._tables:
            order = self.members
            if self.seed is not None:
                # A sort by raw Philox counters: numpy promises that these stay the same, not that its shuffles do.
                order = order[np.argsort(self.draws(epoch, 0, len(order)), kind="stable")]
            self._tables[epoch] = Table(order, np.cumsum(self.lengths[order]))
            if len(self._tables) > TABLES_KEPT:
                self._tables.popitem(last=False)
        self._tables.move_to_end(epoch)
        return self._tables[epoch]

    def draws(self, epoch: int, use: int, count: int) -> np.ndarray:
        """uint64 `[count]` that depend on (seed, epoch, use) alone."""
        generator = np.random.Philox(
            key=np.array([self.seed or 0, epoch], np.uint64), counter=np.array([0, 0, 0, use], np.uint64)
        )
        return generator.random_raw(count)

    def pieces(self, start: int, count: int) -> list[Piece]:
        """What tokens start .. start + count of the axis are, in order."""
        made, stop = [], start + count
        while start < stop:
            epoch, offset = divmod(start, self.tokens)
            order, ends = self.table(epoch)
            place = int(np.searchsorted(ends, offset, side="right"))
            while start < stop and place < len(order):
                n = min(int(ends[place]) - offset, stop - start)
                document = int(order[place])
                made.append(Piece(document, int(self.lengths[document] - (ends[place] - offset)), n))
                start, offset, place = start + n, offset + n, place + 1
        return made
