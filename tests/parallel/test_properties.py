"""Any op, any packing, any layout, any strategy: ranks agree with one device, and gradients are those of the outputs.

Thousands of cases: `bash launch/test.sh -m many`.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from distributed import run_threads
from hypothesis import given, settings
from hypothesis import strategies as st
from parallel_cases import CASES, STRATEGIES, agree, fits, is_rows, local, shared

from longreach.kernels.documents import Documents
from longreach.parallel.collectives import sum_over_ranks


@st.composite
def drawn(draw):
    """(ranks, name, packing, length, spans, strategy, seed), for a comparison with the references."""
    ranks = draw(st.sampled_from([2, 3, 4]))
    spans = draw(st.integers(1, 4))
    length = ranks * spans * draw(st.integers(1, 13))
    name = draw(st.sampled_from(list(CASES)))
    packing = tuple(draw(documents_of(length)) for _ in range(draw(st.integers(1, 2))))
    strategy = draw(st.sampled_from([key for key in STRATEGIES if fits(name, ranks, key)]))
    return ranks, name, packing, length, spans, strategy, draw(st.integers(0, 2**31 - 1))


@st.composite
def documents_of(draw, length):
    """Lengths of documents that fill a row, or end before it does."""
    filled = draw(st.one_of(st.just(length), st.integers(0, length)))
    borders = sorted(draw(st.sets(st.integers(1, max(1, filled - 1)), max_size=8)))
    edges = [0, *(border for border in borders if border < filled), filled]
    return tuple(b - a for a, b in pairwise(edges) if b > a)


def check(case) -> None:
    ranks, name, packing, *rest = case
    run_threads(ranks, agree, [name], [packing], *rest, False, "reference")


@pytest.mark.slow
@given(drawn())
@settings(deadline=None, max_examples=400)
def test_ranks_agree_with_one_device(case) -> None:
    check(case)


@pytest.mark.slow
@pytest.mark.many
@given(drawn())
@settings(deadline=None, max_examples=5000)
def test_ranks_agree_with_one_device_in_thousands_of_cases(case) -> None:
    check(case)


def differences(rank: int, world: int, name: str, strategy: str, owners: str) -> None:
    """One coordinate on one rank is moved at a time, by all ranks alike; the projection is summed over all ranks.

    That is a coordinate of one rank that is drawn, or of every rank.
    """
    length, case = 8 * world, CASES[name]
    generator = torch.Generator().manual_seed(1)
    inputs, dout = case.draw(2, length, generator)
    seq = shared(world, 2, Documents.from_lengths([[5, length - 7], [length]], length), strategy)
    here = local(inputs, seq)

    def projection() -> float:
        with torch.no_grad():
            total = (case.call(*here, seq=seq) * seq.shard(dout)).sum()
        sum_over_ranks(total, seq)
        return total.item()

    case.call(*here, seq=seq).backward(seq.shard(dout))
    step = 1e-5
    for index, x in enumerate(here):
        constant = not is_rows(inputs[index])
        if constant:
            sum_over_ranks(x.grad, seq)
        drawn_owner = int(torch.randint(world, (), generator=generator))
        for owner in [drawn_owner] if constant or owners == "drawn" else range(world):
            place = int(torch.randint(x.numel(), (), generator=generator))
            values = []
            for sign in (1.0, -1.0):
                moved = x.data.view(-1)[place].clone()
                if constant or rank == owner:
                    x.data.view(-1)[place] += sign * step
                values.append(projection())
                x.data.view(-1)[place] = moved
            found = torch.tensor((values[0] - values[1]) / (2 * step), dtype=torch.float64)
            expected = x.grad.reshape(-1)[place].clone() * (rank == owner)
            sum_over_ranks(expected, seq)
            torch.testing.assert_close(
                found, expected, rtol=1e-5, atol=1e-6, msg=lambda text, i=index: f"{name}, input {i}: {text}"
            )


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [strategy for strategy in STRATEGIES if fits("softmax", 4, strategy)])
@pytest.mark.parametrize("owners", ["drawn", pytest.param("every", marks=pytest.mark.many)])
def test_gradients_are_those_of_finite_differences(strategy: str, owners: str) -> None:
    for name in CASES:
        if fits(name, 4, strategy):
            run_threads(4, differences, name, strategy, owners)
