"""The diagonal scan against its recurrence and another's code: op, gradients, parts, segments of a row."""

from functools import partial

import pytest
import recurrence_checks as check
import torch
from covering import pairwise, slow_but
from largest_tensor import LargestTensor
from recurrence_parts import CUTS, OFTEN, PACKINGS, ROWS, Parts, assert_near, nan_in_fresh_memory, run_op

from longreach.kernels.diagonal_scan import DiagonalRecurrence, chunked, diagonal_scan, flops
from longreach.kernels.documents import Documents
from longreach.kernels.recurrence import Summary

DECAYS = ("token", "constant")
STRENGTHS = {"mild": 0.1, "-20 a step": 20.0}
WIDTHS = {"lanes": 4096, "few lanes": 40, "one lane, channels in blocks": 3}


def draw(documents, decay="token", strength=0.1, channels=(5,)):
    """(x, log_decay), initial state, and gradients of the output and of the final state, in float64."""
    torch.manual_seed(0)
    shape = documents.batch, documents.length, *channels
    # Decays of all sizes: what is decayed little comes after what is decayed much.
    log_decay = -strength * torch.rand(shape if decay == "token" else channels, dtype=torch.float64) ** 4
    x, dout = torch.randn(2, *shape, dtype=torch.float64)
    state, dstate = torch.randn(2, shape[0], *channels, dtype=torch.float64)
    return (x, log_decay), state, dout, dstate


run = partial(run_op, diagonal_scan)


@pytest.mark.parametrize(("decay", "documents", "strength"), pairwise(DECAYS, PACKINGS, STRENGTHS, often=OFTEN))
def test_outputs_states_and_gradients_are_those_of_the_recurrence(decay, documents, strength, monkeypatch):
    inputs, state, *given = draw(documents, decay, strength)
    expected = run(inputs, state, documents, *given, backend="reference")
    for width in WIDTHS.values():
        monkeypatch.setattr(chunked, "WIDTH", width)
        with nan_in_fresh_memory():
            assert_near(run(inputs, state, documents, *given), expected, 1e-9)
    assert_near(run(inputs, state, documents, *given, dtype=torch.float32), expected, 1e-4)


def test_a_thousand_tokens_and_channels_of_several_dims():
    documents = Documents.whole(1, 1000)
    inputs, state, *given = draw(documents, channels=(3, 2))
    flat = [x.flatten(-2) for x in (*inputs, state, *given)]
    expected = run(flat[:2], flat[2], documents, *flat[3:], backend="reference")
    found = run(inputs, state, documents, *given)
    assert found[0].shape == (1, 1000, 3, 2)
    assert_near([x.flatten(-2) for x in found], expected, 1e-9)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.slow
def test_the_recurrence_passes_gradcheck(decay):
    documents = Documents.from_lengths([[3, 2], [4]], 5).slice(1, 5)
    (x, log_decay), state, *_ = draw(documents, decay, channels=(2,))
    leaves = [leaf.requires_grad_() for leaf in (x, log_decay.clamp(max=-1e-3), state)]
    assert torch.autograd.gradcheck(
        lambda x, log_decay, state: diagonal_scan(
            x, log_decay, initial_state=state, documents=documents, backend="reference"
        ),
        leaves,
    )


@pytest.mark.parametrize("decay", DECAYS)
def test_bfloat16_is_computed_in_float32(decay):
    inputs, state, *given = draw(PACKINGS["packed"], decay)
    check.bfloat16(diagonal_scan, inputs, state, PACKINGS["packed"], *given)


@pytest.mark.parametrize("strength", [-20.0, -200.0, -torch.inf])
@pytest.mark.parametrize("decay", DECAYS)
def test_strong_decay_neither_overflows_nor_forgets_the_present(decay, strength):
    documents = Documents.whole(1, 200)
    (x, log_decay), state, *given = draw(documents, decay)
    inputs = x, torch.full_like(log_decay, strength)
    found = run(inputs, state, documents, *given, dtype=torch.float32)
    assert_near(found[:3], [x, x[:, -1], given[0] + torch.nn.functional.pad(given[1][:, None], (0, 0, 199, 0))], 1e-6)
    assert all(bool(tensor.isfinite().all()) for tensor in found)


def test_gradients_of_decays_are_exact_however_strong():
    """Where a decay is e^-20, its gradient is e^-20 h dh, and no difference of larger numbers."""
    documents = Documents.whole(1, 200)
    (x, log_decay), state, *given = draw(documents)
    inputs = x, log_decay - 20
    expected = run(inputs, state, documents, *given, backend="reference")[3]
    found = run(inputs, state, documents, *given, dtype=torch.float32)[3]
    assert (found - expected).norm() <= 1e-5 * expected.norm()


def test_no_document_moves_another():
    same = 0, 2, 3  # out, dx, dlog_decay
    check.no_document_moves_another(diagonal_scan, partial(draw, strength=1e-3), [0], same)


def test_a_state_enters_only_where_a_document_goes_on():
    check.where_a_state_enters(diagonal_scan, draw)


@pytest.mark.parametrize("decay", DECAYS)
def test_token_by_token_is_the_whole(decay):
    inputs, *_ = draw(Documents.whole(2, 37), decay)
    check.token_by_token(diagonal_scan, inputs)


def test_channels_of_any_dims():
    (x, log_decay), state, *_ = draw(Documents.whole(2, 20, position=1), "constant")
    expected = diagonal_scan(x, log_decay, initial_state=state)
    dims = (x.shape[2], 1, 1)
    found = diagonal_scan(x.view(2, 20, *dims), log_decay.view(dims), initial_state=state.view(2, *dims))
    assert found[1].shape == (2, *dims)
    assert_near([found[0].flatten(2), found[1].flatten(1)], expected, 0.0)


recurrence = Parts(DiagonalRecurrence())


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize("cuts", slow_but(["5"], CUTS))
@pytest.mark.parametrize("decay", DECAYS)
def test_segments_put_together_are_the_whole_row(decay, cuts, width, monkeypatch):
    monkeypatch.setattr(chunked, "WIDTH", width)
    inputs, _, *given = draw(ROWS, decay)
    check.segments(recurrence, inputs, *given, run(inputs, None, ROWS, *given), ROWS, cuts)


def test_transitions_are_zero_unless_one_document_goes_through():
    inputs, state, *_ = draw(ROWS)
    assert not recurrence.summarize(inputs, state, ROWS).transition.any()  # every row starts a document
    cut = tuple(x[:, 160:300] for x in inputs)
    transition = recurrence.summarize(cut, state, ROWS.slice(160, 300)).transition
    assert [bool(row.any()) for row in transition] == [True, True, False, True]
    torch.testing.assert_close(transition[0], inputs[1][0, 160:300].sum(0).exp())


def test_combining_is_associative():
    torch.manual_seed(0)
    a, b, c = (Summary(torch.rand(2, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)) for _ in range(3))
    left = recurrence.combine(recurrence.combine(c, b), a)
    right = recurrence.combine(c, recurrence.combine(b, a))
    assert_near(left, right, 1e-12)


def test_gradients_come_through_the_final_state_alone():
    documents = PACKINGS["packed"]
    inputs, _, dout, dstate = draw(documents)
    found = run(inputs, None, documents, torch.zeros_like(dout), dstate)
    leaves = [x.clone().requires_grad_() for x in inputs]
    _, final = diagonal_scan(*leaves, documents=documents)
    assert_near(torch.autograd.grad(final, leaves, dstate), found[2:], 1e-12)


def test_no_tensor_is_larger_than_an_input():
    documents = Documents.from_lengths([[3000, 1096]])
    torch.manual_seed(0)
    x, log_decay = (torch.randn(1, 4096, 64, requires_grad=True) for _ in range(2))
    with LargestTensor() as largest:
        out, _ = diagonal_scan(x, -log_decay.exp(), documents=documents)
        out.sum().backward()
    assert largest.numel <= max(x.numel(), 64 * chunked.WIDTH)


@pytest.mark.slow
def test_flash_linear_attention_agrees():
    """HGRN's recurrence, with the decays and inputs as its layer makes them."""
    naive = pytest.importorskip(
        "fla.ops.hgrn.naive", reason="flash-linear-attention is not installed; it is an oracle here and nothing else"
    )
    (x, log_decay), state, *_ = draw(Documents.whole(2, 150, position=1), strength=1.0)
    x = (1 - log_decay.exp()) * torch.nn.functional.silu(x)
    expected, final = naive.naive_recurrent_hgrn(x.float(), log_decay.float(), state.float(), output_final_state=True)
    assert_near(diagonal_scan(x.float(), log_decay.float(), initial_state=state.float()), [expected, final], 1e-4)


WRONG = {
    "x must be": lambda x, a: diagonal_scan(x[0], a),
    "log_decay must be like x": lambda x, a: diagonal_scan(x, a[:, :3]),
    "constant, \\[5, 1\\]": lambda x, a: diagonal_scan(x.view(2, 20, 5, 1), a[0, 0]),
    "log_decay must not be positive": lambda x, a: diagonal_scan(x, -a),
    "initial_state must": lambda x, a: diagonal_scan(x, a, initial_state=x),
    "documents must describe": lambda x, a: diagonal_scan(x, a, documents=Documents.whole(2, 5)),
    "documents must start at position 0": lambda x, a: diagonal_scan(
        x, a, documents=Documents.concatenate([Documents.whole(2, 10), Documents.whole(2, 10, position=50)])
    ),
    "at least one token": lambda x, a: diagonal_scan(x[:, :0], a[:, :0]),
    "backend must": lambda x, a: diagonal_scan(x, a, backend="fast"),
}


@pytest.mark.parametrize("message", WRONG)
def test_bad_input_is_named(message):
    inputs, *_ = draw(Documents.whole(2, 20))
    with pytest.raises(ValueError, match=message):
        WRONG[message](*inputs)


def test_costs():
    assert flops(10, channels=6) == 3 * 10 * 6
    inputs = torch.rand(2, 7, 5), -torch.rand(2, 7, 5)
    op = DiagonalRecurrence()
    assert op.state_bytes(inputs) == 2 * 5 * 4
    assert op.bytes_sent(inputs, ranks=1) == 0
    assert op.bytes_sent(inputs, ranks=3, spans=2) == 2 * 2 * 3 * 2 * 5 * 4
