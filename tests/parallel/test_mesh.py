import pytest
import torch.distributed as dist
from distributed import run_ranks

from longreach.parallel.collectives import agree
from longreach.parallel.mesh import Mesh, check_sequence_ranks


def test_one_process_needs_no_group() -> None:
    assert Mesh.create() == Mesh(0, 1, 1, None)
    with pytest.raises(ValueError, match=r"parallel.sequence must divide the number of processes, 1; got 2"):
        Mesh.create(2)


@pytest.mark.parametrize(("sequence", "world"), [(3, 4), (0, 2), (8, 4)])
def test_sequence_ranks_must_divide_the_processes(sequence: int, world: int) -> None:
    with pytest.raises(ValueError, match=f"must divide the number of processes, {world}; got {sequence}"):
        check_sequence_ranks(sequence, world)


def grid(rank: int, world: int) -> tuple[int, int, int]:
    mesh = Mesh.create(2)
    assert dist.get_process_group_ranks(mesh.sequence_group) == [rank // 2 * 2, rank // 2 * 2 + 1]
    assert dist.get_rank(mesh.sequence_group) == mesh.sequence_rank
    return mesh.data_rank, mesh.sequence_rank, mesh.data_ranks


def test_ranks_that_share_a_row_are_neighbours() -> None:
    assert run_ranks(4, grid) == [(0, 0, 2), (0, 1, 2), (1, 0, 2), (1, 1, 2)]


def disagree(rank: int, world: int) -> str:
    agree(None, world)
    try:
        agree(f"rank {rank} failed" if rank else None, world)
    except ValueError as error:
        return str(error)
    return "no error"


def test_an_error_on_one_rank_is_raised_on_all_with_its_message() -> None:
    assert run_ranks(3, disagree) == ["rank 1 failed"] * 3
