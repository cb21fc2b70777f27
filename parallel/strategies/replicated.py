"""Replicated keys: every rank already has them all, such as the summaries of all windows, and sends none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor

from ...kernels.attend import Attend, Gradient
from ..sequence import Sequence
from .attention import SharedAttention, tile_of_row


class ReplicatedAttention(SharedAttention):
    """Attention of a rank's queries over keys of the whole row; the log-sum-exp is its second output."""

    returns_lse: ClassVar[bool] = True
    outputs: ClassVar[int] = 2
    sends: ClassVar[bool] = False

    def over_keys(self, inputs: Any, where: Sequence) -> tuple[Tensor, Tensor]:
        return self.op.attend(inputs, self.op.sent(inputs), self._tile(where), where.backend)

    def over_keys_backward(
        self, gradient: Gradient, inputs: Any, where: Sequence
    ) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        tile, sent = self._tile(where), self.op.sent(inputs)
        return self.op.attend_backward(gradient, inputs, sent, tile, where.backend)

    def _tile(self, seq: Sequence) -> Any:
        return seq.derive(tile_of_row, self.op)


def replicated(build: Callable[..., Attend], *settings: Any) -> ReplicatedAttention:
    """The op `build(*settings)` over keys that every rank has; plain values, as `mix` wants them."""
    return ReplicatedAttention(build(*settings))
