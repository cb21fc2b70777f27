"""Gated slot attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ....kernels.slot_attention import flops
from ....parallel import ops
from ....parallel.sequence import Sequence
from ...layers.decay_gate import GateLinear
from ...layers.normalisation import RMSNorm
from ...layers.short_convolution import ShortConvolution
from ...mixer import Mixer, check_groups, head_size


class GatedSlotAttention(Mixer):
    """Softmax attention over a few slots with forget gates (GSA, Zhang et al., 2024, arXiv 2409.07146).

        K_t = K_(t-1) diag(f_t) + k_t^T (1 - f_t)        V_t = diag(f_t) V_(t-1) + (1 - f_t)^T v_t
        o_t = softmax(q_t K_t) V_t                       q, k, v = silu(W x)
        f_t = sigmoid(W_f x_t)^(1 / gate_normaliser)     one gate per slot
        y = W_o RMSNorm(silu(o))                         the norm spans all heads

    slots: M of each head. kv_heads: of k, v and f, by default as many as heads; each is shared by as many heads of q,
    and repeated for them. conv_size: taps of a short convolution over W x, with another silu, or None for none. There
    is no scale on q. Raises ValueError for sizes that do not divide.
    """

    small = {"slots": 6}

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        slots: int = 64,
        kv_heads: int | None = None,
        key_dim: int | None = None,
        value_dim: int | None = None,
        gate_normaliser: float = 8.0,
        conv_size: int | None = None,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        check_groups(heads, kv_heads)
        if slots < 1 or gate_normaliser <= 0:
            raise ValueError(f"slots and gate_normaliser must be positive; got {slots} and {gate_normaliser}")
        self.heads, self.kv_heads, self.slots, self.gate_normaliser = heads, kv_heads, slots, gate_normaliser
        self.key_dim = head_size("heads", width, heads, "key_dim") if key_dim is None else key_dim
        self.value_dim = head_size("heads", width, heads, "value_dim") if value_dim is None else value_dim
        self.query = nn.Linear(width, heads * self.key_dim, bias=False)
        self.key = nn.Linear(width, kv_heads * self.key_dim, bias=False)
        self.value = nn.Linear(width, kv_heads * self.value_dim, bias=False)
        channels = (heads + kv_heads) * self.key_dim + kv_heads * self.value_dim
        self.conv = None if conv_size is None else ShortConvolution(channels, conv_size, activation="silu")
        self.forget = GateLinear(width, kv_heads * slots, bias=False)
        self.norm = RMSNorm(heads * self.value_dim, norm_eps)
        self.output = nn.Linear(heads * self.value_dim, width, bias=False)

    def forward(self, x: Tensor, seq: Sequence) -> Tensor:
        parts = self.query(x), self.key(x), self.value(x)
        q, k, v = map(F.silu, parts if self.conv is None else self.conv.of_parts(parts, seq))
        q, k, v = q.unflatten(-1, (self.heads, -1)), self.by_head(k), self.by_head(v)
        log_decay = self.by_head(F.logsigmoid(self.forget(x)) / self.gate_normaliser)
        out = ops.slot_attention(q, k, v, -torch.expm1(log_decay), log_decay, seq=seq, scale=1.0)
        return self.output(self.norm(F.silu(out.flatten(-2))))

    def by_head(self, x: Tensor) -> Tensor:
        """Splits the last dim into heads of keys and values, each repeated for those of queries that share it."""
        split = x.unflatten(-1, (self.kv_heads, -1))
        return split if self.kv_heads == self.heads else split.repeat_interleave(self.heads // self.kv_heads, dim=-2)

    def mixing_flops(self, seq: Sequence) -> int:
        sizes = {"heads": self.heads, "key_dim": self.key_dim, "slots": self.slots, "value_dim": self.value_dim}
        return flops(seq.places, **sizes)
