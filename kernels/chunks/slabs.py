"""How chunked sweeps cut their work: blocks of rows and heads, slabs of chunks in time, masks where documents meet.

A slab is a few chunks of every lane (a row and head) of a block, copied as `[chunks, rows, heads, C, D]` into
workspaces that stay in cache: batched products run at full speed there, and at half once a batch spans the sequence.
Chunks lie on a regular grid whatever the packing. A chunk in which documents meet has masks instead: which tokens see
one another, which see the state that enters the chunk, which reach the state that leaves it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ..documents import Documents

CHUNK = 64
MATRICES = 32  # chunks times lanes in a slab: what keeps a slab's workspaces within a core's caches


class Block(NamedTuple):
    """A part of the rows and heads that is swept over the whole sequence by itself."""

    rows: slice
    heads: slice

    def of(self, x: Tensor, heads: int) -> Tensor:
        """The block's part of `[B, T, G, …]`, where G groups stand for `heads` heads."""
        repeats = heads // x.shape[2]
        return x[self.rows, :, self.heads.start // repeats : self.heads.stop // repeats]

    def of_state(self, state: Tensor) -> Tensor:
        return state[self.rows, self.heads]


def blocks(batch: int, heads: int, groups: int) -> Iterator[Block]:
    """Blocks of at most MATRICES lanes, or as few as whole groups of heads allow."""
    repeats = heads // groups
    sizes = [n for n in range(repeats, heads + 1, repeats) if heads % n == 0]
    heads_each = max([n for n in sizes if n <= MATRICES], default=repeats)
    rows_each = max(1, MATRICES // heads_each)
    for row in range(0, batch, rows_each):
        for head in range(0, heads, heads_each):
            yield Block(slice(row, min(row + rows_each, batch)), slice(head, head + heads_each))


class Slab(NamedTuple):
    """Tokens `start..stop` as `chunks` chunks, the last of them padded where the sequence ends."""

    start: int
    stop: int
    first: int  # index of its first chunk
    chunks: int

    @property
    def tokens(self) -> int:
        return self.stop - self.start


def slabs(length: int, chunk: int, chunks: int, limit: int | None = None) -> list[Slab]:
    """All slabs of so many chunks in order, or those that hold the first `limit` tokens."""
    size, end = chunks * chunk, length if limit is None else limit
    stops = [(start, min(start + size, length)) for start in range(0, end, size)]
    return [Slab(start, stop, start // chunk, -(-(stop - start) // chunk)) for start, stop in stops]


class Masks(NamedTuple):
    """0/1 factors for chunks in which documents meet, each broadcastable over `[chunks, rows, heads, …]`."""

    same: Tensor  # [chunks, rows, 1, C, C]: query i and key j <= i are of one document
    enter: Tensor  # [chunks, rows, 1, C, 1]: the state that enters the chunk is of this token's document
    leave: Tensor  # [chunks, rows, 1, C, 1]: this token is of the document that the chunk ends in
    through: Tensor  # [chunks, rows, 1, 1, 1]: the entering state's document goes on beyond the chunk


@dataclass(frozen=True)
class Grid:
    """The slabs of one block: `rows` and `heads` lanes of `length` tokens in chunks of `chunk`."""

    rows: int
    heads: int
    length: int
    dtype: torch.dtype
    device: torch.device
    longest_chunk: int = CHUNK
    matrices: int = MATRICES

    @cached_property
    def chunk(self) -> int:
        """C: a power of two, and no longer than the sequence makes useful."""
        return min(self.longest_chunk, 1 << max(0, self.length - 1).bit_length())

    @cached_property
    def lanes(self) -> int:
        return self.rows * self.heads

    @cached_property
    def chunks(self) -> int:
        """Chunks in a full slab."""
        return min(max(1, self.matrices // self.lanes), -(-self.length // self.chunk))

    def slabs(self, limit: int | None = None) -> list[Slab]:
        """All slabs in order, or those that hold the first `limit` tokens."""
        return slabs(self.length, self.chunk, self.chunks, limit)

    @cached_property
    def sizes(self) -> set[int]:
        """The numbers of chunks that slabs have."""
        return {slab.chunks for slab in self.slabs()}

    def workspace(self, dim: int, *, zero: bool = False) -> Tensor:
        """Room for `[chunks, rows, heads, C, dim]`; with `zero` it holds zeros, which takes a pass over memory."""
        shape = (self.chunks, self.rows, self.heads, self.chunk, dim)
        return (torch.zeros if zero else torch.empty)(shape, dtype=self.dtype, device=self.device)


class Lanes:
    """A tensor `[B, T, G, D]` of a block, read and written slab by slab as `[N, C, D]` with N = chunks * lanes.

    Groups become heads on reading and are summed on writing; what is past the end is read as 0.
    """

    def __init__(self, x: Tensor, grid: Grid) -> None:
        rows, length, groups, dim = x.shape
        size = grid.chunk
        self.size, self.whole = size, length // size
        cut = self.whole * size
        self.chunks = x[:, :cut].unflatten(1, (self.whole, size)).permute(1, 0, 3, 2, 4).unsqueeze(3)
        self.rest = x[:, cut:].permute(0, 2, 1, 3).unsqueeze(2)
        self.work = grid.workspace(dim)
        self.grouped = self.work.view(-1, rows, groups, grid.heads // groups, size, dim)
        self.flat = {n: self.work[:n].view(-1, size, dim) for n in grid.sizes}

    def load(self, slab: Slab, scale: float = 1.0) -> Tensor:
        """The slab times `scale`, in the workspace."""
        whole = min(slab.chunks, self.whole - slab.first)
        if whole:
            target = self.grouped if whole == self.grouped.shape[0] else self.grouped[:whole]
            _copy(self.chunks[slab.first : slab.first + whole], scale, target)
        if whole < slab.chunks:
            rest = self.rest.shape[-2]
            _copy(self.rest, scale, self.grouped[whole, ..., :rest, :])
            self.grouped[whole, ..., rest:, :].zero_()
        return self.flat[slab.chunks]

    def store(self, slab: Slab, *, add: bool = False, scale: float = 1.0) -> None:
        """Writes the workspace times `scale` to the slab, or adds it."""
        values = self.grouped.sum(3, keepdim=True) if self.grouped.shape[3] > 1 else self.grouped
        whole = min(slab.chunks, self.whole - slab.first)
        cut = values if whole == values.shape[0] else values[:whole]
        parts = [(self.chunks[slab.first : slab.first + whole], cut)] if whole else []
        if whole < slab.chunks:
            parts.append((self.rest, values[whole, ..., : self.rest.shape[-2], :]))
        for target, part in parts:
            if add:
                target.add_(part, alpha=scale)
            else:
                _copy(part, scale, target)


class LastSteps(Lanes):
    """A tensor of tokens, `[B, T, G, D]`, of each of which the grid has N = length / T steps.

    It is read at each token's last step, as 0 at the others, and written from there.
    """

    def __init__(self, x: Tensor, grid: Grid) -> None:
        super().__init__(x[:, :0], grid)
        self.tokens = x.permute(0, 2, 1, 3).unsqueeze(2)
        self.steps = grid.length // x.shape[1]

    def load(self, slab: Slab, scale: float = 1.0) -> Tensor:
        self.work[: slab.chunks].zero_()
        for tokens, steps in self._pairs(slab, self.grouped):
            _copy(tokens, scale, steps)
        return self.flat[slab.chunks]

    def store(self, slab: Slab, *, add: bool = False, scale: float = 1.0) -> None:
        values = self.grouped.sum(3, keepdim=True) if self.grouped.shape[3] > 1 else self.grouped
        for tokens, steps in self._pairs(slab, values):
            if add:
                tokens.add_(steps, alpha=scale)
            else:
                _copy(steps, scale, tokens)

    def _pairs(self, slab: Slab, values: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Of each chunk: its tokens, and their last steps among the values."""
        for chunk in range(slab.chunks):
            start = slab.start + chunk * self.size
            stop = min(start + self.size, slab.stop)
            first, end = start // self.steps, stop // self.steps  # tokens that end in the chunk
            if first < end:
                last = (first + 1) * self.steps - 1 - start
                yield self.tokens[..., first:end, :], values[chunk, ..., last : stop - start : self.steps, :]


def _copy(x: Tensor, scale: float, out: Tensor) -> None:
    """out = scale x, in one go where that does not round in x's narrower type."""
    if scale == 1.0:
        out.copy_(x)
    elif x.dtype.itemsize < out.dtype.itemsize:
        out.copy_(x).mul_(scale)
    else:
        torch.mul(x.expand_as(out), scale, out=out)  # groups for their heads


class States:
    """States, or their gradients, at the borders of a slab's chunks: `[chunks + 1, lanes, K, V]`.

    The first is zero until it is written, and no other is anything; or they are those of `each`.
    """

    def __init__(self, grid: Grid, key_dim: int, value_dim: int, each: Tensor | None = None) -> None:
        if each is None:
            shape = (grid.chunks + 1, grid.lanes, key_dim, value_dim)
            each = torch.empty(shape, dtype=grid.dtype, device=grid.device)
            each[0].zero_()
        self.each = each
        self.at = self.each.unbind(0)
        sizes = grid.sizes
        self.before = {n: self.each[:n].view(-1, key_dim, value_dim) for n in sizes}  # each chunk's entering state
        self.after = {n: self.each[1 : n + 1].view(-1, key_dim, value_dim) for n in sizes}  # … and its leaving one


def on_host(x: Tensor) -> bool:
    """Whether reading a value of x waits for no other device: elsewhere no branch may depend on one."""
    return x.device.type == "cpu"


def fade(x: Tensor) -> bool:
    """Zeroes, in place, what has decayed so far that products with it would be subnormal; whether anything is left.

    CPUs multiply subnormal numbers many times slower than others. On other devices x stays, and something may be left.
    """
    if not on_host(x):
        return True
    limits = torch.finfo(x.dtype)
    x.mul_(x.abs() >= limits.tiny / limits.eps)
    return bool(x.any())


def borders(documents: Documents) -> Tensor:
    """bool `[T]`, on the host: tokens at which some row does not go on with the document of the token before."""
    marked = torch.zeros(documents.length, dtype=torch.bool)
    start = documents.columns.start
    marked[start[start > 0]] = True
    if documents.has_padding:
        marked |= (documents.ids() < 0).any(0)
    return marked


def rows_of(documents: Documents, rows: slice) -> Documents:
    """The documents of some rows, kept with those of all."""
    return documents.derive(Documents.rows, rows.start, rows.stop)


class Borders:
    """Where the documents of a block's rows meet, or end in padding."""

    def __init__(self, documents: Documents, grid: Grid) -> None:
        self.grid = grid
        self.marked = documents.derive(borders)
        self.ids: Tensor | None = None
        if bool(self.marked.any()):
            size = grid.chunks * grid.chunk
            tail = -documents.length % size
            own = documents.ids(grid.device)
            # One id before the first token, so that every chunk can look back; the last token's beyond the end.
            self.ids = torch.cat([own[:, :1], own, own[:, -1:].expand(-1, tail)], dim=1)

    def met(self, slabs: list[Slab]) -> list[bool]:
        """Whether documents meet in each of some slabs, or end in padding."""
        if self.ids is None:
            return [False] * len(slabs)
        return [bool(self.marked[slab.start : slab.stop].any()) for slab in slabs]

    def masks(self, slab: Slab) -> Masks | None:
        """The masks of a slab, or None where each of its rows goes on through it in one document."""
        if self.ids is None or not bool(self.marked[slab.start : slab.stop].any()):
            return None
        size, dtype = self.grid.chunk, self.grid.dtype
        end = slab.start + slab.chunks * size
        ids = self.ids[:, slab.start + 1 : end + 1].unflatten(1, (slab.chunks, size)).transpose(0, 1)
        before = self.ids[:, slab.start : end : size].T.unsqueeze(-1)
        real = ids >= 0
        same = ((ids.unsqueeze(-1) == ids.unsqueeze(-2)) & real.unsqueeze(-1)).tril()
        enter, leave = (ids == before) & real, (ids == ids[..., -1:]) & real
        return Masks(
            same[:, :, None].to(dtype),
            enter[:, :, None, :, None].to(dtype),
            leave[:, :, None, :, None].to(dtype),
            enter[:, :, None, -1:, None].to(dtype),
        )
