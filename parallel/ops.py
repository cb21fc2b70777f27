"""What mixers import: every op that mixes tokens, on a sequence of which this rank holds a part.

Each has the signature of its kernel plus `seq`, and a `slot` that names its state within a layer: two calls in one
layer need two slots. With a decoding `seq` the same call continues from the cache that `seq` carries and updates it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..kernels import short_conv as conv_kernels
from ..kernels.block_sparse import block_sparse_attention as attend_blocks_here
from ..kernels.compressed import compressed_attention as attend_windows_here
from ..kernels.delta_rule import DeltaRecurrence
from ..kernels.diagonal_scan import DiagonalRecurrence
from ..kernels.documents import Documents, Run
from ..kernels.gated_linear import GatedLinearRecurrence
from ..kernels.mask import Mask
from ..kernels.recurrence import Inputs, Recurrence
from ..kernels.select_blocks import Rule
from ..kernels.select_blocks import select_blocks as select_here
from ..kernels.selective_scan import SelectiveRecurrence
from ..kernels.softmax import check_inputs as check_softmax
from ..kernels.softmax import softmax_attention as attend_here
from .block_sparse import BlockSelection, BlockSparseAttention
from .collectives import halo
from .compressed import CompressedAttention
from .gather import GatherAttention
from .operation import Operation, Setting, mix
from .ring import RingAttention
from .sequence import DecodingCache, Sequence
from .state_passing import StatePassing
from .ulysses import ulysses
from .windows import GatherWindows, LocalWindows, WindowMeans, check_windows, summaries_decoded, windows_decoded


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
    if seq.cache is None:
        return _shared_attention(q, k, v, sink_logits, mask, scale, None, seq, slot)
    k, v, keys = _extend_keys(k, v, mask, seq, seq.cache, slot)
    return attend_here(  # type: ignore[return-value]
        q, k, v, mask=mask, documents=seq.local, key_documents=keys, scale=scale, sink_logits=sink_logits,
        backend=seq.backend,
    )  # fmt: skip


def _shared_attention(
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
    return _mix(build, settings, (q, k, v, sink_logits), seq, slot, by_heads=strategy == "ulysses")


def _mix(
    build: Callable[..., Operation],
    settings: tuple[Setting, ...],
    inputs: Inputs,
    seq: Sequence,
    slot: str,
    *,
    by_heads: bool,
    common: tuple[int, ...] = (),
) -> Tensor:
    """The operation `build(*settings)`, with tokens exchanged for heads or as they are."""
    if by_heads and seq.heads is not None:
        return mix(ulysses, (seq.heads.ranks, common, build, *settings), inputs, seq, slot)
    return mix(build, settings, inputs, seq, slot)


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


def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    seq: Sequence,
    value_log_decay: Tensor | None = None,
    bonus: Tensor | None = None,
    log_input: Tensor | None = None,
    read: str = "inclusive",
    normaliser: str | None = None,
    scale: float | None = None,
    slot: str = "state",
) -> Tensor:
    """S_t = diag(e^{g_t}) S_{t−1} + k_tᵀ v_t;  o_t = scale q_t S_t over the whole row: `[B, T, H, V]` in q's type.

    q, k `[B, T, H or G, K]`, v `[B, T, H, V]`; `log_decay` None, `[H]`, `[H, K]`, `[B, T, H]` or `[B, T, H, K]`. For
    these and the variants see `longreach.kernels.gated_linear`.
    """
    settings = (read, normaliser, log_input is not None)
    inputs = (q, k, v, log_decay, value_log_decay, bonus, log_input)
    raw = _recurrent(GatedLinearRecurrence, settings, inputs, seq, scale, slot)
    return GatedLinearRecurrence(*settings).finish(raw, q.dtype)


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None = None,
    log_decay: Tensor | None = None,
    *,
    seq: Sequence,
    erase: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
    slot: str = "state",
) -> Tensor:
    """S_t = (I − β_t k_tᵀk_t) diag(e^{g_t}) S_{t−1} + β_t k_tᵀ v_t;  o_t = scale q_t S_t over the whole row.

    q, k `[B, T, H or G, K]`, v `[B, T, H, V]`, `beta` `[B, T, H]`; `log_decay` None, `[B, T, H]` or `[B, T, H, K]`;
    `erase` = (a, b), shaped like k, in place of beta for (diag(e^{g_t}) + b_tᵀ a_t) S_{t−1} + k_tᵀ v_t. Returns
    `[B, T, H, V]` in q's type. See `longreach.kernels.delta_rule`.
    """
    a, b = (None, None) if erase is None else erase
    return _recurrent(DeltaRecurrence, (), (q, k, v, beta, log_decay, a, b), seq, scale, slot)


def diagonal_scan(x: Tensor, log_decay: Tensor, *, seq: Sequence, slot: str = "state") -> Tensor:
    """h_t = e^{a_t} h_{t−1} + x_t over the whole row: every h `[B, T, …]` in x's type.

    x `[B, T, …]`; `log_decay` like x, or constant with x's dims of channels. See `longreach.kernels.diagonal_scan`.
    """
    return _recurrent(DiagonalRecurrence, (), (x, log_decay), seq, None, slot)


def selective_scan(
    x: Tensor,
    delta: Tensor,
    a: Tensor | None,
    b: Tensor,
    c: Tensor,
    *,
    seq: Sequence,
    decay: str = "exponential",
    slot: str = "state",
) -> Tensor:
    """h_t = e^{Δ_t a} h_{t−1} + Δ_t x_t b_t;  y_t = Σ_n h_t c_t over the whole row: `[B, T, D]` in x's type.

    x, delta `[B, T, D]`, a `[D, N]`, b, c `[B, T, N]`; with `decay="longhorn"` 1 − Δ_t b_t² in place of e^{Δ_t a}, and
    a None. See `longreach.kernels.selective_scan`.
    """
    return _recurrent(SelectiveRecurrence, (decay,), (x, delta, a, b, c), seq, None, slot, common=(3, 4))


def _recurrent(
    build: Callable[..., Recurrence],
    settings: tuple[Setting, ...],
    inputs: Inputs,
    seq: Sequence,
    scale: float | None,
    slot: str,
    common: tuple[int, ...] = (),
) -> Tensor:
    """The recurrence `build(*settings)` over the whole row, or continued from the decoding cache."""
    if seq.cache is None:
        by_heads = seq.strategy.recurrent == "ulysses"
        settings = (scale, build, *settings)
        return _mix(_state_passing, settings, inputs, seq, slot, by_heads=by_heads, common=common)
    recurrence = build(*settings)
    recurrence.check(inputs)
    state = seq.cache.entries.get((seq.layer, slot), (None,))[0]
    out, final = recurrence.forward(inputs, state, seq.local, scale=scale, backend=seq.backend)
    seq.cache.entries[seq.layer, slot] = (final,)
    return out


def _state_passing(scale: float | None, build: Callable[..., Recurrence], *settings: Setting) -> StatePassing:
    return StatePassing(build(*settings), scale)


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
    if torch.compiler.is_compiling():
        return _traced_conv(x, weight, bias, seq=seq, activation=activation, slot=slot)
    width = weight.shape[1] - 1
    folded, history = _with_history(x, seq, width, slot)
    out = conv_kernels.short_conv(
        folded, weight, bias=bias, documents=seq.spans, history=history, activation=activation, backend=seq.backend
    )
    return seq.unfold(out)


def _traced_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, seq: Sequence, activation: str | None, slot: str
) -> Tensor:
    """The convolution as torch.compile fuses it best: a shift for each tap, masked by how far the document reaches."""
    taps, dtype = weight.shape[1], torch.promote_types(x.dtype, torch.float32)
    folded = seq.fold(x)
    before = halo(folded, seq, taps - 1, slot)
    before = folded.new_zeros(folded.shape[0], taps - 1, folded.shape[2]) if before is None else before
    rows = torch.cat([before, folded], dim=1).to(dtype)
    reach = seq.fold(seq.reach(x.device).unsqueeze(-1))
    out = torch.zeros_like(folded, dtype=dtype) if bias is None else (reach >= 0) * bias.to(dtype)
    for back in range(taps):
        shifted = rows[:, taps - 1 - back : rows.shape[1] - back]
        out = out + torch.where(reach >= back, shifted, 0.0) * weight[:, taps - 1 - back].to(dtype)
    out = torch.nn.functional.silu(out) if activation == "silu" else out
    return seq.unfold(out.to(x.dtype))


def token_shift(x: Tensor, *, seq: Sequence, slot: str = "shift") -> Tensor:
    """The previous token of each of `[B, T, D]`, zero at a document's start."""
    if torch.compiler.is_compiling():
        weight = x.new_tensor([[1.0, 0.0]]).expand(x.shape[2], -1)
        return _traced_conv(x, weight, None, seq=seq, activation=None, slot=slot)
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


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    *,
    seq: Sequence,
    block_size: int,
    query_block: int = 1,
    mask: Mask | None = None,
    scale: float | None = None,
    dense_length: int = 0,
    slot: str = "block_sparse",
) -> Tensor:
    """o = softmax(scale q kᵀ + mask) v over the blocks of the whole row that are listed: `[B, T, H, V]` in q's type.

    q `[B, T, H, K]`, k `[B, T, G, K]`, v `[B, T, G, V]`; `blocks` int32 `[B, ceil(T/query_block), G or H, M]`, lists of
    the queries held here by the ids of the whole row, −1 for none. Queries at positions below `dense_length` see all
    blocks, whatever is listed. See `longreach.kernels.block_sparse`.
    """
    mask = Mask() if mask is None else mask
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    check_softmax(q, k, v)
    if dense_length and query_block > 1:
        raise ValueError(f"dense_length must come with lists of single queries; got query_block={query_block}")
    if seq.cache is None:
        settings = (block_size, query_block, mask.causal, mask.window, mask.sink_tokens, scale)
        if not dense_length:
            return mix(BlockSparseAttention, settings, (q, k, v, blocks), seq, slot)
        dense = _shared_attention(q, k, v, None, mask, scale, dense_length, seq, f"{slot} dense")
        sparse = seq.positions(q.device) >= dense_length
        blocks = torch.where(sparse[:, :, None, None], blocks, -1)
        sparsely = mix(BlockSparseAttention, settings, (q, k, v, blocks), seq, slot)
        return dense + sparsely  # each is 0 where the other is not
    k, v, keys = _extend_keys(k, v, Mask(), seq, seq.cache, slot)
    if seq.cache.length < dense_length:
        blocks = _all_blocks_below(dense_length, blocks, block_size, seq)
    return attend_blocks_here(  # type: ignore[return-value]
        q, k, v, blocks, block_size=block_size, query_block=query_block, mask=mask, documents=seq.local,
        key_documents=keys, scale=scale, backend=seq.backend,
    )  # fmt: skip


def _all_blocks_below(dense_length: int, blocks: Tensor, block_size: int, seq: Sequence) -> Tensor:
    """Lists of the tokens to decode, of which those at positions below `dense_length` list every block so far."""
    positions = seq.positions(blocks.device)[:, :, None, None]
    last = min(dense_length - 1, int(positions.max())) // block_size
    every = torch.arange(max(last + 1, blocks.shape[-1]), dtype=blocks.dtype, device=blocks.device)
    listed = torch.nn.functional.pad(blocks, (0, len(every) - blocks.shape[-1]), value=-1)
    dense = torch.where(every <= positions // block_size, every, -1)
    return torch.where(positions < dense_length, dense, listed)


def compressed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    seq: Sequence,
    size: int,
    stride: int,
    scale: float | None = None,
    slot: str = "compressed",
) -> tuple[Tensor, Tensor]:
    """o = softmax(scale q kᵀ) v over the summaries of windows in each token's past: (out, lse).

    q `[B, T, H, K]`; k `[B, …, G, K]` and v `[B, …, G, V]` of the windows of the whole row, as `gather_windows` and
    `window_means` give them. out `[B, T, H, V]` in q's type; lse `[B, T, H]`, float32 (float64), for `select_blocks`,
    without a gradient. See `longreach.kernels.compressed`.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if seq.cache is None:
        raw = mix(CompressedAttention, (size, stride, scale), (q, k, v), seq, slot)
        return raw[..., :-1].to(q.dtype), raw[..., -1].detach()
    row = Documents.whole(q.shape[0], seq.cache.length + q.shape[1])
    return attend_windows_here(  # type: ignore[return-value]
        q, k, v, size=size, stride=stride, documents=seq.local, row_documents=row, scale=scale, return_lse=True,
        backend=seq.backend,
    )  # fmt: skip


def select_blocks(
    q: Tensor,
    summaries: Tensor,
    *,
    seq: Sequence,
    rule: Rule,
    scale: float | None = None,
    lse: Tensor | None = None,
    slot: str = "selection",
) -> Tensor:
    """The blocks of the whole row that each query held here lists: int32 `[B, T, G or H, rule.count]`, no gradient.

    q `[B, T, H, K]`; `summaries` `[B, …, G, K]` of the windows of the whole row, as `window_means` and `gather_windows`
    give them; `lse` `[B, T, H]`. See `longreach.kernels.select_blocks`.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, summaries, lse = q.detach(), summaries.detach(), None if lse is None else lse.detach()
    if seq.cache is None:
        rule_settings = (
            rule.block_size, rule.count, rule.window, rule.stride, rule.score, rule.aggregate, rule.pooled,
            rule.initial, rule.local,
        )  # fmt: skip
        return mix(_block_selection, (scale, *rule_settings), (q, summaries, lse), seq, slot)
    row = Documents.whole(q.shape[0], seq.cache.length + q.shape[1])
    return select_here(
        q, summaries, rule=rule, documents=seq.local, row_documents=row, scale=scale, lse=lse, backend=seq.backend
    )


def _block_selection(scale: float, *rule: Any) -> BlockSelection:
    return BlockSelection(scale, Rule(*rule))


def window_means(x: Tensor, *, seq: Sequence, size: int, stride: int | None = None, slot: str = "means") -> Tensor:
    """The mean of every window of `size` tokens at each `stride`-th (default: blocks, `size`) of each document.

    x `[B, T, …]` to `[B, N // stride, …]`: the windows of the whole row in the order of `WindowLayout`, only complete
    ones, then zeros; decoding, those so far and nothing more.
    """
    stride = size if stride is None else stride
    check_windows(size, stride)
    if seq.cache is None:
        return mix(WindowMeans, (size, stride), (x,), seq, slot)
    rows = windows_decoded(x, seq, seq.cache, size, stride, f"{slot} rows")
    means = rows.to(torch.promote_types(x.dtype, torch.float32)).mean(2).to(x.dtype)
    return summaries_decoded(means, seq, seq.cache, slot)


def local_windows(x: Tensor, *, seq: Sequence, size: int, stride: int, slot: str = "windows") -> Tensor:
    """The tokens of the windows that end here: `[B, T, …]` to `[B, W, size, …]`, for a mixer to summarise each.

    W is as many as can end in the tokens held, and what is left is zero; decoding, it is the windows that the new
    tokens complete. `gather_windows` puts what the mixer makes of them in the order of the row.
    """
    check_windows(size, stride)
    if seq.cache is None:
        return mix(LocalWindows, (size, stride), (x,), seq, slot)
    return windows_decoded(x, seq, seq.cache, size, stride, slot)


def gather_windows(x: Tensor, *, seq: Sequence, size: int, stride: int, slot: str = "summaries") -> Tensor:
    """Summaries `[B, W, …]` of the `local_windows` of every rank to those of the whole row, `[B, N // stride, …]`."""
    check_windows(size, stride)
    if seq.cache is None:
        return mix(GatherWindows, (seq.layout.length, size, stride), (x,), seq, slot)
    return summaries_decoded(x, seq, seq.cache, slot)
