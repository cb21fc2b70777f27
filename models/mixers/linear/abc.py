"""Attention with bounded-memory control."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ....kernels import diagonal_scan
from ....kernels.slot_attention import flops
from ....parallel import ops
from ....parallel.sequence import Sequence
from ...layers.decay_gate import GateLinear
from ...layers.normalisation import RMSNorm
from ...layers.rotary import rotary
from ...mixer import Mixer, head_size

LEAST = -45.0  # what a gate's logit is cut at: exp(-45) of the past beside 1 of a token is less than float64 tells


class ABC(Mixer):
    """Softmax attention over a few slots, weighted means of all that came (ABC, Peng et al., 2022, arXiv 2110.02488).

        K_t = sum_(i<=t) exp(s_i)^T k_i / sum_(i<=t) exp(s_i)        V_t likewise of v, in each of M slots of a head
        o_t = softmax(q_t K_t^T / sqrt(key_dim)) V_t                 s = W_s x, within -cap … cap
        y = W_o (silu(W_g x) * RMSNorm(o))                           the norm is within each head

    It runs as gated slot attention with the gates f_t = sum_(i<t) exp(s_i) / sum_(i<=t) exp(s_i); the sums are float64,
    which `cap` keeps in range. slots: M, by default key_dim. key_dim, value_dim: of a head, by default half of and all
    of width / heads. Rotated q and k (rope_base), gate, norm and cap are those of flash-linear-attention; the paper's
    attention has none. Raises ValueError for sizes that do not divide and for a cap that is not within 0 … 100.
    """

    small = {"slots": 6}

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        slots: int | None = None,
        key_dim: int | None = None,
        value_dim: int | None = None,
        rope_base: float | None = 10000.0,
        cap: float = 32.0,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.key_dim = head_size("2 * heads", width, 2 * heads, "key_dim") if key_dim is None else key_dim
        self.value_dim = head_size("heads", width, heads, "value_dim") if value_dim is None else value_dim
        slots = self.key_dim if slots is None else slots
        if slots < 1:
            raise ValueError(f"slots must be at least 1; got {slots}. Use null for key_dim")
        if not 0 < cap <= 100:
            raise ValueError(f"cap must be above 0 and at most 100; got {cap}. Its exponential is summed over tokens")
        self.heads, self.slots, self.cap = heads, slots, cap
        keys, values = heads * self.key_dim, heads * self.value_dim
        self.rotary = rotary(self.key_dim, rope_base, 1.0, None)
        self.query = nn.Linear(width, keys, bias=False)
        self.key = nn.Linear(width, keys, bias=False)
        self.value = nn.Linear(width, values, bias=False)
        self.slot = GateLinear(width, heads * slots, bias=False)  # s
        self.gate = nn.Linear(width, values, bias=False)
        self.norm = RMSNorm(self.value_dim, norm_eps)
        self.output = nn.Linear(values, width, bias=False)

    def forward(self, x: Tensor, seq: Sequence) -> Tensor:
        parts = self.query(x), self.key(x), self.value(x), self.gate(x), self.past(self.slot(x), seq)
        q, k, v, gate, past = (part.unflatten(-1, (self.heads, -1)) for part in parts)
        if self.rotary is not None:
            q, k = self.rotary(q, seq), self.rotary(k, seq)
        out = ops.slot_attention(q, k, v, torch.sigmoid(-past), F.logsigmoid(past), seq=seq)
        return self.output(self.norm(out, gate, "silu").flatten(-2))

    def past(self, s: Tensor, seq: Sequence) -> Tensor:
        """The logits of the gates: log sum_(i<t) exp(s_i) - s_t, in the type of s; `LEAST` where nothing came."""
        wide = s.clamp(-self.cap, self.cap).double()
        nothing = torch.zeros(s.shape[-1], dtype=torch.float64, device=s.device)
        before = ops.diagonal_scan(ops.token_shift(wide.exp(), seq=seq), nothing, seq=seq, slot="sums")
        log_before = before.clamp(min=torch.finfo(torch.float64).tiny).log()
        return (log_before - wide).clamp(min=LEAST).to(s.dtype)

    def mixing_flops(self, seq: Sequence) -> int:
        sums = diagonal_scan.flops(seq.places, channels=self.heads * self.slots)
        sizes = {"heads": self.heads, "key_dim": self.key_dim, "slots": self.slots, "value_dim": self.value_dim}
        return sums + flops(seq.places, **sizes)
