"""The harness itself: results, failures and hangs of ranks come back, and the pool works again afterwards."""

import os
import time

import pytest
import torch
from distributed import RankError, run_ranks
from torch import distributed

pytestmark = pytest.mark.slow  # processes start


def total(rank, world, value):
    x = torch.tensor([float(rank + value)])
    distributed.all_reduce(x)
    return x, os.getpid()


def fail_on_one(rank, world):
    if rank == 1:
        raise ValueError("planted failure")
    distributed.barrier()


def hang(rank, world):
    if rank == 1:
        time.sleep(1000)
    distributed.barrier()


def die(rank, world):
    if rank == 0:
        os._exit(3)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_results_come_back_in_rank_order_from_processes_that_stay(world):
    first = run_ranks(world, total, 10)
    second = run_ranks(world, total, 20)
    assert [x.item() for x, _ in first] == [sum(r + 10 for r in range(world))] * world
    assert [x.item() for x, _ in second] == [sum(r + 20 for r in range(world))] * world
    assert [pid for _, pid in first] == [pid for _, pid in second]


@pytest.mark.parametrize(
    ("function", "message"),
    [(fail_on_one, "planted failure"), (hang, r"did not end within 1\.5 s(.|\n)*in hang"), (die, "exit code 3")],
)
def test_a_failure_is_reported_and_the_pool_works_again(function, message):
    start = time.monotonic()
    with pytest.raises(RankError, match=message):
        run_ranks(2, function, timeout=1.5)
    assert time.monotonic() - start < 20
    assert len(run_ranks(2, total, 1)) == 2
