"""Cached keys: while decoding each rank attends to those that it keeps, and partial results merge by log-sum-exp."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...kernels.attend import Attend, Decoding, merge
from ..collectives import gathered
from ..decoding_cache import Columns


class OverCached(Decoding):
    """New queries, of which every rank has all, over the keys that the ranks keep; each gets the same result."""

    def __init__(self, op: Attend, columns: Columns) -> None:
        super().__init__(op)
        self.columns = columns

    def over_keys(self, inputs: Any, where: Any) -> tuple[Tensor, Tensor] | None:
        mine = super().over_keys(inputs, where)
        if self.columns.group is None:
            return mine
        parts = [gathered(x, self.columns.group, self.columns.ranks) for x in mine or self.op.zeros(inputs)]
        out, lse = (part[0] for part in parts)
        for later in zip(*(part[1:] for part in parts), strict=True):
            out, lse = merge(out, lse, *later)
        return out, lse
