"""How chunked scans cut their work: blocks of rows and channels, slabs of tokens, and where documents meet in them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from ..dims import shape_of
from ..problem import Problem
from .slabs import Slab, borders, rows_of, slabs


class Sweep:
    """One block of rows and channels, swept over the whole sequence by itself: its slabs and its parts of tensors.

    The first input of the problem is x `[B, T, D]`, and its states are `[B, D, …]`. What a subclass sets:

    width: elements of a token's states over rows and channels, enough to hide a call and few enough to keep a slab of
        them in cache.    chunk, chunks: tokens of a chunk, and chunks of a slab.
    """

    width: ClassVar[int]
    chunk: int
    chunks: int

    def __init__(self, problem: Problem[Any], rows: slice, channels: slice) -> None:
        self.rows, self.channels, self.dtype, self.device = rows, channels, problem.dtype, problem.device
        self.x = self.part(problem.inputs.x)
        self.length = self.x.shape[1]
        self.works: dict[str, Tensor] = {}
        self.documents = rows_of(problem.documents, rows)
        self.marked = self.documents.derive(borders)

    @classmethod
    def over(cls, problem: Problem[Any]) -> Iterator[Self]:
        """Sweeps over all channels, as many at once as `width` has room for, or as many rows of all of them."""
        batch, channels, *rest = shape_of(problem.op.state, problem.sizes)
        size = math.prod(rest)
        channels_each, rows_each = max(1, cls.width // size), max(1, cls.width // (size * channels))
        for row in range(0, batch, rows_each):
            for channel in range(0, channels, channels_each):
                rows = slice(row, min(row + rows_each, batch))
                yield cls(problem, rows, slice(channel, min(channel + channels_each, channels)))

    def part(self, x: Tensor) -> Tensor:
        """The block's part of `[B, T, D]`, `[B, D]` or `[D]`."""
        return x[self.channels] if x.dim() == 1 else x[self.rows, ..., self.channels]

    def slabs(self, limit: int | None = None) -> list[Slab]:
        """All slabs in order, or those that hold the first `limit` tokens."""
        return slabs(self.length, self.chunk, self.chunks, limit)

    def meets(self, slab: Slab) -> bool:
        """Whether some row does not go on through the slab in one document."""
        return bool(self.marked[slab.start : slab.stop].any())

    @cached_property
    def ids(self) -> Tensor:
        """The documents of the tokens `[rows, 1 + T]`, one more before the first token, to look back to."""
        ids = self.documents.ids(self.device)
        return torch.cat([ids[:, :1], ids], dim=1)
