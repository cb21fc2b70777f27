"""Windows: the overlapping stretches of a document that summaries stand for, and which blocks they touch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .blocks import Numbered
from .documents import Documents


@dataclass(frozen=True)
class WindowLayout(Numbered):
    """The windows of whole rows: of `size` tokens, one starting at every `stride`-th position of each document.

    Only complete windows exist: a document of n tokens has floor((n − size) / stride) + 1 of them, or none. They are
    numbered document by document over the row. Window i of a document covers positions i·stride .. i·stride + size − 1
    and stands at the last of them, so that a query sees the windows that end at or before it.
    """

    size: int
    stride: int

    def __post_init__(self) -> None:
        if self.size < 1 or self.stride < 1:
            raise ValueError(f"size and stride of windows must be at least 1; got {self.size} and {self.stride}")
        super().__post_init__()

    def number(self, length: int) -> int:
        """How many complete windows the first `length` tokens of a document have."""
        return max(0, (length - self.size) // self.stride + 1)

    def table(self, device: torch.device | str = "cpu") -> Tensor:
        """int32 `[B, count, 3]`: document, first position and row index of the first token; −1 past the end."""
        table = torch.full((self.documents.batch, self.count, 3), -1, dtype=torch.int32)
        for row, runs in enumerate(self.documents.runs):
            for run in runs:
                number = 0 if run.is_padding else self.number(run.length)
                if number:
                    at = self.first[row][run.document]
                    positions = torch.arange(number, dtype=torch.int32) * self.stride
                    table[row, at : at + number, 0] = run.document
                    table[row, at : at + number, 1] = positions
                    table[row, at : at + number, 2] = positions + run.start
        return table.to(device)


def seen_windows(documents: Documents, size: int, stride: int) -> int:
    """How many (query, window) pairs there are: for each token, the complete windows of its document up to it."""
    return sum(
        _windows_below(run.end_position, size, stride) - _windows_below(run.position, size, stride)
        for row in documents.runs
        for run in row
        if not run.is_padding
    )


def _windows_below(position: int, size: int, stride: int) -> int:
    """Sum over queries below `position` of the complete windows they see."""
    queries = max(0, position - size + 1)  # from the first that sees a window on; each `stride` see one more
    full, rest = divmod(queries, stride)
    return stride * full * (full + 1) // 2 + rest * (full + 1)
