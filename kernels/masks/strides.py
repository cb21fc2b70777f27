"""Strides: bands of every r-th key become bands of neighbours, once the tokens stand by position modulo r.

So backends need to know only bands of neighbouring keys, and work follows the visible pairs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..documents import Documents, expanded
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
    """Some bands of a tile without strides: the order of its queries and keys (None: as they are), and the rest."""

    queries: Order | None
    keys: Order | None
    tile: Tile


def without_strides(tile: Tile, device: torch.device) -> tuple[Part, ...]:
    """Parts that cover every visible pair of a tile once; kept by the tile."""
    if all(band.stride == 1 for band in tile.mask.bands):
        return (Part(None, None, tile),)
    return tile.on(device, _parts)


def _parts(tile: Tile) -> tuple[Part, ...]:
    plain = Bands(tuple(band for band in tile.mask.bands if band.stride == 1)).tile(tile.queries, tile.keys)
    parts = [] if plain is None else [Part(None, None, plain)]
    parts += [part for band in tile.mask.bands if band.stride > 1 for part in _strided(tile, band)]
    return tuple(parts)


def _strided(tile: Tile, band: Band) -> list[Part]:
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
