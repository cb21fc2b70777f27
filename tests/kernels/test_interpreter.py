"""The repaired interpreter computes bfloat16 as the hardware does."""

import torch
import triton
import triton.language as tl


@triton.jit
def _affine(x, y, out, total, n, N: tl.constexpr):
    i = tl.arange(0, N)
    a, b = tl.load(x + i, mask=i < n, other=0.0), tl.load(y + i, mask=i < n, other=0.0)
    tl.store(out + i, a * b + a, mask=i < n)
    tl.store(total, tl.sum(a.to(tl.float32) * b.to(tl.float32), axis=0))


@triton.jit
def _product(x, y, out, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    tl.store(out + at, tl.dot(tl.load(x + at), tl.load(y + at)))


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape))).bfloat16()


def test_elementwise_arithmetic_rounds_as_torch_does(repaired_bf16):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, y = draw(29).to(device), draw(29).flip(0).to(device)
    out, total = torch.empty_like(x), torch.empty((), device=device)
    _affine[(1,)](x, y, out, total, 29, N=32)
    exact = x.double() * y.double() + x.double()
    torch.testing.assert_close(out.double(), exact, rtol=2**-7, atol=2**-7)
    torch.testing.assert_close(total.double(), (x.double() * y.double()).sum(), rtol=1e-5, atol=1e-5)


def test_products_are_summed_in_float32(repaired_bf16):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, y = draw(32, 32).to(device), draw(32, 32).T.contiguous().to(device)
    out = torch.empty(32, 32, device=device)
    _product[(1,)](x, y, out, N=32)
    torch.testing.assert_close(out.double(), x.double() @ y.double(), rtol=1e-5, atol=1e-4)
