"""Softmax attention as it is defined: the dense matrix of every query against every key."""

from __future__ import annotations

import torch
from torch import Tensor

from ..attend import Gradient
from ..masks import Tile


def attend(q: Tensor, k: Tensor, v: Tensor, *, tile: Tile, scale: float) -> tuple[Tensor, Tensor]:
    """See `dense_attend`, with what the tile's mask shows."""
    return dense_attend(q, k, v, _visible(q, tile), scale)


def attend_backward(
    gradient: Gradient, q: Tensor, k: Tensor, v: Tensor, *, tile: Tile, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See `dense_backward`, with what the tile's mask shows."""
    return dense_backward(gradient, q, k, v, _visible(q, tile), scale)


def _visible(q: Tensor, tile: Tile) -> Tensor:
    return tile.mask.dense(tile.queries, tile.keys, q.device).unsqueeze(1)


def dense_attend(q: Tensor, k: Tensor, v: Tensor, visible_BJTS: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """out_i = Σ_j exp(s_ij − lse_i) v_j,  lse_i = log Σ_j exp(s_ij),  s_ij = scale·q_i·k_j where j is visible.

    visible: bool `[B, J, T, S]` for J heads, of which each stands for H / J neighbouring query heads.
    """
    p_BHTS, lse_BHT = _weights(q, k, visible_BJTS, scale, None)
    v_BSHV = v.to(p_BHTS.dtype).repeat_interleave(q.shape[2] // v.shape[2], dim=2)
    return torch.einsum("bhts,bshv->bthv", p_BHTS, v_BSHV), lse_BHT.transpose(1, 2)


def dense_backward(
    gradient: Gradient, q: Tensor, k: Tensor, v: Tensor, visible_BJTS: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """With p = exp(s − lse) and Δ_i = dout_i·out_i − dlse_i:  dv = pᵀ dout,  ds = p (dout vᵀ − Δ),  dq = scale ds k.

    Out and lse are the final ones, merged over every tile, so that p is this tile's share of the whole.
    """
    p_BHTS, _ = _weights(q, k, visible_BJTS, scale, gradient.lse)
    dtype, repeats = p_BHTS.dtype, q.shape[2] // k.shape[2]
    dout_BTHV, delta_BTH = gradient.dout.to(dtype), gradient.delta(dtype)
    k_BSHK, v_BSHV = (x.to(dtype).repeat_interleave(repeats, dim=2) for x in (k, v))
    dv_BSHV = torch.einsum("bhts,bthv->bshv", p_BHTS, dout_BTHV)
    dp_BHTS = torch.einsum("bthv,bshv->bhts", dout_BTHV, v_BSHV)
    ds_BHTS = scale * p_BHTS * (dp_BHTS - delta_BTH.transpose(1, 2).unsqueeze(-1))
    dq_BTHK = torch.einsum("bhts,bshk->bthk", ds_BHTS, k_BSHK)
    dk_BSHK = torch.einsum("bhts,bthk->bshk", ds_BHTS, q.to(dtype))
    dk, dv = (x.unflatten(2, (-1, repeats)).sum(3) for x in (dk_BSHK, dv_BSHV))
    return dq_BTHK, dk, dv


def _weights(q: Tensor, k: Tensor, visible_BJTS: Tensor, scale: float, lse_BTH: Tensor | None) -> tuple[Tensor, Tensor]:
    """exp(s − lse) `[B, H, T, S]` and lse `[B, H, T]`, in float32 or float64; lse is by default that of s."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    k_BSHK = k.to(dtype).repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    s_BHTS = scale * torch.einsum("bthk,bshk->bhts", q.to(dtype), k_BSHK)
    hidden = ~visible_BJTS.repeat_interleave(q.shape[2] // visible_BJTS.shape[1], dim=1)
    s_BHTS = s_BHTS.masked_fill(hidden, float("-inf"))
    lse_BHT = s_BHTS.logsumexp(-1) if lse_BTH is None else lse_BTH.to(dtype).transpose(1, 2)
    return (s_BHTS - lse_BHT.unsqueeze(-1)).exp().masked_fill(hidden, 0.0), lse_BHT
