"""Which folder a run gets."""

from pathlib import Path

import pytest

from longreach.parallel.mesh import Mesh
from longreach.trainer.run import directory as run_directory
from longreach.trainer.run.directory import RunDirectory
from longreach.trainer.run.settings import RunSettings


def test_runs_of_the_same_second_get_names_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_directory.time, "strftime", lambda form: "2026-01-02_03-04-05")
    claimed = [RunDirectory.claim(RunSettings(name="r"), Mesh()) for _ in range(3)]
    assert [str(directory.path) for directory in claimed] == [
        "runs/r/2026-01-02_03-04-05",
        "runs/r/2026-01-02_03-04-05.2",
        "runs/r/2026-01-02_03-04-05.3",
    ]
    for directory in claimed:
        directory.release(unused=True)
    assert list((tmp_path / "runs" / "r").iterdir()) == []


def test_a_run_that_never_began_leaves_nothing(tmp_path: Path) -> None:
    directory = RunDirectory.claim(RunSettings(dir=str(tmp_path / "a" / "b")), Mesh())
    assert (tmp_path / "a" / "b" / "lock.json").exists()
    directory.release(unused=True)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "there").mkdir()
    RunDirectory.claim(RunSettings(dir=str(tmp_path / "there")), Mesh()).release(unused=True)
    assert list((tmp_path / "there").iterdir()) == []


@pytest.mark.parametrize("place", ["file", "file/run"])
def test_a_folder_that_cannot_be_is_refused(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match=r"run\.dir must be a folder that can be written; got .*Name another"):
        RunDirectory.claim(RunSettings(dir=str(tmp_path / place)), Mesh())


def test_a_disk_without_room_for_the_lock_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(self: Path, text: str, **kwargs: str) -> int:
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_text", no_space)
    with pytest.raises(ValueError, match=r"run\.dir must be a folder that can be written; .*No space left.*free space"):
        RunDirectory.claim(RunSettings(dir=str(tmp_path / "run")), Mesh())
    assert list(tmp_path.iterdir()) == []
