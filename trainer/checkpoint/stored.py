"""Stored checkpoints: which are there, which of them are whole, and what is wrong with the others."""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ...models.moved import former_name
from ...parallel.collectives import agree
from ...parallel.mesh import Mesh
from .tensor_files import Place, checksum, map_tensor, read_places

INDEX = "index.json"
CHECK = "crc32"  # of the index, in itself
KEPT = "kept"  # a file that marks a checkpoint as one to stay
FORMAT = "longreach checkpoint 1"
BUFFERS = "buffers"
WEIGHTS = ("weights", BUFFERS)  # how the names of files of parameters and buffers begin


class CheckpointError(ValueError):
    """A checkpoint that could not be written, or that is truncated, damaged, or of another model."""


@dataclass(frozen=True)
class Stored:
    """A verified checkpoint: its state, and file, place and checksum of each tensor."""

    path: Path
    state: dict[str, Any]
    adam_steps: int
    tensors: dict[str, tuple[str, Place, int]]

    def map(self, key: str) -> Tensor:
        """A tensor, read from the disk where it is touched."""
        file, place, _ = self.tensors[key]
        return map_tensor(self.path / file, place)

    def named_for(self, names: Collection[str]) -> Stored:
        """The same, with the tensors of a model of these names called by them, whatever they were called before."""
        former = {former_name(name): name for name in names if name not in self.tensors}
        tensors = {}
        for key, entry in self.tensors.items():
            kind, slash, name = key.rpartition("/")
            tensors[f"{kind}{slash}{former.get(name, name)}"] = entry
        return replace(self, tensors=tensors)


def is_one(path: str | Path) -> bool:
    """Whether a folder is a checkpoint, complete or not."""
    return (Path(path) / INDEX).is_file()


def latest(directory: str | Path) -> Path | None:
    """The newest complete checkpoint of a folder of checkpoints."""
    return next((path for path in reversed(steps(Path(directory))) if is_complete(path)), None)


def is_complete(path: Path) -> bool:
    """Whether files and index of a checkpoint agree, but for the tensors' bytes."""
    try:
        _read(path)
    except _Damage:
        return False
    return True


def keep_for_ever(path: Path) -> None:
    """Marks a checkpoint as one that saving never removes, whatever `checkpoint.keep` says; one rank calls it."""
    (path / KEPT).touch()


def is_kept(path: Path) -> bool:
    """Whether a checkpoint is marked to stay."""
    return (path / KEPT).exists()


def steps(directory: Path) -> list[Path]:
    """What a folder of checkpoints holds, complete or not, by step. Raises OSError if it cannot be read."""
    try:
        names = os.listdir(directory)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted((directory / name for name in names if re.fullmatch(r"step-\d+", name)), key=step_of)


def step_of(path: Path) -> int:
    """The step after which a checkpoint was saved, by its name."""
    return int(path.name.removeprefix("step-"))


def verify(path: str | Path) -> Stored:
    """Reads the index and compares it with the files' sizes and headers.

    Raises CheckpointError where they disagree or where `path` is no checkpoint. Says nothing of the tensors' bytes.
    """
    try:
        return _read(Path(path))
    except _Damage as damage:
        raise _refusal(Path(path), damage) from None


def examine(path: Path, mesh: Mesh) -> str | None:
    """What is wrong with a checkpoint, its bytes included, of which each rank reads its share; every rank calls it."""
    error = None
    try:
        stored = _read(path)
        _check_bytes(stored, sorted(stored.tensors)[mesh.rank :: mesh.world_size])
    except _Damage as damage:
        error = str(damage)
    try:
        agree(error, mesh.world_size)
    except ValueError as problem:
        return f"checkpoint {path} must be complete and undamaged; {problem}"
    return None


def advice(path: Path, is_good: Callable[[Path], bool]) -> str:
    """What to do about a damaged checkpoint: the newest other one of the run that is good, if any."""
    others = (other for other in reversed(steps(path.parent)) if other.name != path.name and is_good(other))
    return f"Use {other}" if (other := next(others, None)) else "Use another one"


def sealed(index: Mapping[str, Any]) -> dict[str, Any]:
    """An index as it is written: with a checksum of all that it says, since a run goes on from the numbers in it."""
    told = json.loads(json.dumps(index))
    return {**told, CHECK: _checksum(told)}


def _checksum(told: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps({key: told[key] for key in told if key != CHECK}, sort_keys=True).encode())


class _Damage(Exception):
    """What is wrong with a checkpoint."""


def _read(path: Path) -> Stored:
    try:
        index = json.loads((path / INDEX).read_text(encoding="utf-8"))
        if index["format"] != FORMAT:
            raise _Damage(f"its {INDEX} is not of the format {FORMAT!r}")
        if CHECK in index and index[CHECK] != _checksum(index):  # those from before it had one are read too
            raise _Damage(f"its {INDEX} has changed since it was written")
        tensors: dict[str, tuple[str, Place, int]] = {}
        for file, entry in index["files"].items():
            tensors.update(_read_file(path, Path(file).name, entry))
        return Stored(path, {**index["state"], "step": int(index["state"]["step"])}, index["adam_steps"], tensors)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _Damage(f"{INDEX} cannot be read ({type(error).__name__}: {error})") from None


def _read_file(path: Path, file: str, entry: dict[str, Any]) -> dict[str, tuple[str, Place, int]]:
    try:
        size = (path / file).stat().st_size
        places = read_places(path / file) if size == entry["bytes"] else {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _Damage(f"{file} cannot be read ({error})") from None
    if size != entry["bytes"]:
        raise _Damage(f"{file} has {size} of {entry['bytes']} bytes")
    if places.keys() != entry["crc32"].keys():
        raise _Damage(f"{file} does not hold the tensors that {INDEX} says")
    return {key: (file, place, entry["crc32"][key]) for key, place in places.items()}


def differences(stored: Stored, expected: Mapping[str, Sequence[int]]) -> str:
    """How the weights and buffers of a checkpoint differ from these names and shapes, or an empty text.

    Three of them, and the number of the others; what has another shape is named with its file.
    """
    kept = {name: place for name, place in stored.tensors.items() if place[0].startswith(WEIGHTS)}
    problems = [f"{name} is missing" for name in expected if name not in kept]
    problems += [f"{name} is not the model's" for name in kept if name not in expected]
    for name, shape in expected.items():
        if name in kept and (there := kept[name][1].shape) != tuple(shape):
            problems.append(f"{name} in {kept[name][0]} has shape {list(there)} instead of {list(shape)}")
    more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
    return ", ".join(problems[:3]) + more


def check_bytes(stored: Stored, keys: list[str]) -> None:
    """Compares the bytes of tensors with their checksums. Raises CheckpointError."""
    try:
        _check_bytes(stored, keys)
    except _Damage as damage:
        raise _refusal(stored.path, damage) from None


def _check_bytes(stored: Stored, keys: list[str]) -> None:
    for key in keys:
        file, place, expected = stored.tensors[key]
        try:
            actual = checksum(stored.path / file, place)
        except OSError as error:
            raise _Damage(f"{file} cannot be read ({error})") from None
        if actual != expected:
            raise _Damage(f"the bytes of {key} in {file} have changed since they were written")


def is_undamaged(path: Path) -> bool:
    """Whether a checkpoint is complete and its bytes are those that were written; it reads all of them."""
    try:
        stored = _read(path)
        _check_bytes(stored, list(stored.tensors))
    except _Damage:
        return False
    return True


def _refusal(path: Path, damage: _Damage) -> CheckpointError:
    return CheckpointError(f"checkpoint {path} must be complete and undamaged; {damage}. {advice(path, is_undamaged)}")
