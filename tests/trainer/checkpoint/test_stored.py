"""Which stored checkpoints are whole, and which of them stay."""

from pathlib import Path

import pytest
from stored_checkpoints import DAMAGE, store, truncated

from longreach.trainer.checkpoint.checkpoint import _prune
from longreach.trainer.checkpoint.stored import CheckpointError, latest, steps, verify


def names(folder: Path) -> list[int]:
    return [int(path.name[5:]) for path in steps(folder)]


@pytest.mark.parametrize(
    ("keep", "spare", "left"),
    [
        (2, None, [80, 100]),
        (1, None, [100]),
        (2, 85, [80, 100]),  # it is among the newest
        (2, 70, [60, 80, 100]),
        (1, 79, [60, 100]),
        (3, 10, [60, 80, 100]),  # there is none so early
        (1, 100, [100]),  # itself
    ],
)
def test_the_newest_stay_and_the_newest_from_before_a_decay(
    tmp_path: Path, keep: int, spare: int | None, left: list[int]
) -> None:
    for step in (20, 40, 60, 80, 100):
        store(tmp_path, step)
    _prune(tmp_path, tmp_path / "step-00000100", keep, spare)
    assert names(tmp_path) == left


def test_damaged_ones_do_not_take_the_place_of_good_ones(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8, 10):
        store(tmp_path, step)
    truncated(tmp_path / "step-00000004")
    truncated(tmp_path / "step-00000010")  # from which a run could not go on, and which it has not reached again
    _prune(tmp_path, tmp_path / "step-00000006", 2, None)
    assert names(tmp_path) == [2, 6, 8, 10]
    assert latest(tmp_path) == tmp_path / "step-00000008"


def test_other_names_are_no_checkpoints(tmp_path: Path) -> None:
    for name in ("step-2x", ".step-00000003.writing", "notes"):
        (tmp_path / name).mkdir()
    assert steps(tmp_path) == steps(tmp_path / "nothing") == []
    assert latest(tmp_path) is None


@pytest.mark.parametrize("damage", DAMAGE[:1] + DAMAGE[2:])
def test_the_advice_beside_a_damaged_checkpoint_names_a_good_one(tmp_path: Path, damage) -> None:
    bad = store(tmp_path, 4)
    damage(bad)
    with pytest.raises(CheckpointError, match=r"Use another one$"):
        verify(bad)
    good = store(tmp_path, 2)
    with pytest.raises(CheckpointError, match=f"Use {good}$"):
        verify(bad)
