"""Choice: which checkpoint a run starts from, and which one a path means."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ...models.moved import with_current_paths
from ...parallel.mesh import Mesh
from ..ranks.exchange import from_first_rank, together
from ..run.directory import RunDirectory
from .stored import advice, examine, is_one, latest, steps, verify


@dataclass(frozen=True)
class Candidates:
    """Checkpoints that a run may start from, the best first; `foreign` are of another run, for the first start only."""

    own: list[Path]
    foreign: list[Path]

    def __iter__(self) -> Iterator[Path]:
        return iter([*self.own, *self.foreign])

    def refusal(self, directory: RunDirectory, problems: list[str], mesh: Mesh) -> ValueError:
        """What is raised where none of them is good, for the reasons in `problems`; every rank calls it."""
        if not self.own:
            other = advice(self.foreign[0], lambda path: examine(path, mesh) is None)
            return ValueError(f"{problems[0]}. {other}, or leave checkpoint.resume out to start anew")
        return ValueError(
            f"{'; '.join(problems)}. None of {directory.path} is good: start anew in another run.dir, or from another "
            "run's with checkpoint.resume=PATH"
        )


def candidates(resume: str, directory: RunDirectory) -> Candidates:
    """`auto`: the run's own checkpoints, the newest first. A path: that after them, since it counts for a first start.

    Raises ValueError for a path where there is no checkpoint, and for `none` where the run has some.
    """
    try:
        own = steps(directory.checkpoints)[::-1]
    except OSError as error:
        raise ValueError(f"run.dir must be a folder that can be read; got {error}. Name another") from None
    if resume == "auto":
        return Candidates(own, [])
    if resume == "none":
        if own:
            raise ValueError(
                f"run.dir must be a new folder with checkpoint.resume=none; got {directory.path}, which holds "
                f"{own[0].name}. Give another run.dir, or checkpoint.resume=auto to go on"
            )
        return Candidates([], [])
    path = Path(resume)
    if not path.is_dir():
        if own:
            return Candidates(own, [])  # what this run once started from may have gone
        raise ValueError(f"checkpoint.resume must be a checkpoint's folder, or a run's; got {path}. Check the path")
    foreign = [path]
    if not is_one(path):
        foreign = next((there for folder in (path / "checkpoints", path) if (there := steps(folder))), [path])
    mine = {path.resolve() for path in own}
    return Candidates(own, [path for path in foreign[::-1] if path.resolve() not in mine])


def choose(resume: str, directory: RunDirectory, mesh: Mesh) -> tuple[Path | None, list[str]]:
    """The checkpoint to start from, with its bytes examined, and notes about the choice; every rank calls it.

    It is the newest good one of the run, or else what `resume` (checkpoint.resume) names, as the first rank sees the
    file system. Raises ValueError on every rank where there are some and none is good.
    """
    there = together(mesh, lambda: candidates(resume, directory) if mesh.rank == 0 else Candidates([], []))
    there = from_first_rank(there, mesh)
    problems: list[str] = []
    for path in there:
        problem = examine(path, mesh)
        if problem is None:
            notes = [f"passed over: {problem}" for problem in problems]
            named = Path(resume).expanduser().resolve()
            if resume != "auto" and path in there.own and named not in (path.resolve(), *path.resolve().parents):
                notes.append(
                    f"checkpoint.resume={resume} counts for a run's first start, and this one goes on from its own "
                    f"{path.name}. To start from there once more, give another run.dir"
                )
            return path, notes
        problems.append(problem)
    if problems:
        raise there.refusal(directory, problems, mesh)
    return None, []


def is_own(path: Path) -> bool:
    """Whether a folder is a checkpoint of LongReach, complete or not, a run, or a run's folder of checkpoints."""
    return is_one(path) or (path / "metrics.jsonl").is_file() or bool(steps(path) or steps(path / "checkpoints"))


def locate(path: str | Path, setting: str) -> Path:
    """The complete checkpoint at `path`, or the newest one where `path` is a run or its folder of checkpoints.

    Raises ValueError where there is none, and CheckpointError where none is complete.
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        raise ValueError(f"{setting} must be a checkpoint's folder, or a run's; got {path}. Check the path")
    for folder in (path / "checkpoints", path):
        if (newest := latest(folder)) is not None:
            return newest
    there = [*steps(path / "checkpoints"), *steps(path)]
    if not there and not is_one(path):
        raise ValueError(
            f"{setting} must be a checkpoint's folder, or a run's that has saved one; got {path}, where there is none. "
            "Check the path"
        )
    verify(there[-1] if there else path)
    return path


def own_checkpoint(folder: str) -> Path | None:
    """The checkpoint of LongReach at `folder`, or the newest one where that is a run; None where it is something else.

    Raises CheckpointError for one that is not complete.
    """
    path = Path(folder).expanduser()
    return locate(path, "init_from") if is_own(path) else None


def read_config(path: Path) -> dict[str, Any]:
    """The configuration of the run that a checkpoint is of, which lies beside its weights.

    Raises ValueError where it is missing or names no model.
    """
    try:
        run = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
        return {**run, "model": with_current_paths(dict(run["model"]))}
    except (OSError, KeyError, TypeError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"checkpoint must hold the config.yaml of its run; got {path}: {error}") from None
