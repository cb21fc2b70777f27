"""Keys and values that a layer makes for others."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ....parallel import ops
from ....parallel.sequence import Sequence
from ...layers.normalisation import RMSNorm
from ...layers.rotary import rotary
from ...part import Part
from .attention import key_names


class KeyValues(Part):
    """Keys and values for all later layers that read them (YOCO, Sun et al., 2024, arXiv 2405.05254).

        k = rotated W_k x        v = W_v x        y = 0: nothing is added to the residual stream

    It stands last in the last layer before those that read it, as in the pattern `window*7, window|mlp|keys, cross*8`
    with `keys_of: keys` of the mixer `cross`; then those layers keep nothing of their own when they decode, and skip
    all but the last token of a prompt.

    kv_heads, head_dim: heads and their size. key_norm: an RMS norm of each head's keys before rotation. The other
    settings are those of `Attention`, and rotation should be that of the queries. Raises ValueError for sizes below 1.
    """

    small = {"kv_heads": 2, "head_dim": 8}

    def __init__(
        self,
        *,
        width: int,
        kv_heads: int,
        head_dim: int,
        name: str = "",
        rope_base: float | None = 10000.0,
        rope_fraction: float = 1.0,
        rope_scaling: dict[str, Any] | None = None,
        key_norm: bool = False,
        norm_eps: float = 1e-6,
        bias: bool = False,
    ) -> None:
        super().__init__()
        for setting, value in (("kv_heads", kv_heads), ("head_dim", head_dim)):
            if value < 1:
                raise ValueError(f"{setting} must be at least 1; got {value}")
        self.keys_as, self.kv_heads, self.head_dim = name, kv_heads, head_dim
        self.publishes = key_names(name)
        self.widths = dict.fromkeys(self.publishes, head_dim)
        self.rotary = rotary(head_dim, rope_base, rope_fraction, rope_scaling)
        self.key = nn.Linear(width, kv_heads * head_dim, bias=bias)
        self.value = nn.Linear(width, kv_heads * head_dim, bias=bias)
        self.key_norm = RMSNorm(head_dim, norm_eps) if key_norm else None

    def forward(self, x: Tensor, seq: Sequence) -> tuple[Tensor, ...]:
        """x `[B, T, D]` to zeros like it, keys and values `[B, T, kv_heads, head_dim]`."""
        k, v = (project(x).unflatten(-1, (-1, self.head_dim)) for project in (self.key, self.value))
        k = k if self.key_norm is None else self.key_norm(k)
        k = k if self.rotary is None else self.rotary(k, seq)
        return x.new_zeros(()).expand_as(x), *ops.keep_keys(k, v, seq=seq, keys_as=self.keys_as)
