"""Dilated: every r-th key of a window."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from .pattern import FAR, Band, Pattern


@dataclass(frozen=True)
class Dilated(Pattern):
    """Visible are keys j of the query's own document with i − j = 0, r, 2r, …, less than `window` if there is one.

    `dilation` is r (atrous attention; as a layer of LongNet, Ding et al., 2023, arXiv 2307.02486, section 2.2).
    """

    dilation: int
    window: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("dilation", self.dilation), ("window", self.window)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")
        super().__post_init__()

    @cached_property
    def bands(self) -> tuple[Band, ...]:
        back = FAR if self.window is None else self.window - 1
        return (Band(back=back, ahead=0, stride=self.dilation),)
