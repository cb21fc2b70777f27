"""Documents: where packed documents start in the tokens of a row, known on the host."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from .derived import Deriving

PADDING = -1


class Run(NamedTuple):
    """Consecutive tokens of one document: `length` tokens from row index `start`, the first at `position` in it."""

    document: int
    start: int
    length: int
    position: int

    @property
    def stop(self) -> int:
        return self.start + self.length

    @property
    def end_position(self) -> int:
        return self.position + self.length

    @property
    def is_padding(self) -> bool:
        return self.document == PADDING


class Runs(NamedTuple):
    """Runs as arrays, int64 `[R]` on the host: the row of each, and what `Run` says of one."""

    row: Tensor
    document: Tensor
    start: Tensor
    length: Tensor
    position: Tensor

    @property
    def stop(self) -> Tensor:
        return self.start + self.length

    @property
    def end_position(self) -> Tensor:
        return self.position + self.length

    @property
    def real(self) -> Tensor:
        """Which runs are not padding."""
        return self.document != PADDING

    def at(self, index: Tensor) -> Runs:
        """The runs at these places, or where a mask is True."""
        return Runs(*(x[index] for x in self))


@dataclass(frozen=True, eq=False)
class Documents(Deriving):
    """The documents of `[B, T]` packed tokens, as runs on the host; ids and positions on a device are derived.

    `table` int64 `[R, 5]` has a run in each line: row, document, start, length, position, as `Run` explains them. In
    order, they cover `0..length` of every row without gaps. Padding is a run of document −1. A run whose position is
    not 0 continues a document whose earlier tokens are elsewhere (on another rank, in another span of this rank, or in
    a decoding cache). Ids are compared within a row only. Masks, layouts and meters need the host's table alone and
    never synchronise with a device.
    """

    table: Tensor
    batch: int
    length: int

    @classmethod
    def of_runs(cls, rows: Sequence[Iterable[Run]], length: int) -> Documents:
        """The documents of rows whose runs are listed."""
        lines = [(number, *run) for number, row in enumerate(rows) for run in row]
        return cls(_table(lines), len(rows), length)

    @classmethod
    def whole(cls, batch: int, length: int, position: int = 0) -> Documents:
        """One document per row, whose tokens start at `position` in it."""
        return cls(_table([(row, 0, 0, length, position) for row in range(batch if length else 0)]), batch, length)

    @classmethod
    def from_lengths(cls, rows: Sequence[Iterable[int]], length: int | None = None) -> Documents:
        """Rows of document lengths in order, each row padded to `length` (default: the longest row)."""
        lengths = [torch.tensor(list(row), dtype=torch.int64, device="cpu") for row in rows]
        sums = [int(row.sum()) for row in lengths]
        total = max(sums, default=0) if length is None else length
        tables = []
        for number, (row, sum_of_row) in enumerate(zip(lengths, sums, strict=True)):
            if len(row) and int(row.min()) < 1:
                raise ValueError(f"document lengths must be at least 1; got {row.tolist()}")
            if sum_of_row > total:
                raise ValueError(f"document lengths must sum to at most length={total}; got {sum_of_row}")
            zero = torch.zeros_like(row)
            tables.append(
                torch.stack(
                    [zero + number, torch.arange(len(row), device="cpu"), row.cumsum(0) - row, row, zero], dim=1
                )
            )
            if sum_of_row < total:
                tables.append(_table([(number, PADDING, sum_of_row, total - sum_of_row, 0)]))
        return cls(torch.cat([_table([]), *tables]), len(lengths), total)

    @classmethod
    def padded(cls, table: Tensor, batch: int, length: int) -> Documents:
        """The documents of runs that fill their rows from 0 on, each row padded to `length`."""
        used = torch.zeros(batch, dtype=torch.int64, device="cpu").index_add_(0, table[:, 0], table[:, 3])
        short = (used < length).nonzero().squeeze(1)
        rest = torch.stack([short, 0 * short + PADDING, used[short], length - used[short], 0 * short], dim=1)
        both = torch.cat([table, rest])
        return cls(both[torch.argsort(both[:, 0], stable=True)], batch, length)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Documents):
            return NotImplemented
        return (self.batch, self.length) == (other.batch, other.length) and torch.equal(self.table, other.table)

    __hash__ = None  # type: ignore[assignment]

    @cached_property
    def columns(self) -> Runs:
        """The table's columns."""
        return Runs(*self.table.unbind(1))

    @cached_property
    def runs(self) -> tuple[tuple[Run, ...], ...]:
        """The runs of each row, one by one: for what goes through them in Python."""
        rows: list[list[Run]] = [[] for _ in range(self.batch)]
        for row, *numbers in self.table.tolist():
            rows[row].append(Run(*numbers))
        return tuple(map(tuple, rows))

    @cached_property
    def ends(self) -> Tensor:
        """int64 `[B, 2]`: the lines of each row's first run, and of that after its last."""
        bounds = torch.searchsorted(self.columns.row.contiguous(), torch.arange(self.batch + 1, device="cpu"))
        return torch.stack([bounds[:-1], bounds[1:]], dim=1)

    @cached_property
    def continues(self) -> tuple[bool, ...]:
        """Whether each row's first token continues a document begun earlier: only such rows use an initial state."""
        return tuple(continuing(self).tolist())

    @cached_property
    def is_whole(self) -> bool:
        """Whether every row is a single run, so that no reset happens inside any row."""
        return len(self.table) <= self.batch and bool((self.ends[:, 1] - self.ends[:, 0] <= 1).all())

    @cached_property
    def has_padding(self) -> bool:
        """Whether any place holds no token."""
        return not bool(self.columns.real.all())

    @cached_property
    def goes_through(self) -> bool:
        """Whether all rows are in the middle of one document, from their first token to their last."""
        return self.is_whole and all(self.continues) and not self.has_padding

    @cached_property
    def tokens(self) -> int:
        """How many places hold a token."""
        return int(self.columns.length[self.columns.real].sum())

    def lines(self, runs: Runs) -> Tensor:
        """int64: the line of the first run here that is of the same row and document as each run; −1 where none is."""
        keys, order = self.derive(_sorted_keys)
        if not len(keys):
            return torch.full_like(runs.row, -1)
        wanted = key_of(runs)
        at = torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)
        return torch.where((keys[at] == wanted) & runs.real, order[at], -1)

    def require(self, batch: int, length: int) -> None:
        """Raises ValueError unless these are `batch` rows of `length` tokens whose documents start within the row.

        Only a row's first token may continue a document, as recurrences require.
        """
        if (self.batch, self.length) != (batch, length):
            raise ValueError(
                f"documents must describe {batch} rows of {length} tokens; got {self.batch} rows of {self.length}. "
                "Build them for the tokens passed"
            )
        late = self.derive(_first_late)
        if late is not None:
            raise ValueError(
                f"documents must start at position 0 inside a row; got position {late.position} at token "
                f"{late.start}. Pass spans that are apart in the document as rows of their own"
            )

    def slice(self, start: int, stop: int) -> Documents:
        """The documents of tokens `start..stop` of every row; a cut document keeps its id and its positions."""
        if not 0 <= start <= stop <= self.length:
            raise ValueError(f"slice must lie within 0..{self.length}; got {start}..{stop}")
        low, high = self.columns.start.clamp(min=start), self.columns.stop.clamp(max=stop)
        return Documents(self._between(low, high, torch.full_like(low, start))[low < high], self.batch, stop - start)

    def spans(self, length: int) -> Documents:
        """The rows cut into spans of `length` tokens, which divides theirs: `[spans * B, length]`, span after span."""
        number = self.length // length
        first = self.columns.start // length
        each = (self.columns.stop - 1) // length - first + 1
        owner, place = expanded(each)
        span, runs = first[owner] + place, self.columns.at(owner)
        low, high = torch.maximum(runs.start, span * length), torch.minimum(runs.stop, (span + 1) * length)
        cut = Documents(torch.stack(runs, dim=1), self.batch, self.length)._between(low, high, span * length)
        cut[:, 0] += span * self.batch
        order = torch.argsort(span * self.batch + runs.row, stable=True)
        return Documents(cut[order], number * self.batch, length)

    def _between(self, low: Tensor, high: Tensor, origin: Tensor) -> Tensor:
        """The table of what each run has between row indices `low` and `high`, counted from `origin`."""
        row, document, start, _, position = self.columns
        moved = torch.where(document == PADDING, 0, position + low - start)
        return torch.stack([row, document, low - origin, high - low, moved], dim=1)

    def up_to(self, position: int) -> Documents:
        """The same tokens, where those from `position` of their document on are padding."""
        runs = self.columns
        kept = torch.where(runs.real, (position - runs.position).clamp(min=0).minimum(runs.length), runs.length)
        before = torch.stack([*runs[:3], kept, runs.position], dim=1)
        padding = torch.full_like(kept, PADDING)
        after = torch.stack([runs.row, padding, runs.start + kept, runs.length - kept, 0 * kept], dim=1)
        both = torch.stack([before, after], dim=1).flatten(0, 1)
        return Documents(both[both[:, 3] > 0], self.batch, self.length)

    def rows(self, start: int, stop: int) -> Documents:
        """Rows `start..stop` of the batch."""
        if start >= stop:
            return Documents(self.table[:0], 0, self.length)
        table = self.table[int(self.ends[start, 0]) : int(self.ends[stop - 1, 1])]
        return Documents(torch.cat([table[:, :1] - start, table[:, 1:]], dim=1), stop - start, self.length)

    @staticmethod
    def concatenate(parts: Sequence[Documents]) -> Documents:
        """Parts one after the other in time; runs that continue each other are joined."""
        tables, offset = [], 0
        for part in parts:
            tables.append(part.table + torch.tensor([0, 0, offset, 0, 0], device="cpu"))
            offset += part.length
        return Documents.joined(torch.cat(tables), parts[0].batch, offset)

    @classmethod
    def joined(cls, table: Tensor, batch: int, length: int) -> Documents:
        """The documents of runs in any order; those that continue each other are joined."""
        table = table[torch.argsort((table[:, 0] << 32) + table[:, 2])]
        row, document, _, lengths, position = table.unbind(1)
        goes_on = (row[1:] == row[:-1]) & (document[1:] == document[:-1])
        goes_on &= (document[1:] == PADDING) | (position[1:] == position[:-1] + lengths[:-1])
        begins = torch.cat([torch.ones(min(1, len(table)), dtype=torch.bool, device="cpu"), ~goes_on])
        joined = table[begins]
        joined[:, 3] = torch.zeros(len(joined), dtype=torch.int64, device="cpu").index_add_(
            0, begins.cumsum(0) - 1, lengths
        )
        return cls(joined, batch, length)

    @staticmethod
    def stack(parts: Sequence[Documents]) -> Documents:
        """Parts of equal length one after the other along the batch."""
        if len({part.length for part in parts}) > 1:
            raise ValueError(f"stacked documents must have one length; got {[part.length for part in parts]}")
        tables, batch = [], 0
        for part in parts:
            tables.append(part.table + torch.tensor([batch, 0, 0, 0, 0], device="cpu"))
            batch += part.batch
        return Documents(torch.cat(tables), batch, parts[0].length)

    def ids(self, device: torch.device | str = "cpu") -> Tensor:
        """int32 `[B, T]`: the document of each token, −1 for padding."""
        return self.on(device, _ids)

    def positions(self, device: torch.device | str = "cpu") -> Tensor:
        """int32 `[B, T]`: each token's position in its document, 0 for padding."""
        return self.on(device, _positions)


def continuing(documents: Documents) -> Tensor:
    """bool `[B]`: whether each row's first token continues a document begun earlier."""
    first, last = documents.ends.unbind(1)
    some = first < last
    at = first.clamp(max=max(len(documents.table) - 1, 0))
    runs = documents.columns
    return some & (runs.real & (runs.position > 0))[at] if len(documents.table) else some


def per_token(documents: Documents, values: Tensor) -> Tensor:
    """`[B, T]`: for each token the value `[R]` of its run."""
    return torch.repeat_interleave(values, documents.columns.length).view(documents.batch, documents.length)


def expanded(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """For `numbers` of things per owner, int64: the owner of each thing, and which of the owner's things it is."""
    owner = torch.repeat_interleave(numbers)
    return owner, torch.arange(len(owner), device="cpu") - (numbers.cumsum(0) - numbers)[owner]


def ranks_in_groups(keys: Tensor) -> Tensor:
    """int64: for each key, how many equal ones are before it."""
    ordered, order = keys.sort(stable=True)
    ranks = torch.empty_like(order)
    ranks[order] = torch.arange(len(keys), device="cpu") - torch.searchsorted(ordered, ordered)
    return ranks


def key_of(runs: Runs) -> Tensor:
    """Numbers that order runs by row, then document."""
    return (runs.row << 32) + runs.document


def _sorted_keys(documents: Documents) -> tuple[Tensor, Tensor]:
    keys, order = key_of(documents.columns).sort(stable=True)
    return keys, order


def _ids(documents: Documents) -> Tensor:
    return per_token(documents, documents.columns.document.int())


def _positions(documents: Documents) -> Tensor:
    runs = documents.columns
    first = per_token(documents, (runs.position - runs.start).int())
    positions = first.add_(torch.arange(documents.length, dtype=torch.int32, device="cpu"))
    return positions.masked_fill_(per_token(documents, ~runs.real), 0) if documents.has_padding else positions


def _first_late(documents: Documents) -> Run | None:
    """The first run, of those after the first in their row, that continues a document."""
    runs = documents.columns
    late = runs.position > 0
    late[documents.ends[:, 0][documents.ends[:, 0] < documents.ends[:, 1]]] = False
    lines = late.nonzero()
    return Run(*documents.table[int(lines[0])].tolist()[1:]) if len(lines) else None


def _table(lines: list[tuple[int, ...]]) -> Tensor:
    return torch.tensor(lines, dtype=torch.int64, device="cpu").view(-1, 5)
