"""SeerAttention: attention to the blocks of a gate that is distilled from the attention of the model itself."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

from torch import Tensor

from ....kernels.select_blocks import Rule
from ....parallel import ops
from ....parallel.sequence import Sequence
from ...layers.selectors.block_gate import BlockGate
from ...mixer import also_takes
from ..softmax.attention import Attention


class SeerAttention(Attention):
    """SeerAttention with a gate per token (SeerAttention-R; Gao et al., 2025, arXiv 2506.08889).

        s_tgb = q_tg . k_bg / sqrt(gate_dim)        of the gate: see `BlockGate`
        o_t = attention of q_t to the `count` blocks of the highest s_tgb, the latest ones among them

    The loss "gate" is the divergence of softmax_b(s_tgb) from the greatest attention weight that a head of the group
    gives a token of b, over the sum of these. Its gradient reaches the gate alone, and no other loss does. So a model
    of softmax attention gets a gate: `init_from` its run, with `optimizer.only=[gate]` and as many `dense_steps` as
    steps.

    block_size, count: tokens of a block, blocks a query. initial, local: the first blocks of a document and the latest,
        the own first, that are always read.
    gate_dim: of the gate's queries and keys. gate_loss: the weight of the loss.
    dense_steps: the first steps of a run, in which attention sees all keys and the gate learns from all blocks; later
        both have what is listed.
    The other settings are those of `Attention`. Raises ValueError as that does.
    """

    detached = MappingProxyType({"gate": "gate"})
    small = MappingProxyType({"block_size": 4, "count": 3, "initial": 0, "local": 1, "gate_dim": 8, "dense_steps": 0})

    @also_takes(Attention)
    def __init__(
        self,
        *,
        block_size: int = 64,
        count: int = 64,
        initial: int = 0,
        local: int = 1,
        gate_dim: int = 128,
        gate_loss: float = 1.0,
        dense_steps: int = 0,
        **attention: Any,
    ) -> None:
        for name, value in (("dense_steps", dense_steps), ("gate_loss", gate_loss)):
            if value < 0:
                raise ValueError(f"{name} must not be negative; got {value}")
        if attention.get("gate") is not None:
            raise ValueError(
                f"gate must be null for SeerAttention, whose own gate is of blocks; got {attention['gate']!r}. Leave "
                "out the output's gate"
            )
        rule = Rule(block_size, count, score="dot", pooled=False, initial=initial, local=local)
        super().__init__(**attention)
        self.losses = {"gate": gate_loss}
        self.dense_steps, self.dense = dense_steps, False
        self.gate = BlockGate(
            rule, heads=self.heads, groups=self.kv_heads, head_dim=self.head_dim, dim=gate_dim,
            rope_base=attention.get("rope_base", 10000.0), rope_scaling=attention.get("rope_scaling"),
        )  # fmt: skip

    @property
    def selector(self) -> BlockGate:
        """The gate."""
        return self.gate

    def at_step(self, step: int) -> None:
        self.dense = step < self.dense_steps

    def forward(self, x: Tensor, seq: Sequence) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        q, k, v = self.unrotated(x, seq)
        gate = self.gate.project(q, k, seq)
        q, k = self.rotated(q, k, seq)
        lists = None if self.dense else self.gate.select(gate, seq)
        loss = self.gate.loss(q, k, gate, lists, seq)
        if lists is None:
            out = ops.softmax_attention(q, k, v, seq=seq)
        else:
            out = ops.block_sparse_attention(q, k, v, lists, seq=seq, block_size=self.gate.rule.block_size)
        return self.output(out.flatten(-2)), loss

    def mixing_flops(self, seq: Sequence) -> int:
        heads, dim = self.heads, self.head_dim
        loss = self.gate.loss_flops(seq, heads=heads, key_dim=dim, dense=self.dense)
        if self.dense:
            return super().mixing_flops(seq) + loss
        scores = self.gate.selection_flops(seq, heads=self.kv_heads, key_dim=self.gate.dim)
        return scores + self.gate.attention_flops(seq, heads=heads, key_dim=dim, value_dim=dim) + loss
