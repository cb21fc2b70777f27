"""Commit: a checkpoint that all ranks have written becomes one at once, by a rename, and old ones make way."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from ..run.failure import remedy
from .stored import FORMAT, INDEX, CheckpointError, is_complete, is_kept, keep_for_ever, sealed, step_of, steps
from .tensor_files import TensorWriter

LEFT = ".left"  # how the names of checkpoints end that a rollback has left behind
Written = tuple[dict[str, Any], str | None]  # a rank's files with their entries in the index, and what went wrong


class Target(NamedTuple):
    """Where a checkpoint will be, and where it is while it is being written."""

    path: Path
    temporary: Path

    @classmethod
    def of(cls, directory: Path, step: int) -> Target:
        path = directory / f"step-{step:08d}"
        return cls(path, directory / f".{path.name}.writing")

    def make(self) -> str | None:
        """Makes the folder to write into, and removes what attempts that were cut short have left; what went wrong."""
        directory = self.path.parent
        try:
            directory.mkdir(exist_ok=True)
            for left_over in directory.glob(".step-*"):
                _remove(left_over)
            self.temporary.mkdir()
        except OSError as failure:
            return str(failure)
        return None


class Retention(NamedTuple):
    """What stays beside a new checkpoint: the newest `keep` with it, the newest up to step `spare`, and those marked.

    kept: the new one is marked, to stay for ever.
    """

    keep: int
    spare: int | None = None
    kept: bool = False


def entries(writers: Iterable[TensorWriter]) -> dict[str, Any]:
    """What the index says of the files: bytes and checksums."""
    return {writer.path.name: {"bytes": writer.size, "crc32": writer.checksums} for writer in writers}


def unwritten(path: Path, why: str) -> CheckpointError:
    """The error of a checkpoint that could not be written."""
    return CheckpointError(f"checkpoint {path} could not be written: {why}. Earlier ones stay; {remedy(why)}")


def commit(
    target: Target,
    index: dict[str, Any],
    written: Sequence[Written],
    retention: Retention,
    beside: Callable[[Path], None] | None,
) -> str | None:
    """Makes a checkpoint of what the ranks have `written`, unless one has failed: then all goes, and it says why.

    The first rank calls it. index: what `index.json` says besides the files. beside: see `checkpoint.save`.
    """
    error = next((f"{text} (rank {rank})" for rank, (_, text) in enumerate(written) if text), None)
    try:
        if error is None:
            if beside is not None:
                beside(target.temporary)
            if retention.kept or is_kept(target.path):
                keep_for_ever(target.temporary)
            files = {file: entry for part, _ in written for file, entry in part.items()}
            _complete(*target, {**index, "files": files})
            _prune(target.path, retention)
    except Exception as failure:  # of any kind: the tokenizers' library raises bare ones for a full disk
        error = f"{failure}"
    if error is not None:
        shutil.rmtree(target.temporary, ignore_errors=True)
    return error


def _complete(path: Path, temporary: Path, index: dict[str, Any]) -> None:
    for file, entry in index["files"].items():
        if not (temporary / file).exists() or (temporary / file).stat().st_size != entry["bytes"]:
            raise OSError(f"{file} is not there; run.dir must be on a file system that all ranks share")
    with open(temporary / INDEX, "w") as file:
        json.dump(sealed({"format": FORMAT, **index}), file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    _sync_folder(temporary)
    replaced = path.with_name(f".{path.name}.replaced")
    if path.exists():  # a run that was resumed from an earlier checkpoint comes by here again
        os.rename(path, replaced)
    os.rename(temporary, path)
    _sync_folder(path.parent)
    _remove(replaced)


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def leave_behind(path: Path) -> list[str]:
    """Sets aside the checkpoints after `path`, for a run that has gone back there and will come to other ones.

    As the newest they would be gone on from. They make way for the next that is written, unless they are marked to
    stay. Returns what a disk that cannot be written has kept where it was.
    """
    for later in steps(path.parent):
        if step_of(later) > step_of(path):
            aside = later.with_name(f"{later.name}{LEFT}")
            with suppress(OSError):
                _remove(aside)
                os.rename(later, aside)
    return [later.name for later in steps(path.parent) if step_of(later) > step_of(path)]


def _prune(written: Path, retention: Retention) -> None:
    """Those after `written` stay: of a run that goes on from an earlier one, since they are damaged, until it is there.

    Nor do damaged ones count among those that are kept.
    """
    for left in written.parent.glob(f"step-*{LEFT}"):
        if not is_kept(left):
            shutil.rmtree(left, ignore_errors=True)
    keep, spare, _ = retention
    kept, spared = 1, spare is None or step_of(written) <= spare
    for path in reversed([path for path in steps(written.parent) if step_of(path) < step_of(written)]):
        complete = is_complete(path)
        if complete and kept < keep:
            kept += 1
            spared = spared or step_of(path) <= (spare or 0)
        elif complete and not spared and step_of(path) <= (spare or 0):
            spared = True
        elif not is_kept(path):
            shutil.rmtree(path, ignore_errors=True)
