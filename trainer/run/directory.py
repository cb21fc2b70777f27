"""The run's folder: chosen by the first rank, shared by all; what lies where in it."""

from __future__ import annotations

import itertools
import os
import re
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from ...parallel.mesh import Mesh
from ..ranks.exchange import from_first_rank, together
from .failure import remedy
from .lock import POLL_SECONDS, RunLock
from .settings import RunSettings


class RunDirectory:
    """run.dir and its contents: config.yaml, metrics.jsonl, samples.txt, environment.json, checkpoints/, plots/,
    profile/, wandb/.

    lock.json is there while the run goes on, and faults.jsonl where it has skipped steps, gone back or died.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics = path / "metrics.jsonl"
        self.samples = path / "samples.txt"
        self.plot = path / "plots" / "loss.png"
        self.checkpoints = path / "checkpoints"
        self.profile = path / "profile"
        self._made: list[Path] = []
        self._lock: RunLock | None = None

    @classmethod
    def claim(cls, settings: RunSettings, mesh: Mesh) -> RunDirectory:
        """The folder for this run alone, made and locked by the first rank; every rank calls it.

        It is run.dir, or runs/<name>/<time> by the first rank's clock, with a number behind it where that is taken.
        Raises ValueError on every rank for a folder that can be neither made nor written, or where another run goes on.
        """
        path, made = from_first_rank(together(mesh, lambda: _make(settings) if mesh.rank == 0 else None), mesh)
        directory = cls(path)
        if mesh.rank == 0:
            directory._made, directory._lock = made, RunLock(directory.path)
        try:
            # In short rounds: no rank waits in a collective for as long as it takes to tell whether another run lives.
            while not from_first_rank(together(mesh, directory._locked), mesh):
                if mesh.rank == 0:
                    time.sleep(POLL_SECONDS)
        except BaseException:
            directory.release(unused=True)
            raise
        return directory

    def _locked(self) -> bool:
        try:
            return self._lock is not None and self._lock.attempt()
        except OSError as error:
            raise unwritable(self.path, error) from None

    def lost(self) -> str | None:
        """Asked of the first rank: why the folder is no longer this run's; None while it is."""
        return self._lock.lost() if self._lock is not None else None

    def release(self, *, unused: bool = False) -> None:
        """Ends the claim. unused: the run never began; what was made for it and is still empty is removed."""
        if self._lock is not None:
            self._lock.release()
        if unused:
            with suppress(OSError):
                for folder in reversed(self._made):
                    folder.rmdir()

    def write_config(self, config: dict[str, Any]) -> None:
        """Written aside and renamed: a full disk does not cost a resumed run the one that it has."""
        text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
        aside = self.path / "config.yaml.partial"
        try:
            aside.write_text(text, encoding="utf-8")
            os.replace(aside, self.path / "config.yaml")
        except OSError:
            aside.unlink(missing_ok=True)
            raise

    def add_sample(self, step: int, text: str) -> None:
        with self.samples.open("a", encoding="utf-8") as file:
            file.write(f"--- step {step}\n{text}\n\n")

    def read_samples(self, last: int) -> list[dict[str, Any]]:
        """The samples up to step `last`, in the order of steps; of those of one step the last that was written."""
        if not self.samples.exists():
            return []
        text = self.samples.read_text(encoding="utf-8", errors="replace")
        _, *parts = re.split(r"^--- step (\d+)\n", text, flags=re.MULTILINE)
        samples = {int(step): sample.removesuffix("\n\n") for step, sample in zip(parts[::2], parts[1::2], strict=True)}
        return [{"step": step, "sample": sample} for step, sample in sorted(samples.items()) if step <= last]


def _make(settings: RunSettings) -> tuple[Path, list[Path]]:
    """Makes the folder where it is not there; returns it and all that was made for it, outermost first."""
    path = Path(settings.dir or f"runs/{settings.name or 'run'}/{time.strftime('%Y-%m-%d_%H-%M-%S')}")
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(f"run.dir must be a folder that can be written; got {path}. Name another")
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if settings.dir is None:
            path = _new(path)
            return path, [*reversed(missing[1:]), path]
        path.mkdir(exist_ok=True)
    except OSError as error:
        said = f"got {path}: {error.strerror}"
        raise ValueError(f"run.dir must be a folder that can be made; {said}. Name another") from None
    return path, missing[::-1]


def _new(path: Path) -> Path:
    """`path`, or one with a number behind it: a run that began in the same second has a folder of its own."""
    for number in itertools.count(2):
        try:
            path.mkdir()
        except FileExistsError:
            path = path.with_name(f"{path.name.partition('.')[0]}.{number}")
        else:
            return path
    raise AssertionError


def unwritable(path: Path, error: OSError) -> ValueError:
    """What is raised where run.dir cannot be written before training begins."""
    return ValueError(f"run.dir must be a folder that can be written; got {path}: {error}; {remedy(error)}")
