"""Checks that every op with a state passes. `recurrence_parts` says how an op is called.

`draw(documents)` gives inputs, an initial state, and gradients of the output and of the final state.
"""

import itertools

import torch
from recurrence_parts import assert_near, cut, run_op

from longreach.kernels.documents import Documents


def bfloat16(op, inputs, state, documents, dout, dstate):
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


def no_document_moves_another(op, draw, changed, same, lengths=(5, 70, 1, 130, 40)):
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


def where_a_state_enters(op, draw, variables=slice(None)):
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


def token_by_token(op, inputs):
    """Each token continues from the state of the one before it: together they are the whole row."""
    out, final = op(*inputs)
    state, steps = None, []
    for t in range(out.shape[1]):
        step, state = op(*cut(inputs, t, t + 1), initial_state=state)
        steps.append(step)
    assert_near([torch.cat(steps, 1), state], [out, final], 1e-9)


def segments(
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
        for x, pieces in zip(recurrence.record(*inputs), zip(*parts, strict=True), strict=True)
        if pieces[0] is not None
    ]
    assert_near(joined, whole[2:], 1e-9)
