"""Attention: the projections that mixers of softmax attention share."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ....kernels.masks import Mask
from ....kernels.softmax import flops
from ....parallel import ops
from ....parallel.sequence import Sequence
from ...layers.normalisation import RMSNorm
from ...layers.output_gate import output_gate
from ...layers.rotary import rotary
from ...layers.short_convolution import ShortConvolution
from ...mixer import Mixer, check_groups, head_size

QK_NORMS = (None, "head", "full")


class Attention(Mixer):
    """Causal softmax attention with grouped heads (Ainslie et al., 2023, arXiv 2305.13245).

        o_i = sum_j softmax_j(q_i . k_j / sqrt(head_dim)) v_j        j <= i in i's document

    A subclass says in `attend` which keys are read; its constructor `also_takes` these settings.

    heads, kv_heads: query heads, and the key/value heads that groups of them share (default: as many).
    head_dim: of a head, by default width / heads.
    rope_base: None for no positions. rope_fraction: the part of a head's dims that turns. rope_scaling: settings of
        `RopeScaling`, for models extended by Llama-3's rule or YaRN.
    qk_norm: RMS norm of queries and keys before rotation: "head" over each head with one weight (Qwen3, Gemma 3),
        "full" over all heads at once (MiniMax-M2).
    conv_size: taps of a short causal convolution over queries, keys and values, before norms and rotation, so that
        one layer can match what came before a token (the Canon-B layers of Allen-Zhu, 2025). None for none.
    gate, gate_rank, gate_bias: the output's gate, see `OutputGate`: "channel" is that of Qwen3-Next.
    bias, output_bias: of the projections of queries, keys and values, and of the output's.
    key_multiplier: a constant by which keys are multiplied, as in Falcon-H1 (arXiv 2507.22448).
    Raises ValueError for sizes that do not divide and for settings without effect.
    """

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        rope_base: float | None = 10000.0,
        rope_fraction: float = 1.0,
        rope_scaling: dict[str, Any] | None = None,
        qk_norm: str | None = None,
        norm_eps: float = 1e-6,
        conv_size: int | None = None,
        gate: str | None = None,
        gate_rank: int | None = None,
        gate_bias: bool = False,
        bias: bool = False,
        output_bias: bool = False,
        key_multiplier: float = 1.0,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        head_dim = head_size("heads", width, heads) if head_dim is None else head_dim
        check_groups(heads, kv_heads)
        if qk_norm not in QK_NORMS:
            raise ValueError(f"qk_norm must be one of {', '.join(map(str, QK_NORMS))}; got {qk_norm!r}")
        if qk_norm is not None and key_multiplier != 1.0:
            raise ValueError(
                f"key_multiplier must be 1 with a qk_norm, which undoes it; got {key_multiplier}. Leave one of them out"
            )
        self.heads, self.kv_heads, self.head_dim, self.key_multiplier = heads, kv_heads, head_dim, key_multiplier
        self.rotary = rotary(head_dim, rope_base, rope_fraction, rope_scaling)
        self.qk_norm = qk_norm
        self.query = nn.Linear(width, heads * head_dim, bias=bias)
        self.key = nn.Linear(width, kv_heads * head_dim, bias=bias)
        self.value = nn.Linear(width, kv_heads * head_dim, bias=bias)
        self.gate = output_gate(gate, width, heads, head_dim, rank=gate_rank, bias=gate_bias)
        self.output = nn.Linear(heads * head_dim, width, bias=output_bias)
        self.conv = None if conv_size is None else ShortConvolution((heads + 2 * kv_heads) * head_dim, conv_size)
        if qk_norm is not None:
            self.query_norm = RMSNorm(head_dim if qk_norm == "head" else heads * head_dim, norm_eps)
            self.key_norm = RMSNorm(head_dim if qk_norm == "head" else kv_heads * head_dim, norm_eps)

    def forward(self, x: Tensor, seq: Sequence) -> Tensor:
        out = self.attend(*self.project(x, seq), seq)
        return self.output((out if self.gate is None else self.gate(x, out)).flatten(-2))

    def project(self, x: Tensor, seq: Sequence) -> tuple[Tensor, Tensor, Tensor]:
        """Queries `[B, T, heads, head_dim]`, keys and values `[B, T, kv_heads, head_dim]`, normed and rotated."""
        q, k, v = self.unrotated(x, seq)
        return *self.rotated(q, k, seq), v

    def unrotated(self, x: Tensor, seq: Sequence) -> tuple[Tensor, Tensor, Tensor]:
        """What `project` rotates."""
        q, k, v = self.before_norms(x, seq)
        if self.qk_norm == "full":
            q, k = self.query_norm(q), self.key_norm(k)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in (q, k, v))
        if self.qk_norm == "head":
            q, k = self.query_norm(q), self.key_norm(k)
        return q, k, v

    def before_norms(self, x: Tensor, seq: Sequence) -> tuple[Tensor, Tensor, Tensor]:
        """Queries `[B, T, heads * head_dim]`, keys and values `[B, T, kv_heads * head_dim]`, convolved."""
        q, k, v = self.query(x), self.key(x), self.value(x)
        if self.key_multiplier != 1.0:
            k = k * self.key_multiplier
        return (q, k, v) if self.conv is None else self.conv.of_parts((q, k, v), seq)  # type: ignore[return-value]

    def rotated(self, q: Tensor, k: Tensor, seq: Sequence) -> tuple[Tensor, Tensor]:
        """Both at their tokens' positions."""
        return (q, k) if self.rotary is None else (self.rotary(q, seq), self.rotary(k, seq))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, seq: Sequence) -> Tensor:
        """The mixing itself, `[B, T, heads, head_dim]`: here of all keys."""
        return ops.softmax_attention(q, k, v, seq=seq)

    def mixing_flops(self, seq: Sequence) -> int:
        return flops(seq.pairs(Mask()), heads=self.heads, key_dim=self.head_dim, value_dim=self.head_dim)
