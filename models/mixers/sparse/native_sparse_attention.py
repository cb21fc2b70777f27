"""Native sparse attention: compressed, selected and nearby keys, each read by a branch of its own."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ....kernels import compressed, softmax
from ....kernels.masks.mask import Mask
from ....kernels.select_blocks import Rule
from ....parallel import ops
from ....parallel.sequence import Sequence
from ...layers.normalisation import RMSNorm
from ...layers.rotary import rotary
from ...layers.selectors.selector import Selector
from ...layers.short_convolution import ShortConvolution
from ...mixer import UNMEASURED, Mixer, check_groups, head_size
from ...part import Clipped
from .compression import Compression

COMPRESSIONS = ("mlp", "mean")


class NativeSparseAttention(Mixer):
    """Native sparse attention (NSA; Yuan et al., 2025, arXiv 2502.11089).

        compressed: attention of q_t to phi(k), phi(v) of the windows of `window_size` tokens that end at or before t
        selected: attention to the `count` blocks of the highest scores; a block's score sums, over the heads of the
            group, the compressed branch's weights of the windows that overlap it, weighted by their overlap
        near: attention to the last `near` tokens
        o_t = g_t1 compressed + g_t2 selected + g_t3 near        g = sigmoid(W x), three a head

    All in t's document. phi is an MLP over the window's tokens, each with a learned embedding of its place in it, or
    their mean. Queries and keys are rotated in the selected and the near branch; the compressed one goes by content.
    A query that no window precedes gets 0 from the compressed branch.

    heads, kv_heads: query heads, and the key/value heads that groups of them share, blocks included.
    head_dim, value_dim: of a key and of a value (default: as long).
    window_size, window_stride: tokens of a window, and from one to the next. compression: "mlp" or "mean".
    compression_hidden: of the MLP; 4 * head_dim by default.
    block_size, count: tokens of a selected block, and blocks a query; initial, local: those that always are among them,
        the document's first and the latest up to the query's own.
    shared_kv: one pair of key and value projections for the three branches, rather than one for each.
    qk_norm: RMS norm of each head's queries and keys before rotation.
    conv_size: taps of a short causal convolution over queries, keys and values, as in `SoftmaxAttention`.
    Raises ValueError for sizes that do not fit.
    """

    small = MappingProxyType(
        {
            "window_size": 4, "window_stride": 2, "block_size": 4, "count": 3, "initial": 1, "local": 1, "near": 9,
            "compression_hidden": 32,
        }
    )  # fmt: skip

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        value_dim: int | None = None,
        window_size: int = 32,
        window_stride: int = 16,
        compression: str = "mlp",
        compression_hidden: int | None = None,
        block_size: int = 64,
        count: int = 16,
        initial: int = 1,
        local: int = 2,
        near: int = 512,
        shared_kv: bool = False,
        rope_base: float | None = 10000.0,
        rope_fraction: float = 1.0,
        rope_scaling: dict[str, Any] | None = None,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
        conv_size: int | None = None,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        head_dim = head_size("heads", width, heads, "head_dim") if head_dim is None else head_dim
        value_dim = head_dim if value_dim is None else value_dim
        check_groups(heads, kv_heads)
        if compression not in COMPRESSIONS:
            raise ValueError(f"compression must be one of {', '.join(COMPRESSIONS)}; got {compression!r}")
        if compression == "mean" and compression_hidden is not None:
            raise ValueError(f"compression_hidden must come with compression='mlp'; got {compression_hidden}")
        self.heads, self.kv_heads, self.key_dim, self.value_dim = heads, kv_heads, head_dim, value_dim
        self.window_size, self.window_stride = window_size, window_stride
        self.selector = Selector(
            Rule(block_size, count, window=window_size, stride=window_stride, initial=initial, local=local)
        )
        self.near = Mask(window=near)
        self.rotary = rotary(head_dim, rope_base, rope_fraction, rope_scaling)
        self.branches = 1 if shared_kv else 3
        self.query = nn.Linear(width, heads * head_dim, bias=False)
        self.key = nn.Linear(width, self.branches * kv_heads * head_dim, bias=False)
        self.value = nn.Linear(width, self.branches * kv_heads * value_dim, bias=False)
        self.gate = nn.Linear(width, 3 * heads, bias=False)
        self.output = nn.Linear(heads * value_dim, width, bias=False)
        self.compress_keys = self.compress_values = None
        if compression == "mlp":
            hidden = 4 * head_dim if compression_hidden is None else compression_hidden
            self.compress_keys = Compression(window_size, window_stride, kv_heads, head_dim, hidden)
            self.compress_values = Compression(window_size, window_stride, kv_heads, value_dim, hidden)
        if qk_norm:
            self.query_norm, self.key_norm = RMSNorm(head_dim, norm_eps), RMSNorm(head_dim, norm_eps)
        self.qk_norm = qk_norm
        channels = self.query.out_features + self.key.out_features + self.value.out_features
        self.conv = None if conv_size is None else ShortConvolution(channels, conv_size)

    def forward(self, x: Tensor, seq: Sequence) -> Tensor:
        q, keys, values = self.query(x), self.key(x), self.value(x)
        if self.conv is not None:
            q, keys, values = self.conv.of_parts((q, keys, values), seq)
        q = q.unflatten(-1, (self.heads, -1))
        keys, values = (part.unflatten(-1, (self.branches, self.kv_heads, -1)) for part in (keys, values))
        if self.qk_norm:
            q, keys = self.query_norm(q), self.key_norm(keys)
        far_k, selected_k, near_k = keys.expand(-1, -1, 3, -1, -1).unbind(2)
        far_v, selected_v, near_v = values.expand(-1, -1, 3, -1, -1).unbind(2)
        rotated = self._rotated(q, seq)

        summaries, summary_values = self.compress(far_k, far_v, seq)
        size, stride = self.window_size, self.window_stride
        far, lse = ops.compressed_attention(q, summaries, summary_values, seq=seq, size=size, stride=stride)
        blocks = self.selector(q, summaries, seq, lse=lse)
        selected = ops.block_sparse_attention(
            rotated, self._rotated(selected_k, seq), selected_v, blocks, seq=seq,
            block_size=self.selector.rule.block_size,
        )  # fmt: skip
        near = ops.softmax_attention(rotated, self._rotated(near_k, seq), near_v, seq=seq, mask=self.near)

        gates = torch.sigmoid(self.gate(x)).unflatten(-1, (self.heads, 3)).unsqueeze(-1)
        out = gates[..., 0, :] * far + gates[..., 1, :] * selected + gates[..., 2, :] * near
        return self.output(out.flatten(-2))

    def compress(self, k: Tensor, v: Tensor, seq: Sequence) -> tuple[Tensor, Tensor]:
        """phi of the windows of the whole row: `[B, windows, kv_heads, head_dim]` and `[…, value_dim]`."""
        size, stride = self.window_size, self.window_stride
        both = torch.cat([k, v], dim=-1)  # one exchange for both
        if self.compress_keys is None or self.compress_values is None:
            summaries = ops.window_means(both, seq=seq, size=size, stride=stride)
        else:
            k, v = ops.local_windows(both, seq=seq, size=size, stride=stride).split((self.key_dim, self.value_dim), -1)
            made = torch.cat([self.compress_keys(k), self.compress_values(v)], dim=-1)
            summaries = ops.gather_windows(made, seq=seq, size=size, stride=stride)
        keys, values = summaries.split((self.key_dim, self.value_dim), dim=-1)
        return keys, values

    def _rotated(self, x: Tensor, seq: Sequence) -> Tensor:
        return x if self.rotary is None else self.rotary(x, seq)

    def clipped(self) -> Clipped | str | None:
        return UNMEASURED

    def mixing_flops(self, seq: Sequence) -> int:
        sizes = {"heads": self.heads, "key_dim": self.key_dim}
        windows = {"size": self.window_size, "stride": self.window_stride}
        far = compressed.flops(seq.local, value_dim=self.value_dim, **windows, **sizes)
        scores = self.selector.selection_flops(seq, has_lse=True, **sizes)
        selected = self.selector.attention_flops(seq, value_dim=self.value_dim, **sizes)

        near = softmax.flops(seq.pairs(self.near), value_dim=self.value_dim, **sizes)
        return far + scores + selected + near
