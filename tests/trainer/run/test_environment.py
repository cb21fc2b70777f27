"""What a run is started with and on is kept: enough to do it again, and no secret."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from longreach.trainer.run import environment
from longreach.trainer.run.directory import RunDirectory
from longreach.trainer.run.outputs import Outputs
from longreach.trainer.settings import Settings


def git(folder: Path, *arguments: str) -> str:
    names = {f"GIT_{who}_{what}": "me@here" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments], check=True, capture_output=True, text=True, env=os.environ | names
    )
    return done.stdout.strip()


def test_the_commit_is_kept_and_whether_the_code_differs_from_it(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    (checkout / "inner").mkdir(parents=True)
    assert environment.git_state(checkout) is None
    git(checkout, "init", "-q", "-b", "trunk")
    (checkout / "file.py").write_text("a = 1\n")
    git(checkout, "add", ".")
    git(checkout, "commit", "-qm", "first")
    clean = environment.git_state(checkout / "inner")
    assert clean is not None
    assert clean["commit"] == git(checkout, "rev-parse", "HEAD")
    assert (clean["branch"], clean["dirty"], clean["changed"]) == ("trunk", False, [])
    assert environment.git_state(checkout / "inner", whole=True) is None  # code that is installed in there
    assert environment.git_state(checkout, whole=True) == clean
    hashes = set()
    for text in ("a = 2\n", "a = 3\n"):
        (checkout / "file.py").write_text(text)
        dirty = environment.git_state(checkout)
        assert dirty is not None
        assert (dirty["commit"], dirty["dirty"], dirty["changed"]) == (clean["commit"], True, ["file.py"])
        hashes.add(dirty["diff_sha256"])
    assert len(hashes) == 2


def test_versions_machine_and_named_variables_alone_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123secret")
    monkeypatch.setenv("MY_PASSWORD", "0123secret")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    start = environment.describe(["python", "-m", "it", "a b=c"], torch.device("cpu"))
    text = json.dumps(start)
    assert "0123secret" not in text
    assert start["variables"]["OMP_NUM_THREADS"] == "7"
    assert start["command"] == "python -m it 'a b=c'"
    assert start["python"] == sys.version.split()[0]
    assert start["torch"]["version"] == torch.__version__
    assert start["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert start["gpus"] == []
    assert not any("KEY" in name or "TOKEN" in name or "PASS" in name for name in environment.VARIABLES)


def test_every_start_is_kept_and_a_full_disk_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings()
    settings.logger.wandb.mode = "disabled"

    def begin(step: int, **start: str) -> Outputs:
        return Outputs(settings, RunDirectory(tmp_path), first=True, step=step, environment=dict(start))

    begin(0, host="one").close()
    replace = os.replace

    def full(source: Path, target: Path) -> None:
        if Path(target).name == "environment.json":
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    outputs = begin(40, host="two")
    (told,) = outputs.unkept()
    assert told.startswith("environment.json could not be written: [Errno 28] No space left on device; free space")
    monkeypatch.undo()
    assert outputs.unkept() == []
    assert json.loads((tmp_path / "environment.json").read_text()) == [
        {"step": 0, "host": "one"},
        {"step": 40, "host": "two"},
    ]
    other = Outputs(settings, RunDirectory(tmp_path / "other"), first=False, step=0, environment={"host": "three"})
    other.close()
    assert not (tmp_path / "other").exists()
