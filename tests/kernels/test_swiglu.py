"""SwiGLU against its formula and autograd."""

import pytest
import torch
from torch.nn import functional as F

from longreach.kernels.pointwise import swiglu


@pytest.mark.parametrize("length", [63, 1501])  # of one tile and of two
def test_equals_the_formula_with_gradients(length):
    gate, up = (torch.randn(2, length, 24, dtype=torch.float64, requires_grad=True) for _ in range(2))
    dy = torch.randn(2, length, 24, dtype=torch.float64)
    got, want = swiglu(gate, up), F.silu(gate) * up
    torch.testing.assert_close(got, want)
    for a, b in zip(torch.autograd.grad(got, (gate, up), dy), torch.autograd.grad(want, (gate, up), dy), strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


@pytest.mark.slow
def test_gradcheck_and_bfloat16():
    gate, up = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(swiglu, (gate, up))
    low = [x.detach().bfloat16().requires_grad_() for x in (gate, up)]
    y = swiglu(*low)
    assert y.dtype == torch.bfloat16
    assert [g.dtype for g in torch.autograd.grad(y.sum(), low)] == [torch.bfloat16] * 2


def test_bad_input():
    with pytest.raises(ValueError, match="gate and up must be alike"):
        swiglu(torch.ones(2, 3), torch.ones(2, 4))
