"""State passing: recurrent ops across ranks by one gather of segment summaries in each direction.

A rank's spans are the segments. Each is summarised by (transition, state); all summaries are gathered at once (LASP-2,
Sun et al., 2025, arXiv 2502.07563) and every rank combines those before its segments, see `stretches`. So the bytes
sent do not depend on the length of the sequence, and no rank waits for its neighbour's work. Backward is the mirror
image with the gradients of the states.

No computation of the op itself runs while its gather is under way, since none is left that is not needed before or
after it: an op has run from the zero state when its final state exists, and correcting the outputs takes the state that
enters. States alone could be computed first and gathered during the outputs, but computing them twice is a quarter of
a forward's products more, whatever the network. In backward the same holds for the states' gradients.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...kernels.operation import Tensors
from ...kernels.problem import Problem
from ...kernels.recurrence import Recurrence, Summary
from ..collectives import Gathering, of_last
from ..operation import Operation, is_sequence
from ..sequence import Sequence
from .stretches import Stretches, scan, stretches


@dataclass(frozen=True)
class StatePassing(Operation):
    """A recurrence over the whole row; on one rank, over the tokens held, without any collective.

    An `Operation`; its inputs are the recurrence's. It saves the states that enter this rank's segments, the
    transitions of the segments after its first, and what reads the former where the recurrence says so.
    rank: this rank among those that share the row, on which the shape of what is saved depends.
    """

    op: Recurrence[Any]
    rank: int = 0

    @property
    def kernel(self) -> str:
        return self.op.name

    def forward(self, inputs: Tensors, seq: Sequence) -> tuple[Tensors, Tensors]:
        self.op.check(inputs)
        op, problem = self.op, self._problem(inputs, seq)
        if seq.layout.ranks == 1:
            out, reads = op.run(problem, None)
            return (out,), (None, None, reads)
        out, _, initial, transitions, reads = self._over_ranks(problem, inputs, seq)
        return (out,), (initial, transitions, reads)

    @torch.no_grad()
    def prefill(self, inputs: Tensors, seq: Sequence) -> tuple[Tensor, Tensor]:
        """The output, and on every rank the state after the whole row."""
        self.op.check(inputs)
        problem = self._problem(inputs, seq)
        out, summary, initial, *_ = self._over_ranks(problem, inputs, seq)
        transitions, states, entering = (x.unflatten(0, (seq.layout.spans, -1))[-1:] for x in (*summary, initial))
        last = _expanded(problem, transitions, states)
        return out, of_last(self.op.advance(Summary(last.transition[0], last.state[0]), entering[0]), seq)

    def _over_ranks(
        self, problem: Problem[Any], inputs: Tensors, seq: Sequence
    ) -> tuple[Tensor, Summary, Tensor, Tensor, Tensor | None]:
        """The output, the summaries of this rank's segments, and what backward needs."""
        out, summary, reads = self.op.begin(problem)
        initial, transitions = _before(problem, summary, seq)
        empty_out, *_, empty_reads = self.op.empty_results(inputs)
        out = self.op.correct(problem, out, initial, reads).to(empty_out.dtype)
        if reads is not None and empty_reads is not None:
            reads = reads.to(empty_reads.dtype)
        return seq.unfold(out), summary, initial, transitions, reads

    def backward(
        self, gradients: Tensors, inputs: Tensors, outputs: tuple[Tensor, ...], saved: Tensors, seq: Sequence
    ) -> Tensors:
        (dout,), (initial, transitions, reads) = gradients, saved
        assert dout is not None
        problem, dout = self._problem(inputs, seq, outputs[0]), seq.fold(dout)
        dfinal = None
        if transitions is not None:
            local = self.op.summarize_backward(problem, dout, initial, reads)
            dfinal = _after(problem, local, transitions, seq)
        kept = (reads,) if self.op.keeps_reads else ()
        dinputs, _ = self.op.backward(problem, dout, dfinal, initial, *kept)
        return tuple(
            d if d is None or x is None or not is_sequence(x) else seq.unfold(d)
            for d, x in zip(dinputs, inputs, strict=True)
        )

    def like(self, inputs: Tensors, ranks: int, spans: int) -> tuple[tuple[Tensor, ...], Tensors]:
        if any(x is not None and x.device.type == "meta" for x in inputs):  # a rehearsal: no `forward` will check
            self.op.check(inputs)
        out, state, transition, reads = self.op.empty_results(inputs)
        if ranks == 1:
            return (out,), (None, None, reads if self.op.keeps_reads else None)
        batch, rest = state.shape[0], transition.shape[1:]
        initial = state.new_empty(spans * batch, *state.shape[1:])
        if reads is not None:
            reads = reads.new_empty(spans * batch, reads.shape[1] // spans, *reads.shape[2:])
        after = ranks * spans - 1 - self.rank  # a rank's first span has its number
        return (out,), (initial, transition.new_empty(after, batch, *rest), reads)

    def _problem(self, inputs: Tensors, seq: Sequence, out: Tensor | None = None) -> Problem[Any]:
        """The call on this rank's spans, folded into the batch; exact where outputs are to be corrected."""
        folded = tuple(x if x is None or not is_sequence(x) else seq.fold(x) for x in inputs)
        problem = self.op.problem(folded, seq.spans, backend=seq.backend, exact=seq.layout.ranks > 1)
        return problem if out is None else replace(problem, out=partial(seq.fold, out))


def _before(problem: Problem[Any], mine: Summary, seq: Sequence) -> tuple[Tensor, Tensor]:
    """The states that enter this rank's segments, and the transitions of the segments after its first.

    Summaries travel as one message per rank. The transitions are in the order in which `_after` takes them.
    """
    op, spans, split = problem.op, seq.layout.spans, mine.transition[0].numel()
    packed = torch.cat([part.unflatten(0, (spans, -1)).flatten(2) for part in mine], dim=-1)
    gathered = Gathering(packed, seq).wait().flatten(0, 1).split([split, packed.shape[2] - split], dim=-1)

    def of(segments: Tensor, part: int) -> Tensor:
        return gathered[part].index_select(0, segments).unflatten(2, mine[part].shape[1:])

    upto, *orders = seq.on(packed.device, _indices, False)
    after, *_ = seq.on(packed.device, _indices, True)
    summaries = _expanded(problem, of(upto, 0), of(upto, 1))
    zero = op.zero_state(mine.state[: packed.shape[1]])
    states = scan(summaries, _plan(seq, mirrored=False), orders, op.combine, op.advance, zero)
    return torch.cat(states), of(after, 0)


def _after(problem: Problem[Any], local: Tensor, transitions: Tensor, seq: Sequence) -> Tensor:
    """Gradient of the final state of each of this rank's segments, from what all segments after it ask for."""
    op, mine = problem.op, local.unflatten(0, (seq.layout.spans, -1))
    gathered = Gathering(mine, seq).wait().flatten(0, 1)
    after, *orders = seq.on(local.device, _indices, True)
    summaries = _expanded(problem, transitions, gathered.index_select(0, after))

    def retreat(summary: Summary, dstate: Tensor) -> Tensor:
        return op.retreat(summary, dstate, summary.state)

    zero = torch.zeros_like(mine[0])
    states = scan(summaries, _plan(seq, mirrored=True), orders, op.combine_backward, retreat, zero)
    return torch.cat(states[::-1])


def _expanded(problem: Problem[Any], transitions: Tensor, states: Tensor) -> Summary:
    """Gathered summaries `[segments, B, …]` in the form that the op takes."""
    if not len(states):
        return Summary(transitions, states)
    summary = problem.op.expand(Summary(transitions.flatten(0, 1), states.flatten(0, 1)), problem.inputs)
    return Summary(*(part.unflatten(0, (len(states), -1)) for part in summary))


def _plan(seq: Sequence, *, mirrored: bool) -> Stretches:
    return stretches(seq.layout, seq.rank, mirrored=mirrored)


def _indices(seq: Sequence, mirrored: bool) -> tuple[Tensor, ...]:
    """On the host: which of the gathered segments this rank needs, and the order of each level."""
    plan = _plan(seq, mirrored=mirrored)
    return tuple(torch.tensor(numbers, dtype=torch.int64) for numbers in (plan.needed, *plan.orders))
