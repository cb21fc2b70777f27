"""Lightning attention as MiniMax-01 uses it."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from ....kernels.gated_linear import flops
from ....parallel import ops
from ....parallel.sequence import Sequence
from ...layers.layer_decays import Slopes
from ...layers.normalisation import RMSNorm
from ...layers.short_convolution import ShortConvolution
from ...mixer import Mixer, head_size


class LightningAttention(Mixer):
    """Linear attention with a fixed decay a head (MiniMax-01, 2025, arXiv 2501.08313; Qin et al., arXiv 2401.04658).

        S_t = exp(-slope_h) S_(t-1) + k_t^T v_t        o_t = q_t S_t        q, k, v = silu(W x)        h = 0 … H - 1
        slope_h = 2^(-8 (h + 1) / H) * (1 - layer / (depth - 1 + 1e-5) + 1e-5)        slope_rule geometric
        slope_h = 8 h / H * (1 - layer / depth)                                       slope_rule arithmetic
        y = W_o (sigmoid(W_g x) * RMSNorm(o))           the norm spans all heads

    `layer` counts from 0 over the whole model: later layers forget more slowly. slope_rule: "geometric" as in
    MiniMax-01, or "arithmetic" as in flash-linear-attention, which also scales q; see `Slopes`. No positions, and no
    scale on q. conv_size: taps of a short causal convolution over q, k and v before the SiLU; MiniMax-01 has none
    (None). Raises ValueError if heads do not divide the width, and for an unknown rule.
    """

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        layer: int,
        depth: int,
        head_dim: int | None = None,
        slope_rule: str = "geometric",
        conv_size: int | None = None,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        head_dim = head_size("heads", width, heads, "head_dim") if head_dim is None else head_dim
        self.heads, self.head_dim = heads, head_dim
        self.slopes = Slopes(slope_rule, heads, layer, depth)
        inner = heads * head_dim
        self.query = nn.Linear(width, inner, bias=False)
        self.key = nn.Linear(width, inner, bias=False)
        self.value = nn.Linear(width, inner, bias=False)
        self.conv = None if conv_size is None else ShortConvolution(3 * inner, conv_size, activation="silu")
        self.gate = nn.Linear(width, inner, bias=False)
        self.norm = RMSNorm(inner, norm_eps)
        self.output = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, seq: Sequence) -> Tensor:
        parts = self.query(x), self.key(x), self.value(x)
        parts = map(F.silu, parts) if self.conv is None else self.conv.of_parts(parts, seq)
        q, k, v = (part.unflatten(-1, (self.heads, self.head_dim)) for part in parts)
        out = ops.gated_linear_attention(q, k, v, -self.slopes(x), seq=seq, scale=1.0)
        return self.output(self.norm(out.flatten(-2), self.gate(x), "sigmoid"))

    def mixing_flops(self, seq: Sequence) -> int:
        return flops(seq.places, heads=self.heads, key_dim=self.head_dim, value_dim=self.head_dim)
