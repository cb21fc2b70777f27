"""Embedding against torch's, and its gradient in bfloat16 against float64."""

import pytest
import torch
from torch.nn import functional as F

from longreach.kernels.pointwise import embedding


def draw(length):
    generator = torch.Generator().manual_seed(length)
    tokens = torch.randint(7, (2, length), generator=generator)
    weight, dy = (torch.randn(*shape, 6, dtype=torch.float64, generator=generator) for shape in [(11,), (2, length)])
    return tokens, weight.requires_grad_(), dy


@pytest.mark.parametrize("length", [0, 1, 63])
def test_equals_torchs_with_its_gradient(length):
    tokens, weight, dy = draw(length)
    got, want = embedding(tokens, weight), F.embedding(tokens, weight)
    assert torch.equal(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, weight, dy), torch.autograd.grad(want, weight, dy))


def test_a_gradient_in_bfloat16_is_that_of_float64_rounded_once():
    tokens, weight, dy = draw(4096)
    dy = (dy + 1).bfloat16()  # of one sign for the most part: a sum that is rounded stops growing
    (exact,) = torch.autograd.grad(F.embedding(tokens, weight), weight, dy.double())
    low = weight.detach().bfloat16().requires_grad_()
    (got,) = torch.autograd.grad(embedding(tokens, low), low, dy)
    assert got.dtype == torch.bfloat16
    assert (got.double() - exact).norm() < 2**-8 * exact.norm()
