"""Gate divergence: how far the distribution that a gate gives blocks of keys is from attention pooled over blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..attend import Attend, Gradient, OnOneDevice, check_keys, documents_of
from ..block_sparse import check_blocks
from ..blocks import BlockLayout, BlockTile
from ..derived import Deriving
from ..dispatch import resolve
from ..documents import Documents
from ..masks import Mask
from ..masks.pattern import Intervals
from ..operation import run
from ..windows import WindowLayout
from . import chunked

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
    inputs, settings = prepared(q, k, gate_q, gate_k, blocks, block_size, scale, gate_scale)
    op = GateDivergence(*settings)
    op.check(inputs)
    if blocks is not None:
        groups = k.shape[2]
        check_blocks(blocks, op.tile_of_lists(documents), heads=groups, kv_heads=groups)
    return run(OnOneDevice(op), inputs, (op.tile(documents, documents), backend))[0].squeeze(-1)


class GateInputs(NamedTuple):
    """See `gate_divergence`."""

    q: Tensor
    k: Tensor
    gate_q: Tensor
    gate_k: Tensor
    blocks: Tensor | None = None


def prepared(
    q: Tensor,
    k: Tensor,
    gate_q: Tensor,
    gate_k: Tensor,
    blocks: Tensor | None,
    block_size: int,
    scale: float | None,
    gate_scale: float | None,
) -> tuple[GateInputs, tuple[Any, ...]]:
    """The inputs, of which attention's have no gradient, and the settings of the op. Queries are float32 at least, and
    so is the result."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    inputs = GateInputs(q.detach().to(dtype), k.detach(), gate_q.to(dtype), gate_k.to(dtype), blocks)
    scales = ((x.shape[-1] ** -0.5 if given is None else given) for x, given in ((q, scale), (gate_q, gate_scale)))
    return inputs, (block_size, *map(float, scales))


@dataclass(frozen=True, eq=False)
class GateTile(Deriving):
    """Queries against the keys of whole rows, in blocks of `block_size`."""

    queries: Documents
    keys: Documents
    block_size: int

    @property
    def windows(self) -> WindowLayout:
        """The complete blocks of the rows."""
        return self.keys.derive(WindowLayout, self.block_size, self.block_size)


@dataclass(frozen=True)
class GateDivergence(Attend):
    """The divergence as an op over the keys of whole rows, which do not come in parts: out `[B, T, G, 1]`."""

    name, record, travels, constant = OP, GateInputs, ("k",), True

    block_size: int
    scale: float
    gate_scale: float

    def check(self, inputs: GateInputs) -> None:
        check_inputs(inputs)

    def tile_of_lists(self, rows: Documents) -> BlockTile:
        """What lists of all tokens of the rows refer to."""
        return BlockTile(rows.derive(BlockLayout, self.block_size), rows, rows)

    def tile(self, queries: Documents, keys: Documents) -> GateTile | None:
        return GateTile(queries, keys, self.block_size) if Mask().reaches(queries, keys) else None

    def kept(self, length: int) -> Intervals:
        return [(0, length)]

    def width(self, inputs: GateInputs) -> tuple[int, int]:
        return inputs.k.shape[2], 1

    def whole(self, inputs: GateInputs, backend: str) -> bool:
        """Whether scores are computed in as few parts as can be: the reference."""
        return resolve(OP, backend, inputs.q.device, inputs.q.dtype, ("chunked", "reference")) == "reference"

    def attend(
        self, inputs: GateInputs, received: tuple[Tensor, ...], tile: GateTile, backend: str
    ) -> tuple[Tensor, Tensor]:
        whole = self.whole(inputs, backend)
        out = chunked.divergence(inputs, received[0], tile, self.scale, self.gate_scale, whole=whole)
        return out.unsqueeze(-1), torch.zeros_like(out)

    def attend_backward(
        self, gradient: Gradient, inputs: GateInputs, received: tuple[Tensor, ...], tile: GateTile, backend: str
    ) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        dout, whole = gradient.dout.squeeze(-1), self.whole(inputs, backend)
        dq, dk = chunked.backward(dout, inputs, received[0], tile, self.scale, self.gate_scale, whole=whole)
        return {"gate_q": dq, "gate_k": dk}, (torch.zeros_like(received[0], dtype=gradient.exact),)


def check_inputs(inputs: GateInputs) -> None:
    """Raises ValueError for shapes that do not fit."""
    q, k, gate_q, gate_k, blocks = inputs
    check_keys(q, k)
    expected = (*q.shape[:2], k.shape[2])
    if gate_q.dim() != 4 or tuple(gate_q.shape[:3]) != expected:
        raise ValueError(f"gate_q must be [B, T, G, D] for [B, T, G] = {expected}; got {tuple(gate_q.shape)}")
    if gate_k.dim() != 4 or (gate_k.shape[0], *gate_k.shape[2:]) != (q.shape[0], *gate_q.shape[2:]):
        raise ValueError(f"gate_k must be [B, N, G, D] for gate_q {tuple(gate_q.shape)}; got {tuple(gate_k.shape)}")
    if blocks is not None and (blocks.dtype != torch.int32 or tuple(blocks.shape[:3]) != expected):
        raise ValueError(f"blocks must be int32 [B, T, G, M]; got {blocks.dtype} {tuple(blocks.shape)}")


def flops(pairs: int, *, heads: int, key_dim: int) -> int:
    """Forward FLOPs of attention's scores on so many (query, key) pairs; those of the gate are far fewer."""
    return 2 * pairs * heads * key_dim
