"""Unread: what is left of an axis of tokens without end when some of it has been read."""

from __future__ import annotations

import numpy as np

NEVER = 1 << 62  # where the last interval stops


class Unread:
    """Intervals `starts` .. `stops` of tokens that nobody has read yet, int64, in order; the last has no end.

    Unread token v is the v-th of them, from 0: rows are cut from the unread tokens as if these were all there are.
    """

    def __init__(self, starts: np.ndarray, stops: np.ndarray) -> None:
        kept = stops > starts
        starts, stops = np.asarray(starts[kept], np.int64), np.asarray(stops[kept], np.int64)
        joint = starts[1:] == stops[:-1]
        self.starts = starts[np.concatenate([[True], ~joint])]
        self.stops = stops[np.concatenate([~joint, [True]])]
        self._before = np.concatenate([[0], np.cumsum((self.stops - self.starts)[:-1])])

    @classmethod
    def from_token(cls, token: int) -> Unread:
        """All tokens from that one on."""
        return cls(np.array([token]), np.array([NEVER]))

    def below(self, token: int) -> int:
        """How many unread tokens lie before that token of the axis."""
        place = int(np.searchsorted(self.starts, token, side="right")) - 1
        if place < 0:
            return 0
        return int(self._before[place] + min(token, self.stops[place]) - self.starts[place])

    def token(self, number: int) -> int:
        """Where unread token `number` lies on the axis."""
        place = int(np.searchsorted(self._before, number, side="right")) - 1
        return int(self.starts[place] + number - self._before[place])

    def intervals(self, number: int, count: int) -> list[tuple[int, int]]:
        """(start on the axis, tokens) of unread tokens number .. number + count."""
        made = []
        while count:
            start = self.token(number)
            n = min(int(self.stops[np.searchsorted(self.starts, start, side="right") - 1]) - start, count)
            made.append((start, n))
            number, count = number + n, count - n
        return made

    def holds(self, tokens: np.ndarray) -> np.ndarray:
        """Which of these tokens of the axis are unread."""
        place = np.searchsorted(self.starts, tokens, side="right") - 1
        return (place >= 0) & (tokens < self.stops[np.maximum(place, 0)])

    def only(self, starts: np.ndarray, stops: np.ndarray, after: int) -> Unread:
        """What is unread where, before token `after`, only these intervals still are."""
        order = np.argsort(starts, kind="stable")
        tail_starts, tail_stops = np.maximum(self.starts, after), self.stops
        kept = tail_stops > tail_starts
        return Unread(
            np.concatenate([starts[order], tail_starts[kept]]), np.concatenate([stops[order], tail_stops[kept]])
        )
