"""Latent attention to the tokens that a learned indexer selects."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ....kernels.latent import absorbed
from ....kernels.select_blocks import Rule
from ....parallel import ops
from ....parallel.sequence import Sequence
from ...layers.selectors.indexer import Indexer
from ...mixer import also_takes
from ..softmax.latent_attention import ExpandedAttention, LatentAttention
from .indexed_attention import Indexed


class SparseLatentAttention(Indexed, LatentAttention):
    """DeepSeek sparse attention over latent attention (DSA of DeepSeek-V3.2; DeepSeek-AI, 2025, arXiv 2512.02556).

        I_ts = sum_j w_tj relu(q_tj . k_s / sqrt(index_dim))        the lightning indexer: index_heads queries, one key
        o_t = latent attention of q_t to the `top_k` tokens of the highest I_ts

    All heads read the same tokens, of which rows travel and are kept as those of `LatentAttention` are: the expansion
    is applied to queries and outputs rather than to the rows. The indexer's queries are made of the compressed queries,
    where there is a query_rank; its keys have a layer norm, and the first rope_dim dims of both turn. The Hadamard
    rotation of both, which serves 8-bit numbers and leaves products as they are, is left out.

    top_k: tokens a query. index_heads, index_dim: of the indexer. index_loss, dense_steps: see `Indexed`. The other
    settings are those of `LatentAttention`, without sink_logits. Raises ValueError as that does.
    """

    small = MappingProxyType({"top_k": 7, "index_heads": 3, "index_dim": 8, "dense_steps": 0})

    @also_takes(LatentAttention)
    def __init__(
        self,
        *,
        top_k: int = 2048,
        index_heads: int = 64,
        index_dim: int = 128,
        index_loss: float = 1.0,
        dense_steps: int = 0,
        **attention: Any,
    ) -> None:
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1; got {top_k}")
        if attention.get("sink_logits"):
            raise ValueError("sink_logits must be false for attention to selected tokens; got True. Leave it out")
        super().__init__(dense_steps=dense_steps, index_loss=index_loss, **attention)
        self.listed_dims = self.shared_dim + self.latent_rank, self.latent_rank
        self.attend = AbsorbedAttention(self.latent_rank, self.attend.out_features, None)
        rope_base, rope_dim = attention.get("rope_base", 10000.0), self.shared_dim // self.rope_heads
        if rope_base is not None and rope_dim > index_dim:
            raise ValueError(f"index_dim must be at least rope_dim={rope_dim}, as so many dims turn; got {index_dim}")
        self.indexer = Indexer(
            Rule(1, top_k, score="relu", local=0), width=self.latent.in_features, heads=index_heads, dim=index_dim,
            weighted=True, query_norm=None, key_norm="layer", norm_eps=attention.get("norm_eps", 1e-6),
            rope_base=rope_base, rope_fraction=1.0 if rope_base is None else rope_dim / index_dim,
            rope_scaling=attention.get("rope_scaling"), conv_size=None, query_width=self.query.in_features,
        )  # fmt: skip

    def forward(self, x: Tensor, seq: Sequence) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        compressed, rows = self.compressed(x), self.rows(x, seq)
        index = self.indexer.project(x, seq, compressed)
        lists, scale = self.lists(index, seq), self.key_dim**-0.5 if self.scale is None else self.scale
        out, q = self.attend(self.queries(compressed, seq), rows, seq, scale, lists)
        loss = self.indexer.loss(q, rows.unsqueeze(2), index, lists, seq, scale)
        return self.gated(x, out), loss


class AbsorbedAttention(ExpandedAttention):
    """Attention to the rows that are listed, by queries that absorb the expansion; to all rows without lists.

    Returns the output and the absorbed queries `[B, T, heads, shared_dim + latent_rank]`.
    """

    def forward(  # type: ignore[override]
        self, q: Tensor, rows: Tensor, seq: Sequence, scale: float, lists: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        wide, values = absorbed(q, self.weight, row_dim=rows.shape[2])
        if lists is None:
            return super().forward(q, rows, seq, scale), wide
        read = ops.listed_latent_attention(
            wide, rows, lists, seq=seq, latent_rank=self.in_features, block_size=1, scale=scale
        )
        return torch.einsum("bthc,hvc->bthv", read, values), wide
