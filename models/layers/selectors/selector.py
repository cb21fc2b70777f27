"""Selector: which blocks of keys each query lists, for mixers that attend to listed blocks alone."""

from __future__ import annotations

from torch import Tensor, nn

from ....kernels import select_blocks as selection
from ....kernels.block_sparse import flops, most_visits
from ....kernels.documents import Documents
from ....kernels.select_blocks import Rule
from ....parallel import ops
from ....parallel.sequence import Sequence


class Selector(nn.Module):
    """Lists blocks by the queries' scores against summaries of windows of keys, as a `Rule` says.

    What another mechanism selects by is its own subclass, with parameters of its own where it learns them: it makes
    summaries, or lists, differently. Lists hold ids of the whole row and carry no gradient, and a selector never sees
    a rank: `summarise` and `forward` call ops of `parallel.ops` alone.
    """

    def __init__(self, rule: Rule) -> None:
        super().__init__()
        self.rule = rule

    def summarise(self, k: Tensor, seq: Sequence) -> Tensor:
        """Keys `[B, T, G, K]` to the mean of each window, `[B, windows, G, K]` of the whole row."""
        return ops.window_means(k.detach(), seq=seq, size=self.rule.span, stride=self.rule.step)

    def forward(
        self, q: Tensor, summaries: Tensor, seq: Sequence, *, scale: float | None = None, lse: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Lists int32 `[B, T, G or H, count]` of queries `[B, T, H, K]`; `lse` `[B, T, H]` of the scores, if known, and
        `weights` `[B, T, H]` where the rule has them."""
        return ops.select_blocks(q, summaries, seq=seq, rule=self.rule, scale=scale, lse=lse, weights=weights)

    def selection_flops(self, seq: Sequence, *, heads: int, key_dim: int, has_lse: bool = False) -> int:
        """Forward FLOPs of scoring."""
        return selection.flops(seq.local, rule=self.rule, heads=heads, key_dim=key_dim, has_lse=has_lse)

    def attention_flops(self, seq: Sequence, *, heads: int, key_dim: int, value_dim: int, beyond: int = 0) -> int:
        """Forward FLOPs of attention to full lists, whole blocks counted, of tokens at positions from `beyond` on."""
        size = self.rule.block_size
        number = seq.local.derive(_visits, size, self.rule.count, beyond)
        return flops(number * heads, block_size=size, heads_a_list=1, key_dim=key_dim, value_dim=value_dim)

    def listed_pairs(self, seq: Sequence) -> int:
        """How many (query, key) pairs full lists have, whole blocks counted."""
        return seq.local.derive(_visits, self.rule.block_size, self.rule.count, 0) * self.rule.block_size


def _visits(documents: Documents, block_size: int, count: int, beyond: int) -> int:
    """The most (query, block) pairs of queries at positions from `beyond` on, with lists of `count` blocks."""
    every, before = (
        most_visits(tokens, block_size=block_size, count=count) for tokens in (documents, documents.up_to(beyond))
    )
    return every - before
