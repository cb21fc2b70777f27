"""Strides and blocks: how bands that have one become plain bands, of other documents.

Bands of every r-th key become bands of neighbours once the tokens stand by position modulo r. Bands within blocks of
positions become bands without blocks where each block is a document. So backends need to know only bands of
neighbouring keys, and work follows the visible pairs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..documents import PADDING, Documents, expanded
from .pattern import FAR, Band, Bands, Tile


class Order(NamedTuple):
    """Tokens in another order. `index` int64 `[B, M]`: which of T tokens stands at each place, T for none.

    `places` int64 `[B, T]`: where each token stands, M for nowhere.
    """

    index: Tensor
    places: Tensor

    def take(self, x: Tensor) -> Tensor:
        """`[B, T, …]` to `[B, M, …]`, with 0 where no token stands."""
        return _rows(x, self.index, 0.0)

    def back(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """`[B, M, …]` to `[B, T, …]`, with `fill` for tokens that stand nowhere."""
        return _rows(x, self.places, fill)


def _rows(x: Tensor, index: Tensor, fill: float) -> Tensor:
    """x `[B, N, …]` at `[B, M]`, of which N stands for `fill`."""
    x = torch.cat([x, x.new_full((x.shape[0], 1, *x.shape[2:]), fill)], dim=1)
    first = torch.arange(x.shape[0], device=x.device).unsqueeze(1) * x.shape[1]
    return x.flatten(0, 1).index_select(0, (index + first).flatten()).unflatten(0, index.shape)


class Part(NamedTuple):
    """Some bands of a tile, made plain: the order of its queries and keys (None: as they are), and the rest."""

    queries: Order | None
    keys: Order | None
    tile: Tile


def with_plain_bands(tile: Tile, device: torch.device) -> tuple[Part, ...]:
    """Parts that cover every visible pair of a tile once; kept by the tile."""
    if all(band.is_plain for band in tile.mask.bands):
        return (Part(None, None, tile),)
    return tile.on(device, _parts)


def _parts(tile: Tile) -> tuple[Part, ...]:
    plain = Bands(tuple(band for band in tile.mask.bands if band.is_plain)).tile(tile.queries, tile.keys)
    parts = [] if plain is None else [Part(None, None, plain)]
    for band in tile.mask.bands:
        if not band.is_plain:
            queries, keys = (tile.queries, tile.keys) if band.block == FAR else _by_block(tile, band.block)
            inside = Bands((band._replace(block=FAR),)).tile(queries, keys)
            parts += [] if inside is None else [Part(None, None, inside)] if band.stride == 1 else _strided(inside)
    return tuple(parts)


def _by_block(tile: Tile, size: int) -> tuple[Documents, Documents]:
    """Queries and keys, cut so that each block of `size` positions of a document is a document of its own."""
    cut = [_cut(documents, size) for documents in (tile.queries, tile.keys)]
    numbers = torch.unique(torch.cat([block for _, block in cut]), return_inverse=True)[1]  # small ones, of both sides
    queries, keys = numbers.split([len(block) for _, block in cut])
    for (table, _), number in zip(cut, (queries, keys), strict=True):
        table[:, 1] = torch.where(table[:, 1] == PADDING, PADDING, number)
    (of_queries, _), (of_keys, _) = cut
    return (
        Documents(of_queries, tile.queries.batch, tile.queries.length),
        Documents(of_keys, tile.keys.batch, tile.keys.length),
    )


def _cut(documents: Documents, size: int) -> tuple[Tensor, Tensor]:
    """The table with every run cut where a block begins, and of each piece its document and block as one number."""
    runs = documents.columns
    first = runs.position // size
    each = torch.where(runs.real, (runs.end_position - 1) // size - first + 1, 1)
    owner, place = expanded(each)
    block, runs = first[owner] + place, runs.at(owner)
    low = torch.where(runs.real, torch.maximum(runs.position, block * size), runs.position)
    high = torch.where(runs.real, torch.minimum(runs.end_position, (block + 1) * size), runs.end_position)
    start = runs.start + low - runs.position
    return torch.stack([runs.row, runs.document, start, high - low, low], dim=1), (runs.document << 32) + block


def _strided(tile: Tile) -> list[Part]:
    """A tile with one band, without blocks."""
    (band,) = tile.mask.bands
    back, ahead = (FAR if far == FAR else far // band.stride for far in (band.back, band.ahead))
    queries, query_order = _by_remainder(tile.queries, band.stride, 0, FAR)
    keys, key_order = _by_remainder(tile.keys, band.stride, band.first, band.last)
    reordered = Bands((Band(back=back, ahead=ahead),)).tile(queries, keys)
    return [] if reordered is None else [Part(query_order, key_order, reordered)]


def _by_remainder(documents: Documents, stride: int, first: int, last: int) -> tuple[Documents, Order]:
    """Tokens at positions first..last, each run's by position modulo `stride`: one document per remainder."""
    runs = documents.columns.at(documents.columns.real)
    low, high = runs.position.clamp(min=first), runs.end_position.clamp(max=last)
    owner, place = expanded((high - low).clamp(min=0, max=stride))
    runs, position = runs.at(owner), low[owner] + place
    length = -((position - high[owner]) // stride)
    before = length.cumsum(0) - length
    tokens_of_rows = torch.zeros(documents.batch, dtype=torch.int64).index_add_(0, runs.row, length)
    start = before - (tokens_of_rows.cumsum(0) - tokens_of_rows)[runs.row]
    table = torch.stack(
        [runs.row, runs.document * stride + position % stride, start, length, position // stride], dim=1
    )
    most = int(tokens_of_rows.max()) if len(tokens_of_rows) else 0
    index = torch.full((documents.batch, most), documents.length)
    places = torch.full((documents.batch, documents.length), most)
    owner, place = expanded(length)
    row, to, token = runs.row[owner], start[owner] + place, (position + runs.start - runs.position)[owner]
    index[row, to] = token + place * stride
    places[row, token + place * stride] = to
    return Documents.padded(table, documents.batch, most), Order(index, places)
