"""Lightning attention as MiniMax-01 uses it."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from ....kernels.gated_linear import flops
from ....parallel import ops
from ....parallel.sequence import Sequence
from ...layers.layer_decays import Slopes
from ...layers.normalisation import HeadNorm, RMSNorm
from ...layers.rotary import rotary
from ...layers.short_convolution import ShortConvolution
from ...mixer import Mixer, head_size


class LightningAttention(Mixer):
    """Linear attention with a fixed decay a head (MiniMax-01, 2025, arXiv 2501.08313; Qin et al., arXiv 2401.04658).

        S_t = exp(-slope_h) S_(t-1) + k_t^T v_t        o_t = q_t S_t        q, k, v = silu(W x)        h = 0 … H - 1
        slope_h = 2^(-8 (h + 1) / H) * (1 - layer / (depth - 1 + 1e-5) + 1e-5)        slope_rule geometric
        slope_h = 8 h / H * (1 - layer / depth)                                       slope_rule arithmetic
        y = W_o (sigmoid(W_g x) * RMSNorm(o))           the norm spans all heads

    `layer` counts from 0 over the whole model: later layers forget more slowly. slope_rule: "geometric" as in
    MiniMax-01, or "arithmetic" as in flash-linear-attention, which also scales q; see `Slopes`. No scale on q.
    conv_size: taps of a short causal convolution over q, k and v before the SiLU; MiniMax-01 has none (None).

    What Ring-linear has besides (Ling team, 2025, arXiv 2510.19338): silu=False leaves the SiLU out. qk_norm: RMS norm
    of each head's q and k. rope_base, rope_fraction: q and k turn by their positions after that; None for no positions.
    norm_groups: of how many equal parts of the heads the norm has statistics of their own.
    Raises ValueError for sizes that do not divide, for an unknown rule, and for settings without effect.
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
        silu: bool = True,
        qk_norm: bool = False,
        rope_base: float | None = None,
        rope_fraction: float = 1.0,
        norm_groups: int = 1,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        head_dim = head_size("heads", width, heads, "head_dim") if head_dim is None else head_dim
        if norm_groups < 1 or heads % norm_groups:
            raise ValueError(f"norm_groups must divide heads={heads}; got {norm_groups}. Change one of them")
        self.heads, self.head_dim, self.silu, self.norm_groups = heads, head_dim, silu, norm_groups
        self.slopes = Slopes(slope_rule, heads, layer, depth)
        inner = heads * head_dim
        self.query = nn.Linear(width, inner, bias=False)
        self.key = nn.Linear(width, inner, bias=False)
        self.value = nn.Linear(width, inner, bias=False)
        activation = "silu" if silu else None
        self.conv = None if conv_size is None else ShortConvolution(3 * inner, conv_size, activation=activation)
        self.query_norm = RMSNorm(head_dim, norm_eps) if qk_norm else None
        self.key_norm = RMSNorm(head_dim, norm_eps) if qk_norm else None
        self.rotary = rotary(head_dim, rope_base, rope_fraction, None)
        self.gate = nn.Linear(width, inner, bias=False)
        self.norm: nn.Module = RMSNorm(inner, norm_eps)
        if norm_groups > 1:
            self.norm = HeadNorm(norm_groups, inner // norm_groups, norm_eps, bias=False, centred=False)
        self.output = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, seq: Sequence) -> Tensor:
        parts = self.query(x), self.key(x), self.value(x)
        if self.conv is not None:
            parts = self.conv.of_parts(parts, seq)
        elif self.silu:
            parts = map(F.silu, parts)
        q, k, v = (part.unflatten(-1, (self.heads, self.head_dim)) for part in parts)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        if self.rotary is not None:
            q, k = self.rotary(q, seq), self.rotary(k, seq)
        out = ops.gated_linear_attention(q, k, v, -self.slopes(x), seq=seq, scale=1.0).flatten(-2)
        out = out if self.norm_groups == 1 else out.unflatten(-1, (self.norm_groups, -1))
        return self.output(self.norm(out, self.gate(x), "sigmoid"))

    def mixing_flops(self, seq: Sequence) -> int:
        return flops(seq.places, heads=self.heads, key_dim=self.head_dim, value_dim=self.head_dim)
