"""The losses of indexers and of gates over blocks, on a sequence that ranks share."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels import gate_divergence as gate
from ...kernels.index_divergence import IndexDivergence, IndexLse, prepared, with_lse
from ..operation import mix
from ..sequence import Sequence
from ..strategies.listed_blocks import by_blocks, by_blocks_at_once
from ..strategies.ring import ring, ring_of_blocks, ring_with_lse
from .attention import CAUSAL


def index_divergence(
    q: Tensor,
    k: Tensor,
    index_q: Tensor,
    index_k: Tensor,
    weights: Tensor | None = None,
    blocks: Tensor | None = None,
    *,
    seq: Sequence,
    block_size: int | None = None,
    scale: float | None = None,
    index_scale: float | None = None,
    slot: str = "index",
) -> Tensor:
    """How far an index is from attention over the whole row, for each of this rank's queries and lists: `[B, T, J]`.

    q `[B, T, H, K]`, k `[B, T, G, K]`, index_q `[B, T, I, D]`, index_k `[B, T, 1, D]`, weights `[B, T, I]`. Over all
    keys before a query, which travel round the ranks, or over those in the blocks that are listed for this rank's
    queries by the ids of the whole row, int32 `[B, T, J, M]`; of these alone the keys are sent. The result is float32
    (float64 for float64), and no gradient reaches q and k. Raises ValueError when it decodes. See
    `longreach.kernels.index_divergence`.
    """
    if seq.cache is not None:
        raise ValueError(f"index_divergence must be called in training; got a cache of {seq.cache.length} tokens")
    inputs, settings = prepared(q, k, index_q, index_k, weights, blocks, block_size, scale, index_scale)
    build, before = (ring, (None,)) if blocks is None else (by_blocks, ())
    with torch.no_grad():
        lse = mix(build, (*before, IndexLse, *settings), inputs, seq, f"{slot} lse")[0]
    return mix(build, (*before, IndexDivergence, *settings), with_lse(inputs, lse), seq, slot)[0].squeeze(-1)


def gate_divergence(
    q: Tensor,
    k: Tensor,
    gate_q: Tensor,
    gate_k: Tensor,
    blocks: Tensor | None = None,
    *,
    seq: Sequence,
    block_size: int,
    scale: float | None = None,
    gate_scale: float | None = None,
    slot: str = "gate",
) -> Tensor:
    """How far a gate over blocks is from attention over the whole row, for each of this rank's queries: `[B, T, G]`.

    q `[B, T, H, K]`, k `[B, T, G, K]`, gate_q `[B, T, G, D]`; gate_k `[B, N // block_size, G, D]` of the blocks of the
    whole row, as `gather_windows` returns them; blocks int32 `[B, T, G, M]`, lists of this rank's queries by the ids of
    the whole row, or None for all. Of the keys, complete blocks travel round the ranks, each from the rank on which it
    ends, or those alone that are listed. The result is float32 (float64 for float64), and no gradient reaches q and k.
    Raises ValueError when it decodes. See `longreach.kernels.gate_divergence`.
    """
    if seq.cache is not None:
        raise ValueError(f"gate_divergence must be called in training; got a cache of {seq.cache.length} tokens")
    gate.check_gates(q, k, gate_q, gate_k, blocks)
    settings = block_size, *gate.scales(q, gate_q, scale, gate_scale)
    if blocks is not None:
        inputs = gate.ListedGateInputs(*gate.prepared(q, k, gate_q, gate_k), blocks)
        return gate.divergence_of(mix(by_blocks_at_once, (gate.ListedGateDivergence, *settings), inputs, seq, slot)[0])
    with torch.no_grad():
        lse_inputs = gate.LseInputs(q, k.to(q.dtype))
        lse = mix(ring_with_lse, (gate.GateLse, CAUSAL.settings, settings[1]), lse_inputs, seq, f"{slot} lse")[1]
    inputs = gate.GateInputs(*gate.prepared(q, k, gate_q, gate_k), lse)
    cut = seq.layout.span_length if seq.layout.ranks > 1 else seq.layout.length
    op = gate.GateDivergence, *settings, cut
    return gate.divergence_of(mix(ring_of_blocks, op, inputs, seq, slot)[0])
