"""Serial: recurrences that no summary can stand for run rank after rank, each from the state that the last one sends.

The spans of a row are run in order, backward in the opposite order. A state goes straight from the rank of a span to
that of the next, and not at all where that is the same rank, or where no document goes on from one span into the other:
a span that begins with documents of its own waits for nobody.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ...kernels.documents import Documents, continuing
from ...kernels.operation import Tensors
from ...kernels.problem import Problem, accumulator
from ...kernels.serial import Serial
from ..collectives import Work, exchange, finish, of_last
from ..operation import Operation, is_sequence
from ..sequence import Sequence

logger = logging.getLogger("longreach")


@dataclass(frozen=True)
class SerialPassing(Operation):
    """A serial recurrence over the whole row; on one rank, over the tokens held, without any message.

    An `Operation`; its inputs are the recurrence's. It saves the states that enter this rank's spans.
    """

    op: Serial[Any]

    @property
    def kernel(self) -> str:
        return self.op.name

    def forward(self, inputs: Tensors, seq: Sequence) -> tuple[Tensors, Tensors]:
        out, entering, _ = self._forward(inputs, seq)
        return (out,), (torch.cat(entering) if seq.layout.ranks > 1 else None,)

    @torch.no_grad()
    def prefill(self, inputs: Tensors, seq: Sequence) -> tuple[Tensor, Tensor]:
        """The output, and on every rank the state after the whole row."""
        out, _, final = self._forward(inputs, seq)
        return out, of_last(final, seq)

    def _forward(self, inputs: Tensors, seq: Sequence) -> tuple[Tensor, list[Tensor], Tensor]:
        """The output, the states that enter this rank's spans, and the state after the last of them."""
        self.op.check(inputs)
        _announce(self.op.name, seq.layout.ranks)
        pipeline, outputs, entering, final = _Pipeline(seq), [], [], torch.empty(0)
        for turn, problem in self._problems(inputs, seq):
            state = pipeline.receive(turn, problem.new_states(), -1)
            out, final = problem.implementation.forward(problem, state)
            pipeline.send(turn, final, +1)
            outputs.append(out)
            entering.append(state)
        pipeline.finish()
        return torch.cat(outputs, dim=1), entering, final

    def backward(
        self, gradients: Tensors, inputs: Tensors, outputs: tuple[Tensor, ...], saved: Tensors, seq: Sequence
    ) -> Tensors:
        (dout,), (entering,) = gradients, saved
        assert dout is not None
        spans, pipeline = seq.layout.spans if seq.layout.ranks > 1 else 1, _Pipeline(seq)
        douts, results = dout.chunk(spans, dim=1), []
        states = [None] if entering is None else entering.chunk(spans)
        for turn, problem in reversed([*self._problems(inputs, seq)]):
            dfinal = pipeline.receive(turn, problem.new_states(), +1)
            dinputs, dinitial = self.op.backward(problem, douts[turn].contiguous(), dfinal, states[turn])
            pipeline.send(turn, dinitial, -1)
            results.append(dinputs)
        pipeline.finish()
        return tuple(_joined(x, parts[::-1]) for x, parts in zip(inputs, zip(*results, strict=True), strict=True))

    def like(self, inputs: Tensors, ranks: int, spans: int) -> tuple[tuple[Tensor, ...], Tensors]:
        if any(x is not None and x.device.type == "meta" for x in inputs):  # a rehearsal: no `forward` will check
            self.op.check(inputs)
        out, state, *_ = self.op.empty_results(inputs)
        return (out,), (state.new_empty(spans * state.shape[0], *state.shape[1:]) if ranks > 1 else None,)

    def _problems(self, inputs: Tensors, seq: Sequence) -> Iterator[tuple[int, Problem[Any]]]:
        """The call on each of this rank's spans, in the order of the row.

        Constants are in the type of the accumulators, in which the spans' gradients of them are added up.
        """
        spans, documents = seq.layout.spans if seq.layout.ranks > 1 else 1, seq.spans
        batch = documents.batch // spans
        parts = [
            x.chunk(spans, dim=1) if x is not None and is_sequence(x) else [None if x is None else _wide(x)] * spans
            for x in inputs
        ]
        for turn, tensors in enumerate(zip(*parts, strict=True)):
            rows = documents if spans == 1 else documents.derive(Documents.rows, turn * batch, (turn + 1) * batch)
            yield turn, self.op.problem(tensors, rows, backend=seq.backend)


def _joined(x: Tensor | None, parts: tuple[Tensor, ...]) -> Tensor | None:
    """The gradient of an input from those of the spans in order: one after the other, or of a constant their sum."""
    if x is None:
        return None
    return torch.cat(parts, dim=1) if is_sequence(x) else torch.stack(parts).sum(0).to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    return x.to(accumulator(x))


@cache
def _announce(op: str, ranks: int) -> None:
    """Tells the log once what a user should know of a run's speed."""
    if ranks > 1:
        logger.info(
            "%s is serial: the %d ranks that share a row run it one after the other; "
            "where ranks exchange tokens for heads (ulysses), they run it at the same time",
            op,
            ranks,
        )


class _Pipeline:
    """The states that travel between the spans of a row, in one direction: from `turn` to its neighbours ±1."""

    def __init__(self, seq: Sequence) -> None:
        self.seq, self.works = seq, list[Work]()
        self.spans = seq.layout.spans_of(seq.rank) if seq.layout.ranks > 1 else (0,)
        self.owners, self.crossed = seq.derive(_owners), seq.derive(_crossed)
        self.here: Tensor | None = None  # for the next span, where that is this rank's too

    def receive(self, turn: int, state: Tensor, direction: int) -> Tensor:
        """What the span on that side gives to this rank's, in place of zeros."""
        kept, self.here = self.here, None
        peer = self._peer(turn, direction)
        if peer == self.seq.rank and kept is not None:
            return kept
        if peer is not None and peer != self.seq.rank:
            finish(exchange([], [(state, peer)], self.seq))
        return state

    def send(self, turn: int, state: Tensor, direction: int) -> None:
        """What this rank's span gives to the span on that side."""
        peer = self._peer(turn, direction)
        if peer == self.seq.rank:
            self.here = state
        elif peer is not None:
            self.works += exchange([(state.contiguous(), peer)], [], self.seq)

    def finish(self) -> None:
        finish(self.works)

    def _peer(self, turn: int, direction: int) -> int | None:
        """The rank of the span on that side; None where no document goes on from one into the other."""
        span = self.spans[turn]
        border = max(span, span + direction)
        return self.owners[span + direction] if border in self.crossed else None


def _owners(seq: Sequence) -> list[int]:
    """The rank of each span."""
    ranks = {span: rank for rank in range(seq.layout.ranks) for span in seq.layout.spans_of(rank)}
    return [ranks[span] for span in range(len(ranks))]


def _crossed(seq: Sequence) -> frozenset[int]:
    """The spans, but for the first, that some row enters with a document begun before: the same on every rank."""
    if seq.layout.ranks == 1:
        return frozenset()
    documents = seq.documents.derive(Documents.spans, seq.layout.span_length)
    rows = continuing(documents).unflatten(0, (-1, seq.documents.batch)).any(1).tolist()
    return frozenset(span for span, any_row in enumerate(rows) if span and any_row)
