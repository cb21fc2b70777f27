"""KernelAttention: what mixers of attention with a feature map share."""

from __future__ import annotations

from torch import Tensor, nn

from ....kernels.gated_linear import flops, whole
from ....parallel import ops
from ....parallel.sequence import Sequence
from ...layers.feature_maps import FeatureMap, Features
from ...mixer import Mixer, check_groups, head_size


class KernelAttention(Mixer):
    """Attention whose weights are products of features, in time linear in the length.

        o_i = sum_j phi(q_i) . phi(k_j) v_j / sum_j phi(q_i) . phi(k_j)        j <= i in i's document
        S_t = S_(t-1) + phi(k_t)^T v_t;  z_t = z_(t-1) + phi(k_t);  o_t = phi(q_t) S_t / phi(q_t) . z_t

    A subclass sets `feature_map`; its constructor `also_takes` these settings. Where the divisor is 0, the output is 0.

    heads, kv_heads: query heads, and the key/value heads that groups of them share (default: as many).
    key_dim, value_dim: of a head, by default width / heads. bias: of all projections.
    Raises ValueError for sizes that do not divide.
    """

    feature_map: FeatureMap

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        kv_heads: int | None = None,
        key_dim: int | None = None,
        value_dim: int | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads = heads, heads if kv_heads is None else kv_heads
        self.key_dim = head_size("heads", width, heads, "key_dim") if key_dim is None else key_dim
        self.value_dim = head_size("heads", width, heads, "value_dim") if value_dim is None else value_dim
        check_groups(heads, self.kv_heads)
        self.query = nn.Linear(width, heads * self.key_dim, bias=bias)
        self.key = nn.Linear(width, self.kv_heads * self.key_dim, bias=bias)
        self.value = nn.Linear(width, self.kv_heads * self.value_dim, bias=bias)
        self.output = nn.Linear(heads * self.value_dim, width, bias=bias)

    def forward(self, x: Tensor, seq: Sequence) -> Tensor:
        features, v = self.project(x, seq)
        return self.output(self.attend(features, v, seq).flatten(-2))

    def project(self, x: Tensor, seq: Sequence) -> tuple[Features, Tensor]:
        """Features of queries and keys, and the values `[B, T, kv_heads, value_dim]`."""
        q, k = (layer(x).unflatten(-1, (-1, self.key_dim)) for layer in (self.query, self.key))
        return self.feature_map(q, k, seq), self.value(x).unflatten(-1, (-1, self.value_dim))

    def attend(self, features: Features, v: Tensor, seq: Sequence) -> Tensor:
        """The weighted mean of the values, `[B, T, H, V]` for as many heads as the queries have."""
        q, k, log_scale = features
        if not self.causal:
            return ops.kernel_attention(q, of_heads(k, v.shape[2]), v, seq=seq)
        heads = q.shape[2]
        log_input = None if log_scale is None else of_heads(log_scale, heads)
        return ops.gated_linear_attention(
            q, k, of_heads(v, heads), log_input=log_input, normaliser="sum", scale=1.0, seq=seq
        )

    def mixing_flops(self, seq: Sequence) -> int:
        sizes = {"heads": self.heads, "key_dim": self.feature_map.size, "value_dim": self.value_dim + 1}
        return (flops if self.causal else whole.flops)(seq.places, **sizes)


def of_heads(x: Tensor, heads: int) -> Tensor:
    """`[B, T, G, …]` to `[B, T, H, …]`: what a group of heads shares, repeated for each of them."""
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], dim=2)
