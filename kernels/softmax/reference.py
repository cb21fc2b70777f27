"""Softmax attention as it is defined: the dense matrix of every query against every key."""

from __future__ import annotations

import torch
from torch import Tensor

from ..masks import Tile


def _scores(q_BTHK: Tensor, k_BSGK: Tensor, tile: Tile, scale: float) -> Tensor:
    """`[B, G, R, T, S]` in float32 or float64, R heads a group, −inf where the mask hides the key."""
    dtype = torch.promote_types(q_BTHK.dtype, torch.float32)
    q_BTGRK = q_BTHK.to(dtype).unflatten(2, (k_BSGK.shape[2], -1))
    s_BGRTS = scale * torch.einsum("btgrk,bsgk->bgrts", q_BTGRK, k_BSGK.to(dtype))
    visible_BTS = tile.mask.dense(tile.queries, tile.keys, q_BTHK.device)
    return s_BGRTS.masked_fill(~visible_BTS[:, None, None], float("-inf"))


def attend(q: Tensor, k: Tensor, v: Tensor, *, tile: Tile, scale: float) -> tuple[Tensor, Tensor]:
    """out_i = Σ_j exp(s_ij − lse_i) v_j,  lse_i = log Σ_j exp(s_ij),  s_ij = scale·q_i·k_j where j is visible."""
    s_BGRTS = _scores(q, k, tile, scale)
    lse_BGRT = s_BGRTS.logsumexp(-1)
    p_BGRTS = (s_BGRTS - lse_BGRT.unsqueeze(-1)).exp().masked_fill(s_BGRTS == float("-inf"), 0.0)
    out_BTGRV = torch.einsum("bgrts,bsgv->btgrv", p_BGRTS, v.to(s_BGRTS.dtype))
    return out_BTGRV.flatten(2, 3), lse_BGRT.flatten(1, 2).transpose(1, 2)


def attend_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    tile: Tile,
    scale: float,
    dlse: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """With p = exp(s − lse) and Δ_i = dout_i·out_i − dlse_i:  dv = pᵀ dout,  ds = p (dout vᵀ − Δ),  dq = scale ds k.

    `out` and `lse` are the final ones, merged over every tile, so that p is this tile's share of the whole.
    """
    s_BGRTS = _scores(q, k, tile, scale)
    dtype, groups = s_BGRTS.dtype, k.shape[2]
    dout = dout.to(dtype)
    delta_BTH = (dout * out.to(dtype)).sum(-1)
    if dlse is not None:
        delta_BTH = delta_BTH - dlse.to(dtype)

    def by_group(x_BTH: Tensor) -> Tensor:
        return x_BTH.transpose(1, 2).unflatten(1, (groups, -1)).unsqueeze(-1)

    p_BGRTS = (s_BGRTS - by_group(lse.to(dtype))).exp().masked_fill(s_BGRTS == float("-inf"), 0.0)
    dout_BTGRV, q_BTGRK = (x.to(dtype).unflatten(2, (groups, -1)) for x in (dout, q))
    dv_BSGV = torch.einsum("bgrts,btgrv->bsgv", p_BGRTS, dout_BTGRV)
    dp_BGRTS = torch.einsum("btgrv,bsgv->bgrts", dout_BTGRV, v.to(dtype))
    ds_BGRTS = scale * p_BGRTS * (dp_BGRTS - by_group(delta_BTH))
    dq_BTGRK = torch.einsum("bgrts,bsgk->btgrk", ds_BGRTS, k.to(dtype))
    dk_BSGK = torch.einsum("bgrts,btgrk->bsgk", ds_BGRTS, q_BTGRK)
    return dq_BTGRK.flatten(2, 3), dk_BSGK, dv_BSGV
