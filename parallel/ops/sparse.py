"""Attention to selected blocks and to summaries of windows, on a sequence that ranks share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...kernels.attend import OnOneDevice
from ...kernels.block_sparse import BlockSparseAttend, BlockSparseInputs, sparse_lists
from ...kernels.block_sparse import block_sparse_attention as local_block_sparse_attention
from ...kernels.compressed import CompressedAttend
from ...kernels.compressed.folding import Folding
from ...kernels.documents import Documents
from ...kernels.latent.listed import ListedLatentAttend, ListedLatentInputs
from ...kernels.masks import Pattern
from ...kernels.operation import Tensors, run
from ...kernels.plain import made_of
from ...kernels.select_blocks import Choices, Rule, choose
from ...kernels.softmax import SoftmaxAttend, SoftmaxInputs
from ...kernels.windows import WindowLayout
from ..operation import Operation, mix
from ..sequence import Sequence
from ..strategies.listed_blocks import by_blocks
from ..strategies.replicated import replicated
from ..strategies.windows import (
    GatherWindows,
    LocalWindows,
    WindowMeans,
    check_windows,
    summaries_decoded,
    windows_decoded,
)
from ..strategies.windows import windows_held as windows_held
from .attention import CAUSAL, attention, documents_of_cached, tile_of_cached, with_cached


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
    if seq.cache is None:
        if dense_length:
            sparse = sparse_lists(blocks, seq.positions(q.device), dense_length, query_block)
            inputs = inputs._replace(blocks=sparse)
        sparsely = mix(by_blocks, (BlockSparseAttend, *settings), inputs, seq, slot)[0]
        if not dense_length:
            return sparsely
        dense = attention(
            SoftmaxAttend, SoftmaxInputs(q, k, v), (mask.settings, scale), seq=seq, slot=f"{slot} dense",
            until=dense_length,
        )  # fmt: skip
        return dense + sparsely  # each is 0 where the other is not
    op = BlockSparseAttend(block_size, query_block, mask, scale)
    extended, stretches = with_cached(op, inputs, seq, slot)
    if seq.cache.length >= dense_length:
        return run(OnOneDevice(op), extended, (tile_of_cached(seq, op, stretches), seq.backend))[0]
    if seq.cache.length + q.shape[1] <= dense_length:
        dense = SoftmaxAttend(mask, scale)
        tensors = SoftmaxInputs(q, extended.k, extended.v)
        return run(OnOneDevice(dense), tensors, (tile_of_cached(seq, dense, stretches), seq.backend))[0]
    keys = documents_of_cached(seq, stretches)
    return local_block_sparse_attention(  # type: ignore[return-value]
        q, extended.k, extended.v, blocks, block_size=block_size, query_block=query_block, mask=mask,
        documents=seq.local, key_documents=keys, scale=scale, dense_length=dense_length, backend=seq.backend,
    )  # fmt: skip


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
    if seq.cache is None:
        settings = block_size, 1, CAUSAL.settings, scale, latent_rank
        return mix(by_blocks, (ListedLatentAttend, *settings), inputs, seq, slot)[0]
    op = ListedLatentAttend(block_size, 1, CAUSAL, scale, latent_rank)
    extended, stretches = with_cached(op, inputs, seq, slot)
    return run(OnOneDevice(op), extended, (tile_of_cached(seq, op, stretches), seq.backend))[0]


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
    if seq.cache is None:
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
    if seq.cache is None:
        return mix(BlockSelection, (scale, rule.settings), (q, summaries, lse, weights), seq, slot)[0]
    choices = seq.derive(_choices, rule)
    return choose(q, summaries, rule=rule, choices=choices, scale=scale, lse=lse, weights=weights, backend=seq.backend)


def _decoded_row(seq: Sequence, before: int) -> Documents:
    """The documents of all tokens so far, while decoding."""
    return Documents.whole(seq.documents.batch, before + seq.documents.length)


def _folding(seq: Sequence, size: int, stride: int, windows: int) -> Folding:
    """Of the new queries against the windows so far, while decoding."""
    assert seq.cache is not None
    row = seq.derive(_decoded_row, seq.cache.length)
    return Folding(WindowLayout(row, size, stride), seq.local, windows)


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
    row = seq.documents if seq.cache is None else seq.derive(_decoded_row, seq.cache.length)
    return Choices.of(seq.local, row, rule)


def window_means(x: Tensor, *, seq: Sequence, size: int, stride: int | None = None, slot: str = "means") -> Tensor:
    """The mean of every window of `size` tokens at each `stride`-th (default: blocks, `size`) of each document.

    x `[B, T, …]` to `[B, N // stride, …]`: the windows of the whole row in the order of `WindowLayout`, only complete
    ones, then zeros. While decoding, they are only the windows so far.
    """
    stride = size if stride is None else stride
    check_windows(size, stride)
    if seq.cache is None:
        return mix(WindowMeans, (size, stride), (x,), seq, slot)[0]
    rows = windows_decoded(x, seq, seq.cache, size, stride, f"{slot} rows")
    means = rows.to(torch.promote_types(x.dtype, torch.float32)).mean(2).to(x.dtype)
    return summaries_decoded(means, seq, seq.cache, slot)


def local_windows(x: Tensor, *, seq: Sequence, size: int, stride: int, slot: str = "windows") -> Tensor:
    """The tokens of the windows that end on this rank: `[B, T, …]` to `[B, W, size, …]`, for a mixer to summarise each.

    W is the most windows that can end there; places without a window are zero. While decoding, W counts the windows
    that the new tokens complete. `gather_windows` puts the mixer's summaries in the order of the row.
    """
    check_windows(size, stride)
    if seq.cache is None:
        return mix(LocalWindows, (size, stride), (x,), seq, slot)[0]
    return windows_decoded(x, seq, seq.cache, size, stride, slot)


def gather_windows(x: Tensor, *, seq: Sequence, size: int, stride: int, slot: str = "summaries") -> Tensor:
    """Summaries `[B, W, …]` of the `local_windows` of every rank to those of the whole row, `[B, N // stride, …]`."""
    check_windows(size, stride)
    if seq.cache is None:
        return mix(GatherWindows, (seq.layout.length, size, stride), (x,), seq, slot)[0]
    return summaries_decoded(x, seq, seq.cache, slot)
