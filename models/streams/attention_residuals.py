"""Attention residuals: parts read what they choose among the outputs of all earlier ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.pointwise import depth_attention
from ...parallel.sequence import Sequence
from ..block import Block
from ..mixer import also_takes


class DepthAttention(nn.Module):
    """A learned query that attends, for each token by itself, over what earlier layers gave for it.

    Sources `[B, T, D]` to one of the same. The query starts at 0: the mean of the sources. See `depth_attention`.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.query = nn.Parameter(torch.zeros(width))
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, sources: list[Tensor]) -> Tensor:
        return depth_attention(sources, self.query, self.weight, self.eps)

    def initialise_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> bool:
        tensor.fill_(1.0 if name == "weight" else 0.0)
        return True


class AttentionResidualBlock(Block):
    """Block whose parts attend over earlier outputs in place of adding to one stream (Kimi Team, 2026, 2603.15031).

        x = sum_s softmax_s(query . k_s) v_s        v_new = part(norm(x))        for each of `parts`, with its own query

    v_s: the embedding, and the outputs of all parts before (Full AttnRes); k_s: these, normed. With `block_size=n`,
    the outputs of n parts in a row, mixers and feed-forward layers counted alike, are one source, their sum; the last
    of them grows as its parts run (Block AttnRes). What the model's last part leaves is attended over once more.
    All of it is done token by token. Raises ValueError for a `block_size` that is not positive.
    """

    @also_takes(Block)
    def __init__(
        self, *, width: int, before: int, last: bool, block_size: int = 1, norm_eps: float = 1e-6, **block: Any
    ) -> None:
        super().__init__(width=width, norm_eps=norm_eps, **block)
        if block_size < 1:
            raise ValueError(f"model.block.block_size must be at least 1; got {block_size}. It counts parts of blocks")
        self.before, self.width, self.block_size = before, width, block_size
        for number, name in enumerate(self.names, before):
            if number:  # the first part has the embedding alone to read
                self.add_module(f"{name}_depth", DepthAttention(width, norm_eps))
        self.final_depth = DepthAttention(width, norm_eps) if last else None
        own = range(before, before + len(self.names))
        self.finished = [_source(number) for number in range(0, before, block_size)]
        self.reads = (*self.reads, *self.finished)
        if not last:
            self.publishes = (*self.publishes, *(_source(number) for number in own if number % block_size == 0))

    def forward(self, x: Tensor, seq: Sequence, *read: Tensor) -> Tensor | tuple[Tensor, ...]:
        values = dict(zip(self.reads, read, strict=True))
        sources: list[Tensor] = [values[name] for name in self.finished]
        growing: Tensor | None = x  # the sum of the parts of the last source, of which there are none where it is None
        for number, name in enumerate(self.names, self.before):
            seen = sources if growing is None else [*sources, growing]
            if number % self.block_size == 0:
                assert growing is not None
                values[_source(number)] = growing
                sources, growing = seen, None
            x = getattr(self, f"{name}_depth")(seen) if number else seen[0]
            out = self.run(name, self.norm(name, x), seq, values)
            growing = out if growing is None else growing + out
        assert growing is not None
        return self.result(growing if self.final_depth is None else self.final_depth([*sources, growing]), values)

    def mixing_flops(self, seq: Sequence) -> int:
        # Multiply and add: a source's dot product, its norm, and its share of the sum, for each of D channels.
        last = self.before + len(self.names)
        counts = [_sources(number, self.block_size) for number in range(max(1, self.before), last)]
        if self.final_depth is not None:
            counts.append(_sources(last, self.block_size))
        return 6 * seq.places * self.width * sum(counts)


def _source(number: int) -> str:
    """What the source is called that is complete when the part of this number runs."""
    return f"residual source before part {number}"


def _sources(number: int, block_size: int) -> int:
    """How many sources the part of this number attends over: those complete before it, and the one that grows."""
    return len(range(0, number, block_size)) + 1
