"""concat: the unread tokens cut after every so many, wherever that is in a document."""

from __future__ import annotations

import hashlib
import math
import struct

import numpy as np

from .epochs import Epochs
from .plan import Plan
from .unread import Unread

ROUNDS = 8  # of the network that permutes rows; four are the least that look random


class Concat(Plan):
    """Rows cut from the unread tokens one after another.

    The rows that lie wholly in an epoch, and on one side of the mark, come in an order of their own, by (seed, epoch):
    neighbours share a document, and a long one would fill step after step. A row with tokens of two epochs stays
    between them, and a padded one at the end. Any row costs one look-up in its epoch's table of documents.
    """

    def __init__(self, epochs: Epochs, unread: Unread, length: int, mark: int | None = None) -> None:
        super().__init__(unread, length, mark)
        self.epochs = epochs

    @property
    def once(self) -> int:
        return -(-self.epochs.tokens // self.length)

    def intervals(self, number: int) -> list[tuple[int, int]]:
        start = self._cut(number) * self.length
        if self.epochs.seed is not None:
            return self.unread.intervals(start, self.length)
        stop = min(start + self.length, self.epochs.tokens)
        return [(start, stop - start)] if stop > start else []

    def read(self, rows: int) -> int:
        return rows * self.length

    def after(self, rows: int) -> Unread:
        first, stop, _ = self._group(rows)
        if not first < rows < stop:
            return self._after_cuts(rows, np.empty(0, np.int64))
        taken = np.sort([self._cut(number) for number in range(first, rows)])
        return self._after_cuts(first, taken)

    def _after_cuts(self, prefix: int, taken: np.ndarray) -> Unread:
        """What is unread without the first `prefix` cuts and some later ones, in order."""
        starts = np.concatenate([[prefix], taken + 1]) * self.length
        stops = taken * self.length
        left = [interval for a, b in zip(starts, stops, strict=False) for interval in self.unread.intervals(a, b - a)]
        begins = np.array([start for start, _ in left], np.int64)
        return self.unread.only(begins, begins + [n for _, n in left], self.unread.token(int(starts[-1])))

    def _cut(self, number: int) -> int:
        """Which of the rows in the order of the documents is row `number`."""
        first, stop, epoch = self._group(number)
        if number >= stop:
            return number  # it reaches into the next epoch, or into the padding
        return first + permuted(number - first, stop - first, (self.epochs.seed or 0, epoch))

    def _group(self, number: int) -> tuple[int, int, int]:
        """The rows first .. stop with which row `number` is permuted, if it is, and their epoch."""
        length, tokens, mark = self.length, self.epochs.tokens, self.mark
        epoch = self.unread.token(number * length) // tokens if self.epochs.seed is not None else 0
        first = -(-self.unread.below(epoch * tokens) // length)
        stop = self.unread.below((epoch + 1) * tokens) // length
        if mark is not None:
            first, stop = (first, min(stop, mark)) if number < mark else (max(first, mark), stop)
        return first, stop, epoch


def permuted(index: int, count: int, key: tuple[int, int]) -> int:
    """Where `index` goes in a permutation of 0 .. count − 1 that depends on `key`, two of 0 .. 2^64 − 1, alone.

    A Feistel network over the least square that holds them, walked until it comes back below `count` (Black and
    Rogaway, 2002, "Ciphers with arbitrary finite domains"): no table, however many rows an epoch has.
    """
    side = 1 + math.isqrt(count - 1)
    while True:
        left, right = divmod(index, side)
        for number in range(ROUNDS):
            digest = hashlib.blake2b(struct.pack("<4Q", *key, number, right), digest_size=8).digest()
            left, right = right, (left + int.from_bytes(digest, "little")) % side
        index = left * side + right
        if index < count:
            return index
