"""BlockLocal: keys of the query's own block of positions."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from .pattern import Band, Pattern


@dataclass(frozen=True)
class BlockLocal(Pattern):
    """Visible are keys j <= i of the query's own document with ⌊i / block⌋ = ⌊j / block⌋.

    Blocks are counted from the document's start. The block-diagonal attention of TransNormer (Qin et al., 2022, arXiv
    2210.10340), and the chunked attention of Llama 4.
    """

    block: int

    def __post_init__(self) -> None:
        if self.block < 1:
            raise ValueError(f"block must be at least 1; got {self.block}")
        super().__post_init__()

    @cached_property
    def bands(self) -> tuple[Band, ...]:
        return (Band(back=self.block - 1, ahead=0, block=self.block),)
