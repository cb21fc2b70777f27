"""Rows of packed documents, each computed from its number alone."""

from __future__ import annotations

import hashlib
import json
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ...kernels.documents import Documents
from .streams.best_fit import BestFit
from .streams.concat import Concat
from .streams.epochs import Epochs, Piece
from .streams.plan import Plan, Reading
from .streams.unread import Unread

NO_TARGET = -100
PACKINGS = {"concat": Concat, "best_fit": BestFit}


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


class Part(NamedTuple):
    """What a run has read of a source: rows, tokens, and how many times over that is."""

    name: str
    rows: int
    tokens: int
    epochs: float


class RowStream(ABC):
    """Rows of `length` tokens, each computed from its number alone, whichever was asked for before.

    `seed` (0 .. 2^64 − 1), `fingerprint` and `packing` tell the stream from others when a run is resumed, and so does
    `version`, which is raised when the same seed and data give other rows.

    A stream is one segment of a run, whose rows are counted from 0. A run has one segment unless it changes its rows on
    purpose, as stages do: then another stream goes on with what the segments before it have not read of its sources,
    told by their fingerprints, whatever their lengths, packings and weights were.

        stream.begin(mark)              a run's first segment; `mark` rows are planned (None: there is no plan)
        state = stream.state(row)       for a checkpoint, or for the next segment
        row = stream.resume(state)      the same segment again, on any ranks: the next row to read
        other.follow(state, mark)       the segment after it, from row 0: neither repeats nor loses a token

    What has been read at `mark` is whole documents, in their order, so that a following segment of longer rows finds
    the others uncut. A segment may end elsewhere, or go on beyond it: what is read then is still read once.
    """

    version = 1
    names: tuple[str, ...] = ()  # of the sources of a mixture

    def __init__(self, length: int, fingerprint: str, seed: int | None = None, packing: str = "concat") -> None:
        self.length = length
        self.fingerprint = fingerprint
        self.seed = seed
        self.packing = packing
        self.mark: int | None = None
        self.read: dict[str, list[Reading]] = {}  # by earlier segments, of sources by fingerprint

    @property
    @abstractmethod
    def rows(self) -> int | None:
        """Rows of a stream that ends; None for an endless one."""

    @abstractmethod
    def row(self, number: int) -> Row:
        """Row `number`, from 0. Past the end of a stream that ends it is all padding: ranks may share unevenly."""

    def source(self, number: int) -> int:
        """Which of the sources `names` row `number` is of; 0 where there is only one."""
        return 0

    def pieces(self, number: int) -> list[Piece]:
        """What row `number` holds of the documents of its source; none where rows follow from their numbers alone."""
        return []

    def parts(self, row: int) -> list[Part]:
        """What has been read of each source, by earlier segments too, where `row` is the next row to read."""
        return []

    @abstractmethod
    def _begin(self) -> None:
        """Makes the rows of the segment, after `read` and with `mark`."""

    def _readings(self, row: int) -> dict[str, Reading]:
        """What of each source this segment has read, by its fingerprint."""
        return {self.fingerprint: Reading(self.length, self.packing, self.mark, row)}

    def begin(self, mark: int | None = None) -> None:
        """Makes this a run's first segment, of `mark` rows as far as is planned."""
        self.read, self.mark = {}, mark
        self._begin()

    def follow(self, state: dict[str, Any], mark: int | None = None) -> None:
        """Makes this the segment that comes after that of `state`; sources that the run has not read yet begin.

        Raises ValueError where the order of a source that it has read would be another.
        """
        read = {name: [Reading(*reading) for reading in readings] for name, readings in state.get("read", {}).items()}
        # A state without it is from before there were segments.
        was: dict[str, Any] = {state["fingerprint"]: (state["sequence_length"], "concat", None, state["row"])}
        now = state.get("reading", was)
        for name, reading in now.items():
            if reading[-1]:
                read.setdefault(name, []).append(Reading(*reading))
        if any(name in read for name in self._readings(0)):
            self._refuse_another(state, "version", "seed")
        self.read, self.mark = read, mark
        self._begin()

    def state(self, row: int) -> dict[str, Any]:
        """What a checkpoint keeps: `row` is the next row to read, on whichever rank."""
        reading = {name: list(reading) for name, reading in self._readings(row).items()}
        read = {name: [list(reading) for reading in readings] for name, readings in self.read.items()}
        return self._identity() | {"row": row, "mark": self.mark, "reading": reading, "read": read}

    @property
    def segment(self) -> str:
        """Which segment of which run this is: its rows, by number, are those of no other."""
        return segment_of(self.state(0))

    def resume(self, state: dict[str, Any], *, restart: bool = False) -> int:
        """The row of a checkpoint's state. Raises ValueError if it counts the rows of another stream.

        restart: such a stream is meant (`data.restart`), and this one follows it.
        """
        if restart and any(({"packing": "concat"} | state).get(key) != own for key, own in self._identity().items()):
            self.follow(state)
            return 0
        self._refuse_another(state, *self._identity())
        self.read = {name: [Reading(*r) for r in readings] for name, readings in state.get("read", {}).items()}
        self.mark = state.get("mark")
        self._begin()
        return int(state["row"])

    def _refuse_another(self, state: dict[str, Any], *keys: str) -> None:
        remedies = {
            "version": "Its rows come in another order: use the LongReach that wrote it, or start anew with init_from",
            "fingerprint": "The data or their settings changed: restore them, go on with the new ones by "
            "data.restart=true, or start anew with init_from",
            "sequence_length": "Restore data.sequence_length, change it by data.restart=true or in a stage, or start "
            "anew with init_from",
            "seed": "Restore trainer.seed, or start anew with init_from",
            "packing": "Restore data.packing, change it by data.restart=true or in a stage, or start anew with "
            "init_from",
        }
        own = self._identity()
        for key in keys:
            theirs = state.get(key, "concat" if key == "packing" else None)
            if theirs != own[key]:
                raise ValueError(f"the checkpoint's data {key} must be {own[key]!r}; got {theirs!r}. {remedies[key]}")

    def _identity(self) -> dict[str, Any]:
        return {
            "version": self.version,
            "fingerprint": self.fingerprint,
            "sequence_length": self.length,
            "seed": self.seed,
            "packing": self.packing,
        }


def segment_of(state: dict[str, Any]) -> str:
    """The `segment` of the stream whose state that is: what its rows follow from."""
    made_of = [state.get(key) for key in ("version", "fingerprint", "sequence_length", "seed", "mark")]
    made_of += [state.get("packing", "concat"), sorted(state.get("read", {}).items())]
    return hashlib.blake2b(json.dumps(made_of).encode(), digest_size=8).hexdigest()


class TokenStream(RowStream):
    """Documents packed into rows of `length` tokens; a cut document starts anew, at position 0, in each row, without
    another BOS.

    With a seed the stream is endless: epoch after epoch of all `members`. Without one it is `members` once, in an order
    of their own. `packing` says how rows are made: see `streams.concat` and `streams.best_fit`; either way each epoch
    has every token once, and rows are permuted within it.

    A stream is one segment of a run: what earlier ones have read, of other lengths or packings, it does not read again
    (`follow`). `mark` is how many rows are planned, where another segment may follow; see `streams.plan.Plan`.
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
        packing: str = "concat",
        name: str = "",
    ) -> None:
        super().__init__(length, fingerprint, seed, packing)
        self.documents, self.padding, self.name = documents, padding, name
        self._lock = threading.Lock()  # of tables: one thread reads ahead, and another asks what has been read
        self.members = np.asarray(members, np.int64)
        self.epochs = Epochs(documents.lengths, self.members, seed)
        self.tokens = self.epochs.tokens  # once over
        if not self.tokens:
            raise ValueError("data.path must hold documents for every split; got a split without tokens. Add documents")
        self.begin()

    def _begin(self) -> None:
        unread, self._read_before = Unread.from_token(0), 0
        for reading in self.read.get(self.fingerprint, []):
            plan = self._plan_of(unread, reading.packing, reading.length, reading.mark)
            self._read_before += plan.read(reading.rows)
            unread = plan.after(reading.rows)
        self._plan = self._plan_of(unread, self.packing, self.length, self.mark)

    def _plan_of(self, unread: Unread, packing: str, length: int, mark: int | None) -> Plan:
        return PACKINGS[packing](self.epochs, unread, length, mark)

    def left(self) -> tuple[int, list[Piece]]:
        """The epoch that earlier segments ended in, from 0, and what they have left unread of it: at least a token."""
        unread = self._plan.unread
        epoch = unread.token(0) // self.tokens
        count = unread.below((epoch + 1) * self.tokens)
        return epoch, [piece for interval in unread.intervals(0, count) for piece in self.epochs.pieces(*interval)]

    @property
    def targets(self) -> int:
        """Targets in all documents once over: every token but the first of each document has one."""
        return self.tokens - len(self.members)

    @property
    def rows(self) -> int | None:
        return self._plan.once if self.seed is None else None

    def row(self, number: int) -> Row:
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

    def pieces(self, number: int) -> list[Piece]:
        if number < 0:
            raise ValueError(f"the row must not be negative; got {number}. Count rows from 0")
        with self._lock:
            return [piece for interval in self._plan.intervals(number) for piece in self.epochs.pieces(*interval)]

    def parts(self, row: int) -> list[Part]:
        before = sum(reading.rows for reading in self.read.get(self.fingerprint, []))
        with self._lock:
            read = self._read_before + self._plan.read(row)
        return [Part(self.name, before + row, read, read / self.tokens)]


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
