"""Plan: the rows of one segment of a run, each from its number alone, and what is unread after some of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

from .unread import Unread


class Reading(NamedTuple):
    """A segment that has been read: `rows` rows of `length` tokens, packed so, with a mark (see `Plan`) or None."""

    length: int
    packing: str
    mark: int | None
    rows: int


class Plan(ABC):
    """Rows of `length` tokens made of what is unread.

    Rows come epoch after epoch and, within each, permuted, so that what has been read is a prefix of the axis at an
    epoch's end alone. `mark`, a number of rows, makes another such place: after so many rows what has been read is a
    prefix of the documents in their order (`best_fit`: up to what did not fit into these rows), so that a segment of
    longer rows, which follows, gets whole documents. The rows beyond the mark go on with the rest.
    """

    def __init__(self, unread: Unread, length: int, mark: int | None) -> None:
        self.unread, self.length, self.mark = unread, length, mark

    @abstractmethod
    def intervals(self, number: int) -> list[tuple[int, int]]:
        """(start on the axis, tokens) of what row `number` holds, in order."""

    @abstractmethod
    def after(self, rows: int) -> Unread:
        """What is unread when the first `rows` rows have been read."""

    @abstractmethod
    def read(self, rows: int) -> int:
        """The tokens of the first `rows` rows."""

    @property
    @abstractmethod
    def once(self) -> int:
        """Rows of an epoch of which nothing has been read; the last one may be padded."""
