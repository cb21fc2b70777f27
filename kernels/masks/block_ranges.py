"""Blocks: which blocks of keys a block of queries sees, or the other way round, and which of them need no mask."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..documents import expanded
from .pattern import Tile


class BlockRanges(NamedTuple):
    """For block n of the B·N blocks of a tile's queries (or keys), half-open ranges of blocks of the other side.

    Those in which every pair is visible are `bounds[offsets[2n] : offsets[2n+1]]`, those that need the mask
    `bounds[offsets[2n+1] : offsets[2n+2]]`. Blocks in no range have no visible pair. Both are int32; their size
    follows the number of blocks and pieces, never their product.
    """

    offsets: Tensor
    bounds: Tensor


def key_ranges(tile: Tile, query_block: int, key_block: int, device: torch.device | str = "cpu") -> BlockRanges:
    """Ranges of blocks of `key_block` keys for every block of `query_block` queries, row by row; kept by the tile."""
    return tile.on(device, _ranges, "keys", query_block, key_block)


def query_ranges(tile: Tile, key_block: int, query_block: int, device: torch.device | str = "cpu") -> BlockRanges:
    """Ranges of blocks of `query_block` queries for every block of `key_block` keys, row by row; kept by the tile."""
    return tile.on(device, _ranges, "queries", key_block, query_block)


def _ranges(tile: Tile, of: str, block: int, other_block: int) -> BlockRanges:
    if of == "keys":
        tokens, run, other, partners = tile.queries, tile.pieces.queries, tile.pieces.keys, tile.mask.keys_of
    else:
        tokens, run, other, partners = tile.keys, tile.pieces.keys, tile.pieces.queries, tile.mask.queries_of
    number = -(-tokens.length // block)
    begin, end = run.start // block, (run.stop - 1) // block + 1
    owner, place = expanded(end - begin)
    n, run, other = begin[owner] + place, run.at(owner), other.at(owner)  # every block of every piece
    start, stop = torch.maximum(run.start, n * block), torch.minimum(run.stop, (n + 1) * block)
    position = start - run.start + run.position
    some, every = partners(position, position + stop - start)
    shift = other.start - other.position  # from a position to its index
    alone = stop - start == (tokens.length - n * block).clamp(max=block)  # else the block has other tokens too
    at, intervals = run.row * number + n, []
    for whole, each in ((False, some), (True, every)):
        for low, high in each:
            low = torch.maximum(low, other.position) + shift
            high = torch.minimum(high, other.end_position) + shift
            kept = alone & (low < high) if whole else low < high
            if not whole:  # the blocks that they touch, rather than those that they fill
                low, high = low - other_block + 1, high + other_block - 1
            low, high = -(-low // other_block), high // other_block
            listed = torch.stack([at, low, high, torch.full_like(at, whole)], dim=1)
            intervals.append(listed[kept & (low < high)])
    return _swept(torch.cat(intervals), number * tokens.batch)


def _swept(intervals: Tensor, blocks: int) -> BlockRanges:
    """Ranges without overlaps, from intervals (block, start, stop, whole): a whole one covers one that needs the mask.

    Borders of intervals are gone through in order, with the number of intervals of both kinds that are open.
    """
    block, start, stop, whole = intervals.unbind(1)
    ones = torch.ones_like(block)
    key = (torch.cat([block, block]) << 32) + torch.cat([start, stop])
    opened = torch.cat([torch.stack([ones, whole], dim=1), -torch.stack([ones, whole], dim=1)])
    border, index = torch.unique(key, return_inverse=True)
    open_after = torch.zeros(len(border), 2, dtype=torch.int64).index_add_(0, index, opened).cumsum(0)
    kind = torch.where(open_after[:, 1] > 0, 0, torch.where(open_after[:, 0] > 0, 1, 2))  # 2: none is open
    changes = torch.cat([torch.ones(min(1, len(kind)), dtype=torch.bool), kind[1:] != kind[:-1]])
    border, kind = border[changes], kind[changes]
    ends = torch.cat([border[1:], border[-1:]])
    listed = kind < 2
    border, ends, kind = border[listed], ends[listed], kind[listed]
    of = 2 * (border >> 32) + kind
    order = of.argsort(stable=True)
    bounds = torch.stack([border & _LOW, ends & _LOW], dim=1)[order].int()
    offsets = torch.searchsorted(of[order].contiguous(), torch.arange(2 * blocks + 1)).int()
    return BlockRanges(offsets, bounds if len(bounds) else torch.zeros(1, 2, dtype=torch.int32))


_LOW = (1 << 32) - 1
