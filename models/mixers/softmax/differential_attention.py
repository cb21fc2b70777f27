"""Differential attention: the difference of two softmax attentions."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ....kernels.softmax import flops
from ....parallel.sequence import Sequence
from ...layers.normalisation import RMSNorm
from ...layers.output_gate import output_gate
from ...mixer import also_takes, head_size
from .softmax_attention import SoftmaxAttention

LAMBDAS = ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")


class DifferentialAttention(SoftmaxAttention):
    """Two softmax attentions to the same values, of which one is subtracted (Ye et al., 2025, arXiv 2410.05258).

        o_i = sum_j (softmax_j(q1_i . k1_j / sqrt(head_dim)) - lambda softmax_j(q2_i . k2_j / sqrt(head_dim))) v_j
        lambda = exp(lambda_q1 . lambda_k1) - exp(lambda_q2 . lambda_k2) + lambda_init
        lambda_init = 0.8 - 0.6 exp(-0.3 layer)
        y = W_o ((1 - lambda_init) RMSNorm(o))               each head by itself

    heads, kv_heads: those of o and of v, with two heads of queries and keys each. head_dim: of q1, q2, k1 and k2, by
    default width / heads / 2; a value has twice as many dims. The other settings are those of `SoftmaxAttention`.
    Raises ValueError as that does.
    """

    in_float32 = LAMBDAS
    lambda_q1: nn.Parameter

    @also_takes(SoftmaxAttention)
    def __init__(
        self,
        *,
        width: int,
        heads: int,
        layer: int,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        norm_eps: float = 1e-5,
        gate: str | None = None,
        gate_rank: int | None = None,
        gate_bias: bool = False,
        **attention: Any,
    ) -> None:
        super().__init__(
            width=width,
            heads=2 * heads,
            kv_heads=None if kv_heads is None else 2 * kv_heads,
            head_dim=head_size("2 * heads", width, 2 * heads, "head_dim") if head_dim is None else head_dim,
            norm_eps=norm_eps,
            **attention,
        )
        self.gate = output_gate(gate, self.query.in_features, heads, 2 * self.head_dim, rank=gate_rank, bias=gate_bias)
        self.lambda_init = 0.8 - 0.6 * math.exp(-0.3 * layer)
        for name in LAMBDAS:
            self.register_parameter(name, nn.Parameter(torch.empty(self.head_dim)))
        self.norm = RMSNorm(2 * self.head_dim, norm_eps)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, seq: Sequence, **settings: Any) -> Tensor:
        """`[B, T, heads, 2 * head_dim]`. The heads of q are those of q1, then of q2, for each head of v."""
        shared = v.unflatten(2, (-1, 2)).flatten(-2)
        out = super().attend(q, k, shared, seq, **settings)
        first, second = out.unflatten(2, (shared.shape[2], 2, -1)).unbind(3)
        factor = self.factor_of_second()  # in float32: where both are alike, little is left of them
        difference = (first - factor * second.to(torch.promote_types(factor.dtype, second.dtype))).flatten(2, 3)
        return ((1 - self.lambda_init) * self.norm(difference)).to(q.dtype)

    def factor_of_second(self) -> Tensor:
        """lambda, in float32 at least."""
        wide = torch.promote_types(self.lambda_q1.dtype, torch.float32)
        q1, k1, q2, k2 = (getattr(self, name).to(wide) for name in LAMBDAS)
        return (q1 * k1).sum().exp() - (q2 * k2).sum().exp() + self.lambda_init

    def mixing_flops(self, seq: Sequence) -> int:
        return flops(seq.pairs(self.mask), heads=self.heads, key_dim=self.head_dim, value_dim=2 * self.head_dim)

    def initialise_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> bool:
        if name not in LAMBDAS:
            return super().initialise_parameter(name, tensor, generator)
        tensor.normal_(0.0, 0.1, generator=generator)
        return True
