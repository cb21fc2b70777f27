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
from ...mixer import UNMEASURED, Mixer, check_groups, head_size
from ...part import Clipped

QK_NORMS = (None, "head", "unweighted", "full")


class Attention(Mixer):
    """Causal softmax attention with grouped heads (Ainslie et al., 2023, arXiv 2305.13245).

        o_i = sum_j softmax_j(q_i . k_j / sqrt(head_dim)) v_j        j <= i in i's document

    A subclass says in `attend` which keys are read; its constructor `also_takes` these settings.

    heads, kv_heads: query heads, and the key/value heads that groups of them share (default: as many).
    head_dim: of a head, by default width / heads.
    rope_base: None for no positions. rope_fraction: the part of a head's dims that turns. rope_scaling: settings of
        `RopeScaling`, for models extended by Llama-3's rule, YaRN, LongRoPE or another base.
    qk_norm: RMS norm of queries and keys before rotation: "head" over each head with one weight (Qwen3, Gemma 3),
        "unweighted" over each head without one (Llama 4 Scout), "full" over all heads at once (MiniMax-M2).
        norm_offset: what is added to its weights, 1 for those that start at 0, as Gemma 3's.
    conv_size: taps of a short causal convolution over queries, keys and values, before norms and rotation, so that
        one layer can match what came before a token (the Canon-B layers of Allen-Zhu, 2025). None for none.
    gate, gate_rank, gate_bias: the output's gate, see `OutputGate`: "channel" is that of Qwen3-Next.
    bias, output_bias: of the projections of queries, keys and values, and of the output's.
    key_multiplier: a constant by which keys are multiplied, as in Falcon-H1 (arXiv 2507.22448).
    share: of how many layers of this mixer one after the other, whatever layers are between, the first makes keys and
        values for all (cross-layer attention, Brandon et al., 2024, arXiv 2405.12981). None for each its own. With 1,
        too, each makes its own, but publishes them for layers with `keys_of`.
    keys_of: the mixer, by its name in the pattern, whose keys and values are read: those of the last layer of it before
        this one. It is a `KeyValues`, or attention with `share` and heads as large. None for own ones.
    with_embedding: queries, keys and values are made of the hidden state and, beside it, the model's embedding, twice
        the width, as in Zamba (arXiv 2405.16712); a head has 2 * width / heads dims by default. See `Part`.
    Raises ValueError for sizes that do not divide and for settings without effect.
    """

    measures_logits = False  # whether an `attend` of its own raises `largest_logits`
    shares_keys = False  # whether `attend` can read keys that another layer keeps; it needs the forward of this class

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        name: str = "",
        occurrence: int = 0,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        rope_base: float | None = 10000.0,
        rope_fraction: float = 1.0,
        rope_scaling: dict[str, Any] | None = None,
        qk_norm: str | None = None,
        norm_eps: float = 1e-6,
        norm_offset: float = 0.0,
        conv_size: int | None = None,
        gate: str | None = None,
        gate_rank: int | None = None,
        gate_bias: bool = False,
        bias: bool = False,
        output_bias: bool = False,
        key_multiplier: float = 1.0,
        share: int | None = None,
        keys_of: str | None = None,
        with_embedding: bool = False,
    ) -> None:
        super().__init__()
        self._check_sharing(share, keys_of, kv_heads)
        if with_embedding and type(self).forward is not Attention.forward:
            raise ValueError(
                f"with_embedding must be false for {type(self).__name__}; got true. SoftmaxAttention can read it"
            )
        self.with_embedding = with_embedding
        inputs = 2 * width if with_embedding else width
        self.keys_of = name if share is not None and occurrence % share else keys_of
        self.keys_as = name if share is not None and self.keys_of is None else None
        self.reads, self.publishes = key_names(self.keys_of), key_names(self.keys_as)
        self.stateless = self.keys_of is not None and conv_size is None
        kv_heads = heads if kv_heads is None else kv_heads
        head_dim = head_size("heads", inputs, heads, "head_dim") if head_dim is None else head_dim
        check_groups(heads, kv_heads)
        if qk_norm not in QK_NORMS:
            raise ValueError(f"qk_norm must be one of {', '.join(map(str, QK_NORMS))}; got {qk_norm!r}")
        if qk_norm is not None and key_multiplier != 1.0:
            raise ValueError(
                f"key_multiplier must be 1 with a qk_norm, which undoes it; got {key_multiplier}. Leave one of them out"
            )
        if qk_norm in (None, "unweighted") and norm_offset:
            raise ValueError(
                f"norm_offset must come with a qk_norm with weights; got {norm_offset}. Leave it out, or give a qk_norm"
            )
        self.heads, self.kv_heads, self.head_dim, self.key_multiplier = heads, kv_heads, head_dim, key_multiplier
        self.widths = dict.fromkeys((*self.reads, *self.publishes), head_dim)
        self.rotary = rotary(head_dim, rope_base, rope_fraction, rope_scaling)
        self.qk_norm = qk_norm
        self.query = nn.Linear(inputs, heads * head_dim, bias=bias)
        if self.keys_of is None:
            self.key = nn.Linear(inputs, kv_heads * head_dim, bias=bias)
            self.value = nn.Linear(inputs, kv_heads * head_dim, bias=bias)
        self.gate = output_gate(gate, inputs, heads, head_dim, rank=gate_rank, bias=gate_bias)
        self.output = nn.Linear(heads * head_dim, width, bias=output_bias)
        channels = heads * head_dim + (2 * kv_heads * head_dim if self.keys_of is None else 0)
        self.conv = None if conv_size is None else ShortConvolution(channels, conv_size)
        weighted = qk_norm != "unweighted"
        if qk_norm is not None:
            normed = heads * head_dim if qk_norm == "full" else head_dim
            self.query_norm = RMSNorm(normed, norm_eps, norm_offset, weighted=weighted)
        if qk_norm is not None and self.keys_of is None:
            normed = kv_heads * head_dim if qk_norm == "full" else head_dim
            self.key_norm = RMSNorm(normed, norm_eps, norm_offset, weighted=weighted)

    def forward(self, x: Tensor, seq: Sequence, *read: Tensor) -> Tensor | tuple[Tensor, ...]:
        q, k, v = self.project(x, seq) if self.keys_of is None else (self.project_queries(x, seq), *read)
        out = self.gated(x, self.attend(q, k, v, seq))
        return out if self.keys_as is None else (out, k, v)

    def gated(self, x: Tensor, out: Tensor) -> Tensor:
        """`[B, T, width]` of what `attend` gives."""
        return self.output((out if self.gate is None else self.gate(x, out)).flatten(-2))

    def project_queries(self, x: Tensor, seq: Sequence) -> Tensor:
        """Queries `[B, T, heads, head_dim]`, normed and rotated: what a layer that reads keys projects."""
        q = self.query(x)
        q = q if self.conv is None else self.conv(q, seq)
        q = self.query_norm(q) if self.qk_norm == "full" else q
        q = q.unflatten(-1, (-1, self.head_dim))
        q = self.query_norm(q) if self.qk_norm in ("head", "unweighted") else q
        return q if self.rotary is None else self.rotary(q, seq)

    def project(self, x: Tensor, seq: Sequence, memory: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries `[B, T, heads, head_dim]`, keys and values `[B, T, kv_heads, head_dim]`, normed and rotated.

        Keys and values are those of `memory` `[B, T, width]`, by default of x.
        """
        q, k, v = self.unrotated(x, seq, memory)
        return *self.rotated(q, k, seq), v

    def unrotated(self, x: Tensor, seq: Sequence, memory: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """What `project` rotates."""
        q, k, v = self.before_norms(x, seq) if memory is None else self.before_norms(x, seq, memory)
        if self.qk_norm == "full":
            q, k = self.query_norm(q), self.key_norm(k)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in (q, k, v))
        if self.qk_norm in ("head", "unweighted"):
            q, k = self.query_norm(q), self.key_norm(k)
        return q, k, v

    def before_norms(self, x: Tensor, seq: Sequence, memory: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries `[B, T, heads * head_dim]`, keys and values `[B, T, kv_heads * head_dim]`, convolved."""
        memory = x if memory is None else memory
        q, k, v = self.query(x), self.key(memory), self.value(memory)
        if self.key_multiplier != 1.0:
            k = k * self.key_multiplier
        return (q, k, v) if self.conv is None else self.conv.of_parts((q, k, v), seq)  # type: ignore[return-value]

    def rotated(self, q: Tensor, k: Tensor, seq: Sequence) -> tuple[Tensor, Tensor]:
        """Both at their tokens' positions."""
        return (q, k) if self.rotary is None else (self.rotary(q, seq), self.rotary(k, seq))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, seq: Sequence) -> Tensor:
        """The mixing itself, `[B, T, heads, head_dim]`: here of all keys."""
        return ops.softmax_attention(
            q, k, v, seq=seq, keys_as=self.keys_as, keys_of=self.keys_of, largest=self.largest_logits
        )

    def mixing_flops(self, seq: Sequence) -> int:
        return flops(seq.pairs(Mask()), heads=self.heads, key_dim=self.head_dim, value_dim=self.head_dim)

    def clipped(self) -> Clipped | str | None:
        if not self.measures_logits and type(self).attend is not Attention.attend:
            return UNMEASURED
        if self.qk_norm is not None:
            return f"whose qk_norm ({self.qk_norm}) bounds logits and undoes a scale of the queries"
        return Clipped(self.query, self.heads)

    def _check_sharing(self, share: int | None, keys_of: str | None, kv_heads: int | None) -> None:
        """Raises ValueError for settings of shared keys that have no effect, or that this attention does not do."""
        shares = self.shares_keys and type(self).forward is Attention.forward
        if not shares and (share is not None or keys_of is not None):
            raise ValueError(
                f"share and keys_of must be null for {type(self).__name__}, which makes its own keys; got "
                f"share={share}, keys_of={keys_of}. SoftmaxAttention can share them"
            )
        if share is not None and share < 1:
            raise ValueError(f"share must be at least 1; got {share}. Use null for layers with keys of their own")
        if keys_of is not None and (share is not None or kv_heads is not None):
            raise ValueError(
                f"keys_of must come without share and kv_heads, which are those of {keys_of!r} then; got "
                f"share={share}, kv_heads={kv_heads}. Set them to null"
            )


def key_names(mixer: str | None) -> tuple[str, ...]:
    """The names under which a mixer publishes keys and values; none for None."""
    return () if mixer is None else (f"{mixer}.keys", f"{mixer}.values")
