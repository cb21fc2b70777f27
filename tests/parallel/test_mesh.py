import time

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks

from longreach.parallel.collectives import agree
from longreach.parallel.mesh import Mesh, check_sequence_ranks


def test_one_process_needs_no_group() -> None:
    assert Mesh.create() == Mesh(0, 1, 1, None)
    with pytest.raises(ValueError, match=r"parallel.sequence must divide the number of processes, 1; got 2"):
        Mesh.create(2)


@pytest.mark.parametrize("sequence", [0, -2])
def test_sequence_ranks_must_be_at_least_one(sequence: int) -> None:
    with pytest.raises(ValueError, match=f"parallel.sequence must be at least 1; got {sequence}"):
        check_sequence_ranks(sequence, 2)


@pytest.mark.parametrize(("sequence", "world"), [(3, 4), (8, 4)])
def test_sequence_ranks_must_divide_the_processes(sequence: int, world: int) -> None:
    with pytest.raises(ValueError, match=f"must divide the number of processes, {world}; got {sequence}"):
        check_sequence_ranks(sequence, world)


def grid(rank: int, world: int) -> tuple[int, int, int]:
    mesh = Mesh.create(2)
    assert dist.get_process_group_ranks(mesh.sequence_group) == [rank // 2 * 2, rank // 2 * 2 + 1]
    assert dist.get_rank(mesh.sequence_group) == mesh.sequence_rank
    return mesh.data_rank, mesh.sequence_rank, mesh.data_ranks


@pytest.mark.slow
def test_ranks_that_share_a_row_are_neighbours() -> None:
    assert run_ranks(4, grid) == [(0, 0, 2), (0, 1, 2), (1, 0, 2), (1, 1, 2)]


def first_calls(rank: int, world: int, sequence: int, ulysses: int) -> list[list[int]]:
    """The ranks of each group, in the order in which a new mesh runs a collective on them."""
    joined = []
    real = dist.all_reduce

    def all_reduce(x: torch.Tensor, group: dist.ProcessGroup) -> None:
        joined.append(dist.get_process_group_ranks(group))
        real(x, group=group)
        assert x == 0

    dist.all_reduce = all_reduce
    try:
        mesh = Mesh.create(sequence, ulysses)
    finally:
        dist.all_reduce = real
    assert joined == [dist.get_process_group_ranks(group) for group in mesh.groups]
    return joined


@pytest.mark.slow
def test_every_group_has_run_a_collective_before_the_first_exchange() -> None:
    world = [0, 1, 2, 3]
    assert run_ranks(4, first_calls, 1, 1) == [[world]] * 4
    assert run_ranks(4, first_calls, 4, 1) == run_ranks(4, first_calls, 4, 4) == [[world]] * 4
    assert run_ranks(4, first_calls, 2, 2) == [[world, [r // 2 * 2, r // 2 * 2 + 1]] for r in world]
    assert run_ranks(4, first_calls, 4, 2) == [[world, [r // 2 * 2, r // 2 * 2 + 1], [r % 2, r % 2 + 2]] for r in world]


def silence(rank: int, world: int) -> None:
    """The first rank of each row waits in a group of the mesh for the second, which does not come."""
    group = Mesh.create(2, timeout_minutes=1 / 60).sequence_group
    if rank % 2:
        time.sleep(3)
        return
    with pytest.raises(RuntimeError):
        dist.all_reduce(torch.zeros(1), group=group)


@pytest.mark.slow
def test_a_silent_rank_is_waited_for_no_longer_than_the_run_allows() -> None:
    run_ranks(4, silence, timeout=30)


def disagree(rank: int, world: int) -> str:
    agree(None, world)
    try:
        agree(f"rank {rank} failed" if rank else None, world)
    except ValueError as error:
        return str(error)
    return "no error"


@pytest.mark.slow
def test_an_error_on_one_rank_is_raised_on_all_with_its_message() -> None:
    assert run_ranks(3, disagree) == ["rank 1 failed"] * 3
