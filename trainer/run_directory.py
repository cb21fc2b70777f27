"""The run's folder: chosen by the first rank, shared by all; what lies where in it."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import Any

import yaml

from ..parallel.mesh import Mesh
from . import checkpoint
from .exchange import from_first_rank
from .settings import RunSettings


class RunDirectory:
    """run.dir and its contents: config.yaml, metrics.jsonl, samples.txt, checkpoints/, plots/, profile/, wandb/."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics = path / "metrics.jsonl"
        self.samples = path / "samples.txt"
        self.plot = path / "plots" / "loss.png"
        self.checkpoints = path / "checkpoints"
        self.profile = path / "profile"

    @classmethod
    def choose(cls, settings: RunSettings, mesh: Mesh) -> RunDirectory:
        """run.dir, or runs/<name>/<time> by the first rank's clock."""
        named = settings.dir or f"runs/{settings.name or 'run'}/{time.strftime('%Y-%m-%d_%H-%M-%S')}"
        return cls(Path(from_first_rank(named, mesh)))

    def check(self) -> None:
        """Raises ValueError if the folder can be neither made nor written; makes nothing yet."""
        existing = next(folder for folder in (self.path, *self.path.absolute().parents) if folder.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            raise ValueError(f"run.dir must be a folder that can be written; got {self.path}. Name another")

    def make(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"run.dir must be a folder that can be made; {error}. Name another") from None

    def write_config(self, config: dict[str, Any]) -> None:
        text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
        (self.path / "config.yaml").write_text(text, encoding="utf-8")

    def add_sample(self, step: int, text: str) -> None:
        with self.samples.open("a", encoding="utf-8") as file:
            file.write(f"--- step {step}\n{text}\n\n")

    def read_samples(self, last: int) -> list[dict[str, Any]]:
        """The samples up to step `last`, in the order of steps; of those of one step the last that was written."""
        if not self.samples.exists():
            return []
        text = self.samples.read_text(encoding="utf-8", errors="replace")
        _, *parts = re.split(r"^--- step (\d+)\n", text, flags=re.MULTILINE)
        found = {int(step): sample.removesuffix("\n\n") for step, sample in zip(parts[::2], parts[1::2], strict=True)}
        return [{"step": step, "sample": sample} for step, sample in sorted(found.items()) if step <= last]


def find_checkpoint(resume: str, directory: RunDirectory) -> Path | None:
    """The checkpoint to start from: `auto` is the newest complete one of the run, None where there is none yet.

    Raises ValueError for a path that is no complete checkpoint, and where going on would mix two runs in one folder.
    """
    newest = checkpoint.latest(directory.checkpoints)
    present = sorted(path for path in directory.checkpoints.glob("step-*") if path.is_dir())
    if resume == "auto":
        if newest is None and present:
            checkpoint.verify(present[-1])  # says what is wrong with it
        return newest
    if resume == "none":
        if present:
            raise ValueError(
                f"run.dir must be a new folder with checkpoint.resume=none; got {directory.path}, which holds "
                f"{present[-1].name}. Give another run.dir, or checkpoint.resume=auto to go on"
            )
        return None
    found = locate(resume, "checkpoint.resume")
    if newest is not None and newest.name > found.name:
        raise ValueError(
            f"run.dir must not hold checkpoints newer than checkpoint.resume={resume}; got {directory.path} with "
            f"{newest.name}. Give another run.dir"
        )
    return found


def passed_over(found: Path | None, directory: RunDirectory) -> list[str]:
    """Names of the run's checkpoints that are newer than the one found, and so are not complete."""
    names = sorted(path.name for path in directory.checkpoints.glob("step-*"))
    return [name for name in names if found is not None and found.parent == directory.checkpoints and name > found.name]


def locate(path: str | Path, setting: str) -> Path:
    """The complete checkpoint at `path`, or the newest one where `path` is a run or its folder of checkpoints."""
    path = Path(path).expanduser()
    if not path.is_dir():
        raise ValueError(f"{setting} must be a checkpoint's folder, or a run's; got {path}. Check the path")
    for folder in (path / "checkpoints", path):
        if (newest := checkpoint.latest(folder)) is not None:
            return newest
    checkpoint.verify(path)
    return path


def own_checkpoint(folder: str) -> Path | None:
    """The checkpoint of LongReach at `folder`, or the newest one where that is a run; None where it is something else.

    Raises CheckpointError for one that is not complete.
    """
    path = Path(folder).expanduser()
    ours = checkpoint.is_one(path) or (path / "metrics.jsonl").is_file()
    return locate(path, "init_from") if ours else None


def read_config(found: Path) -> dict[str, Any]:
    """The configuration of the run that a checkpoint is of, which lies beside its weights.

    Raises ValueError where it is missing or names no model.
    """
    try:
        run = yaml.safe_load((found / "config.yaml").read_text(encoding="utf-8"))
        return {**run, "model": dict(run["model"])}
    except (OSError, KeyError, TypeError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"checkpoint must hold the config.yaml of its run; got {found}: {error}") from None
