"""Triton's short convolution against its definition in float64: under the interpreter, and on a GPU if there is one."""

import pytest
import torch

from longreach.kernels.documents import Documents
from longreach.kernels.short_conv import short_conv, token_shift
from longreach.kernels.short_conv import triton as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PACKED = Documents.from_lengths([[3, 1, 1, 20, 5], [26]], 35)
PACKINGS = {
    "1 token": Documents.whole(2, 1),
    "second token": Documents.whole(2, 1, position=1),
    "continued": Documents.whole(1, 37, position=2),
    "packed": PACKED,
    "cut within documents": PACKED.slice(2, 33),
    "all padding": PACKED.slice(31, 35).rows(0, 1),
}
NAMES = ("out", "x", "weight", "bias", "history")


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Blocks smaller than the tokens of a test, two stretches a row, and memory that is NaN until it is written."""
    if DEVICE == "cpu":
        monkeypatch.setattr(kernels, "CHANNELS", 8)
        monkeypatch.setattr(kernels, "STRETCH", 32)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


def draw(documents, taps, dtype, channels=10):
    """x, weight, bias, history and the gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    batch, length = documents.batch, documents.length
    shapes = (
        (batch, length, channels), (channels, taps), (channels,), (batch, taps - 1, channels),
        (batch, length, channels),
    )  # fmt: skip
    return [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes]


def check(documents, taps, activation, *, dtype=torch.float32, bias=True, tolerance=1e-4, **sizes):
    *inputs, dout = draw(documents, taps, dtype, **sizes)
    results = []
    for backend, given in (("triton", inputs), ("reference", [x.double() for x in inputs])):
        x, weight, offset, history = leaves = [x.clone().requires_grad_() for x in given]
        out = short_conv(
            x, weight, bias=offset if bias else None, history=history, documents=documents, activation=activation,
            backend=backend,
        )  # fmt: skip
        grads = torch.autograd.grad(out, leaves, dout.to(out.dtype), allow_unused=not bias)
        results.append((out.detach(), *grads))
    for name, a, b in zip(NAMES, *results, strict=True):
        if b is not None:
            assert a.shape == b.shape, name
            assert a.dtype == dtype, name
            assert (a.double() - b).norm() <= tolerance * b.norm(), name


@pytest.mark.parametrize("documents", PACKINGS.values(), ids=PACKINGS)
def test_outputs_and_gradients_are_those_of_the_definition(documents):
    check(documents, 4, "silu")


@pytest.mark.parametrize(("taps", "activation"), [(1, None), (2, "silu"), (3, None), (9, "silu")])
def test_numbers_of_taps_with_and_without_activation(taps, activation):
    check(PACKED, taps, activation, bias=activation is None)


def test_bfloat16_is_summed_in_float32(repaired_bf16):
    check(PACKED, 4, "silu", dtype=torch.bfloat16, tolerance=2e-2)


@pytest.mark.parametrize("documents", PACKINGS.values(), ids=PACKINGS)
def test_token_shift_is_the_token_before(documents):
    x, _, _, history, dout = draw(documents, 2, torch.float32)
    results = []
    for backend in ("triton", "reference"):
        leaves = [x.clone().requires_grad_(), history.clone().requires_grad_()]
        out = token_shift(leaves[0], history=leaves[1], documents=documents, backend=backend)
        results.append((out, *torch.autograd.grad(out, leaves, dout)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_other_strides_and_no_history():
    x, weight, _, _, dout = draw(Documents.whole(1, 20), 4, torch.float32)
    x, dout = (t.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for t in (x, dout))
    results = []
    for backend in ("triton", "reference"):
        out = short_conv(x, weight, backend=backend)
        results.append((out, *torch.autograd.grad(out, x, dout.detach())))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float32, 1e-4)])
def test_on_a_gpu(activation, dtype, tolerance):
    documents = Documents.from_lengths([[1, 700, 2, 1300, 45], [2000]], 2048)
    check(documents, 4, activation, dtype=dtype, tolerance=tolerance, channels=1500)
