"""Gathered keys: those of some blocks alone, moved together, as only their device knows which."""

from __future__ import annotations

import torch
from torch import Tensor

from .blocks import BlockTile


def left_out_before(held: Tensor, listed: Tensor) -> Tensor:
    """How many tokens before each block are missing where the tokens of `listed` blocks alone are kept.

    held `[B, count]`: how many tokens each block has among the keys; listed bool `[B, count]`. Blocks stand in the
    order of their ids.
    """
    return held.masked_fill(listed, 0).cumsum(1)


class GatheredTile(BlockTile):
    """A tile whose keys are the tokens of `listed` blocks alone, in their order; lists name no other blocks.

    tile: the same queries against the keys of all blocks. listed: bool `[B, count]`, on the device of the keys, which
    the host does not read: `keys` are those of `tile`.
    """

    tile: BlockTile
    listed: Tensor

    def __init__(self, tile: BlockTile, listed: Tensor) -> None:
        super().__init__(tile.layout, tile.queries, tile.keys, tile.mask, tile.query_block)
        object.__setattr__(self, "tile", tile)
        object.__setattr__(self, "listed", listed)

    def pieces(self, device: torch.device | str = "cpu") -> Tensor:
        return self._moved(self.tile.pieces(device))

    def placed(self, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        table, places = self.tile.placed(device)
        return self._moved(table), places

    def _moved(self, table: Tensor) -> Tensor:
        """Pieces `[R, B, count, …]` of the keys that are left: the others have length 0."""
        start, length = table[..., 0], table[..., 1]
        held = length.sum(0)
        first = start.masked_fill(length == 0, self.keys.length).amin(0)
        padding = (first - (held.cumsum(1) - held)).masked_fill(held == 0, 0)  # before each block, which goes too
        start = start - padding - left_out_before(held, self.listed)
        bounds = torch.stack([start, length.masked_fill(~self.listed, 0)], dim=-1)
        return torch.cat([bounds.to(table.dtype), table[..., 2:]], dim=-1)

    def columns(self, length: int) -> Tensor:
        """int64 `[B, length]`: which key of `tile` stands at each place, one past its last for none."""
        ids = self.layout.ids(self.keys).long().to(self.listed.device)
        kept = torch.nn.functional.pad(self.listed, (0, 1)).gather(1, torch.where(ids < 0, self.listed.shape[1], ids))
        places = torch.where(kept, kept.cumsum(1) - 1, length)
        keys = torch.arange(self.keys.length, device=ids.device).expand_as(ids)
        return ids.new_full((len(ids), length + 1), self.keys.length).scatter_(1, places, keys)[:, :length]


class JoinedTile(BlockTile):
    """A tile whose keys are those of other tiles of the same queries, one after the other.

    tiles: each with the place of its first key.
    """

    tiles: tuple[tuple[int, BlockTile], ...]

    def __init__(self, tiles: tuple[tuple[int, BlockTile], ...]) -> None:
        first = tiles[0][1]
        super().__init__(first.layout, first.queries, first.keys, first.mask, first.query_block)
        object.__setattr__(self, "tiles", tiles)

    def pieces(self, device: torch.device | str = "cpu") -> Tensor:
        tables = []
        for place, tile in self.tiles:
            start, *rest = tile.pieces(device).split([1, 3], dim=-1)
            tables.append(torch.cat([start + place, *rest], dim=-1))
        return torch.cat(tables)

    def placed(self, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        raise NotImplementedError("kernels that need places attend to each tile by itself")
