"""Softmax attention as it is defined: the dense matrix of every query against every key."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..attend import Gradient
from ..masks import Tile

Levels = tuple[Tensor, Tensor]  # of queries `[B, T, L]` and of keys `[B, S, L]`, L being G or H


def attend(q: Tensor, k: Tensor, v: Tensor, *, tile: Tile, **logits: Any) -> tuple[Tensor, Tensor]:
    """See `dense_attend`, with what the tile's mask shows; logits: scale, softcap and levels."""
    return dense_attend(q, k, v, _visible(q, tile), **logits)


def attend_backward(
    gradient: Gradient, q: Tensor, k: Tensor, v: Tensor, *, tile: Tile, **logits: Any
) -> tuple[Tensor, ...]:
    """See `dense_backward`, with what the tile's mask shows; logits: scale, softcap and levels."""
    return dense_backward(gradient, q, k, v, _visible(q, tile), **logits)


def _visible(q: Tensor, tile: Tile) -> Tensor:
    return tile.mask.dense(tile.queries, tile.keys, q.device).unsqueeze(1)


def dense_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible_BJTS: Tensor,
    scale: float,
    softcap: float | None = None,
    levels: Levels | None = None,
) -> tuple[Tensor, Tensor]:
    """out_i = Σ_j exp(s_ij − lse_i) v_j,  lse_i = log Σ_j exp(s_ij),  s_ij = scale·q_i·k_j where j is visible.

    With softcap c, c·tanh(s/c) stands for s; then come levels, level_i − level_j.
    visible: bool `[B, J, T, S]` for J heads, of which each stands for H / J neighbouring query heads.
    """
    p_BHTS, lse_BHT, _ = _weights(q, k, visible_BJTS, scale, softcap, levels, None)
    v_BSHV = v.to(p_BHTS.dtype).repeat_interleave(q.shape[2] // v.shape[2], dim=2)
    return torch.einsum("bhts,bshv->bthv", p_BHTS, v_BSHV), lse_BHT.transpose(1, 2)


def dense_backward(
    gradient: Gradient,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible_BJTS: Tensor,
    scale: float,
    softcap: float | None = None,
    levels: Levels | None = None,
) -> tuple[Tensor, ...]:
    """With p = exp(s − lse) and Δ_i = dout_i·out_i − dlse_i:  dv = pᵀ dout,  ds = p (dout vᵀ − Δ),  dq = scale ds k.

    Of levels the keys' have a gradient, −Σ_i ds_ij, the last one returned; `LevelledAttend` tells that of queries.
    Out and lse are the final ones, merged over every tile, so that p is this tile's share of the whole.
    """
    p_BHTS, _, slope = _weights(q, k, visible_BJTS, scale, softcap, levels, gradient.lse)
    dtype, repeats = p_BHTS.dtype, q.shape[2] // k.shape[2]
    dout_BTHV, delta_BTH = gradient.dout.to(dtype), gradient.delta(dtype)
    k_BSHK, v_BSHV = (x.to(dtype).repeat_interleave(repeats, dim=2) for x in (k, v))
    dv_BSHV = torch.einsum("bhts,bthv->bshv", p_BHTS, dout_BTHV)
    dp_BHTS = torch.einsum("bthv,bshv->bhts", dout_BTHV, v_BSHV)
    ds_BHTS = p_BHTS * (dp_BHTS - delta_BTH.transpose(1, 2).unsqueeze(-1))
    of_levels = [] if levels is None else [-_summed(ds_BHTS.sum(2).transpose(1, 2), levels[1])]
    ds_BHTS = scale * slope * ds_BHTS
    dq_BTHK = torch.einsum("bhts,bshk->bthk", ds_BHTS, k_BSHK)
    dk_BSHK = torch.einsum("bhts,bthk->bshk", ds_BHTS, q.to(dtype))
    return dq_BTHK, _summed(dk_BSHK, k), _summed(dv_BSHV, v), *of_levels


def _summed(dx_BSHX: Tensor, x: Tensor) -> Tensor:
    """The gradient of the heads of x, from that of each query head."""
    return dx_BSHX.unflatten(2, (x.shape[2], -1)).sum(3)


def _weights(
    q: Tensor,
    k: Tensor,
    visible_BJTS: Tensor,
    scale: float,
    softcap: float | None,
    levels: Levels | None,
    lse_BTH: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | float]:
    """exp(s − lse) `[B, H, T, S]` and lse `[B, H, T]`, in float32 or float64; lse is by default that of s.

    Last comes the derivative of the capped logits by those before.
    """
    dtype, heads = torch.promote_types(q.dtype, torch.float32), q.shape[2]
    k_BSHK = k.to(dtype).repeat_interleave(heads // k.shape[2], dim=2)
    s_BHTS = scale * torch.einsum("bthk,bshk->bhts", q.to(dtype), k_BSHK)
    slope: Tensor | float = 1.0
    if softcap is not None:
        capped = torch.tanh(s_BHTS / softcap)
        s_BHTS, slope = softcap * capped, 1 - capped.square()
    if levels is not None:
        of_queries, of_keys = (x.to(dtype).repeat_interleave(heads // x.shape[2], 2).transpose(1, 2) for x in levels)
        s_BHTS = s_BHTS + (of_queries.unsqueeze(3) - of_keys.unsqueeze(2))
    hidden = ~visible_BJTS.repeat_interleave(heads // visible_BJTS.shape[1], dim=1)
    s_BHTS = s_BHTS.masked_fill(hidden, float("-inf"))
    lse_BHT = s_BHTS.logsumexp(-1) if lse_BTH is None else lse_BTH.to(dtype).transpose(1, 2)
    return (s_BHTS - lse_BHT.unsqueeze(-1)).exp().masked_fill(hidden, 0.0), lse_BHT, slope
