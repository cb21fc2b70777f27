"""Ranks, layouts and ZeRO stages against one process, through the command line."""

from pathlib import Path

import pytest
from equivalence import LOSS_TOLERANCE, NORM_TOLERANCE, Topology, differences, train

ROWS = "data.sequence_length=512"
CHOICE = [
    Topology(1, 1, "contiguous", 3),
    Topology(2, 2, "contiguous", 0),
    Topology(2, 2, "zigzag", 2),
    Topology(4, 4, "zigzag", 1),
    Topology(4, 4, "contiguous", 3),
    Topology(4, 2, "contiguous", 1),
    Topology(4, 2, "zigzag", 3),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    return train(Topology(), tmp_path_factory.mktemp("one-process"), ROWS)


@pytest.mark.slow
@pytest.mark.parametrize("topology", CHOICE, ids=str)
def test_a_topology_changes_no_loss_and_no_gradient_norm(
    topology: Topology, base: list[dict[str, float]], tmp_path: Path
) -> None:
    loss, norm = differences(train(topology, tmp_path, ROWS), base)
    assert loss <= LOSS_TOLERANCE
    assert norm <= NORM_TOLERANCE
    assert base[-1]["loss"] < base[0]["loss"]
