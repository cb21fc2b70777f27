"""TransNormerLLM's gated linear attention."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ....kernels.gated_linear import flops
from ....parallel import ops
from ....parallel.sequence import Sequence
from ...layers.feature_maps import Silu
from ...layers.layer_decays import Slopes
from ...layers.normalisation import RMSNorm
from ...mixer import also_takes
from .kernel_attention import KernelAttention, of_heads


class TransNormerLLM(KernelAttention):
    """Gated linear attention with a fixed decay for each head (TransNormerLLM, Qin et al., 2023, arXiv 2307.14995).

        S_t = exp(-slope_h) S_(t-1) + phi(k_t)^T v_t        o_t = phi(q_t) S_t
        phi(x) = silu(x), in the first `lrpe_layers` layers [silu(x) cos(theta t), silu(x) sin(theta t)]
        y = W_o (W_u x * SimpleRMSNorm(o))                  the norm spans all heads and has no weight

    As its published code has it: learned theta in the first layer alone (see `LRPE`), no activation on the values and
    the gate, and geometric slopes, where the paper states arithmetic ones: see `Slopes`, whose `slope_rule` chooses.
    That code's slopes are others where the number of heads is no power of two.
    The other settings are those of `KernelAttention`. Raises ValueError as that does and for an unknown rule.
    """

    @also_takes(KernelAttention)
    def __init__(
        self,
        *,
        layer: int,
        depth: int,
        lrpe_layers: int = 1,
        slope_rule: str = "geometric",
        norm_eps: float = 1e-6,
        **kernel: Any,
    ) -> None:
        super().__init__(**kernel)
        inner = self.heads * self.value_dim
        self.slopes = Slopes(slope_rule, self.heads, layer, depth)
        self.feature_map = Silu(self.key_dim, self.kv_heads if layer < lrpe_layers else None)
        self.gate = nn.Linear(self.query.in_features, inner, bias=self.query.bias is not None)
        self.norm = RMSNorm(inner, norm_eps, weighted=False)

    def forward(self, x: Tensor, seq: Sequence) -> Tensor:
        (q, k, _), v = self.project(x, seq)
        v = of_heads(v, self.heads).to(q.dtype)
        out = ops.gated_linear_attention(q, k, v, -self.slopes(x), scale=1.0, seq=seq)
        return self.output(self.gate(x) * self.norm(out.flatten(-2)).to(x.dtype))

    def mixing_flops(self, seq: Sequence) -> int:
        return flops(seq.places, heads=self.heads, key_dim=self.feature_map.size, value_dim=self.value_dim)
