"""Attention on a sequence that ranks share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...kernels.attend import Attend, ListedAttend
from ...kernels.documents import Documents
from ...kernels.gated_linear.whole import KernelAttend, KernelInputs
from ...kernels.latent import Dims, LatentAttend, LatentInputs, LatentLogits, expand
from ...kernels.masks import Mask, Pattern
from ...kernels.masks.pattern import Intervals
from ...kernels.operation import run
from ...kernels.softmax import LevelledAttend, LevelledInputs, SoftmaxAttend, SoftmaxInputs
from ...kernels.softmax.largest_logits import SHARPNESS, SoftmaxLogits
from ..decoding_cache import CachedRows, Stretch
from ..operation import Setting, check_class, mix
from ..sequence import Sequence
from ..strategies.cached import OverCached
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
    softcap: float | None = None,
    levels: Tensor | None = None,
    sink_logits: Tensor | None = None,
    slot: str = "attention",
    keys_as: str | None = None,
    keys_of: str | None = None,
    largest: Tensor | None = None,
) -> Tensor:
    """o = softmax(scale q kᵀ + mask) v over the whole row: `[B, T, H, V]` in q's type.

    q `[B, T, H, K]`; k `[B, T, G, K]` and v `[B, T, G, V]` with G dividing H; `sink_logits` `[H]`. With `levels`
    `[B, T, G or H]`, float32 (float64 for float64), the level of the query less that of the key is added to each
    logit, after `softcap`. `keys_as` and `keys_of` are those of `attention`. `largest` `[H]` is raised to the largest
    scale q k of each head that a query of this rank sees, where that is more, unless nothing is to be differentiated;
    without softcap and levels. See `longreach.kernels.softmax` and its `largest_logits`.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    settings = (CAUSAL if mask is None else mask).settings, scale, softcap
    where: dict[str, Any] = {"seq": seq, "slot": slot, "keys_as": keys_as, "keys_of": keys_of}
    _raise(largest, SoftmaxLogits, SoftmaxInputs(q, k, v), settings[:2], seq, slot)
    if levels is None:
        return attention(SoftmaxAttend, SoftmaxInputs(q, k, v, sink_logits), settings, **where)
    return attention(LevelledAttend, LevelledInputs(q, k, v, levels, levels, sink_logits), settings, **where)


def keep_keys(k: Tensor, v: Tensor, *, seq: Sequence, keys_as: str, slot: str = "attention") -> tuple[Tensor, Tensor]:
    """The keys `[B, T, G, K]` and values `[B, T, G, V]` themselves, of a layer that does not attend to them.

    When decoding, they are kept for later layers, which read them by `softmax_attention(…, keys_of=keys_as)`.
    """
    if seq.cache is not None:
        rows = seq.cache.published[keys_as] = seq.cache.rows_of(seq.layer, slot)
        append(rows, (k, v), seq, seq.cache.columns.room(_all))
    return k, v


def latent_attention(
    q: Tensor,
    latent: Tensor,
    expansion: Tensor,
    *,
    seq: Sequence,
    mask: Pattern | None = None,
    scale: float | None = None,
    sink_logits: Tensor | None = None,
    slot: str = "attention",
    largest: Tensor | None = None,
) -> Tensor:
    """Softmax attention over keys and values that are linear in a latent: `[B, T, H, V]` in q's type.

    q `[B, T, H, R + K]`, latent `[B, T, R + C]`, expansion `[H (K + V), C]`, `sink_logits` `[H]`. What travels and what
    decoding keeps is the latent. Where tokens are exchanged for heads it goes to every rank whole, unless keys and
    values of a rank's heads are fewer numbers. `largest` is that of `softmax_attention`. See
    `longreach.kernels.latent`.
    """
    mask, scale = CAUSAL if mask is None else mask, q.shape[-1] ** -0.5 if scale is None else scale
    inputs = LatentInputs(q, latent, expansion, sink_logits)
    if seq.cache is None and seq.heads is not None and seq.exchange("attention") == "ulysses":
        heads, key_dim = q.shape[2:]
        if heads * (key_dim + Dims.of(inputs).value) < latent.shape[2] * seq.heads.ranks:
            k, v = expand(latent, expansion, heads=heads, key_dim=key_dim)
            given: dict[str, Any] = {"mask": mask, "scale": scale, "sink_logits": sink_logits, "largest": largest}
            return softmax_attention(q, k, v, seq=seq, slot=slot, **given)
    _raise(largest, LatentLogits, LatentInputs(q, latent, expansion), (mask.settings, scale), seq, slot)
    return attention(LatentAttend, inputs, (mask.settings, scale), seq=seq, slot=slot)


def kernel_attention(q: Tensor, k: Tensor, v: Tensor, *, seq: Sequence, slot: str = "attention") -> Tensor:
    """o_i = Σ_j (q_i · k_j) v_j / Σ_j (q_i · k_j) over the whole document: `[B, T, H, V]` in q's type.

    q `[B, T, H, K]`, k `[B, T, G, K]`, v `[B, T, G, V]`, with G dividing H: features, none of them negative. Keys and
    values travel as those of other attention do. Raises ValueError when it decodes. See
    `longreach.kernels.gated_linear.whole`.
    """
    return attention(KernelAttend, KernelInputs(q, k, v), seq=seq, slot=slot)


def attention(
    op: type[Attend],
    inputs: Any,
    settings: tuple[Setting, ...] = (),
    *,
    seq: Sequence,
    slot: str = "attention",
    until: int | None = None,
    keys_as: str | None = None,
    keys_of: str | None = None,
) -> Tensor:
    """The op `op(*settings)` on a record of its inputs, over the keys of the whole row: `[B, T, H, V]` in q's type.

    Every op over keys, your own too, runs through this: under each strategy, packed, recomputed, or continued from the
    decoding cache. `settings` are plain values, by which a compiled graph is keyed; `slot` names the op's state within
    the layer. Tokens from position `until` of their document on take no part: their outputs are 0.

    Layers that attend to the same keys each get them as inputs. What decoding keeps of them is kept once: by the layer
    that made them, `keys_as` a name, and read by the others as `keys_of` that name. The last layer before a reader that
    uses the name is meant. See `longreach.kernels.attend`.
    """
    check_class("attention", op)
    if seq.decodes:
        made = op(*settings)
        extended, stretches = with_cached(made, inputs, seq, slot, keys_as, keys_of)
        return over_cached(made, extended, seq, tile_of_cached(seq, made, stretches))
    strategy = seq.exchange("attention")
    build, arguments = gather if strategy == "gather" else ring, (until, op, *settings)
    if strategy == "ulysses" and seq.heads is not None:
        without_heads = tuple(op.record._fields.index(name) for name in op.without_heads)  # type: ignore[attr-defined]
        build, arguments = ulysses, (seq.heads.ranks, without_heads, build, *arguments)
    out = mix(build, arguments, inputs, seq, slot)[0]
    if seq.cache is not None and until is None:
        with_cached(op(*settings), inputs, seq, slot, keys_as, keys_of)
    return out


def with_cached(
    op: Attend, inputs: Any, seq: Sequence, slot: str, keys_as: str | None = None, keys_of: str | None = None
) -> tuple[Any, tuple[Stretch, ...]]:
    """The inputs with the keys that this rank keeps and the new ones in place of these, and which columns they are of.

    The cache keeps those that a later query, of any layer that reads them, can still see.
    """
    assert seq.cache is not None
    if keys_of is None:
        rows = seq.cache.rows_of(seq.layer, slot)
        sent, stretches = append(rows, op.sent(inputs), seq, seq.cache.columns.room(op.most_kept))
    else:
        rows = seq.cache.published[keys_of]
        sent, stretches = rows.view()
    if keys_as is not None:
        seq.cache.published[keys_as] = rows
    (rows.keep if keys_as is None and keys_of is None else rows.needs)(seq.derive(_kept, op, rows.length))
    return inputs._replace(**dict(zip(op.travels, sent, strict=True))), stretches


def append(
    rows: CachedRows, parts: tuple[Tensor, ...], seq: Sequence, room: int | None
) -> tuple[tuple[Tensor, ...], tuple[Stretch, ...]]:
    """Rows with those of this rank's tokens, as far as it is the rank that keeps them."""
    assert seq.cache is not None
    columns = seq.derive(_columns_kept)
    appended = rows.append(parts if columns else tuple(x[:, :0] for x in parts), room, columns)
    rows.length = seq.cache.length + seq.layout.length  # on every rank
    return appended


def over_cached(op: Attend, inputs: Any, seq: Sequence, tile: Any) -> Tensor:
    """Attention of new queries over the keys that the ranks keep: `[B, T, H, V]` in q's type."""
    assert seq.cache is not None
    return run(OverCached(op, seq.cache.columns), inputs, (tile, seq.backend))[0]


def _raise(
    largest: Tensor | None, op: type[Attend], inputs: Any, settings: tuple[Any, Any], seq: Sequence, slot: str
) -> None:
    """See `softmax_attention`. A recomputation measures the same again."""
    if largest is None or seq.cache is not None or not torch.is_grad_enabled():
        return
    mask, scale = settings
    with torch.no_grad():
        logits = attention(op, inputs, (mask, scale * SHARPNESS), seq=seq, slot=f"{slot} logits")
        largest.copy_(torch.maximum(largest, logits.amax((0, 1, 3))))


def documents_of_cached(seq: Sequence, stretches: tuple[Stretch, ...]) -> Documents:
    """The documents of cached keys and the new ones; the same of all layers that keep as many."""
    return seq.derive(_documents_of_cached, stretches)


def documents_so_far(seq: Sequence) -> Documents:
    """The documents of all tokens so far, the new ones among them, while decoding."""
    assert seq.cache is not None
    return documents_of_cached(seq, (Stretch(0, seq.cache.length + seq.layout.length, 0),))


def tile_of_cached(seq: Sequence, op: Attend, stretches: tuple[Stretch, ...]) -> Any:
    """The work of the new queries against cached keys and the new ones; the same of all layers that keep as many."""
    return seq.derive(_tile_of_cached, op, stretches)


def _documents_of_cached(seq: Sequence, stretches: tuple[Stretch, ...]) -> Documents:
    assert seq.cache is not None
    return seq.cache.columns.documents(seq.documents.batch, stretches)


def _tile_of_cached(seq: Sequence, op: Attend, stretches: tuple[Stretch, ...]) -> Any:
    if isinstance(op, SoftmaxAttend) and seq.layout.length == 1 and len(stretches) > 1:
        # Of a window, which is written over in turn, a token sees every key: in whatever order, so as one run.
        first, total = min(part.column for part in stretches), sum(part.length for part in stretches)
        tile = op.tile(seq.local, documents_of_cached(seq, (Stretch(0, total, first),)))
        at_end = max(part.column + part.length for part in stretches) == first + total
        if first >= 0 and at_end and tile is not None and tile.pairs == seq.tokens * total:
            return tile
    keys = documents_of_cached(seq, stretches)
    if isinstance(op, ListedAttend):
        return op.tile(seq.local, keys, op.layout(documents_so_far(seq)))
    return op.tile(seq.local, keys)


def _columns_kept(seq: Sequence) -> tuple[tuple[int, int], ...]:
    """The (first, number) of the columns of this rank's tokens that it keeps the keys of."""
    assert seq.cache is not None
    if seq.decodes:
        columns = seq.cache.columns
        return ((columns.length, seq.layout.length),) if columns.holder() == columns.rank else ()
    length = seq.layout.span_length
    return tuple((span * length, length) for span in seq.layout.spans_of(seq.rank))


def _kept(seq: Sequence, op: Attend, column: int) -> Intervals:
    assert seq.cache is not None
    return seq.cache.columns.kept(op.kept, column)


def _all(columns: int, beginnings: int) -> int:
    return columns
