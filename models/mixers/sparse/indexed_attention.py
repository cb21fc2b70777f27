"""Softmax attention to what a learned indexer selects: blocks (MiniMax-M3) or tokens (DeepSeek-V3.2)."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

from torch import Tensor

from ....kernels.select_blocks import Rule
from ....parallel import ops
from ....parallel.sequence import Sequence
from ...layers.selectors.indexer import Index, Indexer
from ...mixer import UNMEASURED, Mixer, also_takes
from ...part import Clipped
from ..softmax.attention import Attention


class Indexed(Mixer):
    """What softmax attention to an indexer's choice adds to the attention of another base class, which stands after it.

    The loss "index" is the divergence of the indexer's distribution over keys from that of attention, which is averaged
    over the heads that share a list. Its gradient reaches the indexer alone, and no other loss does. The indexer and
    `listed_dims`, of a head's key and value where keys are listed, are set by the subclass.

    index_loss: its weight. dense_steps: the first steps of a run, in which attention sees all keys, and the indexer
    learns from all of them; later both have what is listed. For the warm-up of the papers, in which nothing else
    trains, set `optimizer.only=[indexer]` as well.
    """

    detached = MappingProxyType({"index": "indexer"})
    heads: int

    def __init__(self, *, dense_steps: int, index_loss: float, **attention: Any) -> None:
        if dense_steps < 0:
            raise ValueError(f"dense_steps must not be negative; got {dense_steps}")
        if index_loss < 0:
            raise ValueError(f"index_loss must not be negative; got {index_loss}")
        super().__init__(**attention)
        self.losses = {"index": index_loss}
        self.dense_steps, self.dense = dense_steps, False
        self.indexer: Indexer
        self.listed_dims: tuple[int, int]

    @property
    def selector(self) -> Indexer:
        """The indexer."""
        return self.indexer

    def at_step(self, step: int) -> None:
        self.dense = step < self.dense_steps

    def clipped(self) -> Clipped | str | None:
        return UNMEASURED

    def lists(self, index: Index, seq: Sequence) -> Tensor | None:
        """What each query lists; None while attention is dense."""
        return None if self.dense else self.indexer.select(index, seq)

    def mixing_flops(self, seq: Sequence) -> int:
        key_dim, value_dim = self.listed_dims
        loss = self.indexer.loss_flops(seq, heads=self.heads, key_dim=key_dim, dense=self.dense)
        if self.dense:
            return super().mixing_flops(seq) + loss
        scores = self.indexer.selection_flops(seq, heads=self.indexer.heads, key_dim=self.indexer.dim)
        listed = self.indexer.attention_flops(seq, heads=self.heads, key_dim=key_dim, value_dim=value_dim)
        return scores + listed + loss


class IndexedAttention(Indexed, Attention):
    """Softmax attention to the blocks that an indexer selects; see `Attention` and `Indexed` for the settings."""

    def __init__(self, *, dense_steps: int, index_loss: float, **attention: Any) -> None:
        super().__init__(dense_steps=dense_steps, index_loss=index_loss, **attention)
        self.listed_dims = self.head_dim, self.head_dim

    def forward(self, x: Tensor, seq: Sequence) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        q, k, v = self.project(x, seq)
        index = self.indexer.project(x, seq)
        lists = self.lists(index, seq)
        loss = self.indexer.loss(q, k, index, lists, seq)
        if lists is None:
            out = ops.softmax_attention(q, k, v, seq=seq)
        else:
            lists = lists.expand(-1, -1, self.kv_heads, -1).contiguous()
            out = ops.block_sparse_attention(q, k, v, lists, seq=seq, block_size=self.indexer.rule.block_size)
        return self.gated(x, out), loss


class MiniMaxSparseAttention(IndexedAttention):
    """The sparse attention of MiniMax-M3 (MiniMax, 2026): an indexer selects blocks for each group of heads.

        I_tgs = q_tg . k_s / sqrt(index_dim)        q, k of the indexer: a query head per group, one key
        o_t = attention of q_t to the `count` blocks of the highest max_s I_tgs, the latest ones among them

    Queries and keys of the indexer have an RMS norm, and are rotated and convolved as those of attention.

    block_size, count: tokens of a block, blocks a query. local: the latest blocks, the own first, that are always read.
    index_dim: of the indexer's heads.
    index_loss, dense_steps: see `Indexed`. The other settings are those of `Attention`. Raises ValueError as
    that does.
    """

    small = MappingProxyType({"block_size": 4, "count": 3, "local": 1, "index_dim": 8, "dense_steps": 0})

    @also_takes(Attention)
    def __init__(
        self,
        *,
        block_size: int = 128,
        count: int = 16,
        local: int = 1,
        index_dim: int = 128,
        index_loss: float = 1.0,
        dense_steps: int = 0,
        **attention: Any,
    ) -> None:
        rule = Rule(
            block_size, count, window=1, stride=1, score="dot", aggregate="max", pooled=False, initial=0, local=local
        )
        super().__init__(dense_steps=dense_steps, index_loss=index_loss, **attention)
        self.indexer = Indexer(
            rule, width=self.query.in_features, heads=self.kv_heads, dim=index_dim, weighted=False, query_norm="rms",
            key_norm="rms", norm_eps=attention.get("norm_eps", 1e-6), rope_base=attention.get("rope_base", 10000.0),
            rope_fraction=attention.get("rope_fraction", 1.0), rope_scaling=attention.get("rope_scaling"),
            conv_size=attention.get("conv_size"),
        )  # fmt: skip


class DeepSeekSparseAttention(IndexedAttention):
    """DeepSeek sparse attention, over grouped keys (DSA; DeepSeek-AI, 2025, arXiv 2512.02556).

        I_ts = sum_j w_tj relu(q_tj . k_s / sqrt(index_dim))        the lightning indexer: index_heads queries, one key
        o_t = attention of q_t to the `top_k` tokens of the highest I_ts

    All heads read the same tokens. The indexer's keys have a layer norm.

    top_k: tokens a query. index_heads, index_dim: of the indexer. index_rope_fraction: the part of its dims that turns.
    index_loss, dense_steps: see `Indexed`. The other settings are those of `Attention`. Raises ValueError as
    that does.
    """

    small = MappingProxyType({"top_k": 7, "index_heads": 3, "index_dim": 8, "dense_steps": 0})

    @also_takes(Attention)
    def __init__(
        self,
        *,
        top_k: int = 2048,
        index_heads: int = 64,
        index_dim: int = 128,
        index_rope_fraction: float = 0.5,
        index_loss: float = 1.0,
        dense_steps: int = 0,
        **attention: Any,
    ) -> None:
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1; got {top_k}")
        super().__init__(dense_steps=dense_steps, index_loss=index_loss, **attention)
        rope_base = attention.get("rope_base", 10000.0)
        self.indexer = Indexer(
            Rule(1, top_k, score="relu", local=0), width=self.query.in_features, heads=index_heads, dim=index_dim,
            weighted=True, query_norm=None, key_norm="layer", norm_eps=attention.get("norm_eps", 1e-6),
            rope_base=rope_base, rope_fraction=1.0 if rope_base is None else index_rope_fraction,
            rope_scaling=attention.get("rope_scaling"), conv_size=attention.get("conv_size"),
        )  # fmt: skip
