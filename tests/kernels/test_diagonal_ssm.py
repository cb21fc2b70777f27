"""The diagonal state space model against its recurrence and the convolution that it is: op, gradients, segments."""

from functools import partial

import pytest
import recurrence_checks as check
import torch
from covering import slow_but
from largest_tensor import LargestTensor
from recurrence_parts import CUTS, OFTEN, PACKINGS, ROWS, Parts, assert_near, nan_in_fresh_memory, run_op

from longreach.kernels.diagonal_ssm import StateSpaceRecurrence, chunked, diagonal_ssm, flops
from longreach.kernels.documents import Documents

HEADS, STATES, CHANNELS = 3, 4, 2


def draw(documents, strength=0.1):
    """(x, log_decay, angle, real, imaginary), initial state, and gradients of output and final state, in float64."""
    torch.manual_seed(0)
    x, dout = torch.randn(2, documents.batch, documents.length, HEADS, CHANNELS, dtype=torch.float64)
    log_decay = -strength * torch.rand(HEADS, STATES, dtype=torch.float64) ** 4
    others = torch.randn(3, HEADS, STATES, dtype=torch.float64) * torch.tensor([3.0, 1.0, 1.0])[:, None, None]
    state, dstate = torch.randn(2, documents.batch, HEADS, STATES, CHANNELS, 2, dtype=torch.float64)
    return (x, log_decay, *others), state, dout, dstate


run = partial(run_op, diagonal_ssm)


@pytest.mark.parametrize("strength", [0.1, 20.0])
@pytest.mark.parametrize("documents", slow_but(OFTEN, PACKINGS))
def test_outputs_states_and_gradients_are_those_of_the_recurrence(documents, strength, monkeypatch):
    inputs, state, *given = draw(documents, strength)
    expected = run(inputs, state, documents, *given, backend="reference")
    for chunk in (128, 8):
        monkeypatch.setattr(chunked, "CHUNK", chunk)
        with nan_in_fresh_memory():
            assert_near(run(inputs, state, documents, *given), expected, 1e-9)
    rounded = tuple(x.float().double() for x in inputs)  # a rounded angle is off by more with every token
    expected = run(rounded, state, documents, *given, backend="reference")
    assert_near(run(inputs, state, documents, *given, dtype=torch.float32), expected, 1e-4)


def test_it_is_the_convolution_with_its_kernel():
    inputs, _, *given = draw(Documents.whole(2, 300))
    x, log_decay, angle, real, imaginary = inputs
    found = run(inputs, None, None, *given)
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    x, log_decay, angle, real, imaginary = leaves
    times = torch.arange(300, dtype=torch.float64)
    powers = torch.exp(torch.complex(log_decay, angle)[..., None] * times)
    kernel = (torch.complex(real, imaginary)[..., None] * powers).real.sum(1)
    spectrum = torch.fft.rfft(x.permute(0, 2, 3, 1), n=600) * torch.fft.rfft(kernel, n=600)[:, None]
    out = torch.fft.irfft(spectrum, n=600)[..., :300].permute(0, 3, 1, 2)
    expected = out.detach(), *torch.autograd.grad(out, leaves, given[0])
    found = run(inputs, None, None, given[0], torch.zeros_like(given[1]))
    assert_near([found[0], *found[2:]], expected, 1e-9)


@pytest.mark.slow
def test_the_recurrence_passes_gradcheck():
    documents = Documents.from_lengths([[3, 2], [4]], 5).slice(1, 5)
    inputs, state, *_ = draw(documents)
    leaves = [leaf.requires_grad_() for leaf in (*inputs, state)]
    assert torch.autograd.gradcheck(
        lambda *x: diagonal_ssm(*x[:5], initial_state=x[5], documents=documents, backend="reference"), leaves
    )


def test_bfloat16_is_computed_in_float32():
    inputs, state, *given = draw(PACKINGS["packed"])
    check.bfloat16(diagonal_ssm, inputs, state, PACKINGS["packed"], *given)


@pytest.mark.parametrize("strength", [-20.0, -200.0, -torch.inf])
def test_strong_decay_neither_overflows_nor_forgets_the_present(strength):
    documents = Documents.whole(1, 200)
    (x, log_decay, *others), state, *given = draw(documents)
    found = run((x, torch.full_like(log_decay, strength), *others), state, documents, *given, dtype=torch.float32)
    assert_near([found[0]], [x * others[1].sum(1)[:, None]], 1e-5)
    assert all(bool(tensor.isfinite().all()) for tensor in found)


@pytest.mark.slow
def test_long_angles_are_as_exact_as_their_type():
    """In float32, after tens of thousands of tokens, errors are those of the recurrence in the same type or less."""
    documents = Documents.whole(1, 4096)
    torch.manual_seed(0)
    inputs = [torch.randn(1, 4096, 1, 1, dtype=torch.float64), *(torch.rand(4, 1, 8, dtype=torch.float64))]
    inputs[1] = -1e-3 * inputs[1]
    inputs[2] = 9 * inputs[2]
    rounded = [x.float() for x in inputs]
    exact = diagonal_ssm(*(x.double() for x in rounded), documents=documents)[0]
    errors = [
        float((diagonal_ssm(*rounded, documents=documents, backend=backend)[0] - exact).norm())
        for backend in ("chunked", "reference")
    ]
    assert errors[0] <= errors[1]


def test_no_document_moves_another():
    same = 0, 2  # out, dx
    check.no_document_moves_another(diagonal_ssm, partial(draw, strength=1e-3), [0], same)


def test_a_state_enters_only_where_a_document_goes_on():
    check.where_a_state_enters(diagonal_ssm, draw)


def test_token_by_token_is_the_whole():
    inputs, *_ = draw(Documents.whole(2, 37))
    check.token_by_token(diagonal_ssm, inputs)


recurrence = Parts(StateSpaceRecurrence())


@pytest.mark.parametrize("cuts", slow_but(["5"], CUTS))
def test_segments_put_together_are_the_whole_row(cuts):
    inputs, _, *given = draw(ROWS)
    check.segments(recurrence, inputs, *given, run(inputs, None, ROWS, *given), ROWS, cuts)


def test_no_tensor_holds_the_states_of_all_tokens():
    torch.manual_seed(0)
    x = torch.randn(1, 4096, 16, 1, requires_grad=True)
    constants = [torch.rand(16, 32, requires_grad=True) for _ in range(4)]
    with LargestTensor() as largest:
        out, _ = diagonal_ssm(x, -constants[0], *constants[1:], documents=Documents.from_lengths([[3000, 1096]]))
        out.sum().backward()
    assert largest.numel <= 4 * x.numel()


WRONG = {
    "x must be": lambda x, *c: diagonal_ssm(x[..., 0], *c),
    "angle must be": lambda x, a, *c: diagonal_ssm(x, a, a[:, :2], *c[1:]),
    "log_decay must not be positive": lambda x, a, *c: diagonal_ssm(x, -a, *c),
    "initial_state must": lambda x, *c: diagonal_ssm(x, *c, initial_state=x),
    "at least one token": lambda x, *c: diagonal_ssm(x[:, :0], *c),
    "backend must": lambda x, *c: diagonal_ssm(x, *c, backend="triton"),
}


@pytest.mark.parametrize("message", WRONG)
def test_bad_input_is_named(message):
    inputs, *_ = draw(Documents.whole(2, 20))
    with pytest.raises(ValueError, match=message):
        WRONG[message](*inputs)


def test_costs():
    assert flops(10, channels=6, states=4, chunk=8) == 10 * 6 * (16 + 32)
    inputs, *_ = draw(Documents.whole(2, 7))
    op = StateSpaceRecurrence()
    state = 2 * HEADS * STATES * CHANNELS * 2 * 8
    assert op.state_bytes(inputs) == state
    assert op.bytes_sent(inputs, ranks=3) == 2 * (2 * state + 2 * HEADS * STATES * 2 * 8)
