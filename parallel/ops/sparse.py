"""Attention to selected blocks and to summaries of windows, on a sequence that ranks share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...kernels.attend import OnOneDevice
from ...kernels.block_sparse import BlockSparseAttend, BlockSparseInputs, sparse_lists
from ...kernels.compressed import CompressedAttend
from ...kernels.compressed.folding import Folding
from ...kernels.latent.listed import ListedLatentAttend, ListedLatentInputs
from ...kernels.masks import Pattern
from ...kernels.operation import Tensors, run
from ...kernels.plain import made_of
from ...kernels.select_blocks import Choices, Rule, choose
from ...kernels.softmax import SoftmaxAttend, SoftmaxInputs
from ...kernels.windows import WindowLayout
from ..decoding_cache import Stretch
from ..operation import Operation, mix
from ..sequence import Sequence
from ..strategies.listed_blocks import by_blocks
from ..strategies.replicated import replicated
from ..strategies.windows import (
    GatherWindows,
    LocalWindows,
    WindowMeans,
    check_windows,
    keep_last_rows,
    summaries_decoded,
    windows_decoded,
)
from ..strategies.windows import windows_held as windows_held
from .attention import (
    CAUSAL,
    attention,
    documents_of_cached,
    documents_so_far,
    over_cached,
    tile_of_cached,
    with_cached,
)


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    *,
    seq: Sequence,
    block_size: int,
    query_block: int = 1,
    mask: Pattern | None = None,
    scale: float | None = None,
    dense_length: int = 0,
    slot: str = "block_sparse",
) -> Tensor:
    """o = softmax(scale q kᵀ + mask) v over the blocks of the whole row that are listed: `[B, T, H, V]` in q's type.

    q `[B, T, H, K]`, k `[B, T, G, K]`, v `[B, T, G, V]`; `blocks` int32 `[B, ceil(T/query_block), G or H, M]`, lists of
    this rank's queries by the ids of the whole row, −1 for none. Queries at positions below `dense_length` see all
    blocks, whatever is listed. See `longreach.kernels.block_sparse`.
    """
    mask = CAUSAL if mask is None else mask
    scale = float(q.shape[-1] ** -0.5) if scale is None else scale
    inputs = BlockSparseInputs(q, k, v, blocks)
    settings: tuple[Any, ...] = (block_size, query_block, mask.settings, scale)
    op, dense_op = BlockSparseAttend(block_size, query_block, mask, scale), SoftmaxAttend(mask, scale)
    sparse = _lists(inputs, seq, dense_length, query_block)
    if not seq.decodes:
        sparsely = mix(by_blocks, (BlockSparseAttend, *settings), sparse, seq, slot)[0]
        if seq.cache is not None:
            with_cached(op, inputs, seq, slot)
        if not dense_length:
            return sparsely
        dense = attention(
            SoftmaxAttend, SoftmaxInputs(q, k, v), (mask.settings, scale), seq=seq, slot=f"{slot} dense",
            until=dense_length,
        )  # fmt: skip
        return dense + sparsely  # each is 0 where the other is not
    extended, stretches = with_cached(op, sparse, seq, slot)
    positions, parts = seq.derive(_positions_met), []
    if positions.stop > dense_length:
        parts.append(over_cached(op, extended, seq, tile_of_cached(seq, op, stretches)))
    if positions.start < dense_length:
        tensors = SoftmaxInputs(q, extended.k, extended.v)
        parts.append(over_cached(dense_op, tensors, seq, seq.derive(_dense_tile, dense_op, stretches, dense_length)))
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]


def listed_latent_attention(
    q: Tensor,
    latent: Tensor,
    blocks: Tensor,
    *,
    seq: Sequence,
    latent_rank: int,
    block_size: int,
    scale: float,
    slot: str = "listed_latent",
) -> Tensor:
    """Softmax attention of absorbed queries to the rows in listed blocks of the whole row: `[B, T, H, C]`, q's type.

    q `[B, T, H, R + C]`, latent `[B, T, R + C]`, whose last C = `latent_rank` dims are the values; `blocks`
    `[B, T, 1 or H, M]` as those of `block_sparse_attention`. A row that another rank lists is sent to it once, and
    decoding keeps the rows. See `longreach.kernels.latent.listed`.
    """
    inputs = ListedLatentInputs(q, latent, blocks)
    op = ListedLatentAttend(block_size, 1, CAUSAL, scale, latent_rank)
    if not seq.decodes:
        settings = block_size, 1, CAUSAL.settings, scale, latent_rank
        out = mix(by_blocks, (ListedLatentAttend, *settings), inputs, seq, slot)[0]
        if seq.cache is not None:
            with_cached(op, inputs, seq, slot)
        return out
    extended, stretches = with_cached(op, inputs, seq, slot)
    return over_cached(op, extended, seq, tile_of_cached(seq, op, stretches))


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
    `window_means` return them. out `[B, T, H, V]` in q's type; lse `[B, T, H]`, float32 (float64), for `select_blocks`,
    without a gradient. See `longreach.kernels.compressed`.
    """
    scale = float(q.shape[-1] ** -0.5) if scale is None else scale
    if not seq.decodes:
        out, lse = mix(replicated, (CompressedAttend, size, stride, scale), (q, k, v), seq, slot)
        return out, lse.detach()
    folding = seq.derive(_folding, size, stride, k.shape[1])
    out, lse = run(OnOneDevice(CompressedAttend(size, stride, scale)), (q, k, v), (folding, seq.backend))
    return out, lse.detach()


def select_blocks(
    q: Tensor,
    summaries: Tensor,
    *,
    seq: Sequence,
    rule: Rule,
    scale: float | None = None,
    lse: Tensor | None = None,
    weights: Tensor | None = None,
    slot: str = "selection",
) -> Tensor:
    """The blocks of the row that each of this rank's queries lists: int32 `[B, T, G or H, rule.count]`, no gradient.

    q `[B, T, H, K]`; `summaries` `[B, …, G, K]` of the windows of the whole row, as `window_means` and `gather_windows`
    return them; `lse` and `weights` `[B, T, H]`. See `longreach.kernels.select_blocks`.
    """
    scale = float(q.shape[-1] ** -0.5) if scale is None else scale
    q, summaries = q.detach(), summaries.detach()
    lse, weights = (None if x is None else x.detach() for x in (lse, weights))
    if not seq.decodes:
        return mix(BlockSelection, (scale, rule.settings), (q, summaries, lse, weights), seq, slot)[0]
    choices = seq.derive(_choices, rule)
    return choose(q, summaries, rule=rule, choices=choices, scale=scale, lse=lse, weights=weights, backend=seq.backend)


def _lists(inputs: BlockSparseInputs, seq: Sequence, dense_length: int, query_block: int) -> BlockSparseInputs:
    """The inputs without the lists of queries below `dense_length`."""
    if not dense_length or (seq.decodes and seq.derive(_positions_met).start >= dense_length):
        return inputs
    positions = seq.positions(inputs.q.device)
    return inputs._replace(blocks=sparse_lists(inputs.blocks, positions, dense_length, query_block))


def _positions_met(seq: Sequence) -> slice:
    """From the first position in its document of any token to the one after the last."""
    runs = seq.local.columns.at(seq.local.columns.real)
    return slice(int(runs.position.min()), int(runs.end_position.max())) if len(runs.row) else slice(0, 1)


def _dense_tile(seq: Sequence, op: SoftmaxAttend, stretches: tuple[Stretch, ...], until: int) -> Any:
    """Of the new queries below a position against cached keys and the new ones, while decoding."""
    return op.tile(seq.local.up_to(until), documents_of_cached(seq, stretches))


def _folding(seq: Sequence, size: int, stride: int, windows: int) -> Folding:
    """Of the new queries against the windows so far, while decoding."""
    return Folding(WindowLayout(documents_so_far(seq), size, stride), seq.local, windows)


@dataclass(frozen=True)
class BlockSelection(Operation):
    """The blocks of the whole row that each of this rank's queries lists: `[B, T, J, count]`, no gradient.

    No rank sends anything, since each has the summaries of all windows. It is an `Operation` so that compiled graphs
    hold no document and a recomputation takes the first lists; its inputs are (q, summaries, lse, weights), the last
    two None where there are none.
    """

    sends: ClassVar[bool] = False

    scale: float
    rule: Rule

    def __post_init__(self) -> None:
        object.__setattr__(self, "rule", made_of(self.rule))

    @property
    def kernel(self) -> str:
        return "select_blocks"

    def forward(self, inputs: Tensors, seq: Sequence) -> tuple[Tensors, Tensors]:
        q, summaries, lse, weights = inputs
        assert q is not None
        assert summaries is not None
        choices, more = seq.derive(_choices, self.rule), {"lse": lse, "weights": weights}
        lists = choose(q, summaries, rule=self.rule, choices=choices, scale=self.scale, backend=seq.backend, **more)
        return (lists,), ()

    def backward(
        self, gradients: Tensors, inputs: Tensors, outputs: tuple[Tensor, ...], saved: Tensors, seq: Sequence
    ) -> Tensors:
        return (None,) * len(inputs)

    def like(self, inputs: Tensors, ranks: int, spans: int) -> tuple[tuple[Tensor, ...], Tensors]:
        q, summaries, *_ = inputs
        assert q is not None
        assert summaries is not None
        heads = summaries.shape[2] if self.rule.pooled else q.shape[2]
        return (q.new_empty(*q.shape[:2], heads, self.rule.count, dtype=torch.int32),), ()


def _choices(seq: Sequence, rule: Rule) -> Choices:
    return Choices.of(seq.local, documents_so_far(seq) if seq.decodes else seq.documents, rule)


def window_means(x: Tensor, *, seq: Sequence, size: int, stride: int | None = None, slot: str = "means") -> Tensor:
    """The mean of every window of `size` tokens at each `stride`-th (default: blocks, `size`) of each document.

    x `[B, T, …]` to `[B, N // stride, …]`: the windows of the whole row in the order of `WindowLayout`, only complete
    ones, then zeros. While decoding, they are only the windows so far.
    """
    stride = size if stride is None else stride
    check_windows(size, stride)
    if seq.decodes:
        rows = windows_decoded(x, seq, size, stride, f"{slot} rows")
        means = rows.to(torch.promote_types(x.dtype, torch.float32)).mean(2).to(x.dtype)
        return summaries_decoded(means, seq, size, stride, slot)
    means = mix(WindowMeans, (size, stride), (x,), seq, slot)[0]
    if seq.cache is not None:
        keep_last_rows(x, seq, size, stride, f"{slot} rows")
        summaries_decoded(means, seq, size, stride, slot)
    return means


def local_windows(x: Tensor, *, seq: Sequence, size: int, stride: int, slot: str = "windows") -> Tensor:
    """The tokens of the windows that end on this rank: `[B, T, …]` to `[B, W, size, …]`, for a mixer to summarise each.

    W is the most windows that can end there; places without a window are zero. While decoding, W is the most windows
    that the new tokens of any row complete; places that a row leaves over hold any of its tokens. `gather_windows` puts
    the mixer's summaries in the order of the row.
    """
    check_windows(size, stride)
    if seq.decodes:
        return windows_decoded(x, seq, size, stride, slot)
    if seq.cache is not None:
        keep_last_rows(x, seq, size, stride, slot)
    return mix(LocalWindows, (size, stride), (x,), seq, slot)[0]


def gather_windows(x: Tensor, *, seq: Sequence, size: int, stride: int, slot: str = "summaries") -> Tensor:
    """Summaries `[B, W, …]` of the `local_windows` of every rank to those of the whole row, `[B, N // stride, …]`."""
    check_windows(size, stride)
    if seq.decodes:
        return summaries_decoded(x, seq, size, stride, slot)
    summaries = mix(GatherWindows, (seq.layout.length, size, stride), (x,), seq, slot)[0]
    if seq.cache is not None:
        summaries_decoded(summaries, seq, size, stride, slot)
    return summaries
