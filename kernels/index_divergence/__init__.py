"""Index divergence: how far the distribution that an indexer gives the keys is from that of attention itself."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..attend import Gradient, ListedAttend, OnOneDevice, check_keys, documents_of
from ..block_sparse import check_blocks
from ..blocks import BlockLayout, BlockTile
from ..dispatch import resolve
from ..documents import Documents
from ..gathered import GatheredTile
from ..masks import Mask
from ..masks.pattern import Intervals, Tile
from ..operation import run
from . import chunked, reference

OP = "index_divergence"


def index_divergence(
    q: Tensor,
    k: Tensor,
    index_q: Tensor,
    index_k: Tensor,
    weights: Tensor | None = None,
    blocks: Tensor | None = None,
    *,
    block_size: int | None = None,
    documents: Documents | None = None,
    scale: float | None = None,
    index_scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """The Kullback-Leibler divergence of an index from attention, for each query and list: `[B, T, J]`.

        p_tjs = mean over the heads h of list j of softmax_s(scale * q_th . k_s)
        I_tjs = index_scale * index_q_tj . index_k_s                          without weights, J = I lists
        I_t1s = sum_i weights_ti * relu(index_scale * index_q_ti . index_k_s)    with weights, one list
        D_tj  = sum_s p_tjs (log p_tjs - log softmax_s(I_tjs))

    Over the keys s up to t of t's document; with `blocks`, over those in the blocks that are listed, as in
    `block_sparse_attention`. q `[B, T, H, K]`, k `[B, T, G, K]`, G dividing H; index_q `[B, T, I, D]`, index_k
    `[B, T, 1, D]`, `weights` `[B, T, I]`; J divides G. `blocks` int32 `[B, T, J, M]`, of `block_size` tokens. Scales
    are K^(-1/2) and D^(-1/2) by default. The result is float32 (float64 for float64), 0 for padding. Gradients go to
    index_q, index_k and weights alone: dI = softmax(I) - p. No tensor of size T·T exists. Raises ValueError for shapes
    that do not fit and for a backend that cannot run.

    The loss of the lightning indexer (DeepSeek-AI, 2025, "DeepSeek-V3.2", arXiv 2512.02556).
    """
    documents, _ = documents_of(q, k, documents)
    inputs, settings = prepared(q, k, index_q, index_k, weights, blocks, block_size, scale, index_scale)
    lse_op, op = IndexLse(*settings), IndexDivergence(*settings)
    op.check(inputs)
    layout = None if blocks is None else op.layout(documents)
    if layout is not None:
        op.check_lists(inputs, layout, documents)
    tile = op.tile(documents, documents, layout)
    with torch.no_grad():
        lse = run(OnOneDevice(lse_op), inputs, (tile, backend))[0]
    return run(OnOneDevice(op), with_lse(inputs, lse), (tile, backend))[0].squeeze(-1)


class IndexInputs(NamedTuple):
    """See `index_divergence`; lse `[B, T, H]` and index_lse `[B, T, J]`, if known, are of the two distributions."""

    q: Tensor
    k: Tensor
    index_q: Tensor
    index_k: Tensor
    weights: Tensor | None = None
    blocks: Tensor | None = None
    lse: Tensor | None = None
    index_lse: Tensor | None = None

    @property
    def lists(self) -> int:
        """J."""
        return self.index_q.shape[2] if self.weights is None else 1


def prepared(
    q: Tensor,
    k: Tensor,
    index_q: Tensor,
    index_k: Tensor,
    weights: Tensor | None,
    blocks: Tensor | None,
    block_size: int | None,
    scale: float | None,
    index_scale: float | None,
) -> tuple[IndexInputs, tuple[Any, ...]]:
    """The inputs, of which attention's have no gradient, and the settings of the ops. Queries are float32 at least,
    and so are the results."""
    if (blocks is None) != (block_size is None):
        raise ValueError(f"blocks and block_size must come together; got block_size={block_size}")
    dtype = torch.promote_types(q.dtype, torch.float32)
    inputs = IndexInputs(
        q.detach().to(dtype), k.detach(), index_q.to(dtype), index_k,
        None if weights is None else weights.to(dtype), blocks,
    )  # fmt: skip
    scales = ((x.shape[-1] ** -0.5 if given is None else given) for x, given in ((q, scale), (index_q, index_scale)))
    return inputs, (block_size or 0, *map(float, scales))


def with_lse(inputs: IndexInputs, lse: Tensor) -> IndexInputs:
    """The inputs with the output of `IndexLse`."""
    heads = inputs.q.shape[2]
    return inputs._replace(lse=lse[:, :, :heads, 0], index_lse=lse[:, :, heads:, 0])


@dataclass(frozen=True)
class _OverIndex(ListedAttend):
    """What both ops share. `block_size` is that of listed blocks, 0 where all keys are seen."""

    name, record, travels = OP, IndexInputs, ("k", "index_k")

    block_size: int
    scale: float
    index_scale: float

    def check(self, inputs: IndexInputs) -> None:
        check_inputs(inputs)

    def check_lists(self, inputs: IndexInputs, layout: BlockLayout, queries: Documents) -> None:
        assert inputs.blocks is not None
        tile = BlockTile(layout, queries, queries)
        check_blocks(inputs.blocks, tile, heads=inputs.lists, kv_heads=inputs.lists)

    def layout(self, rows: Documents) -> BlockLayout:
        return rows.derive(BlockLayout, self.block_size)

    def tile(self, queries: Documents, keys: Documents, layout: BlockLayout | None = None) -> Tile | BlockTile | None:
        if not self.block_size:
            return Mask().tile(queries, keys)
        return BlockTile.of(self.layout(keys) if layout is None else layout, queries, keys)

    def reached(self, parts: Documents, number: int) -> Tensor:
        return Mask().reached(parts, number)

    def gathered(self, tile: BlockTile, listed: Tensor) -> BlockTile:
        return GatheredTile(tile, listed)

    def kept(self, length: int) -> Intervals:
        return [(0, length)]

    def implementation(self, inputs: IndexInputs, backend: str) -> ModuleType:
        """The module that runs."""
        chosen = resolve(OP, backend, inputs.q.device, inputs.q.dtype, ("chunked", "reference"))
        return reference if chosen == "reference" else chunked


@dataclass(frozen=True)
class IndexLse(_OverIndex):
    """The log-sum-exps of both distributions, as an op over keys: out `[B, T, H + J, 1]`, without a gradient."""

    def width(self, inputs: IndexInputs) -> tuple[int, int]:
        return inputs.q.shape[2] + inputs.lists, 1

    def attend(
        self, inputs: IndexInputs, received: tuple[Tensor, ...], tile: Any, backend: str
    ) -> tuple[Tensor, Tensor]:
        lse = self.implementation(inputs, backend).lse(inputs, received, tile, self.scale, self.index_scale)
        return lse.new_zeros(*lse.shape, 1), lse

    def attend_backward(
        self, gradient: Gradient, inputs: IndexInputs, received: tuple[Tensor, ...], tile: Any, backend: str
    ) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        return {}, tuple(torch.zeros_like(x, dtype=gradient.exact) for x in received)

    def finish(self, out: Tensor, lse: Tensor, inputs: IndexInputs) -> tuple[Tensor, Tensor]:
        return lse.unsqueeze(-1), lse


@dataclass(frozen=True)
class IndexDivergence(_OverIndex):
    """The divergence as an op over keys: out `[B, T, J, 1]`, given both log-sum-exps.

    Of a part of the keys that has the mass m = sum of p, the log-sum-exp is log m and the output is the part's sum / m:
    so parts merge as those of attention do.
    """

    def width(self, inputs: IndexInputs) -> tuple[int, int]:
        return inputs.lists, 1

    def attend(
        self, inputs: IndexInputs, received: tuple[Tensor, ...], tile: Any, backend: str
    ) -> tuple[Tensor, Tensor]:
        part = self.implementation(inputs, backend).divergence(inputs, received, tile, self.scale, self.index_scale)
        total, mass = part
        return (total / mass.clamp(min=torch.finfo(mass.dtype).tiny)).unsqueeze(-1), mass.log()

    def attend_backward(
        self, gradient: Gradient, inputs: IndexInputs, received: tuple[Tensor, ...], tile: Any, backend: str
    ) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        implementation, dout = self.implementation(inputs, backend), gradient.dout.squeeze(-1)
        dq, dweights, dk = implementation.backward(dout, inputs, received, tile, self.scale, self.index_scale)
        stay = {"index_q": dq} if dweights is None else {"index_q": dq, "weights": dweights}
        return stay, (torch.zeros_like(received[0], dtype=gradient.exact), dk)


def check_inputs(inputs: IndexInputs) -> None:
    """Raises ValueError for shapes that do not fit."""
    q, k, index_q, index_k, weights, *_ = inputs
    check_keys(q, k)
    if index_q.dim() != 4 or index_q.shape[:2] != q.shape[:2]:
        raise ValueError(f"index_q must be [B, T, I, D] for q {tuple(q.shape)}; got {tuple(index_q.shape)}")
    if tuple(index_k.shape) != (*k.shape[:2], 1, index_q.shape[3]):
        expected = (*k.shape[:2], 1, index_q.shape[3])
        raise ValueError(f"index_k must be [B, T, 1, D] = {expected}; got {tuple(index_k.shape)}")
    if weights is not None and weights.shape != index_q.shape[:3]:
        raise ValueError(f"weights must be [B, T, I] = {tuple(index_q.shape[:3])}; got {tuple(weights.shape)}")
    if k.shape[2] % inputs.lists:
        raise ValueError(
            f"lists must divide the {k.shape[2]} key/value heads; got {inputs.lists} index heads without weights"
        )


def flops(pairs: int, *, heads: int, key_dim: int, index_heads: int, index_dim: int) -> int:
    """Forward FLOPs on so many (query, key) pairs: both scores, twice, for the log-sum-exps and for the divergence."""
    return 4 * pairs * (heads * key_dim + index_heads * index_dim)
