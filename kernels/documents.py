"""Documents: where packed documents start in the tokens of a row, known on the host."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor

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


@dataclass(frozen=True)
class Documents:
    """The documents of `[B, T]` packed tokens, as runs on the host; ids and positions on a device are derived.

    `runs[b]` covers `0..length` of row b in order and without gaps. Padding is a run of document −1. A run whose
    position is not 0 continues a document whose earlier tokens are elsewhere (on another rank, in another span of this
    rank, or in a decoding cache). Ids are compared within a row only. Only `ids` and `positions` touch a device, so
    that masks, layouts and meters never synchronise with one.
    """

    runs: tuple[tuple[Run, ...], ...]
    length: int
    _tensors: dict[tuple[str, str], Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def whole(cls, batch: int, length: int, position: int = 0) -> Documents:
        """One document per row, whose tokens start at `position` in it."""
        row = (Run(0, 0, length, position),) if length else ()
        return cls((row,) * batch, length)

    @classmethod
    def from_lengths(cls, rows: Sequence[Iterable[int]], length: int | None = None) -> Documents:
        """Rows of document lengths in order, each row padded to `length` (default: the longest row)."""
        lengths = [list(row) for row in rows]
        total = max((sum(row) for row in lengths), default=0) if length is None else length
        packed = []
        for row in lengths:
            if any(n < 1 for n in row):
                raise ValueError(f"document lengths must be at least 1; got {row}")
            if sum(row) > total:
                raise ValueError(f"document lengths must sum to at most length={total}; got {sum(row)}")
            runs, start = [], 0
            for document, n in enumerate(row):
                runs.append(Run(document, start, n, 0))
                start += n
            if start < total:
                runs.append(Run(PADDING, start, total - start, 0))
            packed.append(tuple(runs))
        return cls(tuple(packed), total)

    @property
    def batch(self) -> int:
        return len(self.runs)

    @property
    def continues(self) -> tuple[bool, ...]:
        """Whether each row's first token continues a document begun earlier: only such rows use an initial state."""
        return tuple(bool(row) and not row[0].is_padding and row[0].position > 0 for row in self.runs)

    @property
    def is_whole(self) -> bool:
        """Whether every row is a single run, so that no reset happens inside any row."""
        return all(len(row) <= 1 for row in self.runs)

    def require(self, batch: int, length: int) -> None:
        """Raises ValueError unless these are `batch` rows of `length` tokens whose documents start within the row.

        Only a row's first token may continue a document, as recurrences require.
        """
        if (self.batch, self.length) != (batch, length):
            raise ValueError(
                f"documents must describe {batch} rows of {length} tokens; got {self.batch} rows of {self.length}. "
                "Build them for the tokens passed"
            )
        late = [run for row in self.runs for run in row[1:] if run.position > 0]
        if late:
            raise ValueError(
                f"documents must start at position 0 inside a row; got position {late[0].position} at token "
                f"{late[0].start}. Pass spans that are apart in the document as rows of their own"
            )

    def slice(self, start: int, stop: int) -> Documents:
        """The documents of tokens `start..stop` of every row; a cut document keeps its id and its positions."""
        if not 0 <= start <= stop <= self.length:
            raise ValueError(f"slice must lie within 0..{self.length}; got {start}..{stop}")
        rows = []
        for row in self.runs:
            cut = []
            # A span of a long row contains few of its runs.
            first = max(bisect_right(row, start, key=attrgetter("start")) - 1, 0)
            last = bisect_left(row, stop, key=attrgetter("start"))
            for run in row[first:last]:
                low, high = max(run.start, start), min(run.stop, stop)
                if low < high:
                    position = 0 if run.is_padding else run.position + low - run.start
                    cut.append(Run(run.document, low - start, high - low, position))
            rows.append(tuple(cut))
        return Documents(tuple(rows), stop - start)

    def up_to(self, position: int) -> Documents:
        """The same tokens, where those from `position` of their document on are padding."""
        rows = []
        for row in self.runs:
            cut = []
            for run in row:
                kept = run.length if run.is_padding else min(max(position - run.position, 0), run.length)
                if kept:
                    cut.append(run._replace(length=kept))
                if kept < run.length:
                    cut.append(Run(PADDING, run.start + kept, run.length - kept, 0))
            rows.append(tuple(cut))
        return Documents(tuple(rows), self.length)

    def rows(self, start: int, stop: int) -> Documents:
        """Rows `start..stop` of the batch."""
        return Documents(self.runs[start:stop], self.length)

    @staticmethod
    def concatenate(parts: Sequence[Documents]) -> Documents:
        """Parts one after the other in time; runs that continue each other are joined."""
        rows = []
        for b in range(parts[0].batch):
            joined: list[Run] = []
            offset = 0
            for part in parts:
                for run in part.runs[b]:
                    moved = run._replace(start=run.start + offset)
                    last = joined[-1] if joined else None
                    if (
                        last
                        and last.document == moved.document
                        and (moved.is_padding or last.end_position == moved.position)
                    ):
                        joined[-1] = last._replace(length=last.length + moved.length)
                    else:
                        joined.append(moved)
                offset += part.length
            rows.append(tuple(joined))
        return Documents(tuple(rows), sum(part.length for part in parts))

    @staticmethod
    def stack(parts: Sequence[Documents]) -> Documents:
        """Parts of equal length one after the other along the batch."""
        if len({part.length for part in parts}) > 1:
            raise ValueError(f"stacked documents must have one length; got {[part.length for part in parts]}")
        return Documents(tuple(row for part in parts for row in part.runs), parts[0].length)

    def ids(self, device: torch.device | str = "cpu") -> Tensor:
        """int32 `[B, T]`: the document of each token, −1 for padding."""
        return self._tensor("ids", device)

    def positions(self, device: torch.device | str = "cpu") -> Tensor:
        """int32 `[B, T]`: each token's position in its document, 0 for padding."""
        return self._tensor("positions", device)

    def _tensor(self, kind: str, device: torch.device | str) -> Tensor:
        key = (kind, str(device))
        if key not in self._tensors:
            host = torch.zeros(self.batch, self.length, dtype=torch.int32)
            for b, row in enumerate(self.runs):
                for run in row:
                    if kind == "ids":
                        host[b, run.start : run.stop] = run.document
                    elif not run.is_padding:
                        host[b, run.start : run.stop] = torch.arange(run.position, run.end_position, dtype=torch.int32)
            self._tensors[key] = host.to(device, non_blocking=True)
        return self._tensors[key]
