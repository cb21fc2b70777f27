"""Blocks: which blocks of keys a block of queries sees, or the other way round, and which of them need no mask."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .pattern import Intervals, Tile, intersection, union


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
    tokens = tile.queries if of == "keys" else tile.keys
    number = -(-tokens.length // block)
    seen: list[Intervals] = [[] for _ in range(number * tokens.batch)]
    whole: list[Intervals] = [[] for _ in range(number * tokens.batch)]
    partners = tile.mask.keys_of if of == "keys" else tile.mask.queries_of
    for row, query, key in tile.pieces:
        run, other = (query, key) if of == "keys" else (key, query)
        shift = other.start - other.position  # from a position to its index
        for n in range(run.start // block, -(-run.stop // block)):
            start, stop = max(run.start, n * block), min(run.stop, (n + 1) * block)
            position = start - run.start + run.position
            inside = [(other.position, other.end_position)]
            some, every = (intersection(x, inside) for x in partners(position, position + stop - start))
            at = row * number + n
            seen[at] += [((a + shift) // other_block, -(-(b + shift) // other_block)) for a, b in some]
            if stop - start == min(block, tokens.length - n * block):  # else the block has other tokens too
                whole[at] += [(-(-(a + shift) // other_block), (b + shift) // other_block) for a, b in every]
    offsets, bounds = [0], []
    for some, every in zip(seen, whole, strict=True):
        every = union(every)
        bounds += every
        offsets.append(len(bounds))
        bounds += _without(union(some), every)
        offsets.append(len(bounds))
    return BlockRanges(
        torch.tensor(offsets, dtype=torch.int32), torch.tensor(bounds or [(0, 0)], dtype=torch.int32).view(-1, 2)
    )


def _without(intervals: Intervals, removed: Intervals) -> Intervals:
    """The parts of sorted, disjoint intervals that are outside other such intervals."""
    left: Intervals = []
    for a, b in intervals:
        for c, d in removed:
            if c >= b or d <= a:
                continue
            if a < c:
                left.append((a, c))
            a = d
        if a < b:
            left.append((a, b))
    return left
