"""A norm with its gate against the formula in plain operations: every kind, all gradients, and what is refused."""

import pytest
import torch
from torch.nn import functional as F

from longreach.kernels.pointwise import gated_norm, l2_norm

KINDS = {
    "gated deltanet": {"activation": "silu"},
    "lightning": {"activation": "sigmoid"},
    "mlstm": {"activation": "sigmoid", "centred": True},
    "mamba2": {"activation": "silu", "gate_first": True},
    "all": {"activation": "sigmoid", "centred": True, "gate_first": True},
}


def plain(x, gate, weight, bias, eps, activation, centred=False, gate_first=False):
    active = {"silu": F.silu, "sigmoid": torch.sigmoid}[activation](gate)
    u = x * active if gate_first else x
    u = u - u.mean(-1, keepdim=True) if centred else u
    normed = u / (u.square().mean(-1, keepdim=True) + eps).sqrt() * weight
    normed = normed if bias is None else normed + bias
    return normed if gate_first else normed * active


def drawn(shape, weight, dtype=torch.float64, bias=True):
    tensors = [torch.randn(*size, dtype=dtype) for size in (shape, shape, weight, weight)]
    return [x.requires_grad_() for x in tensors[: 4 if bias else 3]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weight", [(10,), (3, 10)], ids=["shared", "per head"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_equals_the_formula_with_all_gradients(kind, weight, bias):
    leaves = drawn((2, 7, 3, 10), weight, bias=bias)
    arguments = (*leaves, None)[:4]
    got = gated_norm(*arguments, eps=1e-3, **KINDS[kind])
    expected = plain(*arguments, 1e-3, **KINDS[kind])
    torch.testing.assert_close(got, expected, atol=1e-9, rtol=1e-9)
    dout = torch.randn_like(got)
    for a, b in zip(torch.autograd.grad(got, leaves, dout), torch.autograd.grad(expected, leaves, dout), strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_near_float64(kind):
    leaves = drawn((2, 50, 3, 16), (3, 16), torch.bfloat16)
    got = gated_norm(*leaves, **KINDS[kind])
    exact = gated_norm(*(x.double() for x in leaves), **KINDS[kind])
    assert got.dtype == torch.bfloat16
    assert (got - exact).norm() < 0.005 * exact.norm()
    gradients = torch.autograd.grad(got.sum(), leaves)
    assert all(g.dtype == torch.bfloat16 and g.shape == x.shape for g, x in zip(gradients, leaves, strict=True))


def test_l2_norm_is_x_over_its_length():
    x = torch.randn(4, 5, 12, dtype=torch.float64, requires_grad=True)
    plain = x / (x.square().sum(-1, keepdim=True) + 1e-3).sqrt()
    dout = torch.randn_like(x)
    got = l2_norm(x, 1e-3)
    torch.testing.assert_close(got, plain, atol=1e-12, rtol=1e-12)
    a, b = (torch.autograd.grad(y, x, dout)[0] for y in (got, plain))
    torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


def test_bad_input():
    x = torch.ones(2, 3, 4)
    for change, message in [
        ({"gate": torch.ones(2, 3, 5)}, "x and gate must be alike"),
        ({"gate": x.double()}, "x and gate must be alike"),
        ({"weight": torch.ones(3)}, r"weight must be \[D\] or \[H, D\]"),
        ({"bias": torch.ones(3, 4)}, "bias like it"),
        ({"activation": "relu"}, "activation must be one of silu, sigmoid; got 'relu'"),
    ]:
        with pytest.raises(ValueError, match=message):
            gated_norm(**{"x": x, "gate": x, "weight": torch.ones(4), **change})
