"""W&B offline: what is recorded can be read back, and nothing that fails there ends a run."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from longreach.trainer import tracking
from longreach.trainer.settings import WandbSettings
from longreach.trainer.tracking import Tracker, choose_mode, logged_in


def records(folder: Path) -> list[dict[str, Any]]:
    shown = subprocess.run(
        [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)], capture_output=True, text=True
    )
    assert shown.returncode == 0, shown.stderr
    return [json.loads(line) for line in shown.stdout.splitlines()]


@pytest.mark.slow
def test_config_curves_and_sample_are_recorded_at_their_steps(tmp_path: Path) -> None:
    said: list[str] = []
    settings = WandbSettings(mode="offline", project="test")
    tracker = Tracker(settings, tmp_path, {"trainer": {"steps": 7}}, said.append)
    for step in (1, 2, 5):  # a resumed run begins anywhere
        tracker.log({"step": step, "loss": 1.0 / step, "mfu": None})
    tracker.log({"step": 5, "validation_loss": 3.0})
    tracker.sample(5, "def f(x): <b>")
    tracker.close()
    assert said == []
    assert tracker.directory is not None
    assert tracker.directory.parent == tmp_path / "wandb"
    written = records(tracker.directory)
    assert any('"steps": 7' in json.dumps(record) for record in written if record["type"] == "run")
    history = {record["history"]["step"]["num"]: record["history"]["item"] for record in written if "history" in record}
    assert {step: item["loss"] for step, item in history.items()} == {1: 1.0, 2: 0.5, 5: 0.2}
    assert history[5]["validation_loss"] == 3.0
    page = tracker.directory / "files" / history[5]["sample.path"]
    assert "def f(x): &lt;b&gt;" in page.read_text()
    assert "mfu" not in history[1]
    again = Tracker(settings, tmp_path, {}, said.append)
    again.close()
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) in (1, 2)  # named by the second they began
    assert (tmp_path / "wandb" / "run-id.txt").read_text().strip() in str(again.directory)


def test_what_fails_is_said_once_and_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    def refuse(*args: object) -> None:
        raise RuntimeError("no such server")

    monkeypatch.setattr(Tracker, "_start", refuse)
    tracker = Tracker(WandbSettings(mode="online"), tmp_path, {}, said.append)
    tracker.log({"step": 1, "loss": 2.0})
    tracker.sample(1, "text")
    tracker.close()
    assert tracker.mode == "offline"
    assert [line for line in said if "no such server" in line] == said[::2]
    assert "metrics.jsonl has everything" in said[0]


def test_nobody_is_asked_for_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert not logged_in()
    assert choose_mode("auto") == "offline"
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password 1234\n")
    assert choose_mode("auto") == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert choose_mode("auto") == "disabled"
    assert choose_mode("offline") == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "1234")
    assert tracking.logged_in()
