"""Factors of a decay per key channel about the middle of each chunk: what they give is the sum over tokens itself."""

import pytest
import torch

from longreach.kernels.chunks.centred import CentredChannelDecay
from longreach.kernels.chunks.slabs import Grid, Lanes

LENGTH, HEADS, KEYS, CHUNK = 76, 2, 5, 32  # two chunks and a part of one


def drawn(fall, dtype):
    """Queries, keys and decays that come to between half of `fall` and `fall` over the half of a chunk."""
    generator = torch.Generator().manual_seed(0)
    q, k, share = (torch.randn(1, LENGTH, HEADS, KEYS, dtype=dtype, generator=generator) for _ in range(3))
    return q, k, (1 + share.sigmoid()) * fall / CHUNK


def dense(q, k, log_decay):
    """Of each chunk of one row: Σ_c q_ic k_jc e^{g_{j+1,c} + … + g_ic} for j <= i, `[chunks, H, C, C]`."""
    q, k, g = (
        torch.nn.functional.pad(x[0], (0, 0, 0, 0, 0, -LENGTH % CHUNK)).unflatten(0, (-1, CHUNK)).transpose(1, 2)
        for x in (q, k, log_decay)
    )
    tokens = torch.arange(CHUNK)
    between = (tokens > tokens[:, None, None]) & (tokens <= tokens[:, None])  # [j, i, t]
    exponents = torch.einsum("jit,nhtc->nhijc", between.to(g.dtype), g)
    return torch.einsum("nhic,nhjc,nhijc->nhij", q, k, exponents.exp()).tril()


@pytest.mark.parametrize(("fall", "centred"), [(-0.1, True), (-39.0, True), (-100.0, False), (-torch.inf, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_and_their_gradients_are_those_of_the_sum(fall, centred, dtype):
    q, k, log_decay = drawn(max(fall, -100.0), dtype)
    if fall == -torch.inf:
        log_decay[0, 40, 1, 2] = fall
    grid = Grid(1, HEADS, LENGTH, dtype, torch.device("cpu"), CHUNK, 32)
    decay, parts = CentredChannelDecay(log_decay, grid), [Lanes(x, grid) for x in (q, k)]
    (slab,) = grid.slabs()
    decay.load(slab, None)
    assert decay.centred == (centred or (dtype == torch.float64 and fall == -100.0))

    wide = [x.double().clone().requires_grad_() for x in (q, k)]
    expected = dense(*wide, log_decay.double().clamp(min=-1e3))
    given = [part.load(slab) for part in parts]
    out = grid.workspace(CHUNK, zero=True).flatten(0, 2)
    decay.scores(*given, out)
    worst = 40 * torch.finfo(dtype).eps  # a rounded exponent of 40
    torch.testing.assert_close(out.view(expected.shape).double(), expected.detach(), rtol=worst, atol=worst)

    dscores = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = torch.autograd.grad(expected, wide, dscores)
    found = [torch.zeros_like(x) for x in given]
    decay.add_gradients(dscores.to(dtype).view(out.shape), *given, *found)
    for each, gradient in zip(found, gradients, strict=True):
        by_token = each.unflatten(0, (-1, HEADS)).transpose(1, 2).flatten(0, 1)[:LENGTH]
        torch.testing.assert_close(by_token.double(), gradient[0], rtol=worst, atol=8 * worst)


def test_entering_leaving_and_passing_factors_are_those_of_the_sums():
    _, _, log_decay = drawn(-30.0, torch.float32)
    grid = Grid(1, HEADS, LENGTH, torch.float32, torch.device("cpu"), CHUNK, 32)
    decay = CentredChannelDecay(log_decay, grid)
    decay.load(grid.slabs()[0], None)
    padded = torch.nn.functional.pad(log_decay[0].double(), (0, 0, 0, 0, 0, -LENGTH % CHUNK))
    steps = padded.unflatten(0, (-1, CHUNK)).transpose(1, 2)  # [chunks, H, C, K]
    sums = steps.cumsum(2)
    ends = sums[:, :, -1:]
    close = {"rtol": 1e-5, "atol": 0.0}
    torch.testing.assert_close(decay.enter.double(), sums.exp().flatten(0, 1), **close)
    torch.testing.assert_close(decay.leave.double(), (ends - sums).exp().flatten(0, 1), **close)
    torch.testing.assert_close(torch.stack(decay.through).double(), ends.exp().mT, **close)
