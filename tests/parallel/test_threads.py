"""Ranks as threads: the same collectives and the same ops as on processes, and no wait without an end."""

import threading
import time

import pytest
import torch
from distributed import run_ranks, run_threads
from largest_tensor import LargestTensor
from parallel_cases import STRATEGIES, agree, fits, shared
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from longreach.kernels.documents import Documents
from longreach.kernels.masks import Mask
from longreach.parallel import collectives, ops
from longreach.parallel.collectives import (
    Gathering,
    all_to_all,
    counting,
    exchange,
    finish,
    scatter_sum,
    sum_over_ranks,
)
from longreach.parallel.layout import Layout
from longreach.parallel.mesh import Mesh
from longreach.parallel.sequence import Sequence
from longreach.parallel.strategy import Strategy
from longreach.parallel.threads import run_as_threads, this_rank

LENGTH = 96
PACKED = ((7, 41, 1, 30, 5), (LENGTH,))


def row(rank: int, world: int, ulysses: int = 1) -> Sequence:
    mesh = Mesh.create(world, ulysses)
    return Sequence.shared(Documents.whole(1, 4 * world), Layout(4 * world, world), mesh, Strategy())


def mine(rank: int, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(rank)).to(dtype)


def gathered(rank: int, world: int) -> list[torch.Tensor]:
    seq = row(rank, world)
    found = []
    for x in (mine(rank, 2, 3), mine(rank, 3, 2).T, mine(rank, 0, 3), mine(rank, 2, dtype=torch.bfloat16) > 0):
        gathering = Gathering(x, seq)
        found.append(gathering.wait())
    return found


def exchanged_all(rank: int, world: int) -> list[torch.Tensor]:
    seq = row(rank, world)
    assert seq.group is not None
    return [all_to_all(mine(rank, world, 2), seq.group), scatter_sum(mine(rank, world, 3), seq)]


def summed(rank: int, world: int) -> list[torch.Tensor]:
    seq, x = row(rank, world), mine(rank, 3, 2)
    sum_over_ranks(x, seq)
    y = mine(rank, 2).requires_grad_()
    sum_over_ranks(y.detach(), seq)
    return [x, y.detach()]


def passed_round(rank: int, world: int) -> list[torch.Tensor]:
    """Two messages at once to the next rank, waited for out of order, while another goes the other way."""
    seq, after, before = row(rank, world), (rank + 1) % world, (rank - 1) % world
    first, second, back = torch.zeros(2), torch.zeros(3).double(), torch.zeros(2)
    sends = [(mine(rank, 2).float(), after), (mine(rank, 3), after), (mine(-1 - rank, 2).float(), before)]
    works = exchange(sends, [(first, before), (second, before), (back, after)], seq)
    finish(works[::-1])
    return [first, second, back]


def one_sends(rank: int, world: int) -> list[torch.Tensor]:
    """The others have nothing to say."""
    received = torch.zeros(2)
    receives = [(received, 0)] if rank == world - 1 else []
    finish(exchange([(torch.ones(2), world - 1)] if rank == 0 else [], receives, row(rank, world)))
    return [received]


def in_small_groups(rank: int, world: int) -> list[torch.Tensor]:
    """Pairs of neighbours, and those that hold the same heads."""
    mesh = Mesh.create(world, 2)
    heads = mesh.heads
    assert heads is not None
    assert heads.ring is not None
    return [all_to_all(mine(rank, 2, 2), heads.group), all_to_all(mine(rank, world // 2, 2), heads.ring)]


CONTRACT = [gathered, exchanged_all, summed, passed_round, one_sends]


@pytest.mark.parametrize("function", CONTRACT)
def test_collectives_are_those_of_processes(function) -> None:
    for expected, found in zip(run_ranks(3, function), run_threads(3, function), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.slow
def test_groups_within_a_row_are_those_of_processes() -> None:
    for expected, found in zip(run_ranks(4, in_small_groups), run_threads(4, in_small_groups), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def grid(rank: int, world: int) -> tuple[int, ...]:
    mesh = Mesh.create(2)
    return mesh.rank, mesh.world_size, mesh.data_rank, mesh.sequence_rank, mesh.data_ranks


def test_a_mesh_of_threads() -> None:
    assert run_threads(4, grid) == [(0, 4, 0, 0, 2), (1, 4, 0, 1, 2), (2, 4, 1, 0, 2), (3, 4, 1, 1, 2)]
    assert this_rank() is None


def test_what_is_received_is_a_copy() -> None:
    def change(rank: int) -> list[torch.Tensor]:
        seq, x, received = row(rank, 2), torch.full((2, 1), float(rank)), torch.empty(1)
        assert seq.group is not None
        found = [Gathering(x, seq).wait(), all_to_all(x, seq.group)]
        works = exchange([(x[0], 1 - rank)], [(received, 1 - rank)], seq)
        x += 10
        finish(works)
        return [*found, received]

    zero, one = torch.zeros(2, 1), torch.ones(2, 1)
    both = torch.stack([zero, one]), torch.cat([zero[:1], one[:1]])
    torch.testing.assert_close(run_as_threads(2, change), [[*both, one[0]], [*both, zero[0]]])


def test_tensors_without_data_travel_too() -> None:
    def travel(rank: int) -> list[torch.Size]:
        seq = row(rank, 2)
        x, received = mine(rank, 2, 3).to("meta"), torch.empty(2, device="meta")
        assert seq.group is not None
        sum_over_ranks(x, seq)
        finish(exchange([(x[:, 0], 1 - rank)], [(received.double(), 1 - rank)], seq))
        return [Gathering(x, seq).wait().shape, all_to_all(x, seq.group).shape]

    assert run_as_threads(2, travel) == [[torch.Size([2, 2, 3]), torch.Size([2, 3])]] * 2


@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if fits("softmax", 2, name)])
def test_ops_agree_with_one_device(strategy: str) -> None:
    """Some of each kind; `test_ops` runs all of them on more threads."""
    names = [name for name in ("softmax", "scalar decay", "delta", "conv", "blocks of NSA") if fits(name, 2, strategy)]
    run_threads(2, agree, names, [PACKED], LENGTH, 2, strategy, 0, False)


def test_recomputation_on_threads() -> None:
    run_threads(2, agree, ["softmax", "scalar decay", "conv", "blocks of NSA"], [PACKED], LENGTH, 2, "default", 0, True)


def test_backward_runs_in_the_thread_of_its_rank() -> None:
    class Where(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, threads):
            ctx.threads = threads
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            ctx.threads.append(threading.current_thread())
            return gradient, None

    def differentiate(rank: int) -> bool:
        threads: list[threading.Thread] = []
        Where.apply(torch.ones(2, requires_grad=True), threads).sum().backward()
        return threads == [threading.current_thread()] and not torch._C._is_multithreading_enabled()

    assert run_as_threads(3, differentiate) == [True] * 3
    assert torch._C._is_multithreading_enabled()


def test_each_rank_counts_what_it_sends() -> None:
    def count(rank: int) -> dict[str, int]:
        seq = shared(2, 1, Documents.whole(1, 8))
        x = torch.ones(1, 4, 1, 4)
        with counting() as counts:
            ops.softmax_attention(x, x, x, seq=seq, mask=Mask())
        return counts

    before = collectives.sent().copy()
    assert run_as_threads(2, count) == [{"exchange": 4 * 4 * 2 * 4}, {}]  # the second has nobody behind it
    assert collectives.sent() == before


def test_the_first_error_ends_all_ranks() -> None:
    ended = []

    def fail(rank: int) -> None:
        seq = row(rank, 3)
        if rank == 1:
            raise LookupError("no such token")
        try:
            Gathering(torch.ones(2), seq).wait()
        finally:
            ended.append(rank)

    with pytest.raises(LookupError, match="no such token") as caught:
        run_as_threads(3, fail)
    assert caught.value.__notes__ == ["on rank 1 of 3, which are threads"]
    assert sorted(ended) == [0, 2]


def test_an_error_that_all_agree_on() -> None:
    def disagree(rank: int) -> str:
        with pytest.raises(ValueError, match="rank 2 failed") as caught:
            collectives.agree("rank 2 failed" if rank == 2 else None, 3)
        return str(caught.value)

    assert run_as_threads(3, disagree) == ["rank 2 failed"] * 3


def test_an_error_in_backward_ends_all_ranks() -> None:
    def fail(rank: int) -> None:
        x = torch.ones(1, 4, 1, 4, requires_grad=True)
        out = ops.softmax_attention(x, x, x, seq=shared(2, 1, Documents.whole(1, 8)), mask=Mask())
        if rank == 0:
            raise LookupError("before backward")
        out.sum().backward()

    with pytest.raises(LookupError, match="before backward"):
        run_as_threads(2, fail)


def test_ranks_that_wait_in_vain_are_told_at_once() -> None:
    def wait(rank: int) -> None:
        if rank:
            Gathering(torch.ones(2), row(rank, 3)).wait()

    with pytest.raises(RuntimeError, match=r"in vain: rank 1 waits for all_gather.*1 of 3 have ended"):
        run_as_threads(3, wait)

    def hear(rank: int) -> None:
        finish(exchange([], [(torch.ones(2), 1 - rank)], row(rank, 2)))

    with pytest.raises(RuntimeError, match="rank 0 waits for a message from rank 1; rank 1 waits for a message"):
        run_as_threads(2, hear)


def test_different_collectives_are_an_error() -> None:
    def differ(rank: int) -> None:
        seq = row(rank, 2)
        if rank:
            sum_over_ranks(torch.ones(2), seq)
        else:
            Gathering(torch.ones(2), seq)

    with pytest.raises(RuntimeError, match="the same collective; got all_gather and all_reduce"):
        run_as_threads(2, differ)
    with pytest.raises(RuntimeError, match=r"one shape and type in all_reduce; got \[[12]\] in torch.float32 and \["):
        run_as_threads(2, lambda rank: sum_over_ranks(torch.ones(1 + rank), row(rank, 2)))


def test_a_rank_that_never_comes_is_told_with_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longreach.parallel.threads.GRACE_SECONDS", 0.1)
    release = threading.Event()

    def compute_for_ever(rank: int) -> None:
        while rank and not release.is_set():
            time.sleep(0.01)
        if not rank:
            sum_over_ranks(torch.ones(1), row(rank, 2))

    try:
        with pytest.raises(TimeoutError, match=r"not ended after 0.2 s.(.|\n)*compute_for_ever"):
            run_as_threads(2, compute_for_ever, timeout=0.2)
    finally:
        release.set()


def test_modes_that_end_in_another_order_than_they_began_leave_nothing_behind() -> None:
    def watched(rank: int) -> None:
        seq, mode = row(rank, 2), LargestTensor()
        if rank == 0:
            with mode:
                meet(seq)
                meet(seq)
            meet(seq)
        else:
            meet(seq)
            with mode:
                meet(seq)
                meet(seq)

    def meet(seq: Sequence) -> None:
        sum_over_ranks(torch.ones(1), seq)

    run_as_threads(2, watched)
    assert not is_in_torch_dispatch_mode()
