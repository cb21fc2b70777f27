"""The divergence as it is defined: the dense matrices of every query against every key."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..block_sparse.reference import visible
from ..blocks import BlockTile
from .parts import Part

if TYPE_CHECKING:
    from . import IndexInputs


def whole(inputs: IndexInputs, received: tuple[Tensor, ...], tile: Any, scale: float, index_scale: float) -> Part:
    """All queries against all keys."""
    dtype, (k, index_k) = inputs.q.dtype, received
    if isinstance(tile, BlockTile):
        assert inputs.blocks is not None
        seen_BTJS = visible(inputs.blocks, tile, k.shape[1]).transpose(1, 2)
    else:
        seen_BTJS = tile.mask.dense(tile.queries, tile.keys, k.device).unsqueeze(2)
    k_BSHK = k.to(dtype).repeat_interleave(inputs.q.shape[2] // k.shape[2], dim=2)
    scores_BTHS = scale * torch.einsum("bthk,bshk->bths", inputs.q, k_BSHK)
    products_BTIS = index_scale * torch.einsum("btid,bsd->btis", inputs.index_q, index_k.squeeze(2).to(dtype))
    everywhere = slice(None), slice(None)
    return Part(everywhere, scores_BTHS, products_BTIS, inputs.weights, ~seen_BTJS)


def lse(inputs: IndexInputs, received: tuple[Tensor, ...], tile: Any, scale: float, index_scale: float) -> Tensor:
    """`[B, T, H + J]`: the log-sum-exps of attention and of the index."""
    return whole(inputs, received, tile, scale, index_scale).lse()


def divergence(
    inputs: IndexInputs, received: tuple[Tensor, ...], tile: Any, scale: float, index_scale: float
) -> tuple[Tensor, Tensor]:
    """The sums of p (log p − log r) and of p over these keys, `[B, T, J]`."""
    return whole(inputs, received, tile, scale, index_scale).divergence(inputs)


def backward(
    dout: Tensor, inputs: IndexInputs, received: tuple[Tensor, ...], tile: Any, scale: float, index_scale: float
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients of index_q, weights and index_k."""
    dproducts, dweights = whole(inputs, received, tile, scale, index_scale).backward(dout, inputs)
    dq = index_scale * torch.einsum("btis,bsd->btid", dproducts, received[1].squeeze(2).to(dproducts.dtype))
    dk = index_scale * torch.einsum("btis,btid->bsd", dproducts, inputs.index_q)
    return dq, dweights, dk.unsqueeze(2)
