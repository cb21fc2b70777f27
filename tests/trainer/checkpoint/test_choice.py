"""Which checkpoint a run goes on from."""

from pathlib import Path

import pytest
from distributed import run_ranks
from stored_checkpoints import DAMAGE, flipped, missing, store, truncated

from longreach.parallel.mesh import Mesh
from longreach.trainer.checkpoint.choice import choose, locate
from longreach.trainer.checkpoint.commit import leave_behind
from longreach.trainer.checkpoint.stored import check_bytes, verify
from longreach.trainer.run.directory import RunDirectory


def find(run: Path, resume: str = "auto", mesh: Mesh | None = None) -> tuple[str | None, str]:
    found, notes = choose(resume, RunDirectory(run), mesh or Mesh())
    return str(found.relative_to(run.parent)) if found else None, "\n".join(notes)


@pytest.mark.parametrize("damage", DAMAGE)
def test_auto_passes_over_what_is_damaged_and_says_why(tmp_path: Path, damage) -> None:
    own = tmp_path / "run" / "checkpoints"
    store(own, 2)
    damage(store(own, 4))
    damage(store(own, 10))
    found, said = find(tmp_path / "run")
    assert found == "run/checkpoints/step-00000002"
    lines = said.splitlines()
    assert [name in line for name, line in zip(("step-00000010", "step-00000004"), lines, strict=True)] == [True, True]
    assert all("must be complete and undamaged; " in line for line in lines)


def test_a_run_without_a_good_checkpoint_is_no_silent_new_start(tmp_path: Path) -> None:
    own = tmp_path / "run" / "checkpoints"
    assert find(tmp_path / "run") == (None, "")
    (own / "step-00000004").mkdir(parents=True)
    expected = (
        r"step-00000004 must be complete and undamaged; index\.json cannot be read.*start anew in another run.dir"
    )
    with pytest.raises(ValueError, match=expected):
        find(tmp_path / "run")
    # The advice can be followed.
    other = store(tmp_path / "other" / "checkpoints", 3)
    assert find(tmp_path / "run", str(other))[0] == "other/checkpoints/step-00000003"
    assert find(tmp_path / "new") == (None, "")
    with pytest.raises(ValueError, match=r"run\.dir must be a new folder with checkpoint\.resume=none"):
        find(tmp_path / "run", "none")


def test_the_same_command_again_goes_on_from_the_own_newest_checkpoint(tmp_path: Path) -> None:
    other = store(tmp_path / "other" / "checkpoints", 6)
    assert find(tmp_path / "run", str(other)) == ("other/checkpoints/step-00000006", "")
    assert find(tmp_path / "run", str(tmp_path / "other")) == ("other/checkpoints/step-00000006", "")
    own = store(tmp_path / "run" / "checkpoints", 8)
    for named in (other, tmp_path / "other", tmp_path / "has gone", store(own.parent, 3)):
        found, said = find(tmp_path / "run", str(named))
        assert found == "run/checkpoints/step-00000008"
        assert said.startswith(f"checkpoint.resume={named} counts for a run's first start")
    for named in (own, tmp_path / "run"):
        assert find(tmp_path / "run", str(named)) == ("run/checkpoints/step-00000008", "")


def test_a_damaged_checkpoint_that_was_named_is_refused_with_one_that_is_good(tmp_path: Path) -> None:
    good, bad = store(tmp_path / "other" / "checkpoints", 2), store(tmp_path / "other" / "checkpoints", 4)
    flipped(bad)
    flipped(store(tmp_path / "other" / "checkpoints", 3))  # which is complete, as far as sizes tell
    with pytest.raises(
        ValueError, match=f"{bad} must be complete and undamaged; .* have changed .*Use {good}, or leave"
    ):
        find(tmp_path / "run", str(bad))
    assert find(tmp_path / "run", str(good))[0] == "other/checkpoints/step-00000002"  # as the advice says
    with pytest.raises(ValueError, match=f"have changed .*Use {good}"):
        check_bytes(verify(bad), ["w"])
    found, said = find(tmp_path / "run", str(tmp_path / "other"))  # the run's newest good one
    assert found == "other/checkpoints/step-00000002"
    assert "step-00000004 must be" in said
    with pytest.raises(ValueError, match=r"checkpoint\.resume must be a checkpoint's folder.* got .*nowhere"):
        find(tmp_path / "run", str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"checkpoint must be a checkpoint's folder.* got .*nowhere"):
        locate(tmp_path / "nowhere", "checkpoint")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"must be .* a run.s that has saved one"):
        locate(tmp_path / "empty", "checkpoint")


def examine(rank: int, world: int, run: Path) -> tuple[str | None, str]:
    return find(run, mesh=Mesh.create(world))


@pytest.mark.slow
def test_all_ranks_pass_over_what_one_of_them_finds_damaged(tmp_path: Path) -> None:
    own = tmp_path / "run" / "checkpoints"
    store(own, 2)
    flipped(store(own, 4))  # each tensor is read by one rank
    truncated(store(own, 6))
    missing(store(own, 8))
    store(own, 10).rename(own / ".step-00000010.writing")  # half written
    (found, said), *others = run_ranks(3, examine, tmp_path / "run")
    assert others == 2 * [(found, said)]
    assert found == "run/checkpoints/step-00000002"
    assert "step-00000008 must be complete and undamaged; moments-00001-of-00001.safetensors cannot be read" in said
    assert "step-00000006 must be complete and undamaged; weights-00001-of-00001.safetensors has" in said
    assert "have changed" in said


def test_what_a_rollback_leaves_behind_is_not_gone_on_from_or_is_named(tmp_path: Path, monkeypatch) -> None:
    first, *_ = (store(tmp_path / "run" / "checkpoints", step) for step in (2, 4, 6))

    def refuse(*_: object) -> None:
        raise OSError("Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr("os.rename", refuse)
        assert leave_behind(first) == ["step-00000004", "step-00000006"]
    assert find(tmp_path / "run")[0] == "run/checkpoints/step-00000006"
    assert leave_behind(first) == []
    assert find(tmp_path / "run")[0] == "run/checkpoints/step-00000002"
