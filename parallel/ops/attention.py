"""Softmax attention on a sequence of which this rank holds a part."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.documents import Documents, Run
from ...kernels.mask import Mask
from ...kernels.softmax import check_inputs
from ...kernels.softmax import softmax_attention as attend_here
from ..sequence import DecodingCache, Sequence
from ..strategies.gather import GatherAttention
from ..strategies.ring import RingAttention
from .mixing import mix_by


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    seq: Sequence,
    mask: Mask | None = None,
    scale: float | None = None,
    sink_logits: Tensor | None = None,
    slot: str = "attention",
) -> Tensor:
    """o = softmax(scale q kᵀ + mask) v over the whole row: `[B, T, H, V]` in q's type.

    q `[B, T, H, K]`; k `[B, T, G, K]` and v `[B, T, G, V]` with G dividing H; `sink_logits` `[H]`. See
    `longreach.kernels.softmax`.
    """
    mask = Mask() if mask is None else mask
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    check_inputs(q, k, v, sink_logits)
    if seq.cache is None:
        return shared_attention(q, k, v, sink_logits, mask, scale, None, seq, slot)
    k, v, keys = extend_keys(k, v, mask, seq, seq.cache, slot)
    return attend_here(  # type: ignore[return-value]
        q, k, v, mask=mask, documents=seq.local, key_documents=keys, scale=scale, sink_logits=sink_logits,
        backend=seq.backend,
    )  # fmt: skip


def shared_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink_logits: Tensor | None,
    mask: Mask,
    scale: float | None,
    until: int | None,
    seq: Sequence,
    slot: str,
) -> Tensor:
    """By the strategy for attention; tokens from position `until` on take no part."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    strategy = seq.strategy.attention
    build = GatherAttention if strategy == "gather" else RingAttention
    settings = (mask.causal, mask.window, mask.sink_tokens, scale, until)
    return mix_by(build, settings, (q, k, v, sink_logits), seq, slot, by_heads=strategy == "ulysses")


def extend_keys(
    k: Tensor, v: Tensor, mask: Mask, seq: Sequence, cache: DecodingCache, slot: str
) -> tuple[Tensor, Tensor, Documents]:
    """Cached and new keys and values, and where they stand; the cache keeps what a later query can still see."""
    old = cache.entries.get((seq.layer, slot))
    if old is not None:
        k, v = torch.cat([old[0], k], dim=1), torch.cat([old[1], v], dim=1)
    total = cache.length + seq.layout.length
    runs = _kept_runs(total, k.shape[1], mask)
    keys = Documents((runs,) * k.shape[0], k.shape[1])
    cache.entries[seq.layer, slot] = _trim(k, mask), _trim(v, mask)
    return k, v, keys


def _kept_runs(total: int, held: int, mask: Mask) -> tuple[Run, ...]:
    """Positions of `held` keys out of `total`: all of them, or the sinks and then the latest."""
    if held == total:
        return (Run(0, 0, total, 0),)
    sinks = mask.sink_tokens
    latest = Run(0, sinks, held - sinks, total - (held - sinks))
    return (Run(0, 0, sinks, 0), latest) if sinks else (latest,)


def _trim(x: Tensor, mask: Mask) -> Tensor:
    """Drops the keys that no query after these can see."""
    if mask.window is None or x.shape[1] <= mask.sink_tokens + mask.window - 1:
        return x
    latest = x[:, x.shape[1] - (mask.window - 1) :]
    return torch.cat([x[:, : mask.sink_tokens], latest], dim=1)
