"""Rows of packed documents, each computed from its number alone."""

from __future__ import annotations

import hashlib
import math
import struct
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ...kernels.documents import Documents

NO_TARGET = -100
ROUNDS = 8  # of the network that permutes rows; four are the least that look random
TABLES_KEPT = 4  # a row lies in one epoch or, at a seam, in two; small corpora have several in a row


class TokenizedDocuments(Protocol):
    """Documents as token ids, each ended by end of text and, with some tokenizers, begun by BOS."""

    @property
    def lengths(self) -> np.ndarray:
        """int64 `[documents]`."""
        ...

    def __getitem__(self, document: int) -> np.ndarray: ...


class Row(NamedTuple):
    """A row of N tokens: int64 `tokens` and `targets` `[N]`, and the lengths of its documents in order.

    Lengths sum to N, or to less where the row's end is padding. `targets` is −100 where there is none: at the last
    token of a document and at padding. The last token of a row has its target though another row holds it.
    """

    tokens: np.ndarray
    targets: np.ndarray
    lengths: list[int]


class Batch(NamedTuple):
    """Rows stacked: int64 `tokens` and `targets` `[R, N]`, and their documents, known on the host."""

    tokens: Tensor
    targets: Tensor
    documents: Documents


class RowStream(ABC):
    """Rows of `length` tokens, each computed from its number alone, whichever was asked for before.

    `seed` (0 .. 2^64 − 1) and `fingerprint` tell the stream from others when a run is resumed, and so does `version`,
    which is raised when the same seed and data give other rows.
    """

    version = 1

    def __init__(self, length: int, fingerprint: str, seed: int | None = None) -> None:
        self.length = length
        self.fingerprint = fingerprint
        self.seed = seed

    @property
    @abstractmethod
    def rows(self) -> int | None:
        """Rows of a stream that ends; None for an endless one."""

    @abstractmethod
    def row(self, number: int) -> Row:
        """Row `number`, from 0. Past the end of a stream that ends it is all padding: ranks may share unevenly."""

    def pieces(self, number: int) -> list[tuple[int, int, int]]:
        """(document, first token in it, tokens) of what row `number` holds; none where rows follow from their numbers.

        Documents are told by their numbers in the data.
        """
        return []

    def state(self, row: int) -> dict[str, Any]:
        """What a checkpoint keeps: `row` is the next row to read, on whichever rank."""
        return self._identity() | {"row": row}

    def resume(self, state: dict[str, Any]) -> int:
        """The row of a checkpoint's state. Raises ValueError if it counts the rows of another stream."""
        remedies = {
            "version": "Its rows come in another order: use the LongReach that wrote it, or start anew with init_from",
            "fingerprint": "The data or their settings changed: restore them, or start anew with init_from",
            "sequence_length": "Restore data.sequence_length, or start anew with init_from",
            "seed": "Restore trainer.seed, or start anew with init_from",
        }
        for key, own in self._identity().items():
            if state.get(key) != own:
                raise ValueError(
                    f"the checkpoint's data {key} must be {own!r}; got {state.get(key)!r}. {remedies[key]}"
                )
        return int(state["row"])

    def _identity(self) -> dict[str, Any]:
        return {
            "version": self.version,
            "fingerprint": self.fingerprint,
            "sequence_length": self.length,
            "seed": self.seed,
        }


class TokenStream(RowStream):
    """Documents end to end, cut into rows of `length` tokens; a cut document starts anew, at position 0, in each row,
    without another BOS.

    With a seed the stream is endless: epoch e is all `members` in an order that depends on (seed, e) alone, the epochs
    are laid end to end and cut after every N tokens. Without one it is `members` once, in their order, and its last row
    is padded.

    The rows that lie wholly in an epoch come in an order of their own, by (seed, e) too: neighbours share a document,
    and a long one would fill step after step. A row with tokens of two epochs stays between them, and a padded one at
    the end, so that tokens e·E .. (e+1)·E of the rows one after another are epoch e, of E tokens, each once. Any row
    costs one look-up in its epoch's table of documents, whichever was asked for before.
    """

    version = 2  # rows were in the order of the documents in 1

    def __init__(
        self,
        documents: TokenizedDocuments,
        members: np.ndarray,
        *,
        length: int,
        seed: int | None = None,
        fingerprint: str = "",
        padding: int = 0,
    ) -> None:
        super().__init__(length, fingerprint, seed)
        self.documents = documents
        self.members = np.asarray(members, np.int64)
        self.padding = padding
        self.tokens = int(documents.lengths[self.members].sum())  # once over
        if not self.tokens:
            raise ValueError("data.path must hold documents for every split; got a split without tokens. Add documents")
        self._tables: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()

    @property
    def targets(self) -> int:
        """Targets in all documents once over: every token but the first of each document has one."""
        return self.tokens - len(self.members)

    @property
    def rows(self) -> int | None:
        return -(-self.tokens // self.length) if self.seed is None else None

    def row(self, number: int) -> Row:
        if number < 0:
            raise ValueError(f"the row must not be negative; got {number}. Count rows from 0")
        tokens = np.full(self.length, self.padding, np.int64)
        targets = np.full(self.length, NO_TARGET, np.int64)
        lengths, at = [], 0
        for document, start, n in self.pieces(number):
            # One token more than the piece: the target of its last token, unless the document ends there.
            ids = self.documents[document][start : start + n + 1]
            tokens[at : at + n] = ids[:n]
            targets[at : at + len(ids) - 1] = ids[1:]
            lengths.append(n)
            at += n
        return Row(tokens, targets, lengths)

    def pieces(self, number: int) -> list[tuple[int, int, int]]:
        return list(self._pieces(self._cut(number) * self.length, self.length))

    def _cut(self, number: int) -> int:
        """Which of the rows in the order of the documents is row `number`."""
        epoch = number * self.length // self.tokens if self.seed is not None else 0
        first, stop = -(-epoch * self.tokens // self.length), (epoch + 1) * self.tokens // self.length
        if number >= stop:
            return number  # it reaches into the next epoch, or into the padding
        return first + permuted(number - first, stop - first, (self.seed or 0, epoch))

    def _pieces(self, start: int, count: int) -> Iterator[tuple[int, int, int]]:
        """(document, first token in it, tokens) of `count` tokens from token `start` of the stream."""
        stop = start + count if self.seed is not None else min(start + count, self.tokens)
        while start < stop:
            epoch, offset = divmod(start, self.tokens)
            order, ends = self._table(epoch)
            place = int(np.searchsorted(ends, offset, side="right"))
            while start < stop and place < len(order):
                n = min(int(ends[place]) - offset, stop - start)
                document = int(order[place])
                yield document, int(self.documents.lengths[document] - (ends[place] - offset)), n
                start, offset, place = start + n, offset + n, place + 1

    def _table(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The documents of an epoch in order, and where each ends."""
        table = self._tables.get(epoch)
        if table is None:
            order = self.members
            if self.seed is not None:
                # A sort by raw Philox counters: numpy promises that these stay the same, not that its shuffles do.
                keys = np.random.Philox(key=np.array([self.seed, epoch], np.uint64)).random_raw(len(order))
                order = order[np.argsort(keys, kind="stable")]
            table = self._tables[epoch] = order, np.cumsum(self.documents.lengths[order])
            if len(self._tables) > TABLES_KEPT:
                self._tables.popitem(last=False)
        with suppress(KeyError):  # another thread has just dropped it
            self._tables.move_to_end(epoch)
        return table


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


def batch(stream: RowStream, rows: Iterable[int]) -> Batch:
    """The rows of those numbers, stacked: a rank takes its slice of the step's numbers, and no other state exists."""
    made = [stream.row(number) for number in rows]
    if not made:
        raise ValueError("a batch must have at least one row; got none. Raise data.rows_per_micro_batch")
    return Batch(
        torch.from_numpy(np.stack([row.tokens for row in made])),
        torch.from_numpy(np.stack([row.targets for row in made])),
        Documents.from_lengths([row.lengths for row in made], stream.length),
    )
