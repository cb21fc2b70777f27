"""Block-sparse attention as it is defined: the dense matrix of every query against every key, and what is listed."""

from __future__ import annotations

import torch
from torch import Tensor

from ..blocks import BlockTile


def visible(blocks_BLJM: Tensor, tile: BlockTile) -> Tensor:
    """bool `[B, J, T, S]`: the mask, and that the key's block is in the query's list; J heads have lists."""
    device = blocks_BLJM.device
    seen_BTS = tile.mask.dense(tile.queries, tile.keys, device)
    blocks_BTJM = blocks_BLJM.repeat_interleave(tile.query_block, dim=1)[:, : tile.queries.length]
    ids_BS = tile.layout.ids(tile.keys, device)
    listed_BTJS = torch.zeros(*blocks_BTJM.shape[:3], ids_BS.shape[1], dtype=torch.bool, device=device)
    for blocks_BTJ in blocks_BTJM.unbind(-1):
        listed_BTJS |= (blocks_BTJ.unsqueeze(-1) == ids_BS[:, None, None]) & (blocks_BTJ.unsqueeze(-1) >= 0)
    return (listed_BTJS & seen_BTS.unsqueeze(2)).transpose(1, 2)


def _scores(q_BTHK: Tensor, k_BSGK: Tensor, blocks_BLJM: Tensor, tile: BlockTile, scale: float) -> Tensor:
    """`[B, H, T, S]` in float32 or float64, −inf where the key is hidden or its block is not listed."""
    dtype = torch.promote_types(q_BTHK.dtype, torch.float32)
    k_BSHK = k_BSGK.to(dtype).repeat_interleave(q_BTHK.shape[2] // k_BSGK.shape[2], dim=2)
    s_BHTS = scale * torch.einsum("bthk,bshk->bhts", q_BTHK.to(dtype), k_BSHK)
    seen_BHTS = visible(blocks_BLJM, tile).repeat_interleave(q_BTHK.shape[2] // blocks_BLJM.shape[2], dim=1)
    return s_BHTS.masked_fill(~seen_BHTS, float("-inf"))


def attend(q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, *, tile: BlockTile, scale: float) -> tuple[Tensor, Tensor]:
    """out_i = Σ_j exp(s_ij − lse_i) v_j,  lse_i = log Σ_j exp(s_ij),  s_ij = scale·q_i·k_j where j is shown."""
    s_BHTS = _scores(q, k, blocks, tile, scale)
    lse_BHT = s_BHTS.logsumexp(-1)
    p_BHTS = (s_BHTS - lse_BHT.unsqueeze(-1)).exp().masked_fill(s_BHTS == float("-inf"), 0.0)
    v_BSHV = v.to(s_BHTS.dtype).repeat_interleave(q.shape[2] // v.shape[2], dim=2)
    return torch.einsum("bhts,bshv->bthv", p_BHTS, v_BSHV), lse_BHT.transpose(1, 2)


def attend_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    blocks: Tensor,
    *,
    tile: BlockTile,
    scale: float,
    dlse: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """With p = exp(s − lse) and Δ_i = dout_i·out_i − dlse_i:  dv = pᵀ dout,  ds = p (dout vᵀ − Δ),  dq = scale ds k.

    `out` and `lse` are the final ones, merged over every tile, so that p is this tile's share of the whole.
    """
    s_BHTS = _scores(q, k, blocks, tile, scale)
    dtype, repeats = s_BHTS.dtype, q.shape[2] // k.shape[2]
    dout, out, lse = dout.to(dtype), out.to(dtype), lse.to(dtype)
    delta_BTH = (dout * out).sum(-1) if dlse is None else (dout * out).sum(-1) - dlse.to(dtype)
    k_BSHK, v_BSHV = (x.to(dtype).repeat_interleave(repeats, dim=2) for x in (k, v))
    hidden = s_BHTS == float("-inf")
    p_BHTS = (s_BHTS - lse.transpose(1, 2).unsqueeze(-1)).exp().masked_fill(hidden, 0.0)
    dv_BSHV = torch.einsum("bhts,bthv->bshv", p_BHTS, dout)
    dp_BHTS = torch.einsum("bthv,bshv->bhts", dout, v_BSHV)
    ds_BHTS = scale * p_BHTS * (dp_BHTS - delta_BTH.transpose(1, 2).unsqueeze(-1))
    dq_BTHK = torch.einsum("bhts,bshk->bthk", ds_BHTS, k_BSHK)
    dk_BSHK = torch.einsum("bhts,bthk->bshk", ds_BHTS, q.to(dtype))
    dk, dv = (x.unflatten(2, (-1, repeats)).sum(3) for x in (dk_BSHK, dv_BSHV))
    return dq_BTHK, dk, dv
