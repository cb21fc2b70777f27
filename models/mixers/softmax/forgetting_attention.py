"""Forgetting attention: softmax attention with a forget gate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ....kernels import diagonal_scan
from ....parallel import ops
from ....parallel.sequence import Sequence
from ...layers.decay_gate import GateLinear
from ...layers.normalisation import HeadNorm
from ...mixer import also_takes
from .softmax_attention import SoftmaxAttention


class ForgettingAttention(SoftmaxAttention):
    """Softmax attention that forgets as gates say (FoX, Lin et al., 2025, arXiv 2503.02130).

        o_i = sum_j softmax_j(q_i . k_j / sqrt(head_dim) + log f_(j+1) + ... + log f_i) v_j
        f_t = sigmoid(W_f x_t + b)

    A gate per query head. What is forgotten between two tokens is the difference of their levels, the sums of log f up
    to each, which a scan without decay gives. The authors' "Pro" layer, and the default here, has besides:

        k_t = RMSNorm(a_t k'_(t-1) + (1 - a_t) k'_t)        k' = W_k x,  a_t = sigmoid(w x_t) per head
        v_t = b_t v'_(t-1) + (1 - b_t) v'_t                 v' = W_v x,  b_t = sigmoid(u x_t) per head
        q_t = RMSNorm(W_q x_t)                              each head by itself
        y = W_o (sigmoid(W_g x) * RMSNorm(o))               each head by itself

    kv_shift: a and b. qk_norm and gate: as in `Attention`; "channel" is W_g. output_norm: of o.
    Positions are None by default: gates tell near from far. The other settings are
    those of `SoftmaxAttention`. Raises ValueError as that does.
    """

    @also_takes(SoftmaxAttention)
    def __init__(
        self,
        *,
        width: int,
        heads: int,
        rope_base: float | None = None,
        qk_norm: str | None = "head",
        norm_eps: float = 1e-6,
        kv_shift: bool = True,
        output_norm: bool = True,
        gate: str | None = "channel",
        **attention: Any,
    ) -> None:
        attention |= {"rope_base": rope_base, "qk_norm": qk_norm, "norm_eps": norm_eps, "gate": gate}
        super().__init__(width=width, heads=heads, **attention)
        self.forget = GateLinear(width, heads)
        self.shift = nn.Linear(width, 2 * self.kv_heads, bias=False) if kv_shift else None
        self.output_norm = HeadNorm(heads, self.head_dim, norm_eps, bias=False, centred=False) if output_norm else None

    def forward(self, x: Tensor, seq: Sequence) -> Tensor:
        log_forget = F.logsigmoid(self.forget(x))
        levels = ops.diagonal_scan(log_forget, log_forget.new_zeros(self.heads), seq=seq, slot="levels")
        out = self.attend(*self.project(x, seq), seq, levels=levels)
        if self.output_norm is not None:
            if self.gate is not None and not self.gate.per_head:  # norm and gate are one function
                return self.output(self.output_norm(out, self.gate.project(x), "sigmoid"))
            out = self.output_norm(out).view_as(out)
        return self.output((out if self.gate is None else self.gate(x, out)).flatten(-2))

    def before_norms(self, x: Tensor, seq: Sequence) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().before_norms(x, seq)
        if self.shift is None:
            return q, k, v
        new = torch.cat([k, v], dim=-1)
        old = ops.token_shift(new, seq=seq).unflatten(-1, (2 * self.kv_heads, -1))
        part = torch.sigmoid(self.shift(x)).unsqueeze(-1)
        k, v = torch.lerp(new.view_as(old), old, part).flatten(-2).chunk(2, dim=-1)
        return q, k, v

    def mixing_flops(self, seq: Sequence) -> int:
        return super().mixing_flops(seq) + diagonal_scan.flops(seq.places, channels=self.heads)
