"""Attention of each token over what earlier layers gave for it, with a backward that keeps no copies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..operation import Function


def depth_attention(sources: Sequence[Tensor], query: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """o = sum_s softmax_s(query · k_s) v_s,  k_s = weight * v_s / sqrt(mean(v_s^2) + eps)  (arXiv 2603.15031).

    sources v_s: `[..., D]`, all alike; query, weight `[D]`. Returns one of the sources' shape and type; logits, softmax
    and sum are in float32 at least. Raises ValueError where sources differ, or where there are none.
    """
    if not sources or any((v.shape, v.dtype) != (sources[0].shape, sources[0].dtype) for v in sources):
        raise ValueError(f"sources must be alike, one at least; got {[tuple(v.shape) for v in sources]}")
    return _DepthAttention.call(query, weight, eps, *sources)


class _DepthAttention(Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, weight: Tensor, eps: float, *sources: Tensor) -> Tensor:
        wide = torch.promote_types(sources[0].dtype, torch.float32)
        key = query.to(wide) * weight.to(wide)
        dots, scales = [], []
        for source in sources:
            v = source.to(wide)
            dots.append(v @ key)
            scales.append((v.square().mean(-1) + eps).rsqrt())
        dot, scale = torch.stack(dots), torch.stack(scales)
        shares = (dot * scale).softmax(0)
        out = torch.zeros_like(sources[0], dtype=wide)
        for share, source in zip(shares, sources, strict=True):
            out = out + share.unsqueeze(-1) * source
        ctx.save_for_backward(query, weight, dot, scale, shares, *sources)
        return out.to(sources[0].dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        """With z_s = dot_s · scale_s the logits:  dv_s = p_s dout + dz_s scale_s (key − dot_s scale_s² v_s / D)."""
        query, weight, dot, scale, shares, *sources = ctx.saved_tensors
        wide = dot.dtype
        dwide = dout.to(wide)
        key = query.to(wide) * weight.to(wide)
        dshares = torch.stack([(source.to(wide) * dwide).sum(-1) for source in sources])
        dlogits = shares * (dshares - (shares * dshares).sum(0))
        dkey, dsources = torch.zeros_like(key), []
        width = sources[0].shape[-1]
        for n, source in enumerate(sources):
            v, turn = source.to(wide), (dlogits[n] * scale[n]).unsqueeze(-1)
            dkey = dkey + (turn * v).flatten(0, -2).sum(0)
            along = (dot[n] * scale[n].square() / width).unsqueeze(-1)
            dsources.append((shares[n].unsqueeze(-1) * dwide + turn * (key - along * v)).to(source.dtype))
        dquery, dweight = (dkey * weight.to(wide)).to(query.dtype), (dkey * query.to(wide)).to(weight.dtype)
        return dquery, dweight, None, *dsources
