"""What is computed in tiles: outputs, sums and gradients as without tiles, and a peak that does not grow."""

import pytest
import torch
from largest_tensor import LargestTensor
from torch.nn import functional as F

from longreach.kernels.pointwise import tiled

WIDTH, HIDDEN = 6, 40


def problem(tokens, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=generator, dtype=dtype) for shape in ((tokens, WIDTH), (tokens, WIDTH))]
    weights = [torch.randn(shape, generator=generator, dtype=dtype) for shape in ((HIDDEN, WIDTH), (WIDTH, HIDDEN))]
    bias = torch.randn(WIDTH, generator=generator, dtype=dtype)
    for tensor in (*made, *weights, bias):
        tensor.requires_grad_()
    real = torch.arange(tokens) % 5 > 0
    return made, real, [*weights, bias]


def compute_with(weights):
    up, down, bias = weights

    def compute(x, scale, real):
        hidden = F.silu(x @ up.t())
        out = hidden @ down.t() * scale + bias
        return out, torch.where(real, hidden.square().sum(-1), 0.0).sum(), real.sum().to(x.dtype)

    return compute


@pytest.mark.parametrize("size", [1, 7, 16, 17, 100])
def test_tiles_change_nothing(size):
    (x, scale), real, weights = problem(17)
    compute = compute_with(weights)
    dout = torch.randn(17, WIDTH, dtype=torch.float64)
    results = []
    for out, loss, count in (compute(x, scale, real), tiled(compute, (x, scale, real), weights, size)):
        gradients = torch.autograd.grad((out * dout).sum() + 3 * loss, [x, scale, *weights])
        results.append((out, loss, count, *gradients))
    for whole, in_tiles in zip(*results, strict=True):
        torch.testing.assert_close(in_tiles, whole, rtol=1e-12, atol=1e-12)


def test_only_what_is_asked_for_gets_a_gradient():
    (x, scale), real, weights = problem(9)
    compute = compute_with(weights)
    out, loss, _ = tiled(compute, (x.detach(), scale, real), [weights[0], weights[1].detach(), weights[2]], 4)
    whole = torch.autograd.grad(compute(x, scale, real)[1], weights[0])
    torch.testing.assert_close(torch.autograd.grad(loss, weights[0], retain_graph=True), whole)
    out.sum().backward()
    assert x.grad is None
    assert weights[1].grad is None
    assert scale.grad is not None
    assert weights[2].grad is not None


def test_without_gradient_it_is_the_function():
    (x, scale), real, weights = problem(9)
    compute = compute_with(weights)
    with torch.no_grad():
        for whole, in_tiles in zip(compute(x, scale, real), tiled(compute, (x, scale, real), weights, 4), strict=True):
            torch.testing.assert_close(in_tiles, whole)


def test_no_tensor_is_larger_than_a_tile_needs():
    (x, scale), real, weights = problem(300, torch.float32)
    with LargestTensor() as largest:
        out, loss, _ = tiled(compute_with(weights), (x, scale, real), weights, 8)
        (out.sum() + loss).backward()
    assert largest.numel == 300 * WIDTH  # the output, and the gradient of the input; all hidden values are 300 * 40


def test_gradients_of_weights_are_summed_in_float32():
    """In bfloat16 a sum of 1 and many small numbers stays 1."""
    weight = torch.zeros(1, dtype=torch.bfloat16, requires_grad=True)
    x = torch.full((513, 1), 2.0**-9, dtype=torch.bfloat16)
    x[0] = 1.0
    (out,) = tiled(lambda x: x * weight, (x,), [weight], 1)
    out.sum().backward()
    assert weight.grad == torch.tensor(2.0, dtype=torch.bfloat16)
