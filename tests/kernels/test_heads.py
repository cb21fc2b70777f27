"""Factors per head against plain arithmetic, gradients too, over more tokens than a tile has."""

import pytest
import torch

from longreach.kernels.pointwise import add_skip, scale_heads, tiles

SHAPE = 2, 13, 3, 4


def draw(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_()


def assert_same(ours, plain, inputs, tolerance=1e-12):
    found, wanted = ours(*inputs), plain(*inputs)
    assert found.dtype == wanted.dtype
    dout = torch.randn_like(wanted)
    pairs = zip(
        (found, *torch.autograd.grad(found, inputs, dout)), (wanted, *torch.autograd.grad(wanted, inputs, dout)),
        strict=True,
    )  # fmt: skip
    for a, b in pairs:
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(tiles, "TILE", 5 * 12)  # five tokens: the last tile of 26 is shorter


def test_a_factor_of_each_token_scales_its_heads():
    assert_same(scale_heads, lambda x, factor: x * factor[..., None], (draw(*SHAPE), draw(*SHAPE[:3])))


def test_a_skip_adds_its_part_of_each_head():
    assert_same(add_skip, lambda out, x, skip: out + skip[:, None] * x, (draw(*SHAPE), draw(*SHAPE), draw(3)))


def test_factors_may_be_wider_than_what_they_scale():
    x, out = (draw(*SHAPE, dtype=torch.bfloat16) for _ in range(2))
    factor, skip = draw(*SHAPE[:3], dtype=torch.float32), draw(3, dtype=torch.float32)
    assert_same(scale_heads, lambda x, factor: x * factor.to(x.dtype)[..., None], (x, factor), 0.05)
    assert_same(add_skip, lambda out, x, skip: out + skip.to(x.dtype)[:, None] * x, (out, x, skip), 0.1)
