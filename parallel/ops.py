"""What mixers import: every op that mixes tokens, on a sequence of which this rank holds a part.

Each has the signature of its kernel plus `seq`, and a `slot` that names its state within a layer: two calls in one
layer need two slots. With a decoding `seq` the same call continues from the cache that `seq` carries and updates it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from ..kernels import short_conv as conv_kernels
from ..kernels.documents import Documents, Run
from ..kernels.gated_linear import recurrence
from ..kernels.mask import Mask
from ..kernels.softmax import check_inputs as check_softmax
from ..kernels.softmax import softmax_attention as attend_here
from .collectives import halo
from .ring import RingAttention
from .sequence import DecodingCache, Sequence
from .state_passing import StatePassing

Op = TypeVar("Op", bound=Callable)


def _eager(op: Op) -> Op:
    """Keeps an op out of torch.compile's graphs, and its signature in sight of type checkers."""
    return torch.compiler.disable(op)  # type: ignore[return-value]


@_eager
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
    check_softmax(q, k, v, sink_logits)
    if seq.cache is not None:
        k, v, keys = _extend_keys(k, v, mask, seq, seq.cache, slot)
        return attend_here(  # type: ignore[return-value]
            q, k, v, mask=mask, documents=seq.local, key_documents=keys, scale=scale, sink_logits=sink_logits,
            backend=seq.backend,
        )  # fmt: skip
    return RingAttention.apply(q, k, v, sink_logits, mask, seq, scale, slot)  # type: ignore[return-value]


def _extend_keys(
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


@_eager
def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    seq: Sequence,
    scale: float | None = None,
    slot: str = "state",
) -> Tensor:
    """S_t = diag(e^{g_t}) S_{t−1} + k_tᵀ v_t;  o_t = scale q_t S_t over the whole row: `[B, T, H, V]` in q's type.

    q, k `[B, T, H or G, K]`, v `[B, T, H, V]`; `log_decay` None, `[H]`, `[B, T, H]` or `[B, T, H, K]`. See
    `longreach.kernels.gated_linear`.
    """
    inputs = (q, k, v, log_decay)
    recurrence.check(inputs)
    if seq.cache is None:
        return StatePassing.apply(recurrence, seq, scale, slot, *inputs)  # type: ignore[return-value]
    state = seq.cache.entries.get((seq.layer, slot), (None,))[0]
    out, final = recurrence.forward(inputs, state, seq.local, scale=scale, backend=seq.backend)
    seq.cache.entries[seq.layer, slot] = (final,)
    return out


@_eager
def short_conv(
    x: Tensor,
    weight: Tensor,
    *,
    seq: Sequence,
    bias: Tensor | None = None,
    activation: str | None = None,
    slot: str = "conv",
) -> Tensor:
    """Causal depthwise convolution of `[B, T, D]` with `weight [D, W]`; taps never cross a document's start."""
    width = weight.shape[1] - 1
    folded, history = _with_history(x, seq, width, slot)
    out = conv_kernels.short_conv(
        folded, weight, bias=bias, documents=seq.spans, history=history, activation=activation, backend=seq.backend
    )
    return seq.unfold(out)


@_eager
def token_shift(x: Tensor, *, seq: Sequence, slot: str = "shift") -> Tensor:
    """The previous token of each of `[B, T, D]`, zero at a document's start."""
    folded, history = _with_history(x, seq, 1, slot)
    return seq.unfold(conv_kernels.token_shift(folded, documents=seq.spans, history=history, backend=seq.backend))


def _with_history(x: Tensor, seq: Sequence, width: int, slot: str) -> tuple[Tensor, Tensor | None]:
    """Folded spans of x, and the `width` rows before each: from other ranks, or from the decoding cache."""
    if seq.cache is None:
        folded = seq.fold(x)
        return folded, halo(folded, seq, width, slot)
    history = seq.cache.entries.get((seq.layer, slot), (x.new_zeros(x.shape[0], width, *x.shape[2:]),))[0]
    seq.cache.entries[seq.layer, slot] = (torch.cat([history, x], dim=1)[:, x.shape[1] :],)
    return x, history
