"""Rule: how the scores of summaries become a list of blocks."""

from __future__ import annotations

from dataclasses import dataclass

from ..plain import Plain


@dataclass(frozen=True)
class Rule(Plain):
    """Which blocks a query lists, by its scores against the summaries of windows.

    block_size: tokens of a block (l').         count: blocks per list (n), the forced ones among them.
    window, stride: tokens of a summarised window (l) and from one to the next (d); both divide evenly into blocks of
        d. By default the blocks themselves.
    score: "softmax" normalises a head's scores over all windows that it sees; "dot" leaves them as they are; "relu"
        multiplies what is positive of them by a weight per query and head.
    aggregate: "sum" weights the windows that touch a block by their overlap with it in units of the stride,
        "max" takes the greatest.
    pooled: the heads of a group add up their scores and share a list; else every query head has its own.
    initial, local: the first blocks of a document, and the latest (the one the query is in first), which are always
        listed.

    NSA (Yuan et al., 2025, arXiv 2502.11089): Rule(64, 16, window=32, stride=16, initial=1, local=2), whose weights are
    1, 2, 2, 2, 1. InfLLM-v2 (MiniCPM team, 2025, arXiv 2506.07900): the same with aggregate="max". MoBA (Lu et al.,
    2025, arXiv 2502.13189): Rule(512, 3, score="dot", pooled=False), the query's own block among the three. The indexer
    of DeepSeek-V3.2 (DeepSeek-AI, 2025, arXiv 2512.02556) chooses tokens: Rule(1, 2048, score="relu", local=0).
    """

    block_size: int
    count: int
    window: int | None = None
    stride: int | None = None
    score: str = "softmax"
    aggregate: str = "sum"
    pooled: bool = True
    initial: int = 0
    local: int = 1

    def __post_init__(self) -> None:
        for name in ("block_size", "count"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        for name in ("initial", "local"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative; got {getattr(self, name)}")
        if self.initial + self.local > self.count:
            raise ValueError(
                f"count must have room for the forced blocks, {self.initial} initial and {self.local} local; "
                f"got {self.count}"
            )
        if self.score not in ("softmax", "dot", "relu"):
            raise ValueError(f"score must be 'softmax', 'dot' or 'relu'; got {self.score!r}")
        if self.aggregate not in ("sum", "max"):
            raise ValueError(f"aggregate must be 'sum' or 'max'; got {self.aggregate!r}")
        if (self.window is None) != (self.stride is None):
            raise ValueError(f"window and stride must come together; got {self.window} and {self.stride}")
        if self.span < 1 or self.step < 1 or self.span % self.step or self.block_size % self.step:
            raise ValueError(
                f"stride must divide window and block_size; got {self.step} for {self.span} and {self.block_size}"
            )
        super().__post_init__()

    @property
    def span(self) -> int:
        """Tokens of a window."""
        return self.block_size if self.window is None else self.window

    @property
    def step(self) -> int:
        """Tokens from one window to the next."""
        return self.block_size if self.stride is None else self.stride

    @property
    def windows_per_block(self) -> int:
        """Windows that start in a block."""
        return self.block_size // self.step

    @property
    def lead(self) -> int:
        """Windows that touch a block but start before it."""
        return self.span // self.step - 1

    @property
    def weights(self) -> tuple[int, ...]:
        """The overlap, in strides, of a block with the windows that touch it: from `lead` before its first on."""
        span, block = self.span // self.step, self.windows_per_block
        return tuple(min(at + span, block) - max(at, 0) for at in range(-self.lead, block))
