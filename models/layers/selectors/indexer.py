"""Indexers: small networks that learn which keys attention will want, and select blocks of them or single tokens."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ....kernels import index_divergence
from ....kernels.masks import Mask
from ....kernels.select_blocks import Rule
from ....parallel import ops
from ....parallel.sequence import Sequence
from ..normalisation import LayerNorm, RMSNorm
from ..rotary import rotary
from ..short_convolution import ShortConvolution
from .selector import Selector


class Index(NamedTuple):
    """What an indexer makes of the tokens: q `[B, T, I, D]`, k `[B, T, 1, D]`, weights `[B, T, I]` or None."""

    q: Tensor
    k: Tensor
    weights: Tensor | None


class Indexer(Selector):
    """Scores every key for every query by a few heads that share one key, and selects by the scores.

        I_tjs = q_tj . k_s / sqrt(dim)                        one list per head
        I_ts = sum_j w_tj relu(q_tj . k_s / sqrt(dim))        with `weighted`, one list for all: the lightning indexer

    No gradient comes through the lists. What trains the indexer is `loss`, which reaches its parameters alone: it reads
    the tokens, and the attention that it follows, as constants.

    query_norm, key_norm: of each head's queries and of the keys, before rotation: "rms", "layer" or None.
    conv_size: taps of a short convolution over queries and keys, before the norms; None for none.
    query_width: dims of what queries are made of, where that is not the tokens of `width` dims.
    The rope settings are those of `Attention`.
    """

    def __init__(
        self,
        rule: Rule,
        *,
        width: int,
        heads: int,
        dim: int,
        weighted: bool,
        query_norm: str | None,
        key_norm: str | None,
        norm_eps: float,
        rope_base: float | None,
        rope_fraction: float,
        rope_scaling: dict[str, Any] | None,
        conv_size: int | None,
        query_width: int | None = None,
    ) -> None:
        for name, value in (("index_heads", heads), ("index_dim", dim)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")
        super().__init__(rule)
        self.heads, self.dim = heads, dim
        self.rotary = rotary(dim, rope_base, rope_fraction, rope_scaling)
        self.query = nn.Linear(width if query_width is None else query_width, heads * dim, bias=False)
        self.key = nn.Linear(width, dim, bias=False)
        self.conv = None if conv_size is None else ShortConvolution((heads + 1) * dim, conv_size)
        self.weight = nn.Linear(width, heads, bias=False) if weighted else None
        self.query_norm, self.key_norm = _norm(query_norm, dim, norm_eps), _norm(key_norm, dim, norm_eps)

    def project(self, x: Tensor, seq: Sequence, queries_of: Tensor | None = None) -> Index:
        """Of the tokens `[B, T, width]`, and queries of `queries_of` `[B, T, query_width]`, by default of x.

        Neither gets a gradient.
        """
        x = x.detach()
        q, k = self.query(x if queries_of is None else queries_of.detach()), self.key(x)
        if self.conv is not None:
            q, k = self.conv.of_parts((q, k), seq, "index conv")
        q, k = q.unflatten(-1, (self.heads, self.dim)), k.unsqueeze(-2)
        q = q if self.query_norm is None else self.query_norm(q)
        k = k if self.key_norm is None else self.key_norm(k)
        if self.rotary is not None:
            q, k = self.rotary(q, seq), self.rotary(k, seq)
        return Index(q, k, None if self.weight is None else self.weight(x) * self.heads**-0.5)

    def select(self, index: Index, seq: Sequence) -> Tensor:
        """Lists int32 `[B, T, heads or 1, count]`."""
        return self(index.q, self.summarise(index.k, seq), seq, weights=index.weights)

    def loss(
        self, q: Tensor, k: Tensor, index: Index, lists: Tensor | None, seq: Sequence, scale: float | None = None
    ) -> Tensor:
        """The divergence of the index from attention of q `[B, T, H, K]` to k `[B, T, G, K]`: its mean over lists,
        summed over this rank's tokens. Over the keys listed, or all for None. 0 where nothing trains.

        scale: that of attention, by default K^(-1/2).
        """
        if seq.cache is not None or not torch.is_grad_enabled():
            return q.new_zeros((), dtype=torch.promote_types(q.dtype, torch.float32))
        size = None if lists is None else self.rule.block_size
        return ops.index_divergence(q, k, *index, lists, seq=seq, block_size=size, scale=scale).mean(-1).sum()

    def loss_flops(self, seq: Sequence, *, heads: int, key_dim: int, dense: bool) -> int:
        """Forward FLOPs of the loss."""
        pairs = seq.pairs(Mask()) if dense else self.listed_pairs(seq)
        return index_divergence.flops(pairs, heads=heads, key_dim=key_dim, index_heads=self.heads, index_dim=self.dim)


def _norm(kind: str | None, dim: int, eps: float) -> nn.Module | None:
    return None if kind is None else {"rms": RMSNorm, "layer": LayerNorm}[kind](dim, eps)
