"""RMS norm against torch's and its autograd."""

import pytest
import torch
from torch.nn import functional as F

from longreach.kernels.pointwise import rms_norm


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(1, 1, 8), (2, 63, 24), (2, 5, 3, 16), (1, 3001, 24)])  # the last is of two tiles
def test_equals_torch_with_gradients(shape, offset):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(shape[-1], dtype=torch.float64, requires_grad=True)
    dy = torch.randn(shape, dtype=torch.float64)
    got, want = rms_norm(x, weight, 1e-5, offset), F.rms_norm(x, shape[-1:], weight + offset, 1e-5)
    torch.testing.assert_close(got, want, atol=1e-9, rtol=1e-9)
    for a, b in zip(torch.autograd.grad(got, (x, weight), dy), torch.autograd.grad(want, (x, weight), dy), strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


@pytest.mark.slow
def test_gradcheck_without_weight():
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(rms_norm(x, None), F.rms_norm(x, (5,), eps=1e-6))
    assert torch.autograd.gradcheck(lambda x: rms_norm(x, None), x)


def test_bfloat16_is_normalised_in_float32():
    x = (100 + torch.randn(4, 512)).bfloat16().requires_grad_()
    weight = torch.randn(512, requires_grad=True)
    y = rms_norm(x, weight)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, F.rms_norm(x.float(), (512,), weight, 1e-6).bfloat16())
    dx, dweight = torch.autograd.grad(y.float().square().sum(), (x, weight))
    assert (dx.dtype, dweight.dtype) == (torch.bfloat16, torch.float32)
    wide = x.detach().double().requires_grad_()
    (want,) = torch.autograd.grad(F.rms_norm(wide, (512,), weight.double(), 1e-6).square().sum(), wide)
    assert (dx - want).norm() / want.norm() < 0.02


def test_zero_rows_stay_finite():
    x = torch.zeros(2, 4, requires_grad=True)
    y = rms_norm(x, torch.ones(4))
    y.sum().backward()
    assert not y.any()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_bad_input():
    with pytest.raises(ValueError, match=r"weight must be of shape \[4\]"):
        rms_norm(torch.ones(2, 4), torch.ones(3))
    with pytest.raises(ValueError, match="offset must come with a weight"):
        rms_norm(torch.ones(2, 4), None, offset=1.0)
