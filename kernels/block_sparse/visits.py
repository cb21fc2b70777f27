"""Visits: the (query, block) pairs that lists make, sorted by block, so that each block meets its queries at once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..blocks import BlockTile


class Group(NamedTuple):
    """The queries of one piece of a block: `rows[first:last]`; if `full`, all of them see all of it."""

    row: int
    group: int
    start: int
    length: int
    position: int
    first: int
    last: int
    full: bool


class Visits(NamedTuple):
    """Every (token, head with lists, piece of a block) with a visible key, sorted by piece.

    rows: int64 `[visits]`, indices into `[B · J · T]`, J heads with lists; ascending within a group.
    groups: consecutive stretches of `rows`, each of one piece.
    """

    rows: Tensor
    groups: list[Group]


def by_token(blocks: Tensor, tile: BlockTile) -> Tensor:
    """Lists `[B, L, J, M]` as one for each token, `[B, T, J, M]`."""
    if tile.query_block == 1:
        return blocks
    return blocks.repeat_interleave(tile.query_block, dim=1)[:, : tile.queries.length]


def visits_of(blocks: Tensor, tile: BlockTile, groups: int) -> Visits:
    """The visits of lists `[B, L, J, M]` to the blocks' tokens among the tile's keys, which have `groups` heads."""
    device = blocks.device
    ids = by_token(blocks, tile).long()
    batch, length, list_heads, _ = ids.shape
    table = tile.pieces(device)
    parts, _, count, _ = table.shape
    listed = (ids >= 0) & (ids < count)
    row = torch.arange(batch, device=device).view(-1, 1, 1, 1)
    flat = (row * count + ids.clamp(0, max(count - 1, 0))).flatten()
    position = tile.queries.positions(device).view(batch, length, 1, 1)
    document = tile.queries.ids(device).view(batch, length, 1, 1)
    group = torch.arange(list_heads, device=device).view(-1, 1) // (list_heads // groups)
    keys, rows = [], []
    for part in range(parts if count else 0):
        columns = table[part].flatten(0, 1).T.contiguous()
        start, width, owner = (columns[i].index_select(0, flat).view(ids.shape) for i in (2, 1, 3))
        stop = start + width
        visible = tile.mask.count(position, start, stop)
        some, whole = listed & (owner == document) & (visible > 0), visible == width
        at = some.flatten().nonzero().squeeze(1)
        piece = ((row * groups + group) * count + ids) * parts + part
        keys.append((piece * 2 + whole).flatten().index_select(0, at))
        token, head = at // (list_heads * ids.shape[3]), at // ids.shape[3] % list_heads
        rows.append((token // length * list_heads + head) * length + token % length)
    if not keys:
        return Visits(ids.new_empty(0), [])
    key, order = torch.cat(keys).sort(stable=True)
    return Visits(torch.cat(rows).index_select(0, order), _groups(key, table, groups))


def listed_keys(
    blocks: Tensor, tile: BlockTile, number: int, first_query: int = 0, last_query: int | None = None
) -> tuple[Tensor, Tensor]:
    """Of `number` keys those that lists `[B, L, J, M]` name: int64 `[B, T, J, N]`, and bool, which of them are visible.

    N is the same for all lists. A list that names fewer keys has any others in their places, which are not visible.
    With first_query and last_query, of these T queries alone.
    """
    queries = slice(first_query, last_query)
    ids, device = by_token(blocks, tile)[:, queries].long(), blocks.device
    table = tile.pieces(device)
    count, size = table.shape[2], tile.layout.block_size
    listed = (ids >= 0) & (ids < count)
    row = torch.arange(len(ids), device=device).view(-1, 1, 1, 1)
    pieces = table[:, row, ids.clamp(0, max(count - 1, 0))].movedim(0, -2)  # [B, T, J, M, parts, 4]
    start, length, first, owner = (column.unsqueeze(-1) for column in pieces.long().unbind(-1))
    place = torch.arange(size, device=device)
    position, document = (
        x(device)[:, queries].reshape(*ids.shape[:2], *[1] * 4) for x in (tile.queries.positions, tile.queries.ids)
    )
    visible = (place < length) & (owner == document) & listed[..., None, None]
    offset = (first + place).flatten(3)
    seen = tile.mask.visible(position.view(*ids.shape[:2], 1, 1).long(), offset).squeeze(-2)
    return (start + place).clamp(0, number - 1).flatten(3), visible.flatten(3) & seen


def add_to_listed(total: Tensor, index: tuple[Tensor, ...], parts: Tensor) -> None:
    """Adds `parts` `[…, D]` to the rows of `total` `[B, S, …, D]` at `index`, tensors that broadcast together.

    One for each dim of total but the last, as rows may be listed more than once. The same bits at every run.
    """
    if total.device.type != "cpu":
        total.index_put_(index, parts, accumulate=True)  # sorts; `index_add_` there adds in any order
        return
    row = index[0]
    for size, place in zip(total.shape[1:-1], index[1:], strict=True):
        row = row * size + place
    total.view(-1, total.shape[-1]).index_add_(0, row.flatten(), parts.flatten(0, -2))


def _groups(key: Tensor, table: Tensor, groups: int) -> list[Group]:
    parts, _, count, _ = table.shape
    distinct, lengths = torch.unique_consecutive(key, return_counts=True)
    whole, piece = distinct % 2, distinct // 2
    part, block = piece % parts, piece // parts % count
    group, row = piece // (parts * count) % groups, piece // (parts * count * groups)
    lasts = lengths.cumsum(0)
    pieces = table[part, row, block, :3].long()
    columns = torch.cat([torch.stack([row, group], 1), pieces, torch.stack([lasts - lengths, lasts, whole], 1)], 1)
    return [Group(*numbers, full=bool(full)) for *numbers, full in columns.tolist()]
