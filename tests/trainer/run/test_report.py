"""What a finished run shows."""

import json
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from stored_checkpoints import store, truncated

from longreach.trainer.evaluation.baselines import Baselines
from longreach.trainer.run.directory import RunDirectory
from longreach.trainer.run.report import (
    changed_schedule,
    commands,
    comparison,
    launch_command,
    resume_command,
    whereabouts,
)
from longreach.trainer.schedule import Schedule, ScheduleSettings
from longreach.trainer.settings import Settings, TrainerSettings
from longreach.trainer.stages.plan import Plan, plan_of


def test_a_report_compares_with_counting_and_with_less_context() -> None:
    record = {
        "bits_per_byte": 1.5,
        "truncated_context": 16,
        "truncated_rows": 8,
        "truncated_bits_per_byte": 2.0,
        "untruncated_bits_per_byte": 1.6,
    }
    lines = comparison(record, Baselines(byte_unigram=4.5, token_unigram=3.0, token_bigram=2.0))
    assert [line.split()[-3] for line in lines if "needs" in line] == ["33.3%", "50.0%", "75.0%", "80.0%"]
    assert "8 held-out rows" in lines[5]
    assert comparison({"bits_per_byte": 1.5}, None) == []


def test_the_closing_lines_can_be_typed(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "a run")
    offline = directory.path / "wandb" / "offline-run-2-id"
    line = next(
        line for line in whereabouts(directory, None, ("offline", offline), []) if line.startswith("W&B offline")
    )
    assert line.endswith(f"(send it: wandb sync '{tmp_path}/a run/wandb'/offline-run-*)")
    prompt = 'costs $5 `now`, "she" said it\'s\\'
    command = ["python", "-m", "train", "++run.dir=old", "run.name=a b"]
    more, resume = commands(command, directory, directory.path / "c", Settings(), prompt)
    assert shlex.split(more)[-2:] == [f"checkpoint={tmp_path}/a run/c", f"prompt={prompt}"]
    assert [word for word in shlex.split(resume) if "run.dir" in word] == [f"run.dir={tmp_path}/a run"]


def test_a_run_under_srun_is_resumed_under_srun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LONGREACH_COMMAND", raising=False)
    monkeypatch.setenv("LONGREACH_LAUNCHER", "srun")
    monkeypatch.setenv("WORLD_SIZE", "16")
    assert launch_command("train", ["a=1"]) == ["srun", "-n", "16", "python", "-m", "train", "a=1"]


COMMAND = ["python", "-m", "train", "model=llama_tiny", "++trainer.steps=100", "schedule=wsd", "run.dir=elsewhere"]


def continued(run: Path, schedule: ScheduleSettings, *saved: int, given: tuple[str, ...] = ()) -> dict[str, str]:
    """The settings of the command that is printed after 100 steps, those of `saved` having been kept."""
    paths = [store(run / "checkpoints", step) for step in saved]
    settings = Settings(schedule=schedule, trainer=TrainerSettings(steps=100))
    lines = commands([*COMMAND, *given], RunDirectory(run), paths[-1], settings, None)
    words = shlex.split(lines[0].removeprefix("to resume"))
    assert words[:4] == COMMAND[:4]
    return dict(word.lstrip("+").split("=", 1) for word in words[3:])


def following(schedule: ScheduleSettings, printed: dict[str, str]) -> Schedule:
    """The schedule of a printed command that began with `schedule`."""
    kind = printed.get("schedule", schedule.kind)
    fraction = 0.0 if printed.get("schedule") == "wsd" else schedule.final_fraction
    settings = ScheduleSettings(kind, int(printed["schedule.warmup_steps"]), None, fraction)
    return Schedule(settings, float(printed.get("optimizer.learning_rate", "3e-4")), int(printed["trainer.steps"]))


@pytest.mark.parametrize("fraction", [0.0, 0.1])
def test_a_finished_wsd_run_goes_on_from_before_its_decay(tmp_path: Path, fraction: float) -> None:
    schedule = ScheduleSettings("wsd", final_fraction=fraction)
    printed = continued(tmp_path / "run", schedule, 50, 80, 100)
    assert printed["checkpoint.resume"] == str(tmp_path / "run" / "checkpoints" / "step-00000080")
    assert printed["run.dir"] == f"{tmp_path / 'run'}-to-200"
    before, after = Schedule(schedule, 3e-4, 100), following(schedule, printed)
    assert after(80) == before(79) == 3e-4
    assert all(after(step) == before(step) for step in range(80))


def test_a_finished_cosine_run_goes_on_at_its_last_rate(tmp_path: Path) -> None:
    schedule, given = ScheduleSettings("cosine"), ("schedule.final_fraction=0.1", "checkpoint.resume=auto")
    printed = continued(tmp_path / "run", schedule, 50, 100, given=given)
    assert printed["run.dir"] == str(tmp_path / "run")
    assert "checkpoint.resume" not in printed
    assert "schedule.final_fraction" not in printed
    before, after = Schedule(schedule, 3e-4, 100), following(schedule, printed)
    assert after(100) == pytest.approx(before(99), rel=1e-5)
    assert all(after(step + 1) <= after(step) for step in range(100, 199))


@pytest.mark.parametrize("kind", ["cosine", "wsd"])
def test_what_has_decayed_to_nothing_goes_on_in_a_new_stage(tmp_path: Path, kind: str) -> None:
    printed = continued(tmp_path / "run", ScheduleSettings(kind, final_fraction=0.0), 90, 100)
    if kind == "wsd":  # no checkpoint from before the decay, and a twentieth of the peak is left
        assert float(printed["optimizer.learning_rate"]) == pytest.approx(3e-4 / 21, rel=1e-5)
        return
    assert printed["init_from"] == str(tmp_path / "run")
    assert printed["run.dir"] == f"{tmp_path / 'run'}-next"
    assert printed["schedule.warmup_steps"] == "10"
    assert printed["trainer.steps"] == "100"


def test_a_damaged_checkpoint_is_not_what_is_advised(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    good, bad = store(run.checkpoints, 20), store(run.checkpoints, 40)
    truncated(bad)
    last = store(run.checkpoints, 100)
    settings = Settings(schedule=ScheduleSettings("wsd"), trainer=TrainerSettings(steps=100))
    assert f"checkpoint.resume={good}" in commands(COMMAND, run, last, settings, None)[0]


def test_the_command_to_resume_leaves_out_where_the_run_once_began(tmp_path: Path) -> None:
    run, given = RunDirectory(tmp_path / "run"), [*COMMAND, "checkpoint.resume=none"]
    assert resume_command(given, run, run.checkpoints / "step-2") == shlex.join([*COMMAND[:-1], f"run.dir={run.path}"])
    assert "checkpoint.resume=none" in resume_command(given, run, tmp_path / "other" / "step-2")


def test_a_staged_run_is_told_what_became_of_the_schedule_that_it_followed(tmp_path: Path) -> None:
    def plan(*stages: dict[str, Any]) -> Plan:
        return plan_of(Settings(stages=[{"steps": 100}, *stages]))

    first, own = {"steps": 50}, {"steps": 30, "schedule.warmup_steps": 3}
    before = plan(first)
    saved = store(tmp_path, 150)
    index = json.loads((saved / "index.json").read_text())
    index["state"]["schedule"] = asdict(before.stages[-1].schedule)
    (saved / "index.json").write_text(json.dumps(index))
    assert changed_schedule(before, saved, 150) is None  # nothing is left to do
    assert changed_schedule(plan(first, own), saved, 150) is None  # as the new stage says
    longer = plan(first, {"steps": 50})
    last, following = before.stages[-1].schedule(149), longer.stages[-1].schedule(150)
    assert following > 2 * last
    assert changed_schedule(longer, saved, 150) == (
        "the schedule has changed: its number of steps was 150 and is 200, schedule.warmup_steps was 3 and is 4. The "
        f"learning rate was {last:.3g} at step 150 and is {following:.3g} at step 151 (x {following / last:.3g})"
    )
    del index["state"]["schedule"]  # as before checkpoints held it
    (saved / "index.json").write_text(json.dumps(index))
    assert "is not known" in str(changed_schedule(longer, saved, 150))
