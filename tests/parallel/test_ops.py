"""Every op over ranks against itself on one: outputs and all gradients, float64, packed documents.

Two ranks with four spans are processes over gloo; others are threads, which start at once and need no second core.
"""

import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from covering import pairwise
from distributed import run_ranks, run_threads
from parallel_cases import CASES, STRATEGIES, agree, fits, is_rows, shared

from longreach.kernels.documents import Documents
from longreach.parallel import collectives, ops
from longreach.parallel.layout import Layout
from longreach.parallel.sequence import Sequence
from longreach.trainer.run import failure

LENGTH = 96
# Two rows: one with documents that cross spans and padding at the end, one that is a single document.
PACKED = ((7, 41, 1, 30, 5), (LENGTH,))
# Rows of which whole ranks are padding, or one-token documents.
SPARSE = ((3, 2), (*[1] * 20, 60))


def compare(
    world: int, spans: int, strategy: str, names: list[str] | None = None, keep: bool = False, run: Any = None
) -> None:
    fitting = [name for name in names or CASES if fits(name, world, strategy)]
    run = run or (run_ranks if (world, spans) == (2, 4) else run_threads)
    run(world, agree, fitting, [PACKED, SPARSE], LENGTH, spans, strategy, 0, keep)


@pytest.mark.slow
def test_one_rank_runs_the_kernels() -> None:
    agree(0, 1, list(CASES), [PACKED, SPARSE], LENGTH, 2)


@pytest.mark.parametrize("strategy", [pytest.param("default", marks=pytest.mark.slow), "gather", "ulysses"])
def test_two_ranks_agree_with_one(strategy: str) -> None:
    compare(2, 2, strategy)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "strategy", "spans"),
    pairwise(
        (2, 3, 4, 8), list(STRATEGIES), (1, 2, 4), where=lambda world, strategy, spans: fits("softmax", world, strategy)
    ),
)
def test_ranks_agree_with_one(world: int, strategy: str, spans: int) -> None:
    compare(world, spans, strategy)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["default", "2-D, two by heads"])
def test_four_processes_agree_with_one(strategy: str) -> None:
    compare(4, 2, strategy, run=run_ranks)


def test_recomputation_by_heads_and_by_gathering() -> None:
    compare(2, 2, "ulysses", ["softmax", "scalar decay"], keep=True)
    compare(2, 2, "gather", ["softmax"], keep=True)


# Of one key the weight is 1, whatever the query; where blocks are selected, rounding may change the lists.
ROUNDED = [name for name in CASES if name != "short window" and not name.startswith("blocks")]


def errors_of_halves(rank: int, world: int, names: list[str]) -> dict[str, tuple[float, float]]:
    """Root mean squares of bfloat16's errors, on one device and on these ranks, of output and sequences' gradients."""
    documents = Documents.from_lengths(((350, 162), (512,)), 512)
    found = {}
    for name in names:
        case = CASES[name]
        inputs, dout = case.draw(2, 512, torch.Generator().manual_seed(3))
        inputs, dout = [x.bfloat16() for x in inputs], dout.bfloat16()

        def run(seq: Sequence, dtype: torch.dtype, case=case, inputs=inputs, dout=dout) -> list[torch.Tensor]:
            here = [(seq.shard(x) if is_rows(x) else x).to(dtype).requires_grad_() for x in inputs]
            out = case.call(*here, seq=seq)
            rows = [x for x in here if is_rows(x)]
            return [out.detach(), *torch.autograd.grad(out, rows, seq.shard(dout).to(out.dtype))]

        seq, single = shared(world, 2, documents), Sequence.single(documents)
        squares = torch.zeros(2, dtype=torch.float64)
        for exact, one, ours in zip(
            run(single, torch.float64), run(single, torch.bfloat16), run(seq, torch.bfloat16), strict=True
        ):
            scale = exact.square().mean().clamp(min=1e-300)  # a gradient may be 0
            squares[0] += seq.shard((one - exact).square()).mean() / scale
            squares[1] += (ours - seq.shard(exact)).square().mean() / scale
        dist.all_reduce(squares)
        found[name] = tuple(squares.sqrt().tolist())
    return found


@pytest.mark.slow
def test_half_precision_is_rounded_once() -> None:
    for name, (one, two) in run_ranks(2, errors_of_halves, ROUNDED)[0].items():
        assert two <= 1.05 * one, name


def drawn(name: str, length: int = LENGTH) -> list[torch.Tensor]:
    return CASES[name].draw(len(PACKED), length, torch.Generator().manual_seed(1))[0]


def silent_peer(rank: int, world: int) -> str:
    """What the first rank raises when the second does not come."""
    group = dist.new_group(timeout=timedelta(seconds=1.5))
    if rank == 1:
        time.sleep(3)
        return ""
    seq = Sequence(Documents.from_lengths(PACKED, LENGTH), Layout(LENGTH, world), rank, group).at(7)
    with pytest.raises(RuntimeError) as caught:
        ops.softmax_attention(*(seq.shard(x) for x in drawn("softmax")), seq=seq)
    return failure.message(caught.value, started=True)


@pytest.mark.slow
def test_a_silent_rank_is_told_with_the_op_that_waited_for_it() -> None:
    said = run_ranks(2, silent_peer)[0]
    assert "has lost another rank" in said
    assert "in RingAttention of layer 7, on rank 0 of the 2 that share a row" in said


@pytest.mark.slow
def test_recomputation_repeats_no_collective() -> None:
    run_ranks(2, counted, timeout=60)


def counted(rank: int, world: int) -> None:
    """Keeping results: the gradients are the same, and the second forward sends nothing."""

    def run(*names: str, keep: bool) -> None:
        agree(rank, world, list(names), [PACKED, SPARSE], LENGTH, 2, keep=keep)

    run("softmax", "scalar decay", "conv", keep=True)
    made = []
    real = collectives.all_gather
    collectives.all_gather = lambda *args, **kwargs: made.append(1) or real(*args, **kwargs)
    try:
        run("scalar decay", keep=True)
        kept = len(made)
        run("scalar decay", keep=False)
        assert kept > 0
        assert len(made) == 2 * kept
    finally:
        collectives.all_gather = real


def test_a_document_elsewhere_changes_nothing() -> None:
    """Leak probe: no decay at all, one document perturbed, every other token's output bitwise as before."""
    run_ranks(2, leak, timeout=60)


def leak(rank: int, world: int) -> None:
    documents = Documents.from_lengths(PACKED, LENGTH)
    seq, touched = shared(world, 2, documents), documents.ids() == 1
    for name in ("softmax", "window", "undecayed", "wide conv", "shift"):
        inputs = drawn(name)
        moved = [
            torch.where(touched.view(2, LENGTH, *[1] * (x.dim() - 2)), x + 1.0, x) if is_rows(x) else x for x in inputs
        ]
        before, after = (
            CASES[name].call(*[seq.shard(x) if is_rows(x) else x for x in xs], seq=seq) for xs in (inputs, moved)
        )
        changed = (before != after).flatten(2).any(-1)
        assert not changed[~seq.shard(touched)].any(), name
        assert changed[seq.shard(touched)].any(), name
