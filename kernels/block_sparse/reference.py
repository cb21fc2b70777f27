"""Block-sparse attention as it is defined: the dense matrix of every query against every key, masked by the lists."""

from __future__ import annotations

import torch
from torch import Tensor

from ..attend import Gradient
from ..blocks import BlockTile
from ..gathered import GatheredTile
from ..softmax.reference import dense_attend, dense_backward


def visible(blocks_BLJM: Tensor, tile: BlockTile, keys: int) -> Tensor:
    """bool `[B, J, T, S]`: the mask, and that the key's block is in a query's list; S is `keys`, J heads have lists."""
    device = blocks_BLJM.device
    if isinstance(tile, GatheredTile):
        seen_BJTN = torch.nn.functional.pad(visible(blocks_BLJM, tile.tile, tile.keys.length), (0, 1))
        return seen_BJTN.gather(-1, tile.columns(keys)[:, None, None].expand(*seen_BJTN.shape[:3], -1))
    seen_BTS = tile.mask.dense(tile.queries, tile.keys, device)
    blocks_BTJM = blocks_BLJM.repeat_interleave(tile.query_block, dim=1)[:, : tile.queries.length]
    ids_BS = tile.layout.ids(tile.keys).to(device)
    listed_BTJS = torch.zeros(*blocks_BTJM.shape[:3], ids_BS.shape[1], dtype=torch.bool, device=device)
    for blocks_BTJ in blocks_BTJM.unbind(-1):
        listed_BTJS |= (blocks_BTJ.unsqueeze(-1) == ids_BS[:, None, None]) & (blocks_BTJ.unsqueeze(-1) >= 0)
    return (listed_BTJS & seen_BTS.unsqueeze(2)).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, *, tile: BlockTile, scale: float) -> tuple[Tensor, Tensor]:
    """See `dense_attend`, with the keys that are listed and visible."""
    return dense_attend(q, k, v, visible(blocks, tile, k.shape[1]), scale)


def attend_backward(
    gradient: Gradient, q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, *, tile: BlockTile, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See `dense_backward`, with the keys that are listed and visible."""
    dq, dk, dv = dense_backward(gradient, q, k, v, visible(blocks, tile, k.shape[1]), scale)
    return dq, dk, dv
