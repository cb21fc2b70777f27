"""The divergence by parts: some queries against some keys of their document, or against the keys that they list."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..block_sparse.visits import add_to_listed, listed_keys
from ..blocks import BlockTile
from ..dispatch import at_a_time
from ..gathered import GatheredTile
from ..masks import Tile
from .parts import Part

if TYPE_CHECKING:
    from . import IndexInputs

SCORES = 1 << 20  # of a part on a CPU, see `at_a_time`
KEYS = 2048  # at a time
QUERIES = 256


class _Cut(NamedTuple):
    """A part, and its keys: a range of row indices, or for each query its own, int64 `[B, C, J, N]`."""

    part: Part
    index_k: Tensor  # [B, N, D] or [B, C, J, N, D]
    keys: tuple[slice, slice] | Tensor


def _cuts(
    inputs: IndexInputs, received: tuple[Tensor, ...], tile: Any, scale: float, index_scale: float
) -> Iterator[_Cut]:
    cuts = _dense
    if inputs.blocks is not None:
        listed = inputs.blocks.shape[3] * tile.layout.block_size
        number, groups = received[0].shape[1:3]
        cuts = _listed if number > listed * gather_from(inputs.q.shape[2] // groups) else _masked
    return cuts(inputs, received, tile, scale, index_scale)


def gather_from(sharing: int) -> float:
    """How many keys there have to be for each that a query lists, for gathering to be faster than computing all scores.

    As timed on a CPU: gathered keys are read once for all `sharing` heads that share them.
    """
    return min(16.0, 2 + 40 / (1 + sharing))


def _dense(
    inputs: IndexInputs, received: tuple[Tensor, ...], tile: Tile, scale: float, index_scale: float
) -> Iterator[_Cut]:
    dtype, (k, index_k), heads = inputs.q.dtype, received, inputs.q.shape[2]
    step = min(QUERIES, max(16, at_a_time(SCORES, k.device) // (heads * KEYS)))
    queries, keys = (torch.stack(runs, dim=1).tolist() for runs in tile.pieces)
    for (row, _, start, length, position), (_, _, key_start, key_length, key_position) in zip(
        queries, keys, strict=True
    ):
        rows, to_key = slice(row, row + 1), key_start - key_position
        for low in range(0, length, step):
            high = min(low + step, length)
            place = rows, slice(start + low, start + high)
            at = torch.arange(position + low, position + high, device=k.device)
            q = inputs.q[place].unflatten(2, (k.shape[2], -1))
            weights = None if inputs.weights is None else inputs.weights[place]
            for first in range(key_position, min(key_position + key_length, position + high), KEYS):
                last = min(first + KEYS, key_position + key_length, position + high)
                here = rows, slice(first + to_key, last + to_key)
                index_keys = index_k[here].squeeze(2).to(dtype)
                scores = torch.einsum("bcgrk,bsgk->bcgrs", q, k[here].to(dtype)).mul_(scale).flatten(2, 3)
                products = torch.einsum("bcid,bsd->bcis", inputs.index_q[place], index_keys).mul_(index_scale)
                hidden = torch.arange(first, last, device=k.device) > at.unsqueeze(1)
                yield _Cut(Part(place, scores, products, weights, hidden[None, :, None]), index_keys, here)


def _masked(
    inputs: IndexInputs, received: tuple[Tensor, ...], tile: BlockTile, scale: float, index_scale: float
) -> Iterator[_Cut]:
    """All keys, those hidden that are not listed."""
    assert inputs.blocks is not None
    dtype, (k, index_k), (batch, length) = inputs.q.dtype, received, inputs.q.shape[:2]
    if not k.shape[1]:
        return
    of_keys, documents, positions = _keys(tile, k)
    count = tile.layout.count
    step = min(QUERIES, max(1, at_a_time(SCORES, k.device) // (batch * inputs.q.shape[2] * k.shape[1])))
    index_keys, everywhere = index_k.squeeze(2).to(dtype), (slice(None), slice(None))
    keys, document, position = k.to(dtype), tile.queries.ids(k.device), tile.queries.positions(k.device)
    for low in range(0, length, step):
        place = slice(None), slice(low, min(low + step, length))
        blocks = inputs.blocks[place].long()
        listed = torch.zeros(*blocks.shape[:3], count + 1, dtype=torch.bool, device=k.device)
        listed.scatter_(3, torch.where((blocks < 0) | (blocks >= count), count, blocks), True)
        listed[..., count] = False
        shown = (documents.unsqueeze(1) == document[place].unsqueeze(2)) & (
            positions.unsqueeze(1) <= position[place].unsqueeze(2)
        )
        seen = listed.gather(3, of_keys[:, None, None].expand(*blocks.shape[:3], -1)) & shown.unsqueeze(2)
        q = inputs.q[place].unflatten(2, (k.shape[2], -1))
        scores = torch.einsum("bcgrk,bsgk->bcgrs", q, keys).mul_(scale).flatten(2, 3)
        products = torch.einsum("bcid,bsd->bcis", inputs.index_q[place], index_keys).mul_(index_scale)
        weights = None if inputs.weights is None else inputs.weights[place]
        yield _Cut(Part(place, scores, products, weights, ~seen), index_keys, everywhere)


def _keys(tile: BlockTile, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`[B, S]` each: the keys' blocks, int64, one past the last for none, their documents and their positions."""
    whole = tile.tile if isinstance(tile, GatheredTile) else tile
    columns = whole.on(k.device, _blocks_of_keys), tile.keys.ids(k.device), tile.keys.positions(k.device)
    if isinstance(tile, GatheredTile):
        at, nothing = tile.columns(k.shape[1]), (tile.layout.count, -1, 0)
        columns = tuple(
            torch.nn.functional.pad(x, (0, 1), value=value).gather(1, at)
            for x, value in zip(columns, nothing, strict=True)
        )
    of_keys, documents, positions = columns
    return of_keys, documents, positions


def _blocks_of_keys(tile: BlockTile) -> Tensor:
    ids = tile.layout.ids(tile.keys).long()
    return torch.where(ids < 0, tile.layout.count, ids)


def _listed(
    inputs: IndexInputs, received: tuple[Tensor, ...], tile: BlockTile, scale: float, index_scale: float
) -> Iterator[_Cut]:
    assert inputs.blocks is not None
    dtype, (k, index_k), (batch, length) = inputs.q.dtype, received, inputs.q.shape[:2]
    lists, groups, number = inputs.lists, k.shape[2], inputs.blocks.shape[3] * tile.layout.block_size
    dims = groups * k.shape[3] + lists * index_k.shape[3]
    step = min(QUERIES, max(1, 8 * at_a_time(SCORES, k.device) // (batch * number * max(dims, 1))))
    row = torch.arange(batch, device=k.device).view(-1, 1, 1, 1)
    group = torch.arange(groups, device=k.device).view(lists, -1, 1)
    if not k.shape[1]:
        return
    for low in range(0, length, step):
        high = min(low + step, length)
        place = slice(None), slice(low, high)
        keys, seen = listed_keys(inputs.blocks, tile, k.shape[1], low, high)  # [B, C, J, N]
        own = k[row.unsqueeze(-1), keys.unsqueeze(3), group].to(dtype)  # [B, C, J, G / J, N, K]
        q = inputs.q[place].unflatten(2, (lists, groups // lists, -1))
        scores = torch.einsum("bcjprk,bcjpnk->bcjprn", q, own).mul_(scale).flatten(2, 4)
        index_keys = index_k[row, keys, 0].to(dtype)  # [B, C, J, N, D]
        index_q = inputs.index_q[place].unflatten(2, (lists, -1))
        products = torch.einsum("bcjid,bcjnd->bcjin", index_q, index_keys).mul_(index_scale).flatten(2, 3)
        weights = None if inputs.weights is None else inputs.weights[place]
        yield _Cut(Part(place, scores, products, weights, ~seen), index_keys, keys)


def lse(inputs: IndexInputs, received: tuple[Tensor, ...], tile: Any, scale: float, index_scale: float) -> Tensor:
    """See `reference`."""
    heads = inputs.q.shape[2] + inputs.lists
    total = inputs.q.new_full((*inputs.q.shape[:2], heads), float("-inf"))
    for part, *_ in _cuts(inputs, received, tile, scale, index_scale):
        total[part.place] = torch.logaddexp(total[part.place], part.lse())
    return total


def divergence(
    inputs: IndexInputs, received: tuple[Tensor, ...], tile: Any, scale: float, index_scale: float
) -> tuple[Tensor, Tensor]:
    """See `reference`."""
    total, mass = (inputs.q.new_zeros(*inputs.q.shape[:2], inputs.lists) for _ in range(2))
    for part, *_ in _cuts(inputs, received, tile, scale, index_scale):
        more, more_mass = part.divergence(inputs)
        total[part.place] += more
        mass[part.place] += more_mass
    return total, mass


def backward(
    dout: Tensor, inputs: IndexInputs, received: tuple[Tensor, ...], tile: Any, scale: float, index_scale: float
) -> tuple[Tensor, Tensor | None, Tensor]:
    """See `reference`."""
    batch, number, _, dim = received[1].shape
    dq, dk = torch.zeros_like(inputs.index_q), inputs.q.new_zeros(batch, number, dim)
    dweights = None if inputs.weights is None else torch.zeros_like(inputs.weights)
    for part, index_k, keys in _cuts(inputs, received, tile, scale, index_scale):
        dproducts, more = part.backward(dout, inputs)
        dproducts.mul_(index_scale)
        if dweights is not None and more is not None:
            dweights[part.place] += more
        index_q = inputs.index_q[part.place]
        if not isinstance(keys, Tensor):
            dq[part.place] += torch.einsum("bcis,bsd->bcid", dproducts, index_k)
            dk[keys] += torch.einsum("bcis,bcid->bsd", dproducts, index_q)
            continue
        dproducts, index_q = dproducts.unflatten(2, (inputs.lists, -1)), index_q.unflatten(2, (inputs.lists, -1))
        dq[part.place] += torch.einsum("bcjin,bcjnd->bcjid", dproducts, index_k).flatten(2, 3)
        row = torch.arange(len(dk), device=keys.device).view(-1, 1, 1, 1)
        add_to_listed(dk, (row, keys), torch.einsum("bcjin,bcjid->bcjnd", dproducts, index_q))
    return dq, dweights, dk.unsqueeze(2)
