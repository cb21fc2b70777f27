"""Triton's WKV against the recurrence in float64: under the interpreter, and on a GPU where there is one."""

import pytest
import torch
from recurrence_parts import FEW_TOKENS, Parts, nan_in_fresh_memory

from longreach.kernels.documents import Documents
from longreach.kernels.wkv import WKVRecurrence, wkv
from longreach.kernels.wkv import triton as kernels

recurrence = Parts(WKVRecurrence())
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
DECAYS = ("constant", "token", "none")


@pytest.fixture
def small(monkeypatch):
    """Tiles of which a few cover the tokens of a test, and memory that is NaN until it is written."""
    monkeypatch.setattr(kernels, "FORWARD", kernels.Tiles(4, 3, 8, 1))
    monkeypatch.setattr(kernels, "BACKWARD", kernels.Tiles(4, 2, 8, 1))
    with nan_in_fresh_memory():
        yield


def draw(documents, decay="constant", channels=5, dtype=torch.float32, strength=2.0):
    """Inputs, an initial state, and gradients of the final state and of the output."""
    torch.manual_seed(0)
    shape = documents.batch, documents.length, channels
    k, v, dout = torch.randn(3, *shape)
    log_decay = -strength * torch.rand(shape[-1:] if decay == "constant" else shape) ** 4
    bonus = None if decay == "none" else torch.randn(channels).to(DEVICE)
    state, dstate = torch.randn(2, shape[0], channels, 3)
    state[..., 1] = state[..., 1].abs() + 0.5
    vectors = [x.to(DEVICE, dtype) for x in (3 * k, v)]
    inputs = (*vectors, None if decay == "none" else log_decay.to(DEVICE), bonus)
    return inputs, state.to(DEVICE), dstate.to(DEVICE), dout.to(DEVICE, dtype)


def run(inputs, state, dstate, dout, documents, backend):
    """Output, final state and all gradients; the reference in float64."""
    exact = backend == "reference"
    leaves = [
        x if x is None else x.detach().to(torch.float64 if exact else x.dtype).requires_grad_()
        for x in (*inputs, state)
    ]
    out, final = wkv(*leaves[:4], initial_state=leaves[4], documents=documents, backend=backend)
    wanted = [x for x in leaves if x is not None]
    return out, final, *torch.autograd.grad([out, final], wanted, [dout.to(out.dtype), dstate.to(final.dtype)])


def check(documents, **settings):
    inputs, state, dstate, dout = draw(documents, **settings)
    found = run(inputs, state, dstate, dout, documents, "triton")
    expected = run(inputs, state, dstate, dout, documents, "reference")
    for a, b in zip(found, expected, strict=True):
        assert (a.double() - b).norm() <= TOLERANCES[inputs[0].dtype] * b.norm()


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize(
    "documents",
    [
        FEW_TOKENS["1 token"],
        FEW_TOKENS["one chunk"],
        *(pytest.param(FEW_TOKENS[name], marks=pytest.mark.slow) for name in ("packed", "cut from rows")),
    ],
    ids=FEW_TOKENS,
)
def test_triton_gives_the_recurrence(documents, decay, small):
    check(documents, decay=decay)


@pytest.mark.slow
def test_strong_decays_and_padding_alone(small):
    check(Documents.whole(1, 10, position=1), strength=200.0)
    check(Documents.from_lengths([[2], []], 3), strength=20.0)


@pytest.mark.slow
def test_bfloat16(small, repaired_bf16):
    check(FEW_TOKENS["packed"], dtype=torch.bfloat16)


@pytest.mark.slow
def test_parts_are_those_of_the_chunked_form(small):
    documents = FEW_TOKENS["cut from rows"]
    inputs, state, _, dout = draw(documents)
    outs, dstates = [], []
    for backend in ("triton", "chunked"):
        out = recurrence.begin(inputs, documents, backend).out
        outs.append(recurrence.correct(out, inputs, state, documents, backend=backend))
        dstates.append(recurrence.summarize_backward(dout, inputs, state, documents, backend=backend))
    for found, expected in (outs, dstates):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_on_a_gpu(dtype, decay):
    documents = Documents.from_lengths([[1, 700, 1300, 46], [1999]], 2048)
    check(documents, decay=decay, channels=1000, dtype=dtype, strength=0.5)
