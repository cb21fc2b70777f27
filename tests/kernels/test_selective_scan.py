"""The selective scan against its recurrence and transformers' Mamba: op, gradients, parts, segments of a row."""

from functools import partial

import pytest
import recurrence_checks as check
import torch
from covering import pairwise, slow_but
from definitions import definitions_of
from largest_tensor import LargestTensor
from recurrence_parts import OFTEN, Parts, assert_near, nan_in_fresh_memory, run_op

from longreach.kernels.documents import Documents
from longreach.kernels.selective_scan import (
    SelectiveRecurrence,
    chunked,
    flops,
    selective_scan,
)

DECAYS = ("exponential", "longhorn")
STRENGTHS = {"mild": 1.0, "-20 a step": 200.0}
PACKINGS = {
    "1 token": Documents.whole(2, 1),
    "63 tokens": Documents.whole(2, 63),
    "continued": Documents.whole(2, 70, position=9),
    "packed": Documents.from_lengths([[5, 1, 1, 32, 50, 7], [64, 32], [100]], 105),
    "one-token documents": Documents.from_lengths([[1] * 40, [32, 32]], 70),
    "cut from rows": Documents.from_lengths([[5, 1, 1, 24, 40, 29], [100], [15, 85]], 100).slice(20, 93),
    "all padding": Documents.from_lengths([[7], []], 7),
}
WIDTHS = {"all at once": 8192, "rows apart": 15, "channels apart": 6}
CHANNELS, SIZE = 5, 3


def draw(documents, decay="exponential", strength=1.0, channels=CHANNELS, size=SIZE):
    """(x, delta, a, b, c), initial state, and gradients of the output and of the final state, in float64."""
    torch.manual_seed(0)
    batch, length = documents.batch, documents.length
    x, dout = torch.randn(2, batch, length, channels, dtype=torch.float64)
    b, c = torch.randn(2, batch, length, size, dtype=torch.float64)
    state, dstate = torch.randn(2, batch, channels, size, dtype=torch.float64)
    if decay == "longhorn":
        beta = torch.rand(batch, length, channels, dtype=torch.float64) * strength
        return (x, beta / (1 + beta * b.square().sum(-1, keepdim=True)), None, b, c), state, dout, dstate
    delta = 0.1 * torch.rand(batch, length, channels, dtype=torch.float64) ** 2
    a = -strength * torch.rand(channels, size, dtype=torch.float64)
    return (x, delta, a, b, c), state, dout, dstate


def scan(x, delta, a, *rest, **settings):
    return selective_scan(x, delta, a, *rest, decay="longhorn" if a is None else "exponential", **settings)


run = partial(run_op, scan)


@pytest.mark.parametrize(("decay", "documents", "strength"), pairwise(DECAYS, PACKINGS, STRENGTHS, often=OFTEN))
def test_outputs_states_and_gradients_are_those_of_the_recurrence(decay, documents, strength, monkeypatch):
    inputs, state, *given = draw(documents, decay, strength)
    expected = run(inputs, state, documents, *given, backend="reference")
    for width in WIDTHS.values():
        monkeypatch.setattr(chunked, "WIDTH", width)
        with nan_in_fresh_memory():
            assert_near(run(inputs, state, documents, *given), expected, 1e-9)
    assert_near(run(inputs, state, documents, *given, dtype=torch.float32), expected, 1e-4)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.slow
def test_the_recurrence_passes_gradcheck(decay):
    documents = Documents.from_lengths([[3, 2], [4]], 5).slice(1, 5)
    inputs, state, *_ = draw(documents, decay, channels=2, size=2)
    leaves = [leaf.requires_grad_() for leaf in (*inputs, state) if leaf is not None]

    def op(x, delta, *rest):
        a, b, c, state = rest if len(rest) == 4 else (None, *rest)
        return selective_scan(
            x, delta, a, b, c, decay=decay, initial_state=state, documents=documents, backend="reference"
        )

    assert torch.autograd.gradcheck(op, leaves)


@pytest.mark.parametrize("decay", DECAYS)
def test_bfloat16_is_computed_in_float32(decay):
    inputs, state, *given = draw(PACKINGS["packed"], decay)
    check.bfloat16(scan, inputs, state, PACKINGS["packed"], *given)


@pytest.mark.parametrize("strength", [20.0, 200.0, torch.inf])
def test_strong_decay_neither_overflows_nor_forgets_the_present(strength):
    documents = Documents.whole(1, 40)
    (x, delta, a, b, c), state, *given = draw(documents)
    delta = torch.ones_like(delta)
    inputs = x, delta, torch.full_like(a, -strength), b, c
    found = run(inputs, state, documents, *given, dtype=torch.float32)
    assert_near([found[0]], [x * (b * c).sum(-1, keepdim=True)], 1e-5)
    if strength < torch.inf:  # e^-inf's gradient is no number
        assert all(bool(tensor.isfinite().all()) for tensor in found)


@pytest.mark.parametrize("decay", DECAYS)
def test_a_step_that_forgets_everything(decay):
    """delta b^2 of 1, or a decay of e^-20: gradients hold all their digits, as they are no differences."""
    documents = Documents.whole(1, 40)
    (x, delta, a, b, c), state, *given = draw(documents, decay)
    if decay == "longhorn":
        delta[:, 10], b[:, 10] = 1.0, 1.0
    else:
        a = a - 200.0
        delta = torch.full_like(delta, 0.1)
    expected = run((x, delta, a, b, c), state, documents, *given, backend="reference")
    found = run((x, delta, a, b, c), state, documents, *given, dtype=torch.float32)
    for mine, right in zip(found, expected, strict=True):
        assert (mine - right).norm() <= 1e-5 * right.norm()


@pytest.mark.parametrize("decay", DECAYS)
def test_no_document_moves_another(decay):
    same = 0, 2, 3, -2, -1  # out, dx, ddelta, db, dc
    drawn = partial(draw, decay=decay, strength=1e-3)
    check.no_document_moves_another(scan, drawn, [0], same, lengths=(5, 20, 1, 50, 20))


def test_a_state_enters_only_where_a_document_goes_on():
    check.where_a_state_enters(scan, draw)


@pytest.mark.parametrize("decay", DECAYS)
def test_token_by_token_is_the_whole(decay):
    inputs, *_ = draw(Documents.whole(2, 21), decay)
    check.token_by_token(scan, inputs)


ROWS = Documents.from_lengths([[120], [40, 20, 60], [30, 1, 1, 50, 10], [60, 60]], 120)
CUTS = {"2": (60, 120), "5": (1, 40, 60, 81, 120), "on borders": (40, 60, 120)}


@pytest.mark.parametrize("width", [8192, 6])
@pytest.mark.parametrize("cuts", slow_but(["5"], CUTS))
@pytest.mark.parametrize("decay", DECAYS)
def test_segments_put_together_are_the_whole_row(decay, cuts, width, monkeypatch):
    monkeypatch.setattr(chunked, "WIDTH", width)
    inputs, _, *given = draw(ROWS, decay)
    whole = run(inputs, None, ROWS, *given)
    check.segments(Parts(SelectiveRecurrence(decay)), inputs, *given, whole, ROWS, cuts)


@pytest.mark.parametrize("decay", DECAYS)
def test_transitions_are_nothing_unless_one_document_goes_through(decay):
    recurrence = Parts(SelectiveRecurrence(decay))
    inputs, state, *_ = draw(ROWS, decay)
    summary = recurrence.summarize(inputs, state, ROWS)
    assert summary.transition.shape == ((4, CHANNELS) if decay == "exponential" else (4, CHANNELS, SIZE))
    assert not recurrence.expand(summary, inputs).transition.any()  # every row starts a document
    cut = tuple(x if x is None or x.dim() == 2 else x[:, 64:120] for x in inputs)
    transition = recurrence.expand(recurrence.summarize(cut, state, ROWS.slice(64, 120)), cut).transition
    assert [bool(row.any()) for row in transition] == [True, True, False, True]
    _, delta, a, b, _ = cut
    g = torch.log1p(-delta[..., None] * b[:, :, None].square()) if a is None else delta[..., None] * a
    torch.testing.assert_close(transition[0], g[0].sum(0).exp())


def test_a_state_that_does_not_decay_is_forgotten_between_documents():
    recurrence = Parts(SelectiveRecurrence())
    (x, delta, a, b, c), state, *_ = draw(ROWS)
    inputs = x, delta, torch.zeros_like(a), b, c
    summary = recurrence.expand(recurrence.summarize(inputs, state, ROWS), inputs)
    assert torch.equal(recurrence.advance(summary, torch.ones_like(state)), state)


def test_gradients_come_through_the_final_state_alone():
    documents = PACKINGS["packed"]
    inputs, _, dout, dstate = draw(documents)
    found = run(inputs, None, documents, torch.zeros_like(dout), dstate)
    leaves = [x.clone().requires_grad_() for x in inputs]
    _, final = selective_scan(*leaves, documents=documents)
    assert_near(torch.autograd.grad(final, leaves[:4], dstate), found[2:6], 1e-12)


@pytest.mark.parametrize("decay", DECAYS)
def test_nothing_of_the_size_of_all_states_is_ever_held(decay):
    documents = Documents.from_lengths([[600, 424]])
    inputs, _, dout, dstate = draw(documents, decay, channels=64, size=16)
    with LargestTensor() as largest:
        run(inputs, None, documents, dout, dstate, dtype=torch.float32)
    assert largest.numel <= max(inputs[0].numel(), (chunked.SLAB + 1) * chunked.WIDTH)


def test_mamba_of_transformers_agrees():
    modeling = definitions_of("mamba")
    (x, delta, a, b, c), *_ = draw(Documents.whole(2, 75))
    leaves = [tensor.requires_grad_() for tensor in (x, delta, a, b, c)]
    theirs, final = modeling.mamba_selective_scan(
        *(tensor.mT for tensor in (x, delta)), a, b.mT, c.mT, return_last_state=True
    )
    out, state = selective_scan(*leaves)
    # Theirs takes b and x to float32.
    assert_near([out, state], [theirs.mT, final], 1e-6)
    gradients, expected = (
        torch.autograd.grad((y.square().sum() + h.square().sum()), leaves) for y, h in ((out, state), (theirs, final))
    )
    assert_near(gradients, expected, 1e-5)


def test_flash_linear_attention_agrees_on_longhorn():
    """Its decays and inputs, as HGRN's recurrence over channels and states."""
    naive = pytest.importorskip(
        "fla.ops.hgrn.naive", reason="flash-linear-attention is not installed; it is an oracle here and nothing else"
    )
    (x, delta, _, b, c), state, *_ = draw(Documents.whole(2, 75, position=1), "longhorn")
    decays = torch.log1p(-delta.unsqueeze(3) * b.unsqueeze(2).square()).flatten(2)
    values = ((delta * x).unsqueeze(3) * b.unsqueeze(2)).flatten(2)
    h, final = naive.naive_recurrent_hgrn(
        values.float(), decays.float(), state.flatten(1).float(), output_final_state=True
    )
    expected = torch.einsum("btdn,btn->btd", h.view(*x.shape, SIZE).double(), c)
    found = selective_scan(x, delta, None, b, c, decay="longhorn", initial_state=state)
    assert_near(found, [expected, final.view_as(state)], 1e-4)


WRONG = {
    "delta must be": lambda x, d, a, b, c: selective_scan(x, d[:, :3], a, b, c),
    "c must be": lambda x, d, a, b, c: selective_scan(x, d, a, b, c[..., :2]),
    "a must be given": lambda x, d, a, b, c: selective_scan(x, d, None, b, c),
    "and only there": lambda x, d, a, b, c: selective_scan(x, d, a, b, c, decay="longhorn"),
    r"a must be \[D, N\]": lambda x, d, a, b, c: selective_scan(x, d, a.T, b, c),
    "a must not be positive": lambda x, d, a, b, c: selective_scan(x, d, -a, b, c),
    "delta must not be negative": lambda x, d, a, b, c: selective_scan(x, -d, a, b, c),
    "delta b^2 must not exceed 1": lambda x, d, a, b, c: selective_scan(x, 1 + d, None, 2 + b, c, decay="longhorn"),
    "decay must be one of": lambda x, d, a, b, c: selective_scan(x, d, a, b, c, decay="linear"),
    "initial_state must": lambda x, d, a, b, c: selective_scan(x, d, a, b, c, initial_state=x),
    "documents must describe": lambda x, d, a, b, c: selective_scan(x, d, a, b, c, documents=Documents.whole(2, 5)),
    "at least one token": lambda x, d, a, b, c: selective_scan(x[:, :0], d[:, :0], a, b[:, :0], c[:, :0]),
    "backend must": lambda x, d, a, b, c: selective_scan(x, d, a, b, c, backend="fast"),
}


@pytest.mark.parametrize("message", WRONG)
def test_bad_input_is_named(message):
    inputs, *_ = draw(Documents.whole(2, 20))
    with pytest.raises(ValueError, match=message.replace("^", r"\^")):
        WRONG[message](*inputs)


def test_costs():
    assert flops(10, channels=6, states=4) == 7 * 10 * 24
    x, b, a = torch.rand(2, 7, 5), torch.rand(2, 7, 4), -torch.rand(5, 4)
    op, inputs = SelectiveRecurrence(), (x, x, a, b, b)
    assert op.state_bytes(inputs) == 2 * 5 * 4 * 4
    assert op.bytes_sent(inputs, ranks=1, spans=2) == 0
    assert op.bytes_sent(inputs, ranks=3, spans=2) == 2 * 2 * 2 * 5 * (4 + 1 + 4) * 4
    assert SelectiveRecurrence("longhorn").bytes_sent((x, x, None, b, b), ranks=3, spans=2) == 2 * 2 * 2 * 5 * 12 * 4
