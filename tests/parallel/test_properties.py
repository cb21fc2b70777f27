"""Any op, any packing, any layout, any strategy: ranks agree with one device, and gradients are those of the outputs.

Thousands of cases: `bash launch/test.sh -m many`.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from parallel_cases import CASES, Case, is_constant
from torch import Tensor

from longreach.kernels.documents import Documents
from longreach.parallel.layout import Layout
from longreach.parallel.mesh import Mesh
from longreach.parallel.sequence import Sequence
from longreach.parallel.strategy import Strategy

STRATEGIES = {
    "default": (Strategy(), 1),
    "gather": (Strategy("gather"), 1),
    "ulysses": (Strategy("ulysses", "ulysses"), 0),  # all ranks
    "2-D": (Strategy("ulysses", "ulysses"), 2),
}


@st.composite
def drawn(draw):
    """(ranks, spans, span length, documents of each row, case, strategy, seed)."""
    ranks = draw(st.sampled_from([2, 3, 4]))
    spans = draw(st.integers(1, 4))
    length = ranks * spans * draw(st.integers(1, 13))
    name = draw(st.sampled_from(list(CASES)))
    rows = [draw(documents_of(length)) for _ in range(draw(st.integers(1, 2)))]
    strategy = draw(st.sampled_from([key for key in STRATEGIES if fits(name, ranks, key)]))
    return ranks, spans, length, rows, name, strategy, draw(st.integers(0, 2**31 - 1))


@st.composite
def documents_of(draw, length):
    """Lengths of documents that fill a row, or end before it does."""
    filled = draw(st.one_of(st.just(length), st.integers(0, length)))
    borders = sorted(draw(st.sets(st.integers(1, max(1, filled - 1)), max_size=8)))
    edges = [0, *(border for border in borders if border < filled), filled]
    return [b - a for a, b in pairwise(edges) if b > a]


def fits(name: str, ranks: int, strategy: str) -> bool:
    """Four heads come out even among two ranks or four."""
    if strategy == "default":
        return True
    if strategy == "gather":
        return CASES[name].keys
    return CASES[name].by_heads and ranks in ((2, 4) if strategy == "ulysses" else (4,))


def one_device(case: Case, inputs: list[Tensor], documents: Documents, dout: Tensor) -> tuple[Tensor, list[Tensor]]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = case.call(*leaves, seq=Sequence.single(documents, backend="reference"))
    return out.detach(), list(torch.autograd.grad(out, leaves, dout))


def shared(rank: int, world: int, spans: int, documents: Documents, strategy: str) -> Sequence:
    chosen, ulysses = STRATEGIES[strategy]
    mesh = Mesh.create(world, ulysses or world)
    return Sequence.shared(documents, Layout(documents.length, world, spans), mesh, chosen)


def agree(rank: int, world: int, spans: int, length: int, rows, name: str, strategy: str, seed: int) -> None:
    case, documents = CASES[name], Documents.from_lengths(rows, length)
    generator = torch.Generator().manual_seed(seed)
    inputs = case.inputs(len(rows), length, generator)
    dout = torch.randn(case.output(len(rows), length), dtype=torch.float64, generator=generator)
    out, gradients = one_device(case, inputs, documents, dout)
    seq = shared(rank, world, spans, documents, strategy)
    local = [(x if is_constant(x, length) else seq.shard(x)).clone().requires_grad_() for x in inputs]
    found = case.call(*local, seq=seq)
    found.backward(seq.shard(dout))
    close(found, seq.shard(out), "output")
    for index, (x, gradient) in enumerate(zip(local, gradients, strict=True)):
        if is_constant(inputs[index], length):
            dist.all_reduce(x.grad)
        else:
            gradient = seq.shard(gradient)
        close(x.grad, gradient, f"gradient of input {index}")


def close(found: Tensor, expected: Tensor, what: str) -> None:
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9 * scale, msg=lambda text: f"{what}: {text}")


@pytest.mark.slow
@given(drawn())
@settings(deadline=None, max_examples=400)
def test_ranks_agree_with_one_device(case) -> None:
    ranks, *rest = case
    run_ranks(ranks, agree, *rest)


@pytest.mark.slow
@pytest.mark.many
@given(drawn())
@settings(deadline=None, max_examples=5000)
def test_ranks_agree_with_one_device_in_thousands_of_cases(case) -> None:
    ranks, *rest = case
    run_ranks(ranks, agree, *rest)


def differences(rank: int, world: int, name: str, strategy: str) -> None:
    """One coordinate on one rank is moved at a time, by all ranks alike; the projection is summed over all ranks."""
    length, rows = 4 * world, [[5, 4 * world - 7], [4 * world]]
    case, documents = CASES[name], Documents.from_lengths(rows, length)
    generator = torch.Generator().manual_seed(1)
    inputs = case.inputs(2, length, generator)
    dout = torch.randn(case.output(2, length), dtype=torch.float64, generator=generator)
    seq = shared(rank, world, 2, documents, strategy)
    local = [(x if is_constant(x, length) else seq.shard(x)).clone().requires_grad_() for x in inputs]

    def projection() -> float:
        with torch.no_grad():
            total = (case.call(*local, seq=seq) * seq.shard(dout)).sum()
        dist.all_reduce(total)
        return total.item()

    case.call(*local, seq=seq).backward(seq.shard(dout))
    step = 1e-5
    for index, x in enumerate(local):
        constant = is_constant(inputs[index], length)
        if constant:
            dist.all_reduce(x.grad)
        for owner in range(1 if constant else world):
            place = int(torch.randint(x.numel(), (), generator=generator))
            values = []
            for sign in (1.0, -1.0):
                moved = x.data.view(-1)[place].clone()
                if constant or rank == owner:
                    x.data.view(-1)[place] += sign * step
                values.append(projection())
                x.data.view(-1)[place] = moved
            found = torch.tensor((values[0] - values[1]) / (2 * step), dtype=torch.float64)
            expected = x.grad.reshape(-1)[place].clone()
            dist.broadcast(expected, owner)
            torch.testing.assert_close(
                found, expected, rtol=1e-5, atol=1e-6, msg=lambda text, i=index: f"{name}, input {i}: {text}"
            )


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradients_are_those_of_finite_differences(strategy: str) -> None:
    for name in CASES:
        if fits(name, 4, strategy):
            run_ranks(4, differences, name, strategy)
