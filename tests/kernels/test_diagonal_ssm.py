"""The diagonal state space model against its recurrence and the convolution that it is: op, gradients, segments."""

import pytest
import torch
from largest_tensor import LargestTensor
from recurrence_parts import Parts

from longreach.kernels.diagonal_ssm import StateSpaceRecurrence, chunked, diagonal_ssm, flops
from longreach.kernels.documents import Documents

HEADS, STATES, CHANNELS = 3, 4, 2
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


def draw(documents, strength=0.1):
    """(x, log_decay, angle, real, imaginary), initial state, and gradients of output and final state, in float64."""
    torch.manual_seed(0)
    x, dout = torch.randn(2, documents.batch, documents.length, HEADS, CHANNELS, dtype=torch.float64)
    log_decay = -strength * torch.rand(HEADS, STATES, dtype=torch.float64) ** 4
    others = torch.randn(3, HEADS, STATES, dtype=torch.float64) * torch.tensor([3.0, 1.0, 1.0])[:, None, None]
    state, dstate = torch.randn(2, documents.batch, HEADS, STATES, CHANNELS, 2, dtype=torch.float64)
    return (x, log_decay, *others), state, dout, dstate


def run(inputs, state, documents, dout, dstate, backend="auto", dtype=torch.float64):
    """Output, final state and the gradients of all inputs and of the initial state."""
    leaves = [x if x is None else x.to(dtype).detach().clone().requires_grad_() for x in (*inputs, state)]
    out, final = diagonal_ssm(*leaves[:5], initial_state=leaves[5], documents=documents, backend=backend)
    wanted = [x for x in leaves if x is not None]
    gradients = torch.autograd.grad([out, final], wanted, [dout.to(out.dtype), dstate.to(final.dtype)])
    return out.detach(), final.detach(), *gradients


def assert_near(found, expected, tolerance):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=tolerance * max(1.0, b.abs().max().item()))


@pytest.mark.parametrize("strength", [0.1, 20.0])
@pytest.mark.parametrize("documents", PACKINGS.values(), ids=PACKINGS)
def test_outputs_states_and_gradients_are_those_of_the_recurrence(documents, strength, monkeypatch):
    inputs, state, *given = draw(documents, strength)
    expected = run(inputs, state, documents, *given, backend="reference")
    for chunk in (128, 8):
        monkeypatch.setattr(chunked, "CHUNK", chunk)
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
    documents = PACKINGS["packed"]
    inputs, state, *given = draw(documents)
    rounded = [x.bfloat16().double() for x in inputs]
    expected = run(rounded, state, documents, given[0].bfloat16().double(), given[1], backend="reference")
    leaves = [x.bfloat16().requires_grad_() for x in inputs]
    out, final = diagonal_ssm(*leaves, initial_state=state.float(), documents=documents)
    assert (out.dtype, final.dtype) == (torch.bfloat16, torch.float32)
    gradients = torch.autograd.grad([out, final], leaves, [given[0].bfloat16(), given[1].float()])
    assert [x.dtype for x in gradients] == [torch.bfloat16] * 5
    for found, right in zip((out, final, *gradients), expected, strict=False):
        assert (found.double() - right).norm() <= 1e-2 * right.norm()


@pytest.mark.parametrize("strength", [-20.0, -200.0, -torch.inf])
def test_strong_decay_neither_overflows_nor_forgets_the_present(strength):
    documents = Documents.whole(1, 200)
    (x, log_decay, *others), state, *given = draw(documents)
    found = run((x, torch.full_like(log_decay, strength), *others), state, documents, *given, dtype=torch.float32)
    assert_near([found[0]], [x * others[1].sum(1)[:, None]], 1e-5)
    assert all(bool(tensor.isfinite().all()) for tensor in found)


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
    documents = Documents.from_lengths([[5, 70, 1, 130, 40]], 256)
    inputs, _, *given = draw(documents, strength=1e-3)
    before = run(inputs, None, documents, *given, dtype=torch.float32)
    moved = documents.runs[0][3]
    x = inputs[0].clone()
    x[:, moved.start : moved.stop] += 100.0
    after = run((x, *inputs[1:]), None, documents, *given, dtype=torch.float32)
    outside = torch.ones(256, dtype=torch.bool)
    outside[moved.start : moved.stop] = False
    for number in (0, 2):  # out, dx
        assert torch.equal(before[number][:, outside], after[number][:, outside])


def test_a_state_enters_only_where_a_document_goes_on():
    documents = Documents.stack([Documents.whole(1, 20), Documents.whole(1, 20, position=3)])
    inputs, state, *given = draw(documents)
    state[0] = torch.nan
    out, _, *_, dstate = run(inputs, state, documents, *given)
    assert bool(out.isfinite().all())
    assert not dstate[0].any()
    assert dstate[1].all()


def test_token_by_token_is_the_whole():
    (x, *constants), *_ = draw(Documents.whole(2, 37))
    out, final = diagonal_ssm(x, *constants)
    state, steps = None, []
    for t in range(37):
        step, state = diagonal_ssm(x[:, t : t + 1], *constants, initial_state=state)
        steps.append(step)
    assert_near([torch.cat(steps, 1), state], [out, final], 1e-9)


recurrence = Parts(StateSpaceRecurrence())
ROWS = Documents.from_lengths([[300], [100, 50, 150], [60, 1, 1, 120, 20], [150, 150]], 300)
CUTS = {"2": (150, 300), "5": (1, 100, 150, 182, 300), "on borders": (100, 150, 300)}


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
def test_segments_put_together_are_the_whole_row(cuts):
    inputs, _, dout, dfinal = draw(ROWS)
    whole = run(inputs, None, ROWS, dout, dfinal)
    bounds = list(zip((0, *cuts[:-1]), cuts, strict=True))
    segments = [(inputs[0][:, a:b], *inputs[1:]) for a, b in bounds]
    documents = [ROWS.slice(a, b) for a, b in bounds]
    outs, summaries, states = [], [], [torch.zeros_like(dfinal)]
    for segment, held in zip(segments, documents, strict=True):
        out, final = recurrence.forward(segment, None, held)
        summaries.append(recurrence.summarize(segment, final, held))
        outs.append(recurrence.correct(out, segment, states[-1], held))
        states.append(recurrence.advance(summaries[-1], states[-1]))
    assert_near([torch.cat(outs, 1), states[-1]], whole[:2], 1e-9)
    total = summaries[0]
    for summary in summaries[1:]:
        total = recurrence.combine(summary, total)
    assert_near([recurrence.advance(total, torch.zeros_like(dfinal))], [whole[1]], 1e-9)
    dstate, parts = dfinal, []
    for number in reversed(range(len(segments))):
        a, b = bounds[number]
        given = segments[number], states[number], documents[number]
        gradients, dinitial = recurrence.backward(dout[:, a:b], dstate, *given)
        local = recurrence.summarize_backward(dout[:, a:b], *given)
        dstate = recurrence.retreat(summaries[number], dstate, local)
        assert_near([dstate], [dinitial], 1e-9)
        parts.insert(0, gradients)
    dx, *constants = zip(*parts, strict=True)
    assert_near([torch.cat(dx, 1), *(sum(each) for each in constants)], whole[2:], 1e-9)


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
