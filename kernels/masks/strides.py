"""Strides: bands of every r-th key become bands of neighbours, once the tokens stand by position modulo r.

So backends need to know only bands of neighbouring keys, and work follows the visible pairs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..documents import PADDING, Documents, Run
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
    rows, orders = [], []
    for row in documents.runs:
        runs, tokens, start = [], [torch.empty(0, dtype=torch.int64)], 0
        for run in row:
            low, high = max(run.position, first), min(run.end_position, last)
            for position in range(low, min(low + stride, high)) if not run.is_padding else ():
                every = torch.arange(position, high, stride) - run.position + run.start
                runs.append(Run(run.document * stride + position % stride, start, len(every), position // stride))
                tokens.append(every)
                start += len(every)
        rows.append((runs, start))
        orders.append(torch.cat(tokens))
    length = max((start for _, start in rows), default=0)
    index = torch.full((documents.batch, length), documents.length)
    places = torch.full((documents.batch, documents.length), length)
    for row, tokens in enumerate(orders):
        index[row, : len(tokens)] = tokens
        places[row, tokens] = torch.arange(len(tokens))
    for runs, start in rows:
        if start < length:
            runs.append(Run(PADDING, start, length - start, 0))
    return Documents.of_runs([runs for runs, _ in rows], length), Order(index, places)
