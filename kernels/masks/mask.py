"""Mask: causal, sliding-window and bidirectional attention, with sinks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from .pattern import Band, Pattern


@dataclass(frozen=True)
class Mask(Pattern):
    """Visible are keys j of the query's own document with, if `causal`, j <= i; with a `window`, 0 <= i − j < window
    (the query itself counts: W keys in all); and, whatever the window, positions j < `sink_tokens`
    (StreamingLLM, Xiao et al., 2023, arXiv 2309.17453).
    """

    causal: bool = True
    window: int | None = None
    sink_tokens: int = 0

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"window must be at least 1 (the query itself counts); got {self.window}")
        if self.window is not None and not self.causal:
            raise ValueError("window must come with causal=True; a two-sided window is not defined here")
        if self.sink_tokens < 0:
            raise ValueError(f"sink_tokens must not be negative; got {self.sink_tokens}")
        if self.sink_tokens and self.window is None:
            raise ValueError("sink_tokens must come with a window; without one every earlier token is visible anyway")
        super().__post_init__()

    @cached_property
    def bands(self) -> tuple[Band, ...]:
        if not self.causal:
            return (Band(),)
        if self.window is None:
            return (Band(ahead=0),)
        near = Band(first=self.sink_tokens, back=self.window - 1, ahead=0)
        return (Band(last=self.sink_tokens, ahead=0), near) if self.sink_tokens else (near,)
