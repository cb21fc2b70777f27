"""best_fit: a document is cut only where it is longer than a row (Ding et al., 2024, arXiv 2404.10830)."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict
from typing import NamedTuple

import numpy as np

from .epochs import Epochs
from .plan import Plan
from .unread import Unread

LAYOUTS_KEPT = 2  # the epoch that is read, and the next


class Layout(NamedTuple):
    """Rows of an epoch in the order in which they are read: row r holds pieces `firsts[r]` .. `firsts[r + 1]`.

    starts, tokens: of each piece, on the axis. before: tokens of the rows before each, and of all.
    """

    firsts: np.ndarray
    starts: np.ndarray
    tokens: np.ndarray
    before: np.ndarray

    @property
    def rows(self) -> int:
        return len(self.firsts) - 1


class BestFit(Plan):
    """Rows that hold whole documents, as full as best-fit decreasing makes them, over an epoch at once.

    A document longer than a row becomes full rows and a rest, which is packed with the others. The rest of a row is
    padding; no row holds tokens of two epochs. An epoch's layout is made when its first row is asked for.
    """

    def __init__(self, epochs: Epochs, unread: Unread, length: int, mark: int | None = None) -> None:
        super().__init__(unread, length, mark)
        self.epochs = epochs
        self._layouts: OrderedDict[tuple[int, int], Layout] = OrderedDict()
        self._rows: dict[tuple[int, int], int] = {}
        self._epoch = unread.token(0) // epochs.tokens
        self._whole = self._epoch if unread.below((self._epoch + 1) * epochs.tokens) == epochs.tokens else None
        self._marked: tuple[int, int] | None = None  # the epoch that the mark divides, and the rows before it in there
        if mark is not None and epochs.seed is not None:
            epoch, index, _ = self._whole_place(mark)
            self._marked = (epoch, index) if index else None

    @property
    def once(self) -> int:
        """Every order of an epoch has as many: they follow from the lengths alone."""
        if self._whole is None:
            self._whole = self._epoch + 1
        return self._count(self._whole, 0)

    def intervals(self, number: int) -> list[tuple[int, int]]:
        if self.epochs.seed is None and number >= self.once:
            return []
        epoch, index, part = self._place(number)
        layout = self._layout(epoch, part)
        pieces = slice(layout.firsts[index], layout.firsts[index + 1])
        return list(zip(layout.starts[pieces].tolist(), layout.tokens[pieces].tolist(), strict=True))

    def read(self, rows: int) -> int:
        epoch, index, part = self._place(rows)
        before = self.unread.below(epoch * self.epochs.tokens)
        if part == 2:
            before += int(self._layout(epoch, 1).before[-1])
        return before + (int(self._layout(epoch, part).before[index]) if index else 0)

    def after(self, rows: int) -> Unread:
        epoch, index, part = self._place(rows)
        start, stop = epoch * self.epochs.tokens, (epoch + 1) * self.epochs.tokens
        if not index and part < 2:
            return self.unread.only(np.empty(0, np.int64), np.empty(0, np.int64), max(start, self.unread.token(0)))
        layout = self._layout(epoch, part)
        left = slice(layout.firsts[index], None)
        starts, stops = layout.starts[left], layout.starts[left] + layout.tokens[left]
        if part == 1:
            rest = self._layout(epoch, 2)
            starts = np.concatenate([starts, rest.starts])
            stops = np.concatenate([stops, rest.starts + rest.tokens])
        return self.unread.only(starts, stops, stop)

    def _place(self, number: int) -> tuple[int, int, int]:
        """(epoch, row in it or in its part, part) of a row: 0 where the mark does not divide the epoch, 1 before it,
        2 behind it."""
        if self._marked is None or self.mark is None:
            return self._whole_place(number)
        epoch, _ = self._marked
        if number < self.mark:
            found, index, _ = self._whole_place(number)
            return found, index, int(found == epoch)
        behind = number - self.mark
        if behind < (rows := self._count(epoch, 2)):
            return epoch, behind, 2
        return epoch + 1 + (behind - rows) // self.once, (behind - rows) % self.once, 0

    def _whole_place(self, number: int) -> tuple[int, int, int]:
        if number < (rows := self._count(self._epoch, 0)):
            return self._epoch, number, 0
        return self._epoch + 1 + (number - rows) // self.once, (number - rows) % self.once, 0

    def _count(self, epoch: int, part: int) -> int:
        if (epoch, part) not in self._rows:
            if part == 0 and epoch > self._epoch and self._whole not in (None, epoch):
                return self.once
            self._rows[epoch, part] = self._layout(epoch, part).rows
        return self._rows[epoch, part]

    def _layout(self, epoch: int, part: int) -> Layout:
        if (epoch, part) not in self._layouts:
            starts, tokens = self._cut(*self._unread_pieces(epoch))
            if part == 0:
                rows, count = pack(tokens, self.length)
            else:
                starts, tokens, rows, count = self._side_of_mark(starts, tokens, part)
            # Another use of the draws than that for the order of the documents.
            order = np.argsort(self.epochs.draws(epoch, 1 + part, count), kind="stable")
            self._layouts[epoch, part] = _laid_out(starts, tokens, rows, order)
            if len(self._layouts) > LAYOUTS_KEPT:
                self._layouts.popitem(last=False)
        self._layouts.move_to_end((epoch, part))
        return self._layouts[epoch, part]

    def _unread_pieces(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Starts on the axis and tokens of what is unread of each document of an epoch, in its order."""
        start, stop = epoch * self.epochs.tokens, (epoch + 1) * self.epochs.tokens
        ends = start + self.epochs.table(epoch).ends
        inside = (self.unread.starts < stop) & (self.unread.stops > start)
        borders = [self.unread.starts[inside].clip(start), self.unread.stops[inside].clip(max=stop)]
        points = np.unique(np.concatenate([[start], ends, *borders]))
        kept = self.unread.holds(points[:-1])
        return points[:-1][kept], np.diff(points)[kept]

    def _cut(self, starts: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pieces longer than a row, cut into full rows and a rest, beside the others."""
        parts = -(-tokens // self.length)
        if (parts == 1).all():
            return starts, tokens
        number = np.arange(parts.sum()) - np.repeat(np.cumsum(parts) - parts, parts)
        return (
            np.repeat(starts, parts) + number * self.length,
            np.minimum(np.repeat(tokens, parts) - number * self.length, self.length),
        )

    def _side_of_mark(
        self, starts: np.ndarray, tokens: np.ndarray, part: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
        """The pieces before (1) or behind (2) the mark, the row of each, and how many rows there are.

        Before it are the fullest rows of the shortest beginning of the epoch that is sure to have enough of them; what
        is in the few others comes behind it.
        """
        assert self._marked is not None
        wanted = self._marked[1]
        enough = int(np.searchsorted(np.cumsum(tokens), wanted * self.length)) + 1
        rows, count = pack(tokens[:enough], self.length)
        fullest = np.argsort(-np.bincount(rows, tokens[:enough], count), kind="stable")[:wanted]
        number = np.full(count, -1)
        number[fullest] = np.arange(wanted)
        rows = number[rows]
        before = np.flatnonzero(rows >= 0)
        if part == 1:
            return starts[before], tokens[before], rows[before], wanted
        starts, tokens = np.delete(starts, before), np.delete(tokens, before)
        return starts, tokens, *pack(tokens, self.length)


def _laid_out(starts: np.ndarray, tokens: np.ndarray, rows: np.ndarray, order: np.ndarray) -> Layout:
    """Pieces with the row of each, for rows that are read in that order."""
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    by_row = np.argsort(place[rows], kind="stable")
    firsts = np.concatenate([[0], np.cumsum(np.bincount(place[rows], minlength=len(order)))])
    before = np.concatenate([[0], np.cumsum(tokens[by_row])])[firsts]
    return Layout(firsts, starts[by_row], tokens[by_row], before)


def pack(tokens: np.ndarray, length: int) -> tuple[np.ndarray, int]:
    """Best-fit decreasing: the row of each piece of 1 .. `length` tokens, and how many rows there are.

    The longest piece first, each into the row with the least room that it fits into. Pieces of one length go into rows
    of one room together, so that Python takes a step for each such pair rather than for each piece.
    """
    order = np.argsort(-tokens, kind="stable")
    lengths, firsts = np.unique(-tokens[order], return_index=True)
    rows = np.empty(len(tokens), np.int64)
    count = 0
    rooms: list[int] = []  # of the open rows, sorted
    open_rows: dict[int, list[np.ndarray]] = {}
    for size, first, stop in zip(
        (-lengths).tolist(), firsts.tolist(), [*firsts[1:].tolist(), len(tokens)], strict=True
    ):
        while first < stop:
            at = bisect_left(rooms, size)
            if at < len(rooms):
                room = rooms.pop(at)
                ours = np.concatenate(open_rows.pop(room))
            else:
                room, each = length, length // size
                ours = np.arange(count, count - (first - stop) // each)
                count += len(ours)
            each = room // size
            full = min((stop - first) // each, len(ours))
            rows[order[first : first + full * each]] = np.repeat(ours[:full], each)
            first += full * each
            _open(rooms, open_rows, room - each * size, ours[:full])
            ours, some = ours[full:], stop - first
            if len(ours) and some:  # fewer than a row takes
                rows[order[first:stop]] = ours[0]
                first = stop
                _open(rooms, open_rows, room - some * size, ours[:1])
                ours = ours[1:]
            _open(rooms, open_rows, room, ours)
    return rows, count


def _open(rooms: list[int], open_rows: dict[int, list[np.ndarray]], room: int, rows: np.ndarray) -> None:
    if room and len(rows):
        if room not in open_rows:
            insort(rooms, room)
            open_rows[room] = []
        open_rows[room].append(rows)
