"""Gate divergence: how far the distribution that a gate gives blocks of keys is from attention pooled over blocks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..attend import Attend, Gradient, ListedAttend, OnOneDevice, check_keys, documents_of
from ..block_sparse import check_blocks
from ..blocks import BlockLayout, BlockTile
from ..dispatch import resolve
from ..documents import Documents
from ..gathered import GatheredTile
from ..masks import Mask
from ..masks.pattern import Intervals, Tile
from ..operation import run
from ..softmax import SoftmaxAttend, SoftmaxInputs
from . import chunked
from .tiles import GateTile, windows_of_rows

OP = "gate_divergence"


def gate_divergence(
    q: Tensor,
    k: Tensor,
    gate_q: Tensor,
    gate_k: Tensor,
    blocks: Tensor | None = None,
    *,
    block_size: int,
    documents: Documents | None = None,
    scale: float | None = None,
    gate_scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """The Kullback-Leibler divergence of a gate over blocks from attention, for each query and group: `[B, T, G]`.

        m_tgb = max of softmax_s(scale * q_th . k_s) over the heads h of group g and the tokens s of block b
        P_tgb = m_tgb / sum_b m_tgb        over the blocks of t's document that end at or before t
        D_tg  = sum_b P_tgb (log P_tgb - log softmax_b(gate_scale * gate_q_tg . gate_k_bg))

    q `[B, T, H, K]`, k `[B, T, G, K]`, G dividing H; gate_q `[B, T, G, D]`; gate_k `[B, N, G, D]`, one for each
    complete block of `block_size` tokens in the order of `WindowLayout`, what follows the last of a row being ignored.
    With `blocks` int32 `[B, T, G, M]`, as in `block_sparse_attention`, over the keys and blocks that are listed. Scales
    are K^(-1/2) and D^(-1/2) by default. The result is float32 (float64 for float64), 0 where a query has no such
    block. Gradients go to gate_q and gate_k alone. No tensor of size T·T, or T·T over the block size, exists. Raises
    ValueError for shapes that do not fit and for a backend that cannot run.

    The distillation of SeerAttention (Gao et al., 2024, arXiv 2410.13276; 2025, arXiv 2506.08889).
    """
    documents, _ = documents_of(q, k, documents)
    scale, gate_scale = scales(q, gate_q, scale, gate_scale)
    check_gates(q, k, gate_q, gate_k)
    if blocks is not None:
        listed = ListedGateDivergence(block_size, scale, gate_scale)
        inputs = ListedGateInputs(*prepared(q, k, gate_q, gate_k), blocks)
        listed.check(inputs)
        layout = listed.layout(documents)
        listed.check_lists(inputs, layout, documents)
        out = run(OnOneDevice(listed), inputs, (listed.tile(documents, documents, layout), backend))[0]
        return divergence_of(out)
    lse_op, op = GateLse(Mask(), scale), GateDivergence(block_size, scale, gate_scale, documents.length)
    with torch.no_grad():
        lse = run(OnOneDevice(lse_op), LseInputs(q, k.to(q.dtype)), (lse_op.tile(documents, documents), backend))[1]
        windows = windows_of_rows(k, documents, block_size)
    gates = GateInputs(*prepared(q, windows, gate_q, gate_k), lse)
    return divergence_of(run(OnOneDevice(op), gates, (op.tile(documents, documents), backend))[0])


class GateInputs(NamedTuple):
    """What `GateDivergence` gets.

    q `[B, T, H, K]`; k `[B, W, block_size, G, K]` of complete blocks, or `[B, T, G, K]` to make blocks of before they
    travel; gate_q `[B, T, G, D]`; gate_k `[B, N, G, D]` of the blocks of whole rows; lse `[B, T, H]` of attention.
    """

    q: Tensor
    k: Tensor
    gate_q: Tensor
    gate_k: Tensor
    lse: Tensor


class ListedGateInputs(NamedTuple):
    """See `gate_divergence`."""

    q: Tensor
    k: Tensor
    gate_q: Tensor
    gate_k: Tensor
    blocks: Tensor


class LseInputs(NamedTuple):
    """q `[B, T, H, K]` and k `[B, S, G, K]` of one type."""

    q: Tensor
    k: Tensor


def scales(q: Tensor, gate_q: Tensor, scale: float | None, gate_scale: float | None) -> tuple[float, float]:
    """Both scales, by default those of the dims."""
    given = (q, scale), (gate_q, gate_scale)
    first, second = (x.shape[-1] ** -0.5 if scale is None else float(scale) for x, scale in given)
    return first, second


def prepared(q: Tensor, k: Tensor, gate_q: Tensor, gate_k: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same, those of attention without a gradient; all but k are float32 at least, and so are the results."""
    q, gate_q, gate_k = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q.detach(), gate_q, gate_k))
    return q, k.detach(), gate_q, gate_k


def divergence_of(out: Tensor) -> Tensor:
    """`[B, T, G]`: of the output of both ops, `[B, T, 2 G, 1]`, the first half."""
    return out[:, :, : out.shape[2] // 2, 0]


@dataclass(frozen=True)
class GateLse(SoftmaxAttend):
    """The log-sum-exp of softmax attention, by its kernels, without values: only the keys travel."""

    record = LseInputs
    travels = ("k",)
    constant = True

    def check(self, inputs: LseInputs) -> None:  # type: ignore[override]
        check_keys(inputs.q, inputs.k)

    def width(self, inputs: LseInputs) -> tuple[int, int]:
        return inputs.q.shape[2], 1

    def attend(
        self, inputs: LseInputs, received: tuple[Tensor, ...], tile: Tile, backend: str
    ) -> tuple[Tensor, Tensor]:
        (k,) = received
        v = k if k.is_cuda else k[..., :1]  # kernels of a GPU want values as wide as keys
        chosen = "reference" if is_reference(inputs.q, backend) else "auto"
        _, lse = super().attend(SoftmaxInputs(inputs.q, k, v), (k, v), tile, chosen)
        return lse.new_zeros(*lse.shape, 1), lse

    def finish(self, out: Tensor, lse: Tensor, inputs: LseInputs) -> tuple[Tensor, Tensor]:
        return out, lse


def is_reference(q: Tensor, backend: str) -> bool:
    """Whether scores are computed in as few parts as can be: the reference."""
    return resolve(OP, backend, q.device, q.dtype, ("chunked", "reference")) == "reference"


class _OverBlocks(Attend):
    """What both ops share: an output `[B, T, 2 G, 1]`, whose first half is the divergence.

    With log m of some blocks and the gate's logits z, (sum_b m_b (log m_b - z_b) / sum_b m_b, log sum_b m_b) is the
    first half of a part's output and log-sum-exp, and (0, log sum_b exp z_b) the second. So parts merge as those of
    attention do; and of all blocks, D is the first output less the first log-sum-exp plus the second.
    """

    name, constant = OP, True
    gate_scale: float

    @abstractmethod
    def parts(self, inputs: Any, received: tuple[Tensor, ...], tile: Any, *, whole: bool) -> Iterator[chunked.Part]:
        """The work of a tile; whole: in as few parts as can be."""

    def kept(self, length: int) -> Intervals:
        return [(0, length)]

    def width(self, inputs: Any) -> tuple[int, int]:
        return 2 * inputs.gate_q.shape[2], 1

    def attend(self, inputs: Any, received: tuple[Tensor, ...], tile: Any, backend: str) -> tuple[Tensor, Tensor]:
        parts = self.parts(inputs, received, tile, whole=is_reference(inputs.q, backend))
        return chunked.divergence(parts, *self.zeros(inputs))

    def attend_backward(
        self, gradient: Gradient, inputs: Any, received: tuple[Tensor, ...], tile: Any, backend: str
    ) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        parts = self.parts(inputs, received, tile, whole=is_reference(inputs.q, backend))
        dout = self.gate_scale * divergence_of(gradient.dout)
        dq, dk = chunked.backward(parts, dout, gradient.lse, inputs.gate_q, inputs.gate_k)
        return {"gate_q": dq, "gate_k": dk}, tuple(torch.zeros_like(x, dtype=gradient.exact) for x in received)

    def finish(self, out: Tensor, lse: Tensor, inputs: Any) -> tuple[Tensor, Tensor]:
        mass, of_gate = lse.chunk(2, dim=2)
        total = divergence_of(out) - (mass - of_gate)  # exactly 0 for one block
        total = torch.where(mass > float("-inf"), total, 0.0)
        return torch.cat([total, torch.zeros_like(total)], dim=2).unsqueeze(-1), lse


@dataclass(frozen=True)
class GateDivergence(_OverBlocks):
    """The divergence over all blocks, given attention's log-sum-exp, as an op over keys.

    What travels is the keys of the blocks that end on a rank, those of each span of `cut` tokens side by side, in
    ceil(cut / block_size) places.
    """

    record, travels = GateInputs, ("k",)

    block_size: int
    scale: float
    gate_scale: float
    cut: int

    def check(self, inputs: GateInputs) -> None:
        """The tensors have been checked by `check_gates`."""

    def tile(self, queries: Documents, keys: Documents) -> GateTile:
        return self.tile_in(keys, queries, keys)

    def tile_in(self, rows: Documents, queries: Documents, keys: Documents) -> GateTile:
        return GateTile.of(rows, queries, keys, self.block_size, self.cut)

    def reached(self, parts: Documents, number: int) -> Tensor:
        return Mask().reached(parts, number)

    def parts(
        self, inputs: GateInputs, received: tuple[Tensor, ...], tile: GateTile, *, whole: bool
    ) -> Iterator[chunked.Part]:
        return chunked.dense(inputs, received[0], tile, self.scale, self.gate_scale, whole=whole)


@dataclass(frozen=True)
class ListedGateDivergence(_OverBlocks, ListedAttend):
    """The divergence over listed blocks, as an op over keys, all of which come at once."""

    record, travels = ListedGateInputs, ("k",)

    block_size: int
    scale: float
    gate_scale: float

    def check(self, inputs: ListedGateInputs) -> None:
        check_gates(*inputs)

    def check_lists(self, inputs: ListedGateInputs, layout: BlockLayout, queries: Documents) -> None:
        groups = inputs.k.shape[2]
        check_blocks(inputs.blocks, BlockTile(layout, queries, queries), heads=groups, kv_heads=groups)

    def layout(self, rows: Documents) -> BlockLayout:
        return rows.derive(BlockLayout, self.block_size)

    def tile(self, queries: Documents, keys: Documents, layout: BlockLayout | None = None) -> BlockTile | None:
        return BlockTile.of(self.layout(keys) if layout is None else layout, queries, keys)

    def gathered(self, tile: BlockTile, listed: Tensor) -> BlockTile:
        return GatheredTile(tile, listed)

    def parts(
        self, inputs: ListedGateInputs, received: tuple[Tensor, ...], tile: BlockTile, *, whole: bool
    ) -> Iterator[chunked.Part]:
        return chunked.listed(inputs, received[0], tile, self.scale, self.gate_scale, whole=whole)


def check_gates(q: Tensor, k: Tensor, gate_q: Tensor, gate_k: Tensor, blocks: Tensor | None = None) -> None:
    """Raises ValueError for shapes that do not fit."""
    check_keys(q, k)
    expected = (*q.shape[:2], k.shape[2])
    if gate_q.dim() != 4 or tuple(gate_q.shape[:3]) != expected:
        raise ValueError(f"gate_q must be [B, T, G, D] for [B, T, G] = {expected}; got {tuple(gate_q.shape)}")
    if gate_k.dim() != 4 or (gate_k.shape[0], *gate_k.shape[2:]) != (q.shape[0], *gate_q.shape[2:]):
        raise ValueError(f"gate_k must be [B, N, G, D] for gate_q {tuple(gate_q.shape)}; got {tuple(gate_k.shape)}")
    if blocks is not None and (blocks.dtype != torch.int32 or tuple(blocks.shape[:3]) != expected):
        raise ValueError(f"blocks must be int32 [B, T, G, M]; got {blocks.dtype} {tuple(blocks.shape)}")


def flops(pairs: int, *, heads: int, key_dim: int, listed: bool) -> int:
    """Forward FLOPs of attention's scores on so many (query, key) pairs; those of the gate are far fewer.

    Of blocks that are not listed, scores are computed twice: for the log-sum-exp and for the divergence.
    """
    return (2 if listed else 4) * pairs * heads * key_dim
