"""Block-sparse attention: softmax attention over the key blocks listed for each query, and its parts."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..attend import Gradient, ListedAttend, OnOneDevice, documents_of
from ..blocks import BlockLayout, BlockTile
from ..dispatch import asked, resolve
from ..documents import Documents
from ..gathered import GatheredTile
from ..masks import Mask, Pattern
from ..masks.pattern import Intervals
from ..operation import run
from ..plain import made_of
from ..softmax import check_inputs, softmax_attention
from . import chunked, reference
from .visits import visits_of


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    *,
    block_size: int,
    query_block: int = 1,
    mask: Pattern | None = None,
    documents: Documents | None = None,
    key_documents: Documents | None = None,
    scale: float | None = None,
    dense_length: int = 0,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention over the key blocks that are listed for each query, or block of queries, and head.

        s_ij = scale * q_i . k_j for j in a listed block and visible;  lse_i = log sum_j exp(s_ij)
        o_i = sum_j exp(s_ij - lse_i) v_j

    q `[B, T, H, K]`, k `[B, S, G, K]`, v `[B, S, G, V]`, G dividing H. `blocks` int32 `[B, L, J, M]`: the blocks of
    L = ceil(T/query_block) runs of `query_block` consecutive queries, for each of J = G (all heads of a group share)
    or H heads; −1, anywhere in a list, means no block. Blocks have `block_size` tokens, restart at each document, and
    are numbered document by document over the row (`BlockLayout`). `mask` is causal, `Mask()`, by default. It compares
    positions: a query's own block may be listed, and later tokens and other documents stay hidden in listed blocks.
    `documents` are those of the queries (default: a row is one document), `key_documents` those of the keys, whole rows
    (default: `documents`, for S = T). A list must not repeat a block. On the CPU, where checking costs little, a
    repeated block and one that the row does not have raise ValueError; on other devices the first counts twice and the
    second is ignored. Queries at positions below `dense_length` see all blocks, whatever is listed.

    Returns out `[B, T, H, V]` in q's type and, with `return_lse`, lse `[B, T, H]` in float32 (float64 for float64);
    both carry gradients to q, k and v, never to `blocks`. A query that sees no key has out 0 and lse −inf. Time and
    memory grow with the lists: no tensor of size T·S exists, and the same inputs give the same bits at every run.
    Raises ValueError for shapes that do not fit and for a backend that cannot run.

    Yuan et al., 2025, "Native Sparse Attention", arXiv 2502.11089; Lu et al., 2025, "MoBA", arXiv 2502.13189.
    """
    factor = q.shape[-1] ** -0.5 if scale is None else float(scale)
    op = BlockSparseAttend(block_size, query_block, Mask() if mask is None else mask, factor)
    check_inputs(q, k, v)
    documents, key_documents = documents_of(q, k, documents, key_documents)
    tile = BlockTile(op.layout(key_documents), documents, key_documents, op.mask, query_block)
    check_blocks(blocks, tile, heads=q.shape[2], kv_heads=k.shape[2])
    if dense_length:
        blocks = sparse_lists(blocks, documents.positions(q.device), dense_length, query_block)
    inputs = BlockSparseInputs(q, k, v, blocks)
    out, lse = run(OnOneDevice(op), inputs, (op.tile(documents, key_documents), backend))
    if dense_length:
        dense, dense_lse = softmax_attention(
            q, k, v, mask=op.mask, documents=documents.up_to(dense_length),
            key_documents=key_documents.up_to(dense_length), scale=scale, return_lse=True, backend=backend,
        )  # fmt: skip
        short = documents.positions(q.device).unsqueeze(-1) < dense_length
        out, lse = out + dense, torch.where(short, dense_lse, lse)  # each out is 0 where the other is not
    return (out, lse) if return_lse else out


def sparse_lists(blocks: Tensor, positions: Tensor, dense_length: int, query_block: int = 1) -> Tensor:
    """Lists of single queries at `positions` `[B, T]`, empty where these are below `dense_length`.

    Raises ValueError for lists of several queries.
    """
    if query_block > 1:
        raise ValueError(f"dense_length must come with lists of single queries; got query_block={query_block}")
    return torch.where(positions[:, :, None, None] >= dense_length, blocks, -1)


class BlockSparseInputs(NamedTuple):
    """q `[B, T, H, K]`, k `[B, S, G, K]`, v `[B, S, G, V]`, and the lists `[B, L, J, M]` of the queries."""

    q: Tensor
    k: Tensor
    v: Tensor
    blocks: Tensor


@dataclass(frozen=True)
class BlockSparseAttend(ListedAttend):
    """The op as `longreach.kernels.attend` describes it. `mask` is a pattern or the `settings` of one."""

    name, record = "block_sparse_attention", BlockSparseInputs

    block_size: int
    query_block: int
    mask: Pattern
    scale: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "mask", made_of(self.mask))

    def check(self, inputs: BlockSparseInputs) -> None:
        check_inputs(inputs.q, inputs.k, inputs.v)

    def check_lists(self, inputs: Any, layout: BlockLayout, queries: Documents) -> None:
        tile = BlockTile(layout, queries, queries, self.mask, self.query_block)
        check_blocks(inputs.blocks, tile, heads=inputs.q.shape[2], kv_heads=self.kv_heads(inputs))

    def kv_heads(self, inputs: Any) -> int:
        """Heads of the keys."""
        return inputs.k.shape[2]

    def layout(self, rows: Documents) -> BlockLayout:
        return rows.derive(BlockLayout, self.block_size)

    def tile(self, queries: Documents, keys: Documents, layout: BlockLayout | None = None) -> BlockTile | None:
        layout = self.layout(keys) if layout is None else layout
        return BlockTile.of(layout, queries, keys, mask=self.mask, query_block=self.query_block)

    def gathered(self, tile: BlockTile, listed: Tensor) -> BlockTile:
        return GatheredTile(tile, listed)

    def kept(self, length: int) -> Intervals:
        return [(0, length)]

    def attend(
        self, inputs: BlockSparseInputs, received: tuple[Tensor, ...], tile: BlockTile, backend: str
    ) -> tuple[Tensor, Tensor]:
        k, v = received
        return attend(inputs.q, k, v, inputs.blocks, tile=tile, scale=self.scale, backend=backend)

    def attend_backward(
        self, gradient: Gradient, inputs: BlockSparseInputs, received: tuple[Tensor, ...], tile: BlockTile, backend: str
    ) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        q, (k, v) = inputs.q, received
        dq, *travelled = attend_backward(gradient, q, k, v, inputs.blocks, tile=tile, scale=self.scale, backend=backend)
        return {"q": dq}, tuple(travelled)


def check_blocks(blocks: Tensor, tile: BlockTile, *, heads: int, kv_heads: int) -> None:
    """Raises ValueError unless `blocks` are lists for the tile's queries; checks ids only on the host."""
    shape = (tile.queries.batch, tile.lists)
    if blocks.dtype != torch.int32 or blocks.dim() != 4 or tuple(blocks.shape[:2]) != shape:
        raise ValueError(
            f"blocks must be int32 [B, L, J, M] with B, L = {shape[0]}, {shape[1]} for query_block={tile.query_block}; "
            f"got {blocks.dtype} {tuple(blocks.shape)}"
        )
    if blocks.shape[2] not in (heads, kv_heads):
        raise ValueError(f"blocks must have lists for {kv_heads} or {heads} heads; got {blocks.shape[2]}")
    if blocks.device.type != "cpu" or not blocks.numel():
        return
    if int(blocks.min()) < -1:
        raise ValueError(f"blocks must be ids, or −1 for none; got {int(blocks.min())}")
    counts = torch.tensor(tile.layout.counts, dtype=torch.int32)
    if bool((blocks.amax((1, 2, 3)) >= counts).any()):
        row = int((blocks.amax((1, 2, 3)) >= counts).nonzero()[0])
        raise ValueError(
            f"blocks must be below the number of blocks of their row; row {row} has {int(counts[row])} of "
            f"{tile.layout.block_size} tokens and got {int(blocks[row].max())}. Number them as BlockLayout does"
        )
    ordered = blocks.sort(-1).values
    if bool(((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any()):
        raise ValueError("blocks must name a block at most once per list; got one twice. Leave −1 in its place")


def _implementation(backend: str, q: Tensor, tile: BlockTile) -> ModuleType:
    if tile.layout.block_size < chunked.GATHERED and asked("block_sparse_attention", backend) == "auto":
        backend = "chunked"  # the kernels would pad a block of one token to sixteen
    chosen = resolve("block_sparse_attention", backend, q.device, q.dtype)
    if chosen == "triton":
        from . import triton as kernels

        return kernels
    return reference if chosen == "reference" else chunked


@torch.no_grad()
def attend(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, *, tile: BlockTile, scale: float, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Attention over the tokens of listed blocks that are among the tile's keys: out `[B, T, H, V]`, lse `[B, T, H]`.

    Float32 (float64 for float64). The keys may be any part of the rows: tiles over all parts, merged,
    give attention over the whole blocks. Queries that see no key have out 0 and lse −inf, the neutral element of
    `merge`. No gradient flows through the results.
    """
    return _implementation(backend, q, tile).attend(q, k, v, blocks, tile=tile, scale=scale)


@torch.no_grad()
def attend_backward(
    gradient: Gradient,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    *,
    tile: BlockTile,
    scale: float,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of one tile, float32 (float64 for float64); the gradients of tiles add up.

    p_ij = exp(s_ij - lse_i);  ds_ij = p_ij (dout_i . v_j - dout_i . out_i + dlse_i)
    """
    return _implementation(backend, q, tile).attend_backward(gradient, q, k, v, blocks, tile=tile, scale=scale)


def count_visits(blocks: Tensor, tile: BlockTile, *, kv_heads: int) -> int:
    """How many visits, (query, head with lists, block) with a visible key, the lists cause in a tile.

    A block in several pieces counts once per piece. This reads the lists, and so waits for their device.
    """
    return len(visits_of(blocks, tile, kv_heads).rows)


def most_visits(documents: Documents, *, block_size: int, count: int) -> int:
    """The visits of a head with lists if each query lists `count` blocks, or all up to its own if these are fewer.

    Meters use it before lists exist: it is the sum over tokens of min(count, position // block_size + 1).
    """
    runs = documents.columns.at(documents.columns.real)
    listed = _listed_before(runs.end_position, block_size, count) - _listed_before(runs.position, block_size, count)
    return int(listed.sum())


def _listed_before(position: Tensor, block_size: int, count: int) -> Tensor:
    """Sum over positions below `position` of min(count, position // block_size + 1)."""
    rising = position.clamp(max=(count - 1) * block_size)
    blocks, rest = rising // block_size, rising % block_size
    return block_size * blocks * (blocks + 1) // 2 + rest * (blocks + 1) + (position - rising) * count


def flops(visits: int, *, block_size: int, heads_a_list: int, key_dim: int, value_dim: int) -> int:
    """Forward FLOPs of that many visits (`count_visits`, `most_visits`); a backward does 2.5 times as many.

    Every visit counts as a whole block for each of the `heads_a_list` heads that share the list.
    """
    return 2 * visits * block_size * heads_a_list * (key_dim + value_dim)
