"""WKV against its recurrence and transformers' loop: op, gradients, parts, segments of a row."""

from functools import partial

import pytest
import recurrence_checks as check
import torch
from covering import pairwise
from definitions import definitions_of
from largest_tensor import LargestTensor
from recurrence_parts import CUTS, OFTEN, ROWS, Parts, assert_near, nan_in_fresh_memory, run_op

from longreach.kernels.documents import Documents
from longreach.kernels.gated_linear import gated_linear_attention
from longreach.kernels.gated_linear.stable import LOWEST
from longreach.kernels.recurrence import Summary
from longreach.kernels.wkv import WKVRecurrence, chunked, flops, wkv

DECAYS = ("constant", "token", "none")
STRENGTHS = {"none": ("none", 0.0)} | {
    f"{decay}, {name}": (decay, strength)
    for decay in DECAYS[:2]
    for name, strength in {"mild": 0.1, "-20 a step": 20.0}.items()
}
PACKINGS = {
    "1 token": Documents.whole(2, 1),
    "63 tokens": Documents.whole(2, 63),
    "continued": Documents.whole(2, 70, position=9),
    "packed": Documents.from_lengths([[5, 1, 1, 64, 50], [70, 40], [90]], 121),
    "one-token documents": Documents.from_lengths([[1] * 30, [16, 14]], 40),
    "cut from rows": Documents.from_lengths([[5, 1, 1, 64, 100, 29], [300], [30, 270]], 300).slice(40, 150),
    "all padding": Documents.from_lengths([[7], []], 7),
}
# Tokens of a lane and numbers of a slab: many lanes, those of a remainder, one lane.
CUTS_OF_SLABS = {"lanes": (4, 1 << 18), "few lanes in a slab": (3, 300), "one lane": (16, 1)}


@pytest.fixture(params=CUTS_OF_SLABS.values(), ids=CUTS_OF_SLABS)
def slabs(request, monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK", request.param[0])
    monkeypatch.setattr(chunked, "SLAB", {"cpu": request.param[1]})


def draw(documents, decay="constant", strength=0.1, channels=5):
    """Inputs, an initial state, and gradients of the output and of the final state, in float64."""
    torch.manual_seed(0)
    shape = documents.batch, documents.length, channels
    k, v, dout = torch.randn(3, *shape, dtype=torch.float64)
    log_decay = -strength * torch.rand(channels if decay == "constant" else shape, dtype=torch.float64) ** 4
    state, dstate = torch.randn(2, shape[0], channels, 3, dtype=torch.float64)
    state[..., 1] = state[..., 1].abs() + 0.5
    bonus = None if decay == "none" else torch.randn(channels, dtype=torch.float64)
    return (4 * k, v, None if decay == "none" else log_decay, bonus), state, dout, dstate


run = partial(run_op, wkv)


@pytest.mark.parametrize(
    ("slabs", "decay", "documents"), pairwise(CUTS_OF_SLABS, STRENGTHS, PACKINGS, often=OFTEN), indirect=["slabs"]
)
def test_outputs_states_and_gradients_are_those_of_the_recurrence(slabs, decay, documents):
    inputs, state, *given = draw(documents, *decay)
    expected = run(inputs, state, documents, *given, backend="reference")
    assert all(bool(x.isfinite().all()) for x in expected)
    with nan_in_fresh_memory():
        assert_near(run(inputs, state, documents, *given), expected, 1e-9)
        assert_near(run(inputs, state, documents, *given, dtype=torch.float32), expected, 1e-4)


def test_is_gated_linear_attention_on_heads_of_one_channel():
    documents = PACKINGS["packed"]
    (k, v, log_decay, bonus), *_ = draw(documents)
    ones = torch.ones_like(v)[..., None]
    expected, _ = gated_linear_attention(
        ones, ones, v[..., None], log_decay, log_input=k, read="exclusive", bonus=bonus.exp()[:, None],
        normaliser="sum", scale=1.0, documents=documents,
    )  # fmt: skip
    assert_near([wkv(k, v, log_decay, bonus, documents=documents)[0]], [expected[..., 0]], 1e-9)


def test_transformers_agree():
    modeling = definitions_of("rwkv")
    (k, v, log_decay, bonus), *_ = draw(Documents.whole(2, 90), strength=3.0)
    expected, state = modeling.rwkv_linear_attention_cpu((-log_decay).log(), bonus, k, v, return_state=True)
    out, final = wkv(k, v, log_decay, bonus)
    assert_near([out], [expected], 1e-6)  # they compute in float32
    assert_near(final.unbind(-1), state, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("decay", DECAYS)
def test_the_recurrence_passes_gradcheck(decay):
    """But for final states, which are relative to a scale: with the scale for a constant, theirs is not the whole."""
    documents = Documents.from_lengths([[3, 2], [4]], 5).slice(1, 5)
    inputs, state, *_ = draw(documents, decay, channels=2)
    leaves = [x.requires_grad_() for x in (*inputs[:2], state[..., :2].clone())]
    given = [None if x is None else x.clamp(max=-1e-3).requires_grad_() for x in inputs[2:3]] + [inputs[3]]

    def call(k, v, sums):
        entering = torch.cat([sums, state[..., 2:]], dim=-1)
        return wkv(k, v, *given, initial_state=entering, documents=documents, backend="reference")[0]

    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("decay", DECAYS)
def test_bfloat16_is_computed_in_float32(decay):
    inputs, _, *given = draw(PACKINGS["packed"], decay)
    check.bfloat16(wkv, inputs, None, PACKINGS["packed"], *given)


def test_keys_of_any_size_neither_overflow_nor_vanish(slabs):
    """Large keys outweigh all others, and nothing is divided by zero where all of them are small."""
    documents = Documents.whole(1, 100)
    (k, v, log_decay, bonus), _, *given = draw(documents)
    for size in (1e4, -1e4):
        k[:, 50] = size
        k[:, :20] = -1e4
        found = run((k, v, log_decay, bonus), None, documents, *given, dtype=torch.float32)
        assert all(bool(x.isfinite().all()) for x in found)
    expected = run((k, v, log_decay, bonus), None, documents, *given, backend="reference")
    assert_near(found, expected, 1e-3)


def test_no_document_moves_another(slabs):
    same = 0, 2, 3  # out, dk, dv
    check.no_document_moves_another(wkv, partial(draw, strength=1e-3), [0, 1], same)


def test_a_state_enters_only_where_a_document_goes_on():
    check.where_a_state_enters(wkv, draw, variables=slice(2))


@pytest.mark.parametrize("decay", DECAYS)
def test_token_by_token_is_the_whole(decay):
    inputs, *_ = draw(Documents.whole(2, 37), decay)
    check.token_by_token(wkv, inputs)


recurrence = Parts(WKVRecurrence())


def true(state):
    """The sums themselves."""
    return state[..., :2] * state[..., 2:].exp()


@pytest.mark.parametrize(
    ("cuts", "backend"),
    [
        pytest.param(*case, id=", ".join(case), marks=() if case == ("5", "chunked") else pytest.mark.slow)
        for case in [*((name, "chunked") for name in CUTS), ("2", "reference")]
    ],
)
@pytest.mark.parametrize("decay", DECAYS)
def test_segments_put_together_are_the_whole_row(decay, cuts, backend):
    inputs, _, dout, dfinal = draw(ROWS, decay)
    dfinal[..., 2] = 0.0
    whole = run(inputs, None, ROWS, dout, dfinal)
    check.segments(recurrence, inputs, dout, dfinal, whole, ROWS, CUTS[cuts], backend=backend, linear=False, true=true)


def test_transitions_are_those_of_rows_that_one_document_goes_through():
    inputs, state, *_ = draw(ROWS)
    cut = tuple(x if x.dim() == 1 else x[:, 160:300] for x in inputs)
    assert (recurrence.summarize(inputs, state, ROWS).transition == -torch.inf).all()  # every row starts a document
    transition = recurrence.summarize(cut, state, ROWS.slice(160, 300)).transition
    assert [bool(row.isfinite().all()) for row in transition] == [True, True, False, True]
    torch.testing.assert_close(transition[0], 140 * inputs[2])


def test_combining_is_associative():
    torch.manual_seed(0)
    a, b, c = (
        Summary(-torch.rand(2, 3, dtype=torch.float64), torch.randn(2, 3, 3, dtype=torch.float64)) for _ in range(3)
    )
    left = recurrence.combine(recurrence.combine(c, b), a)
    right = recurrence.combine(c, recurrence.combine(b, a))
    assert_near([left.transition, true(left.state)], [right.transition, true(right.state)], 1e-12)


def test_a_zero_state_is_nothing():
    inputs, state, *_ = draw(Documents.whole(2, 30, position=1))
    zero = recurrence.zero_state(state)
    assert bool((zero[..., 2] == LOWEST).all())
    assert_near(wkv(*inputs, initial_state=zero), wkv(*inputs), 0.0)


def test_no_tensor_is_larger_than_an_input():
    documents = Documents.from_lengths([[3000, 1096]])
    torch.manual_seed(0)
    k, v = (torch.randn(1, 4096, 128, requires_grad=True) for _ in range(2))
    with LargestTensor() as largest:
        out, _ = wkv(k, v, -torch.rand(128), documents=documents)
        out.sum().backward()
    assert largest.numel <= max(k.numel(), 4 * chunked.SLAB["cpu"])


def test_work_grows_with_tokens_and_channels():
    assert flops(10, channels=6) == 60 * flops(1, channels=1) > 0


WRONG = {
    "k must be": lambda k, v, w, u: wkv(k[0], v, w, u),
    "log_decay must be": lambda k, v, w, u: wkv(k, v, w[:3], u),
    "bonus must be": lambda k, v, w, u: wkv(k, v, w, u[:3]),
    "log_decay must not be positive": lambda k, v, w, u: wkv(k, v, -w, u),
    "initial_state must": lambda k, v, w, u: wkv(k, v, w, u, initial_state=k),
    "documents must describe": lambda k, v, w, u: wkv(k, v, w, u, documents=Documents.whole(2, 5)),
    "backend must": lambda k, v, w, u: wkv(k, v, w, u, backend="fast"),
}


@pytest.mark.parametrize("message", WRONG)
def test_bad_input_is_named(message):
    inputs, *_ = draw(Documents.whole(2, 20))
    with pytest.raises(ValueError, match=message):
        WRONG[message](*inputs)


def test_backward_leaves_the_gradient_that_it_gets_as_it_is():
    """Of one row, whose tokens need no other order than they have."""
    k, v = (torch.randn(1, 40, 3, dtype=torch.float64, requires_grad=True) for _ in "kv")
    out, dout = wkv(k, v)[0], torch.randn(1, 40, 3, dtype=torch.float64)
    before = dout.clone()
    torch.autograd.grad(out, [k, v], dout)
    assert torch.equal(dout, before)
