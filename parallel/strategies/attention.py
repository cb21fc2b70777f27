"""Attention across ranks: what all strategies share, however keys come to the queries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...kernels.attend import Attend, Attention
from ...kernels.operation import Tensors
from ..operation import Operation
from ..sequence import Sequence


@dataclass(frozen=True)
class SharedAttention(Attention, Operation):
    """An `Attend` over the keys of all ranks that share a row; on one rank, over its own.

    Tokens from position `until` of their document on, unless it is None, take no part: their outputs are 0. Inputs
    travel in their own type, without loss; partial results and gradients are float32 (float64).
    """

    op: Attend
    until: int | None = None

    @property
    def kernel(self) -> str | None:
        return self.op.name

    def like(self, inputs: Tensors, ranks: int, spans: int) -> tuple[tuple[Tensor, ...], Tensors]:
        named = self.op.record(*inputs)
        self.op.check(named)
        shape = *named.q.shape[:-2], *self.op.width(named)
        exact = torch.promote_types(named.q.dtype, torch.float32)
        saved = None if exact == named.q.dtype else named.q.new_empty(shape, dtype=torch.int8)
        out, lse = named.q.new_empty(shape), named.q.new_empty(shape[:-1], dtype=exact)
        return ((out, lse), (saved,)) if self.returns_lse else ((out,), (saved, lse))

    @staticmethod
    def add_up(total: dict[str, Tensor], part: dict[str, Tensor]) -> None:
        """Adds the gradients of inputs that stay, of one more part of the keys; an op may return one tensor twice."""
        for name, x in part.items():
            if name not in total:
                total[name] = torch.zeros_like(x)
            total[name] += x

    def rows(self, seq: Sequence) -> Sequence:
        """The sequence without the tokens that take no part."""
        return seq if self.until is None else seq.up_to(self.until)


def tile_of_row(seq: Sequence, op: Attend) -> Any:
    """The tile of this rank's queries and the keys of the whole row."""
    return op.tile(seq.local, seq.documents)
