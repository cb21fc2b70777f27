"""Serial: ops whose next state is no affine function of the state before it, so that segments cannot be combined."""

from __future__ import annotations

from typing import NoReturn

from torch import Tensor

from .operation import Tensors
from .problem import Problem, Record
from .recurrence import Beginning, Recurrence, Summary


class Serial(Recurrence[Record]):
    """A recurrence that can only be run from the state that enters, such as one through its own output.

    No summary says what a stretch of tokens does to any state. So ranks that share a row run one after the other, each
    from the final state of the one before it, and backward in the opposite order: more ranks hold longer rows, and do
    not make them faster. Everything else is as for any recurrence; a subclass states the same, and has no `begin`.
    """

    def begin(self, problem: Problem[Record]) -> Beginning:
        self._refuse()

    def combine(self, later: Summary, earlier: Summary) -> Summary:
        self._refuse()

    def advance(self, summary: Summary, state: Tensor) -> Tensor:
        self._refuse()

    def retreat(self, summary: Summary, dstate: Tensor, local: Tensor) -> Tensor:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise TypeError(f"{self.name} is serial: what its tokens do to a state depends on the state")

    def bytes_sent(self, tensors: Tensors, ranks: int, spans: int = 1) -> int:
        """Bytes that a rank between two others sends: forward the state after each of its spans, backward the gradient
        of the one before it. The first and the last span of a turn that comes back have a neighbour on the same rank.
        """
        return (2 * spans if ranks > 1 else 0) * self._bytes(tensors, self.state)
