"""The delta rule against its recurrence and other people's code: op, gradients, parts, segments of a row."""

from functools import partial

import pytest
import recurrence_checks as check
import torch
from covering import pairwise, slow_but
from definitions import definitions_of
from largest_tensor import LargestTensor
from recurrence_parts import CUTS, OFTEN, PACKINGS, ROWS, Parts, assert_near, nan_in_fresh_memory, run_op
from torch.nn import functional as F

from longreach.kernels.delta_rule import DeltaRecurrence, delta_rule, flops
from longreach.kernels.documents import Documents
from longreach.kernels.recurrence import Summary

RULES = ("beta", "erase")
DECAYS = ("none", "token", "channel")
STRENGTHS = {"none": ("none", 0.0)} | {
    f"{decay}, {strength}": (decay, strength) for decay in DECAYS[1:] for strength in (0.1, 20.0)
}


def draw(documents, rule="beta", decay="none", strength=0.1, heads=4, groups=4, keys=6, values=10):
    """(q, k, v, beta, log_decay, a, b), initial state, and gradients of the output and of the final state, in float64.

    Erased directions have length 1, as all users of the rule make them; decays are of all sizes.
    """
    torch.manual_seed(0)
    batch, length = documents.batch, documents.length

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    q, k, v = (
        normal(batch, length, groups, keys),
        normal(batch, length, groups, keys),
        normal(batch, length, heads, values),
    )
    beta = a = b = log_decay = None
    if rule == "beta":
        k, beta = F.normalize(k, dim=-1), torch.rand(batch, length, heads, dtype=torch.float64)
    else:
        direction = F.normalize(normal(batch, length, heads, keys), dim=-1)
        a, b = -direction, direction * torch.rand_like(direction)
    if decay != "none":
        shape = (batch, length, heads, *([keys] if decay == "channel" else []))
        log_decay = -strength * torch.rand(shape, dtype=torch.float64) ** 4
    state, dout, dstate = (normal(*s) for s in ((batch, heads, keys, values), v.shape, (batch, heads, keys, values)))
    return (q, k, v, beta, log_decay, a, b), state, dout, dstate


def call(inputs, **settings):
    *tensors, a, b = inputs
    return delta_rule(*tensors, erase=None if a is None else (a, b), **settings)


def apply(*inputs, **settings):
    return call(inputs, **settings)


run = partial(run_op, apply)


@pytest.mark.parametrize(("rule", "decay", "documents"), pairwise(RULES, STRENGTHS, PACKINGS, often=OFTEN))
def test_outputs_states_and_gradients_are_those_of_the_recurrence(rule, decay, documents):
    inputs, state, *given = draw(documents, rule, *decay)
    expected = run(inputs, state, documents, *given, backend="reference")
    with nan_in_fresh_memory():
        assert_near(run(inputs, state, documents, *given), expected, 1e-9)
        assert_near(run(inputs, state, documents, *given, dtype=torch.float32), expected, 1e-4)


@pytest.mark.parametrize(("rule", "decay"), [("beta", "token"), ("erase", "channel")])
@pytest.mark.slow
def test_a_thousand_tokens(rule, decay):
    documents = Documents.whole(1, 1000)
    inputs, state, *given = draw(documents, rule, decay, heads=2, groups=1)
    expected = run(inputs, state, documents, *given, backend="reference")
    assert_near(run(inputs, state, documents, *given), expected, 1e-9)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.slow
def test_the_recurrence_passes_gradcheck(rule, decay):
    documents = Documents.from_lengths([[3, 2], [4]], 5).slice(1, 5)
    inputs, state, *_ = draw(documents, rule, decay, strength=0.5, heads=2, groups=1, keys=2, values=3)
    inputs = [x.clamp(max=-1e-3) if x is inputs[4] and x is not None else x for x in inputs]
    leaves = [x.requires_grad_() for x in (*inputs, state) if x is not None]

    def op(*given):
        given = iter(given)
        filled = [None if x is None else next(given) for x in inputs]
        return call(filled, initial_state=next(given), documents=documents, backend="reference")

    assert torch.autograd.gradcheck(op, leaves)


def test_beta_may_be_left_out():
    documents = PACKINGS["packed"]
    (q, k, v, _, *rest), state, *given = draw(documents, decay="channel")
    ones = torch.ones(v.shape[:3], dtype=v.dtype)
    with_ones = run((q, k, v, ones, *rest), state, documents, *given)
    assert_near(run((q, k, v, None, *rest), state, documents, *given), [*with_ones[:5], *with_ones[6:]], 1e-12)


@pytest.mark.parametrize("decay", DECAYS)
def test_a_beta_is_a_case_of_erasing(decay):
    documents = PACKINGS["packed"]
    inputs, state, dout, dstate = draw(documents, decay=decay)
    q, k, v, beta, log_decay, *_ = inputs
    decayed = k if log_decay is None else k * log_decay.exp().view(*k.shape[:3], -1)
    general = (q, k, v * beta[..., None], None, log_decay, -beta[..., None] * decayed, k)
    expected = run(inputs, state, documents, dout, dstate)
    found = run(general, state, documents, dout, dstate)
    assert_near(found[:3], expected[:3], 1e-9)  # out, final state, dq
    assert_near(found[-1:], expected[-1:], 1e-9)  # initial state


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("rule", "decay"), [("beta", "token"), ("beta", "channel"), ("erase", "channel")])
def test_grouped_heads(rule, decay, groups):
    documents = PACKINGS["packed"]
    inputs, state, *given = draw(documents, rule, decay, groups=groups)
    expected = run(inputs, state, documents, *given, backend="reference")
    assert_near(run(inputs, state, documents, *given), expected, 1e-9)


MANY_LANES = {"heads in blocks": (1, 48, 48), "one group": (1, 40, 1), "rows in blocks": (5, 16, 8)}


@pytest.mark.parametrize("sizes", MANY_LANES.values(), ids=MANY_LANES)
@pytest.mark.parametrize(("rule", "decay"), [("beta", "token"), ("erase", "channel")])
def test_more_lanes_than_a_slab_holds(rule, decay, sizes):
    rows, heads, groups = sizes
    documents = Documents.from_lengths([[40 + row, 30 - row] for row in range(rows)], 75)
    inputs, state, *given = draw(documents, rule, decay, heads=heads, groups=groups, keys=3, values=2)
    expected = run(inputs, state, documents, *given, backend="reference")
    assert_near(run(inputs, state, documents, *given), expected, 1e-9)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("rule", RULES)
def test_bfloat16_is_computed_in_float32(rule, decay):
    inputs, state, *given = draw(PACKINGS["packed"], rule, decay)
    check.bfloat16(apply, inputs, state, PACKINGS["packed"], *given)


@pytest.mark.parametrize("decay", ["token", "channel"])
@pytest.mark.parametrize("rule", RULES)
def test_strong_decay_neither_overflows_nor_forgets_the_present(rule, decay):
    documents = Documents.whole(1, 200)
    inputs, state, *given = draw(documents, rule, decay)
    inputs = (*inputs[:4], torch.full_like(inputs[4], -20.0), *inputs[5:])
    found = run(inputs, state, documents, *given, dtype=torch.float32)
    assert_near(found, run(inputs, state, documents, *given, backend="reference"), 1e-4)


@pytest.mark.parametrize("rule", RULES)
def test_zero_keys_write_nothing_and_repeated_keys_overwrite(rule):
    documents = Documents.whole(1, 100)
    (q, k, v, beta, log_decay, a, b), _, *given = draw(documents, rule, "channel")
    k = torch.zeros_like(k)
    if rule == "erase":
        a, b = torch.zeros_like(a), torch.zeros_like(b)
    found = run((q, k, v, beta, log_decay, a, b), None, documents, *given, dtype=torch.float32)
    assert all(bool(x.isfinite().all()) for x in found)
    assert not found[0].any()
    if rule == "beta":
        same = F.normalize(torch.ones_like(k), dim=-1)
        inputs = (same, same, v, torch.ones_like(beta), None, None, None)
        out, _ = call([x if x is None else x.float() for x in inputs], scale=1.0)
        assert_near([out], [v], 1e-4)  # the state holds the last value under the one key


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("rule", RULES)
def test_no_document_moves_another(rule, decay):
    drawn, same = partial(draw, rule=rule, decay=decay, strength=1e-3), (0, 2, 3, 4)  # out, dq, dk, dv
    check.no_document_moves_another(apply, drawn, [0, 2], same)


@pytest.mark.parametrize("rule", RULES)
def test_a_state_enters_only_where_a_document_goes_on(rule):
    check.where_a_state_enters(apply, partial(draw, rule=rule, decay="token"))


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("rule", RULES)
def test_token_by_token_is_the_whole(rule, decay):
    inputs, *_ = draw(Documents.whole(2, 37), rule, decay)
    check.token_by_token(apply, inputs)


recurrence = Parts(DeltaRecurrence())


@pytest.mark.parametrize("cuts", slow_but(["5"], CUTS))
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("rule", RULES)
def test_segments_put_together_are_the_whole_row(rule, decay, cuts):
    inputs, _, *given = draw(ROWS, rule, decay)
    check.segments(recurrence, inputs, *given, run(inputs, None, ROWS, *given), ROWS, cuts)


@pytest.mark.parametrize("rule", RULES)
def test_a_run_from_nothing_is_that_of_the_recurrence(rule):
    documents = PACKINGS["cut from rows"]
    inputs, state, dout, _ = draw(documents, rule, "channel")
    out, summary, reads = recurrence.begin(inputs, documents, backend="reference")
    found = recurrence.begin(inputs, documents)
    assert_near([found.out, *found.summary, found.reads], [out, *summary, reads], 1e-9)
    nothing = torch.zeros_like(state)
    _, expected = recurrence.backward(dout, None, inputs, nothing, documents, backend="reference")
    assert_near([recurrence.summarize_backward(dout, inputs, state, documents, found.reads)], [expected], 1e-9)


def test_what_has_faded_is_nothing():
    """Decays of e^-1 a token: in float32 nothing of the state before is left after some hundred tokens."""
    documents = Documents.whole(1, 400, position=1)
    inputs, state, *_ = draw(documents, decay="token", heads=1, groups=1)
    inputs = tuple(x if x is None else x.float() for x in inputs)
    inputs = (*inputs[:4], torch.full_like(inputs[4], -1.0), *inputs[5:])
    out, summary, reads = recurrence.begin(inputs, documents)
    assert not summary.transition.any()
    assert reads[:, :32].any()
    assert not reads[:, 352:].any()
    state = state.float()
    expected, final = recurrence.forward(inputs, state, documents)
    assert_near([recurrence.correct(out, inputs, state, documents, reads), summary.state], [expected, final], 1e-5)


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_backward_given_a_state_and_the_gradient_of_the_last(backend):
    documents = PACKINGS["cut from rows"]
    inputs, state, dout, dstate = draw(documents, decay="channel")
    expected = run(inputs, state, documents, dout, dstate, backend="reference")
    gradients, dinitial = recurrence.backward(dout, dstate, inputs, state, documents, backend=backend)
    assert_near([*(x for x in gradients if x is not None), dinitial], expected[2:], 1e-9)


def test_transitions_are_zero_unless_one_document_goes_through():
    inputs, *_ = draw(ROWS, decay="channel")
    assert not recurrence.begin(inputs, ROWS).summary.transition.any()  # every row starts a document
    held = ROWS.slice(160, 300)
    cut = tuple(x if x is None else x[:, 160:300] for x in inputs)
    transition = recurrence.begin(cut, held).summary.transition
    assert [bool(row.any()) for row in transition] == [True, True, False, True]


def test_combining_is_associative():
    torch.manual_seed(0)
    a, b, c = (
        Summary(torch.rand(2, 3, 4, 4, dtype=torch.float64), torch.randn(2, 3, 4, 5, dtype=torch.float64))
        for _ in range(3)
    )
    left = recurrence.combine(recurrence.combine(c, b), a)
    right = recurrence.combine(c, recurrence.combine(b, a))
    assert_near(left, right, 1e-12)


def test_gradients_come_through_the_final_state_alone():
    documents = PACKINGS["packed"]
    inputs, _, dout, dstate = draw(documents, decay="token")
    found = run(inputs, None, documents, torch.zeros_like(dout), dstate)
    leaves = [x if x is None else x.clone().requires_grad_() for x in inputs]
    _, final = call(leaves, documents=documents)
    gradients = torch.autograd.grad(final, leaves[1:5], dstate)
    assert_near(gradients, found[3:], 1e-12)


@pytest.mark.parametrize("rule", RULES)
def test_no_tensor_is_larger_than_an_input(rule):
    documents = Documents.from_lengths([[3000, 1096]])
    inputs, *_ = draw(documents, rule, "token", heads=8, groups=2, keys=16, values=16)
    leaves = [x if x is None else x.float().requires_grad_() for x in inputs]
    with LargestTensor() as largest:
        out, _ = call(leaves, documents=documents)
        out.sum().backward()
    assert largest.numel <= leaves[2].numel()


@pytest.mark.parametrize("decay", ["token", "channel"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.slow
def test_flash_linear_attention_agrees(rule, decay):
    pytest.importorskip("fla", reason="flash-linear-attention is not installed; it is an oracle here and nothing else")
    inputs, state, *_ = draw(Documents.whole(2, 150, position=1), rule, decay)
    inputs = [x if x is None else x.float() for x in inputs]
    q, k, v, beta, g, a, b = inputs
    state = state.float()
    if rule == "erase":
        from fla.ops.generalized_delta_rule.dplr.naive import dplr_recurrence

        g = g if decay == "channel" else g[..., None].expand_as(k)
        # Theirs puts heads before time.
        expected, final = dplr_recurrence(*(x.transpose(1, 2) for x in (q, k, v, a, b, g)), initial_state=state)
        expected = expected.transpose(1, 2)
    elif decay == "token":
        from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule

        expected, final = naive_recurrent_gated_delta_rule(
            q, k, v, beta, g, initial_state=state, output_final_state=True
        )
    else:
        from fla.ops.kda.naive import naive_recurrent_kda

        expected, final = naive_recurrent_kda(q, k, v, g, beta, initial_state=state, output_final_state=True)
    assert_near(call(inputs, initial_state=state), [expected, final], 1e-4)


@pytest.mark.slow
def test_transformers_chunked_gated_delta_rule_agrees():
    modeling = definitions_of("qwen3_next")
    documents = Documents.whole(2, 150)
    inputs, _, dout, dstate = draw(documents, decay="token")
    leaves = [x.float().requires_grad_() for x in inputs[:5]]
    q, k, v, beta, g = leaves
    theirs = modeling.torch_chunk_gated_delta_rule(q, k, v, g=g, beta=beta, output_final_state=True)
    gradients = torch.autograd.grad(theirs, leaves, [dout.float(), dstate.float()])
    found = run(inputs, None, documents, dout, dstate, dtype=torch.float32)
    assert_near(found, [*theirs, *gradients], 1e-4)


WRONG = {
    "q must be": lambda q, k, v, beta, g: delta_rule(q[..., :3, :], k, v, beta, g),
    "k must be": lambda q, k, v, beta, g: delta_rule(q, k[:, :5], v, beta, g),
    "v must be": lambda q, k, v, beta, g: delta_rule(q, k, v[0], beta, g),
    "beta must be": lambda q, k, v, beta, g: delta_rule(q, k, v, beta[..., :2], g),
    "in place of beta": lambda q, k, v, beta, g: delta_rule(q, k, v, beta, g, erase=(k, k)),
    "b must be": lambda q, k, v, beta, g: delta_rule(q, k, v, None, g, erase=(k, k[..., :2])),
    "log_decay must be": lambda q, k, v, beta, g: delta_rule(q, k, v, beta, g[:, :3]),
    "log_decay must not be positive": lambda q, k, v, beta, g: delta_rule(q, k, v, beta, -g),
    "initial_state must": lambda q, k, v, beta, g: delta_rule(q, k, v, beta, g, initial_state=v),
    "documents must describe": lambda q, k, v, beta, g: delta_rule(q, k, v, beta, g, documents=Documents.whole(2, 5)),
    "documents must start at position 0": lambda q, k, v, beta, g: delta_rule(
        q, k, v, beta, g, documents=Documents.concatenate([Documents.whole(2, 10), Documents.whole(2, 10, position=50)])
    ),
    "at least one token": lambda q, k, v, beta, g: delta_rule(q[:, :0], k[:, :0], v[:, :0]),
    "backend must": lambda q, k, v, beta, g: delta_rule(q, k, v, beta, g, backend="fast"),
}


@pytest.mark.parametrize("message", WRONG)
def test_bad_input_is_named(message):
    inputs, *_ = draw(Documents.whole(2, 20), decay="token")
    with pytest.raises(ValueError, match=message):
        WRONG[message](*inputs[:5])


def test_costs():
    sizes = {"heads": 2, "key_dim": 3, "value_dim": 5}
    assert flops(10, **sizes, chunk=8) == 10 * 2 * (6 * 15 + 8 * (12 + 15))
    assert flops(10, **sizes, chunk=8, general=True) == 10 * 2 * (8 * 15 + 8 * (12 + 15 + 4 * 8))
    k, v = torch.rand(2, 7, 3, 4), torch.rand(2, 7, 3, 5)
    op, inputs = DeltaRecurrence(), (k, k, v)
    assert op.state_bytes(inputs) == 2 * 3 * 4 * 5 * 4
    assert op.bytes_sent(inputs, ranks=1) == 0
    assert op.bytes_sent(inputs, ranks=3) == 2 * 2 * 3 * (4 * 9 + 20) * 4
