"""State passing: recurrent ops across ranks by one gather of segment summaries in each direction.

A rank's spans are the segments. Each is summarised by (transition, state); all summaries are gathered at once (LASP-2,
Sun et al., 2025, arXiv 2502.07563) and every rank combines those before its segments. So the bytes sent do not depend
on the length of the sequence, and no rank waits for its neighbour's work. Backward is the mirror image with the
gradients of the states.

No computation of the op itself runs while its gather is under way, since none is left that is not needed before or
after it: an op has run from the zero state when its final state exists, and correcting the outputs takes the state that
enters. States alone could be computed first and gathered during the outputs, but computing them twice is a quarter of
a forward's products more, whatever the network. In backward the same holds for the states' gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...kernels.operation import Tensors
from ...kernels.problem import Problem
from ...kernels.recurrence import Recurrence, Summary
from ..collectives import Gathering, in_row_order
from ..operation import Operation, is_sequence
from ..sequence import Sequence


@dataclass(frozen=True)
class StatePassing(Operation):
    """A recurrence over the whole row; on one rank, over the tokens held, without any collective.

    An `Operation`; its inputs are the recurrence's. It saves the states that enter this rank's segments, the
    transitions of all, and what reads the former where the recurrence says so.
    """

    op: Recurrence[Any]

    def forward(self, inputs: Tensors, seq: Sequence) -> tuple[Tensors, Tensors]:
        self.op.check(inputs)
        op, problem = self.op, self._problem(inputs, seq)
        if seq.layout.ranks == 1:
            return (problem.implementation.forward(problem, None)[0],), (None, None, None)
        out, summary, reads = op.begin(problem)
        summaries, transitions = _gather(summary, seq)
        state = op.zero_state(summaries[0].state)
        before = []
        for earlier in summaries:
            before.append(state)
            state = op.advance(op.expand(earlier, problem.inputs), state)
        initial = torch.cat([before[span] for span in seq.layout.spans_of(seq.rank)])
        empty_out, *_, empty_reads = op.empty_results(inputs)
        out = op.correct(problem, out, initial, reads).to(empty_out.dtype)
        if reads is not None and empty_reads is not None:
            reads = reads.to(empty_reads.dtype)
        return (seq.unfold(out),), (initial, transitions, reads)

    def backward(
        self, gradients: Tensors, inputs: Tensors, outputs: tuple[Tensor, ...], saved: Tensors, seq: Sequence
    ) -> Tensors:
        (dout,), (initial, transitions, reads) = gradients, saved
        assert dout is not None
        problem, dout = self._problem(inputs, seq), seq.fold(dout)
        dfinal = None
        if transitions is not None:
            local = self.op.summarize_backward(problem, dout, initial, reads)
            dfinal = _suffix(problem, local, transitions, seq)
        dinputs, _ = self.op.backward(problem, dout, dfinal, initial)
        return tuple(
            d if d is None or x is None or not is_sequence(x) else seq.unfold(d)
            for d, x in zip(dinputs, inputs, strict=True)
        )

    def like(self, inputs: Tensors, ranks: int, spans: int) -> tuple[tuple[Tensor, ...], Tensors]:
        if any(x is not None and x.device.type == "meta" for x in inputs):  # a rehearsal: no `forward` will check
            self.op.check(inputs)
        out, state, transition, reads = self.op.empty_results(inputs)
        if ranks == 1:
            return (out,), (None, None, None)
        batch, rest = state.shape[0], transition.shape[1:]
        initial = state.new_empty(spans * batch, *state.shape[1:])
        if reads is not None:
            reads = reads.new_empty(spans * batch, reads.shape[1] // spans, *reads.shape[2:])
        return (out,), (initial, transition.new_empty(ranks * spans, batch, *rest), reads)

    def _problem(self, inputs: Tensors, seq: Sequence) -> Problem[Any]:
        """The call on this rank's spans, folded into the batch; exact where outputs are to be corrected."""
        folded = tuple(x if x is None or not is_sequence(x) else seq.fold(x) for x in inputs)
        return self.op.problem(folded, seq.spans, backend=seq.backend, exact=seq.layout.ranks > 1)


def _gather(mine: Summary, seq: Sequence) -> tuple[list[Summary], Tensor]:
    """Summaries of all segments in the order of the row, and their transitions as one tensor; one message per rank."""
    spans = seq.layout.spans
    packed = torch.cat([part.unflatten(0, (spans, -1)).flatten(2) for part in (mine.transition, mine.state)], dim=-1)
    split = mine.transition[0].numel()
    segments = in_row_order(Gathering(packed, seq).wait(), seq)
    summaries = [
        Summary(
            s[:, :split].unflatten(1, mine.transition.shape[1:]),
            s[:, split:].unflatten(1, mine.state.shape[1:]),
        )
        for s in segments
    ]
    return summaries, torch.stack([summary.transition for summary in summaries])


def _suffix(problem: Problem[Any], local: Tensor, transitions: Tensor, seq: Sequence) -> Tensor:
    """Gradient of the final state of each of this rank's segments, from what all segments after it ask for."""
    op, spans = problem.op, seq.layout.spans
    gathered = in_row_order(Gathering(local.unflatten(0, (spans, -1)).contiguous(), seq).wait(), seq)
    dstate = torch.zeros_like(gathered[0])
    after: dict[int, Tensor] = {}
    for span in reversed(range(len(gathered))):
        after[span] = dstate
        summary = op.expand(Summary(transitions[span], gathered[span]), problem.inputs)
        dstate = op.retreat(summary, dstate, gathered[span])
    return torch.cat([after[span] for span in seq.layout.spans_of(seq.rank)])
