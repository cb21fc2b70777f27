"""Attention on a sequence that ranks share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...kernels.attend import Attend, OnOneDevice
from ...kernels.documents import Documents, Run
from ...kernels.masks import Mask, Pattern
from ...kernels.masks.pattern import union
from ...kernels.operation import run
from ...kernels.softmax import SoftmaxAttend, SoftmaxInputs
from ..operation import Setting, check_class, mix
from ..sequence import Sequence
from ..strategies.gather import gather
from ..strategies.ring import ring
from ..strategies.ulysses import ulysses

CAUSAL = Mask()


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    seq: Sequence,
    mask: Pattern | None = None,
    scale: float | None = None,
    sink_logits: Tensor | None = None,
    slot: str = "attention",
) -> Tensor:
    """o = softmax(scale q kᵀ + mask) v over the whole row: `[B, T, H, V]` in q's type.

    q `[B, T, H, K]`; k `[B, T, G, K]` and v `[B, T, G, V]` with G dividing H; `sink_logits` `[H]`. See
    `longreach.kernels.softmax`.
    """
    settings = (CAUSAL if mask is None else mask).settings, q.shape[-1] ** -0.5 if scale is None else scale
    return attention(SoftmaxAttend, SoftmaxInputs(q, k, v, sink_logits), settings, seq=seq, slot=slot)


def attention(
    op: type[Attend],
    inputs: Any,
    settings: tuple[Setting, ...] = (),
    *,
    seq: Sequence,
    slot: str = "attention",
    until: int | None = None,
) -> Tensor:
    """The op `op(*settings)` on a record of its inputs, over the keys of the whole row: `[B, T, H, V]` in q's type.

    Every op over keys, your own too, runs through this: under each strategy, packed, recomputed, or continued from the
    decoding cache. `settings` are plain values, by which a compiled graph is keyed; `slot` names the op's state within
    the layer. Tokens from position `until` of their document on take no part: their outputs are 0. See
    `longreach.kernels.attend`.
    """
    check_class("attention", op)
    if seq.cache is not None:
        made = op(*settings)
        extended, keys = with_cached(made, inputs, seq, slot)
        return run(OnOneDevice(made), extended, (made.tile(seq.local, keys), seq.backend))[0]
    build, arguments = gather if seq.strategy.attention == "gather" else ring, (until, op, *settings)
    if seq.strategy.attention == "ulysses" and seq.heads is not None:
        build, arguments = ulysses, (seq.heads.ranks, (), build, *arguments)
    return mix(build, arguments, inputs, seq, slot)[0]


def with_cached(op: Attend, inputs: Any, seq: Sequence, slot: str) -> tuple[Any, Documents]:
    """The inputs with the cached keys before the new ones, and the documents of all these keys.

    The cache keeps those that a later query can still see.
    """
    assert seq.cache is not None
    entries, key = seq.cache.entries, (seq.layer, slot)
    sent, before = op.sent(inputs), seq.cache.length
    total = before + sent[0].shape[1]
    if key in entries:
        sent = tuple(torch.cat(pair, dim=1) for pair in zip(entries[key], sent, strict=True))
    kept = op.kept(total)
    if kept == [(0, total)]:
        runs = (Run(0, 0, total, 0),)
        entries[key] = sent
    else:
        start, runs = 0, ()
        for first, stop in union([*op.kept(before), (before, total)]):
            runs += (Run(0, start, stop - first, first),)
            start += stop - first
        entries[key] = _parts(sent, runs, kept)
    extended = inputs._replace(**dict(zip(op.travels, sent, strict=True)))
    return extended, Documents.of_runs((runs,) * sent[0].shape[0], sent[0].shape[1])


def _parts(sent: tuple[Tensor, ...], runs: tuple[Run, ...], kept: list[tuple[int, int]]) -> tuple[Tensor, ...]:
    """The tokens at the kept positions, of tensors whose tokens are `runs` of one document."""
    cuts = [
        (max(low, r.position) - r.position + r.start, min(high, r.end_position) - r.position + r.start)
        for low, high in kept
        for r in runs
    ]
    cuts = [(low, high) for low, high in cuts if low < high]
    if sum(high - low for low, high in cuts) == sent[0].shape[1]:
        return sent
    return tuple(torch.cat([x[:, low:high] for low, high in cuts] or [x[:, :0]], dim=1) for x in sent)
