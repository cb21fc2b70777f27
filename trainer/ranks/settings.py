"""The settings of sequence parallelism: how the ranks share the rows, and by which exchanges."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...parallel.layout import Layout
from ...parallel.mesh import check_expert_ranks, check_sequence_ranks, check_ulysses_ranks
from ...parallel.strategy import Strategy
from ..requirements import at_least, one_of

LAYOUTS = {"contiguous": 1, "zigzag": 2}  # spans per rank by default


@dataclass
class ParallelSettings:
    """How the ranks share the rows: `sequence` ranks hold one row together; the rest is data parallel."""

    sequence: int = 1  # ranks that share a row; the others are data parallel
    layout: str = "contiguous"  # or zigzag
    spans: int | None = None  # pieces of a row that a rank holds; null: 1 for contiguous, 2 for zigzag
    attention: str = "ring"  # how softmax attention is shared: ring, gather or ulysses
    recurrent: str = "state_passing"  # how recurrent layers are shared; or ulysses
    ulysses: int | None = None  # ranks that exchange tokens for heads, the rest of `sequence` a ring; null: all of them
    mixers: dict[str, str] = field(default_factory=dict)  # other strategies for layers, by their name in the pattern
    experts: int = 1  # neighbouring ranks that share out the experts of each mixture of experts
    timeout_minutes: float = 10.0  # a rank that stays silent in a collective for so long ends the run

    def check(self, world_size: int, length: int) -> None:
        """Raises ValueError for what cannot be, on that many ranks and with rows of `length` tokens."""
        one_of("parallel.layout", self.layout, tuple(LAYOUTS))
        strategy_of(self)
        if self.ulysses is not None and not _by_heads(self):
            raise ValueError(
                f"parallel.ulysses must be null unless a strategy is ulysses; got {self.ulysses}. "
                "Set parallel.attention or parallel.recurrent to ulysses"
            )
        at_least("parallel.spans", self.spans, 1)
        if self.timeout_minutes <= 0:
            raise ValueError(f"parallel.timeout_minutes must be positive; got {self.timeout_minutes}")
        if self.layout == "contiguous" and self.spans not in (None, 1):
            raise ValueError(
                f"parallel.spans must be 1 with parallel.layout=contiguous; got {self.spans}. "
                "Use parallel.layout=zigzag for more"
            )
        if self.layout == "zigzag" and self.spans == 1:
            raise ValueError(
                "parallel.spans must be at least 2 with parallel.layout=zigzag; got 1. Use contiguous for 1"
            )
        check_sequence_ranks(self.sequence, world_size)
        check_ulysses_ranks(ulysses_ranks(self), self.sequence)
        check_expert_ranks(self.experts, world_size)
        at_least("data.sequence_length", length, 2)
        cuts = self.sequence * spans_of(self)
        if length % cuts:
            raise ValueError(
                f"data.sequence_length must be a multiple of {cuts} (parallel.sequence={self.sequence} ranks times "
                f"{spans_of(self)} spans of parallel.layout={self.layout}); got {length}. "
                f"Use {length // cuts * cuts or cuts} or {(length // cuts + 1) * cuts}"
            )


def spans_of(parallel: ParallelSettings) -> int:
    """Spans that a rank holds of each row."""
    return LAYOUTS[parallel.layout] if parallel.spans is None else parallel.spans


def layout_of(parallel: ParallelSettings, length: int) -> Layout:
    """The layout of rows of `length` tokens."""
    return Layout(length, parallel.sequence, spans_of(parallel))


def strategy_of(parallel: ParallelSettings) -> Strategy:
    """Which exchange each kind of layer uses on shared rows. Raises ValueError for an unknown one."""
    return Strategy(parallel.attention, parallel.recurrent, tuple(sorted(parallel.mixers.items())))


def ulysses_ranks(parallel: ParallelSettings) -> int:
    """Ranks that exchange tokens for heads: 1 where no strategy asks for it."""
    if not _by_heads(parallel):
        return 1
    return parallel.sequence if parallel.ulysses is None else parallel.ulysses


def _by_heads(parallel: ParallelSettings) -> bool:
    return "ulysses" in (parallel.attention, parallel.recurrent, *parallel.mixers.values())
