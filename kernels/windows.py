"""Windows: the overlapping stretches of a document that summaries stand for, and which blocks they touch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .blocks import Number, Numbered
from .documents import Documents, expanded


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

    def number(self, length: Number) -> Number:
        """How many complete windows the first `length` tokens of a document have."""
        return (length >= self.size) * ((length - self.size) // self.stride + 1)

    def table(self, device: torch.device | str = "cpu") -> Tensor:
        """int32 `[B, count, 3]`: document, first position and row index of the first token; −1 past the end."""
        return self.on(device, _table)


def _table(layout: WindowLayout) -> Tensor:
    runs, (each, first) = layout.documents.columns, layout.stretches
    owner, number = expanded(each)
    of_windows, position = runs.at(owner), number * layout.stride
    table = torch.full((layout.documents.batch, layout.count, 3), -1, dtype=torch.int32)
    windows = torch.stack([of_windows.document, position, position + of_windows.start], dim=1)
    table[of_windows.row, first[owner] + number] = windows.int()
    return table


def seen_windows(documents: Documents, size: int, stride: int) -> int:
    """How many (query, window) pairs there are: for each token, the complete windows of its document up to it."""
    runs = documents.columns.at(documents.columns.real)
    seen = _windows_below(runs.end_position, size, stride) - _windows_below(runs.position, size, stride)
    return int(seen.sum())


def _windows_below(position: Tensor, size: int, stride: int) -> Tensor:
    """Sum over queries below `position` of the complete windows they see."""
    queries = (position - size + 1).clamp(min=0)  # from the first that sees a window on; each `stride` see one more
    full, rest = queries // stride, queries % stride
    return stride * full * (full + 1) // 2 + rest * (full + 1)
