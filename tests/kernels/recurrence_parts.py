"""What tests of ops with a state have in common: rows to run on, calls with gradients, checks of any such op.

An op takes its inputs one by one; `initial_state`, `documents` and `backend` are keywords. An input that begins with
`[B, T]` is one of tokens, any other is a constant. `draw(documents)` gives inputs, an initial state, and gradients of
the output and of the final state.
"""

import itertools

import torch

from longreach.kernels.documents import Documents
from longreach.kernels.recurrence import Summary

PACKINGS = {
    "1 token": Documents.whole(2, 1),
    "63 tokens": Documents.whole(2, 63),
    "130 tokens": Documents.whole(1, 130),
    "continued": Documents.whole(2, 70, position=9),
    "packed": Documents.from_lengths([[5, 1, 1, 64, 100, 29], [128, 64], [200]], 210),
    "one-token documents": Documents.from_lengths([[1] * 80, [64, 64]], 140),
    "cut from rows": Documents.from_lengths([[5, 1, 1, 64, 100, 29], [300], [30, 270]], 300).slice(40, 230),
    "all padding": Documents.from_lengths([[7], []], 7),
}
ROWS = Documents.from_lengths([[300], [100, 50, 150], [60, 1, 1, 120, 20], [150, 150]], 300)
CUTS = {"2": (150, 300), "3": (60, 181, 300), "5": (1, 100, 150, 182, 300), "on borders": (100, 150, 300)}


class Parts:
    """A recurrence whose parts take what makes a problem; what is not here is the recurrence's own."""

    def __init__(self, op):
        self.op = op

    def __getattr__(self, name):
        return getattr(self.op, name)

    def forward(self, inputs, state, documents, backend="auto"):
        problem = self.op.problem(inputs, documents, backend=backend)
        return problem.implementation.forward(problem, state)

    def begin(self, inputs, documents, backend="auto"):
        return self.op.begin(self.op.problem(inputs, documents, backend=backend, exact=True))

    def summarize(self, inputs, final_state, documents, backend="auto"):
        return Summary(self.op.transition(self.op.problem(inputs, documents, backend=backend)), final_state)

    def expand(self, summary, inputs):
        return self.op.expand(summary, self.op.record(*inputs))

    def correct(self, out, inputs, state, documents, reads=None, backend="auto"):
        return self.op.correct(self.op.problem(inputs, documents, backend=backend), out, state, reads)

    def backward(self, dout, dfinal, inputs, state, documents, backend="auto"):
        return self.op.backward(self.op.problem(inputs, documents, backend=backend), dout, dfinal, state)

    def summarize_backward(self, dout, inputs, state, documents, reads=None, backend="auto"):
        return self.op.summarize_backward(self.op.problem(inputs, documents, backend=backend), dout, state, reads)


class nan_in_fresh_memory:
    """What is allocated without values holds NaN, so that reading it before writing it shows."""

    def __enter__(self):
        torch.use_deterministic_algorithms(True, warn_only=True)

    def __exit__(self, *_):
        torch.use_deterministic_algorithms(False)


def assert_near(found, expected, tolerance):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=tolerance * max(1.0, b.abs().max().item()))


def run_op(op, inputs, state, documents, dout, dstate, dtype=torch.float64, **settings):
    """Output, final state and the gradients of all inputs and of the initial state."""
    leaves = [x if x is None else x.to(dtype).detach().clone().requires_grad_() for x in (*inputs, state)]
    out, final = op(*leaves[:-1], initial_state=leaves[-1], documents=documents, **settings)
    wanted = [x for x in leaves if x is not None]
    gradients = torch.autograd.grad([out, final], wanted, [dout.to(out.dtype), dstate.to(final.dtype)])
    return out.detach(), final.detach(), *gradients


def cut(inputs, start, stop):
    """The inputs of some tokens of each row; constants are those of all."""
    rows = inputs[0].shape[:2]
    return tuple(x if x is None or x.shape[:2] != rows else x[:, start:stop] for x in inputs)


def check_bfloat16(op, inputs, state, documents, dout, dstate):
    """Inputs in bfloat16 are computed with in float32."""
    dout = dout.bfloat16()
    rounded = [x if x is None else x.bfloat16().double() for x in inputs]
    expected = run_op(op, rounded, state, documents, dout.double(), dstate, backend="reference")
    leaves = [x if x is None else x.bfloat16().requires_grad_() for x in inputs]
    out, final = op(*leaves, initial_state=None if state is None else state.float(), documents=documents)
    assert (out.dtype, final.dtype) == (torch.bfloat16, torch.float32)
    wanted = [x for x in leaves if x is not None]
    gradients = torch.autograd.grad([out, final], wanted, [dout, dstate.float()])
    assert {x.dtype for x in gradients} == {torch.bfloat16}
    for found, right in zip((out, final, *gradients), expected[: 2 + len(wanted)], strict=True):
        assert (found.double() - right).norm() <= 1e-2 * right.norm()


def check_no_document_moves_another(op, draw, changed, same, lengths=(5, 70, 1, 130, 40)):
    """Inputs `changed` in the fourth document of a row: outside it, results `same` of `run_op` stay what they were."""
    length = sum(lengths) + 10
    documents = Documents.from_lengths([lengths], length)
    inputs, _, *given = draw(documents)
    moved = documents.runs[0][3]
    others = [x if x is None else x.clone() for x in inputs]
    for number in changed:
        others[number][:, moved.start : moved.stop] += 100.0
    before, after = (run_op(op, each, None, documents, *given, dtype=torch.float32) for each in (inputs, others))
    outside = torch.ones(length, dtype=torch.bool)
    outside[moved.start : moved.stop] = False
    for number in same:
        assert torch.equal(before[number][:, outside], after[number][:, outside])


def check_where_a_state_enters(op, draw, variables=slice(None)):
    """Only where a document goes on; `variables` are those of a state's last dimension that have a gradient."""
    documents = Documents.stack([Documents.whole(1, 20), Documents.whole(1, 20, position=3)])
    inputs, state, *given = draw(documents)
    state[0] = torch.nan
    out, _, *_, dstate = run_op(op, inputs, state, documents, *given)
    assert bool(out.isfinite().all())
    assert not dstate[0].any()
    assert dstate[1, ..., variables].all()
    without = run_op(op, inputs, None, documents, *given)[0]
    assert torch.equal(out[0], without[0])
    assert not torch.allclose(out[1], without[1])


def check_token_by_token(op, inputs):
    out, final = op(*inputs)
    state, steps = None, []
    for t in range(out.shape[1]):
        step, state = op(*cut(inputs, t, t + 1), initial_state=state)
        steps.append(step)
    assert_near([torch.cat(steps, 1), state], [out, final], 1e-9)


def check_segments(
    recurrence, inputs, dout, dfinal, whole, documents, cuts, *, backend="auto", linear=True, true=lambda state: state
):
    """Runs on segments, which end at `cuts`, put together, against `whole`: output, final state, gradients of inputs.

    linear: outputs are linear in the state, so that its gradient does not depend on it.
    true: of a state, what does not depend on the form it is kept in.
    """
    bounds = list(itertools.pairwise((0, *cuts)))
    segments = [(cut(inputs, a, b), documents.slice(a, b)) for a, b in bounds]

    outs, summaries, reads, states = [], [], [], [recurrence.zero_state(dfinal)]
    for segment, held in segments:
        begun = recurrence.begin(segment, held, backend)
        from_zero, final = recurrence.forward(segment, None, held, backend)
        assert_near([begun.out, true(begun.summary.state)], [from_zero, true(final)], 1e-9)
        summaries.append(recurrence.expand(begun.summary, segment))
        reads.append(begun.reads)
        outs.append(recurrence.correct(begun.out, segment, states[-1], held, begun.reads, backend))
        alone, final = recurrence.forward(segment, states[-1], held, backend)
        states.append(recurrence.advance(summaries[-1], states[-1]))
        assert_near([outs[-1], true(states[-1])], [alone, true(final)], 1e-9)
    assert_near([torch.cat(outs, 1), true(states[-1])], [whole[0], true(whole[1])], 1e-9)

    total = summaries[0]
    for summary in summaries[1:]:
        total = recurrence.combine(summary, total)
    assert_near([true(recurrence.advance(total, recurrence.zero_state(dfinal)))], [true(whole[1])], 1e-9)

    dstate, parts = recurrence.with_units(dfinal, whole[1]), []
    for number in reversed(range(len(segments))):
        douts = dout[:, slice(*bounds[number])]
        segment, held = segments[number]
        gradients, dinitial = recurrence.backward(douts, dstate, segment, states[number], held, backend)
        local = recurrence.summarize_backward(douts, segment, states[number], held, reads[number], backend)
        if linear:
            unseen = recurrence.summarize_backward(douts, segment, None, held, reads[number], backend)
            assert_near([unseen], [local], 1e-12)
        dstate = recurrence.retreat(summaries[number], dstate, local)
        assert_near([dstate], [dinitial], 1e-9)
        parts.insert(0, gradients)
    joined = [
        torch.cat(pieces, 1) if x.shape[:2] == dout.shape[:2] else sum(pieces)
        for x, pieces in zip(inputs, zip(*parts, strict=True), strict=True)
        if x is not None
    ]
    assert_near(joined, whole[2:], 1e-9)
