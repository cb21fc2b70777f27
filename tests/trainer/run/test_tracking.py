"""W&B offline: what is recorded can be read back, and nothing that fails there ends a run."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from longreach.trainer.run import tracking
from longreach.trainer.run.settings import WandbSettings
from longreach.trainer.run.tracking import Tracker, choose_mode, logged_in


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
    tracker.log({"step": 5, "validation_loss": 3.0, "stage": "short"})
    tracker.log({"step": 5, "validation_loss": 4.0, "stage": "long", "before_stage": True})
    tracker.log({"step": 5, "tasks": [{"task": "needle", "choice": 0.5}, {"task": "mqar", "choice": None}]})
    tracker.sample(5, "def f(x): <b>")
    tracker.close()
    assert said == []
    assert tracker.directory is not None
    assert tracker.directory.parent == tmp_path / "wandb"
    written = records(tracker.directory)
    assert any('"steps": 7' in json.dumps(record) for record in written if record["type"] == "run")
    history = {record["history"]["step"]["num"]: record["history"]["item"] for record in written if "history" in record}
    assert {step: item["loss"] for step, item in history.items()} == {1: 1.0, 2: 0.5, 5: 0.2}
    assert history[5] | {"validation_loss": 3.0, "stage": "short", "before_stage/validation_loss": 4.0} == history[5]
    page = tracker.directory / "files" / history[5]["sample.path"]
    assert "def f(x): &lt;b&gt;" in page.read_text()
    table = json.loads((tracker.directory / "files" / history[5]["tasks.path"]).read_text())
    assert (table["columns"], table["data"]) == (["task", "choice"], [["needle", 0.5], ["mqar", None]])
    assert "mfu" not in history[1]
    again = Tracker(settings, tmp_path, {}, said.append)
    again.close()
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) in (1, 2)  # named by the second they began
    assert (tmp_path / "wandb" / "run-id.txt").read_text().strip() in str(again.directory)


@pytest.mark.slow
def test_a_resumed_run_is_one_whole_curve_under_the_variables_of_wandb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    for name, value in {"PROJECT": "mine", "ENTITY": "team", "NAME": "run 7", "RUN_ID": "one"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    first = Tracker(WandbSettings(mode="offline"), tmp_path, {}, said.append)
    for step in range(1, 6):  # killed after step 5; step 3 was saved
        first.log({"step": step, "loss": 100.0 + step})
    first.close(failed=True)
    time.sleep(1)  # a part is named by the second that it began in
    kept = [{"step": step, "loss": 100.0 + step} for step in range(1, 4)]
    history = [*kept, {"step": 3, "validation_loss": 7.0}, {"step": 3, "sample": "text"}]
    again = Tracker(WandbSettings(mode="offline"), tmp_path, {}, said.append, history)
    for step in range(4, 7):
        again.log({"step": step, "loss": 200.0 + step})
    again.close()
    assert said == []
    parts = sorted((tmp_path / "wandb").glob("offline-run-*-one"))
    assert len(parts) == 2
    assert parts[1] == again.directory
    written = records(parts[1])
    (run,) = (record["run"] for record in written if record["type"] == "run")
    assert (run["project"], run["entity"], run["display_name"], run["run_id"]) == ("mine", "team", "run 7", "one")
    history = {record["history"]["step"]["num"]: record["history"]["item"] for record in written if "history" in record}
    curve = {step: item["loss"] for step, item in history.items()}
    assert curve == {1: 101.0, 2: 102.0, 3: 103.0, 4: 204.0, 5: 205.0, 6: 206.0}
    assert history[3]["validation_loss"] == 7.0
    assert "sample.path" in history[3]


def test_settings_come_before_the_variables_of_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def init(**arguments: Any) -> None:
        given.update(arguments)
        raise RuntimeError("enough")

    monkeypatch.setattr("wandb.init", init)
    for name in ("PROJECT", "ENTITY", "NAME", "RUN_ID"):
        monkeypatch.setenv(f"WANDB_{name}", "variable")
    Tracker(WandbSettings("offline", "project", "entity", "name"), tmp_path, {}, print)
    assert [given[name] for name in ("project", "entity", "name", "id")] == ["project", "entity", "name", "variable"]
    for name in ("PROJECT", "ENTITY", "NAME", "RUN_ID"):
        monkeypatch.delenv(f"WANDB_{name}")
    Tracker(WandbSettings("offline"), tmp_path, {}, print)
    assert [given[name] for name in ("project", "entity", "name", "id")] == [
        "longreach",
        None,
        tmp_path.name,
        "variable",  # the run's own, from its first start
    ]
    (tmp_path / "wandb" / "run-id.txt").write_text("")  # as a full disk leaves it
    Tracker(WandbSettings("offline"), tmp_path, {}, print)
    assert given["id"] not in ("", "variable")


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
    monkeypatch.setenv("WANDB_MODE", "dryrun")
    assert choose_mode("auto") == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "1234")
    assert tracking.logged_in()
