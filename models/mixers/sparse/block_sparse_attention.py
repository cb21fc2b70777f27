"""Softmax attention that reads only the blocks it selects: MoBA and InfLLM-v2, with the weights of a dense layer."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

from torch import Tensor

from ....kernels.select_blocks import Rule
from ....parallel import ops
from ....parallel.sequence import Sequence
from ...layers.selectors.selector import Selector
from ...mixer import also_takes
from ..softmax.attention import Attention


class SelectedAttention(Attention):
    """Softmax attention over selected blocks; see `Attention` for its settings.

    All keys are seen by tokens at positions below `dense_length`, and by all tokens in the run's first `dense_steps`
    steps. score_scale: what scores are multiplied by; head_dim^(-1/2) for None.
    """

    def __init__(
        self, rule: Rule, *, dense_steps: int, dense_length: int = 0, score_scale: float | None = None, **attention: Any
    ) -> None:
        for name, value in (("dense_steps", dense_steps), ("dense_length", dense_length)):
            if value < 0:
                raise ValueError(f"{name} must not be negative; got {value}")
        super().__init__(**attention)
        self.selector = Selector(rule)
        self.dense_steps, self.dense = dense_steps, False
        self.dense_length, self.score_scale = dense_length, score_scale

    def at_step(self, step: int) -> None:
        self.dense = step < self.dense_steps

    def attend(self, q: Tensor, k: Tensor, v: Tensor, seq: Sequence) -> Tensor:
        if self.dense:
            return super().attend(q, k, v, seq)
        lists = self.selector(q, self.selector.summarise(k, seq), seq, scale=self.score_scale)
        size = self.selector.rule.block_size
        return ops.block_sparse_attention(q, k, v, lists, seq=seq, block_size=size, dense_length=self.dense_length)

    def mixing_flops(self, seq: Sequence) -> int:
        if self.dense:
            return super().mixing_flops(seq)
        heads, dim, beyond = self.heads, self.head_dim, self.dense_length
        scores = self.selector.selection_flops(seq, heads=heads, key_dim=dim)
        sparse = self.selector.attention_flops(seq, heads=heads, key_dim=dim, value_dim=dim, beyond=beyond)
        dense = super().mixing_flops(seq.up_to(beyond)) if beyond else 0
        return scores + sparse + dense


class MoBA(SelectedAttention):
    """Mixture of block attention (Lu et al., 2025, arXiv 2502.13189).

        s_b = q_t . mean(k_j for j in block b)        for the blocks of t's document that end before t's own
        o_t = attention of q_t to the keys j <= t of t's own block and of the top_k - 1 blocks of the highest s_b

    Every query head selects for itself, by rotated keys; no gradient flows through the scores. It has no parameter that
    softmax attention has not, so that each can go on with the other's weights: a pattern may end in layers of softmax
    attention, and the first `dense_steps` steps of a run attend to everything.

    block_size: tokens of a block. top_k: blocks a query, its own among them; 1 is the own block alone.
    The other settings are those of `Attention`. Raises ValueError as that does.
    """

    small = MappingProxyType({"block_size": 4, "top_k": 2, "dense_steps": 0})

    @also_takes(Attention)
    def __init__(
        self,
        *,
        block_size: int = 512,
        top_k: int = 3,
        dense_steps: int = 0,
        **attention: Any,
    ) -> None:
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1 (the own block counts); got {top_k}")
        rule = Rule(block_size, top_k, score="dot", pooled=False)
        super().__init__(rule, dense_steps=dense_steps, score_scale=1.0, **attention)


class InfLLMv2(SelectedAttention):
    """InfLLM-v2, the sparse attention of MiniCPM4 (MiniCPM team, 2025, arXiv 2506.07900).

        p_ti = sum over the heads of a group of softmax_i(q_t . mean(k of window i) / sqrt(head_dim))
        score_tb = max p_ti over the windows i that touch block b
        o_t = attention of q_t to the `count` blocks of the highest scores, the first and the latest ones among them

    Heads of a group share their blocks. It has no parameter that softmax attention has not: a dense checkpoint goes on
    as it is.

    block_size, count: tokens of a block, blocks a query. window_size, window_stride: tokens of a window, and from one
        to the next.
    initial, local: first blocks of the document and latest ones, the own among them, that are always read.
    dense_length: tokens at positions below it attend to all before them. The original decides by the length of the
        whole sequence; here it is by position, so that no token's output depends on what follows it.
    dense_steps: the first steps of a run in which all tokens do.
    The other settings are those of `Attention`. Raises ValueError as that does.
    """

    small = MappingProxyType(
        {
            "block_size": 4, "count": 3, "window_size": 4, "window_stride": 2, "initial": 1, "local": 1,
            "dense_length": 5, "dense_steps": 0,
        }
    )  # fmt: skip

    @also_takes(Attention)
    def __init__(
        self,
        *,
        block_size: int = 64,
        count: int = 64,
        window_size: int = 32,
        window_stride: int = 16,
        initial: int = 1,
        local: int = 32,
        dense_length: int = 8192,
        dense_steps: int = 0,
        **attention: Any,
    ) -> None:
        rule = Rule(
            block_size, count, window=window_size, stride=window_stride, aggregate="max", initial=initial, local=local
        )
        super().__init__(rule, dense_steps=dense_steps, dense_length=dense_length, **attention)
