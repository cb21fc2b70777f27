"""Triton's token-local kernels against the torch forms in float64: interpreted, and on a GPU where there is one."""

import pytest
import torch
from torch.nn import functional as F

from longreach.kernels.pointwise import cross_entropy, gated_norm, rms_norm, rotate, rotations, swiglu
from longreach.kernels.pointwise import triton as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def near(found, expected, dtype):
    for a, b in zip(found, expected, strict=True):
        assert (a.double() - b.double()).norm() <= TOLERANCES[dtype] * b.double().norm() + 1e-12


def draw(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE).to(dtype)


def check_norm(shape, dtype, *, weighted=True, offset=0.0):
    x, dy = draw(*shape, dtype=dtype), draw(*shape, dtype=dtype)
    weight = draw(shape[-1], dtype=dtype) if weighted else None
    leaves = [t.double().requires_grad_() for t in (x, weight) if t is not None]
    y = rms_norm(leaves[0], leaves[1] if weighted else None, 1e-5, offset)
    expected = (y.detach(), *torch.autograd.grad(y, leaves, dy.double()))
    offset = offset if weighted else 1.0
    found, inverse = kernels.norm(x, weight, 1e-5, offset)
    back = kernels.norm_backward(dy, x, weight, inverse, offset)
    assert all(t.dtype == dtype for t in (found, *back) if t is not None)
    near([found, *(t for t in back if t is not None)], expected, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, id="bf16")])
@pytest.mark.parametrize("shape", [(2, 7, 3, 20), (3, 5)], ids=str)
def test_rms_norm(shape, dtype, repaired_bf16, monkeypatch):
    monkeypatch.setattr(kernels, "TILE", 64)
    monkeypatch.setattr(kernels, "SUMS", 3)
    check_norm(shape, dtype)
    check_norm(shape, dtype, offset=1.0)
    check_norm(shape, dtype, weighted=False)


def check_gated(size, dtype):
    gate, up, dy = (draw(*size, dtype=dtype) for _ in range(3))
    leaves = [t.double().requires_grad_() for t in (gate, up)]
    y = swiglu(*leaves)
    expected = (y.detach(), *torch.autograd.grad(y, leaves, dy.double()))
    near([kernels.gated(gate, up), *kernels.gated_backward(dy, gate, up)], expected, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, id="bf16")])
def test_swiglu(dtype, repaired_bf16, monkeypatch):
    monkeypatch.setattr(kernels, "TILE", 64)
    check_gated((3, 50), dtype)


def check_gated_norm(shape, dtype, *, shared, bias=False, **settings):
    x, gate, dy = (draw(*shape, dtype=dtype) for _ in range(3))
    parameters = [draw(*shape[-1 if shared else -2 :], dtype=dtype) for _ in range(1 + bias)]
    leaves = [t.double().requires_grad_() for t in (x, gate, *parameters)]
    y = gated_norm(*leaves, eps=1e-5, **settings)
    expected = (y.detach(), *torch.autograd.grad(y, leaves, dy.double()))
    kind = (settings["activation"] == "silu", settings.get("centred", False), settings.get("gate_first", False))
    weight, offset = (*parameters, None)[:2]
    found = kernels.gated_norm(x, gate, weight, offset, 1e-5, kind)
    back = kernels.gated_norm_backward(dy, x, gate, weight, offset, 1e-5, kind)
    assert all(t.dtype == dtype for t in (found, *back) if t is not None)
    near([found, *(t for t in back if t is not None)], expected, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, id="bf16")])
def test_gated_norm(dtype, repaired_bf16, monkeypatch):
    monkeypatch.setattr(kernels, "TILE", 64)
    monkeypatch.setattr(kernels, "SUMS", 6)
    check_gated_norm((2, 7, 3, 20), dtype, shared=True, activation="silu")
    check_gated_norm((2, 7, 3, 20), dtype, shared=False, bias=True, activation="sigmoid", centred=True)
    check_gated_norm((2, 7, 3, 20), dtype, shared=False, activation="silu", gate_first=True)


def check_turned(shape, half, dtype):
    """Every second head of x, as mixers take parts of a projection, there and back."""
    x, dy = draw(*shape, dtype=dtype)[:, :, ::2], draw(*shape, dtype=dtype)[:, :, ::2]
    positions = 100_000 + torch.arange(shape[0] * shape[1], device=DEVICE).view(shape[:2])
    frequencies = (torch.rand(half) + 0.1).to(DEVICE)
    leaf = x.double().requires_grad_()
    y = rotate(leaf, *rotations(positions, frequencies, 1.3, torch.float64))
    expected = (y.detach(), *torch.autograd.grad(y, leaf, dy.double()))
    turns = rotations(positions, frequencies, 1.3)
    found = kernels.turned(x, *turns, 1.0), kernels.turned(dy, *turns, -1.0)
    assert all(t.dtype == dtype and t.is_contiguous() for t in found)
    near(found, expected, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, id="bf16")])
@pytest.mark.parametrize("half", [3, 8, 10], ids=["6 of 20 dims", "16 of 20 dims", "all dims"])
def test_rotation(half, dtype, repaired_bf16, monkeypatch):
    monkeypatch.setattr(kernels, "TILE", 128)
    check_turned((2, 5, 6, 20), half, dtype)


def check_likelihood(n, vocabulary, dtype, scale=0.7):
    logits, ids = draw(n, vocabulary, dtype=dtype) * 4, torch.randint(vocabulary, (n,), device=DEVICE)
    ids[::3] = -100
    leaf = logits.double().requires_grad_()
    loss = F.cross_entropy(leaf * scale, ids, ignore_index=-100, reduction="sum")
    (expected,) = torch.autograd.grad(loss, leaf)
    lse, picked = torch.full((2, n), torch.nan, device=DEVICE)
    kernels.likelihood(logits, ids, scale, lse, picked)
    found = (lse - picked).masked_fill(ids < 0, 0.0).sum()
    gradient = kernels.likelihood_gradient(logits.clone(), ids, lse, scale)
    assert not gradient[::3].any()
    near([found, gradient], [loss.detach(), expected], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, id="bf16")])
def test_likelihood_and_its_gradient(dtype, repaired_bf16, monkeypatch):
    monkeypatch.setattr(kernels, "VOCABULARY_BLOCK", 32)
    check_likelihood(7, 75, dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(dtype):
    for shape in ((2, 1000, 640), (1, 3000, 10, 64), (7, 8192), (3, 5000)):
        check_norm(shape, dtype, offset=0.5)
        check_norm(shape, dtype, weighted=False)
    check_gated((3, 1001, 1792), dtype)
    check_gated_norm((2, 1000, 6, 128), dtype, shared=True, activation="silu")
    check_gated_norm((2, 1000, 6, 128), dtype, shared=False, bias=True, activation="sigmoid", centred=True)
    check_gated_norm((1, 1000, 1, 4096), dtype, shared=False, activation="silu", gate_first=True)
    check_turned((2, 1000, 14, 128), 64, dtype)
    check_turned((1, 3001, 6, 256), 32, dtype)
    check_likelihood(300, 32768, dtype)
    check_likelihood(33, 50257, dtype, scale=1.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_public_functions_on_a_gpu_are_those_of_the_cpu():
    hidden, weight = torch.randn(2, 700, 96), torch.randn(5000, 96) / 4
    targets = torch.randint(5000, (2, 700))
    targets[0, :99] = -100
    results = []
    for device, dtype in (("cuda", torch.float32), ("cpu", torch.float64)):
        h, w = (x.to(device, dtype).requires_grad_() for x in (hidden, weight))
        loss = cross_entropy(rms_norm(swiglu(h, h), None), w, targets.to(device), chunk=300)
        results.append([x.double().cpu() for x in (loss.detach(), *torch.autograd.grad(loss, (h, w)))])
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() <= 1e-3 * b.norm()
