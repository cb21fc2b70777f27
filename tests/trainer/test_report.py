"""What a finished run shows."""

import shlex
from pathlib import Path

import pytest

from longreach.trainer.baselines import Baselines
from longreach.trainer.report import commands, comparison, launch_command, whereabouts
from longreach.trainer.run_directory import RunDirectory


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
    line = next(line for line in whereabouts(directory, None, ("offline", offline)) if line.startswith("W&B offline"))
    assert line.endswith(f"(send it: wandb sync '{tmp_path}/a run/wandb'/offline-run-*)")
    prompt = 'costs $5 `now`, "she" said it\'s\\'
    command = ["python", "-m", "train", "++run.dir=old", "run.name=a b"]
    more, resume = commands(command, directory, directory.path / "c", 5, prompt)
    assert shlex.split(more)[-2:] == [f"checkpoint={tmp_path}/a run/c", f"prompt={prompt}"]
    assert [word for word in shlex.split(resume) if "run.dir" in word] == [f"run.dir={tmp_path}/a run"]


def test_a_run_under_srun_is_resumed_under_srun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LONGREACH_COMMAND", raising=False)
    monkeypatch.setenv("LONGREACH_LAUNCHER", "srun")
    monkeypatch.setenv("WORLD_SIZE", "16")
    assert launch_command("train", ["a=1"]) == ["srun", "-n", "16", "python", "-m", "train", "a=1"]
