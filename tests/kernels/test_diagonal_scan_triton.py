"""Triton's diagonal scan against the recurrence in float64: under the interpreter, and on a GPU where there is one.

The interpreter takes some milliseconds a step of a loop, so that shapes and tiles are small there.
"""

import pytest
import torch
from recurrence_parts import FEW_TOKENS, Parts, nan_in_fresh_memory

from longreach.kernels.diagonal_scan import DiagonalRecurrence, diagonal_scan
from longreach.kernels.diagonal_scan import triton as kernels
from longreach.kernels.documents import Documents

recurrence = Parts(DiagonalRecurrence())
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


@pytest.fixture
def small(monkeypatch):
    """Tiles of which a few cover the tokens of a test, and memory that is NaN until it is written."""
    monkeypatch.setattr(kernels, "FORWARD", kernels.Tiles(8, 4, 8, 1))
    monkeypatch.setattr(kernels, "BACKWARD", kernels.Tiles(4, 2, 4, 1))
    monkeypatch.setattr(kernels, "CARRY", 4)
    with nan_in_fresh_memory():
        yield


def draw(documents, constant=False, channels=5, dtype=torch.float32, strength=2.0):
    """(x, log_decay), initial state, and gradients of the output and of the final state."""
    torch.manual_seed(0)
    shape = documents.batch, documents.length, channels
    log_decay = -strength * torch.rand(shape[-1:] if constant else shape) ** 4
    x, dout = torch.randn(2, *shape)
    states = (x.to(DEVICE) for x in torch.randn(2, shape[0], channels))
    return tuple(x.to(DEVICE, dtype) for x in (x, log_decay)), *states, dout.to(DEVICE, dtype)


def run(inputs, state, dstate, dout, documents, backend):
    """Output, final state and all gradients; the reference in float64."""
    dtype = torch.float64 if backend == "reference" else inputs[0].dtype
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    leaves.append(state.to(torch.promote_types(dtype, torch.float32)).requires_grad_())
    x, log_decay, state = leaves
    out, final = diagonal_scan(x, log_decay, initial_state=state, documents=documents, backend=backend)
    gradients = torch.autograd.grad([out, final], leaves, [dout.to(dtype), dstate.to(final.dtype)])
    return out, final, *gradients


def check(documents, **settings):
    inputs, state, dstate, dout = draw(documents, **settings)
    found = run(inputs, state, dstate, dout, documents, "triton")
    expected = run(inputs, state, dstate, dout, documents, "reference")
    for a, b in zip(found, expected, strict=True):
        assert (a.double() - b).norm() <= TOLERANCES[inputs[0].dtype] * b.norm()


@pytest.mark.parametrize("constant", [False, True], ids=["a token", "constant"])
@pytest.mark.parametrize("documents", FEW_TOKENS.values(), ids=FEW_TOKENS)
def test_triton_gives_the_recurrence(documents, constant, small):
    check(documents, constant=constant)


def test_strong_decays_and_padding_alone(small):
    check(Documents.whole(1, 10, position=1), strength=200.0)
    check(Documents.from_lengths([[2], []], 3), strength=20.0)


@pytest.mark.parametrize("constant", [False, True], ids=["a token", "constant"])
def test_bfloat16(constant, small, repaired_bf16):
    check(FEW_TOKENS["packed"], constant=constant, dtype=torch.bfloat16)


def test_parts_are_those_of_the_chunked_form(small):
    documents = FEW_TOKENS["cut from rows"]
    inputs, state, _, dout = draw(documents)
    for part in (recurrence.correct, recurrence.summarize_backward):
        found, expected = (
            part(dout.clone(), inputs, state, documents, backend=backend) for backend in ("triton", "chunked")
        )
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("constant", [False, True], ids=["a token", "constant"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_on_a_gpu(dtype, constant):
    documents = Documents.from_lengths([[1, 700, 1300, 46], [1999]], 2048)
    check(documents, constant=constant, channels=1000, dtype=dtype, strength=0.5)
