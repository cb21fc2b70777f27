"""Triton's selective scan against the recurrence in float64: under the interpreter, and on a GPU where there is one.

The interpreter takes some milliseconds a step of a loop, so that shapes and tiles are small there.
"""

import pytest
import torch
from recurrence_parts import Parts, nan_in_fresh_memory

from longreach.kernels.documents import Documents
from longreach.kernels.selective_scan import SelectiveRecurrence, selective_scan
from longreach.kernels.selective_scan import triton as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DECAYS = ("exponential", "longhorn")
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
PACKINGS = {
    "1 token": Documents.whole(2, 1),
    "packed": Documents.from_lengths([[3, 1, 1, 5, 1], [1, 9]], 13),
    "cut from rows": Documents.from_lengths([[5, 11, 1]], 17).slice(3, 17),
}


@pytest.fixture
def small(monkeypatch):
    """Tiles of which a few cover the tokens of a test, and memory that is NaN until it is written."""
    monkeypatch.setattr(kernels, "FORWARD", kernels.Tiles(16, 4, 4, 1))
    monkeypatch.setattr(kernels, "BACKWARD", kernels.Tiles(8, 2, 4, 1))
    monkeypatch.setattr(kernels, "SPAN", 8)
    with nan_in_fresh_memory():
        yield


def draw(documents, decay, channels=3, size=3, dtype=torch.float32, strength=5.0):
    """(x, delta, a, b, c), initial state, and gradients of the output and of the final state."""
    torch.manual_seed(0)
    batch, length = documents.batch, documents.length
    x, dout = torch.randn(2, batch, length, channels)
    b, c = torch.randn(2, batch, length, size)
    states = (x.to(DEVICE) for x in torch.randn(2, batch, channels, size))
    delta, a = torch.rand(batch, length, channels) ** 2, -strength * torch.rand(channels, size)
    if decay == "longhorn":
        delta, a = delta / (1 + delta * b.square().sum(-1, keepdim=True)), None
    inputs = tuple(x if x is None else x.to(DEVICE, dtype) for x in (x, delta, a, b, c))
    return inputs, *states, dout.to(DEVICE, dtype)


def run(inputs, state, dstate, dout, documents, backend):
    """Output, final state and all gradients; the reference in float64."""
    dtype = torch.float64 if backend == "reference" else inputs[0].dtype
    leaves = [x if x is None else x.detach().to(dtype).requires_grad_() for x in inputs]
    state = state.to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    decay = "longhorn" if inputs[2] is None else "exponential"
    out, final = selective_scan(*leaves, decay=decay, initial_state=state, documents=documents, backend=backend)
    wanted = [x for x in (*leaves, state) if x is not None]
    return out, final, *torch.autograd.grad([out, final], wanted, [dout.to(dtype), dstate.to(final.dtype)])


def check(documents, decay, **settings):
    drawn = draw(documents, decay, **settings)
    found = run(*drawn, documents, "triton")
    expected = run(*drawn, documents, "reference")
    for a, b in zip(found, expected, strict=True):
        assert (a.double() - b).norm() <= TOLERANCES[found[0].dtype] * b.norm()


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("documents", PACKINGS.values(), ids=PACKINGS)
def test_triton_gives_the_recurrence(documents, decay, small):
    check(documents, decay)


def test_strong_decays_and_padding_alone(small):
    check(Documents.whole(1, 6, position=1), "exponential", strength=200.0)
    check(Documents.from_lengths([[2], []], 3), "exponential")


@pytest.mark.parametrize("decay", DECAYS)
def test_bfloat16(decay, small, repaired_bf16):
    check(PACKINGS["cut from rows"], decay, dtype=torch.bfloat16)


@pytest.mark.parametrize("decay", DECAYS)
def test_parts_are_those_of_the_chunked_form(decay, small):
    documents = PACKINGS["cut from rows"]
    inputs, state, _, dout = draw(documents, decay)
    recurrence = Parts(SelectiveRecurrence(decay))
    for part in (recurrence.correct, recurrence.summarize_backward):
        found, expected = (
            part(dout.clone(), inputs, state, documents, backend=backend) for backend in ("triton", "chunked")
        )
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    held = Documents.whole(1, 14, position=1)
    found, expected = (
        recurrence.summarize(inputs, state, held, backend=backend).transition for backend in ("triton", "chunked")
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    assert found.all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [16, 10])
def test_on_a_gpu(dtype, decay, size):
    documents = Documents.from_lengths([[1, 700, 1300, 46], [1999]], 2048)
    check(documents, decay, channels=1000, size=size, dtype=dtype)
    check(Documents.whole(1, 6000), decay, channels=100, size=size, dtype=dtype)
