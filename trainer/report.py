"""Report: what a finished run shows in the terminal."""

from __future__ import annotations

import os
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import launchers
from .baselines import Baselines
from .run_directory import RunDirectory


def comparison(record: dict[str, Any], baselines: Baselines | None) -> list[str]:
    """Bits per byte of the held-out text: counting models, the model, and the model with its context cut short."""
    lines = []
    if baselines is not None:
        names = {"byte_unigram": "byte unigram", "token_unigram": "token unigram", "token_bigram": "token bigram"}
        counted = [(names[key], value) for key, value in asdict(baselines).items()]
        lines += _table("held-out text", counted, ("this model", record["bits_per_byte"]))
    if "truncated_bits_per_byte" in record:
        title = f"is context used? {record['truncated_rows']} held-out rows"
        cut = (f"this model, last {record['truncated_context']} tokens", record["truncated_bits_per_byte"])
        lines += _table(title, [cut], ("this model, whole context", record["untruncated_bits_per_byte"]))
    return lines


def recall_comparison(record: dict[str, Any], chance: float | None) -> list[str]:
    """Accuracy on held-out recall problems: by chance, the model's, and the model's with its context cut short."""
    lines = []
    if chance is not None:
        lines += [f"held-out problems, {_ACCURACY}", f"  {'a value by chance':<28} {chance:7.2%}"]
        lines += [f"  {'this model':<28} {record['accuracy']:7.2%}"]
    if "truncated_accuracy" in record:
        cut = f"this model, last {record['truncated_context']} tokens"
        lines += [f"is context used? {record['truncated_rows']} held-out rows, {_ACCURACY}"]
        lines += [f"  {cut:<28} {record['truncated_accuracy']:7.2%}"]
        lines += [f"  {'this model, whole context':<28} {record['untruncated_accuracy']:7.2%}"]
    return lines


_ACCURACY = "share of right answers (more is better)"


def _table(title: str, others: list[tuple[str, float]], own: tuple[str, float]) -> list[str]:
    lines = [f"{title}, bits per byte (less is better)"]
    lines += [f"  {name:<28} {value:7.4f}   the model needs {own[1] / value:.1%} of it" for name, value in others]
    return [*lines, f"  {own[0]:<28} {own[1]:7.4f}"]


def whereabouts(directory: RunDirectory, checkpoint: Path | None, tracked: tuple[str, Path | None]) -> list[str]:
    """Where the run's files are."""
    lines = [
        f"run           {directory.path}",
        f"loss curve    {directory.plot}",
        *([f"samples       {directory.samples}"] if directory.samples.exists() else []),
    ]
    mode, folder = tracked
    if mode == "offline" and folder is not None:
        parts = f"{shlex.quote(str(folder.parent))}/offline-run-*"  # one for each start of the run; the last is whole
        lines.append(f"W&B offline   {folder}   (send it: wandb sync {parts})")
    if checkpoint is not None:
        lines.append(f"checkpoint    {checkpoint}")
    return lines


def commands(
    command: list[str], directory: RunDirectory, checkpoint: Path | None, steps: int, prompt: str | None
) -> list[str]:
    """How to generate from the run, if its data are text (`prompt` is one), and how to go on with it."""
    lines = []
    if checkpoint is not None:
        if prompt is not None:
            words = [f"checkpoint={checkpoint}", f"prompt={prompt}"]
            lines.append(f"more text     python -m longreach.launch.generate {shlex.join(words)}")
        lines.append(f"to resume     {resume_command(command, directory, steps=2 * steps)}")
    return lines


def resume_command(command: list[str], directory: RunDirectory, steps: int | None = None) -> str:
    """`command` (launcher, module and overrides) with this run's folder, and with more steps if given."""
    replaced = ("run.dir=", "trainer.steps=") if steps else ("run.dir=",)
    kept = [word for word in command if not word.lstrip("+").startswith(replaced)]
    more = [f"run.dir={directory.path}"] + ([f"trainer.steps={steps}"] if steps else [])
    return shlex.join(kept + more)


def launch_command(module: str, arguments: list[str]) -> list[str]:
    """The command line that started this process: the script that said so, srun, mpirun, torchrun, or python."""
    if script := os.environ.get("LONGREACH_COMMAND"):
        return [*shlex.split(script), *arguments]
    if launcher := launchers.command():
        return [*launcher, "python", "-m", module, *arguments]
    ranks = os.environ.get("LOCAL_WORLD_SIZE", "1")
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return ["torchrun", "--standalone", "--nproc-per-node", ranks, "-m", module, *arguments]
    if "RANK" in os.environ:
        ranks = os.environ.get("LOCAL_SIZE", ranks)
        return ["deepspeed", "--num_gpus", ranks, "--module", module, *arguments]
    return ["python", "-m", module, *arguments]
