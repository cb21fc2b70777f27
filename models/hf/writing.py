"""The files of a Hugging Face model written: safetensors one tensor after another, JSON, in a folder that is whole."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .tensors import Entries, Tensors

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD_BYTES = 5_000_000_000
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_METADATA = {"__metadata__": {"format": "pt"}}
_ENTRY_BYTES = 200  # of a header, at most, for what it says of a tensor beside the name


class WriteError(ValueError):
    """A folder that could not be written, of which nothing is left."""


def save_tensors(
    state: Iterable[tuple[str, Tensor | Entries]],
    tensors: Tensors,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> torch.dtype:
    """Write our named parameters as their tensors, in files of at most `shard_bytes` (one tensor may exceed it).

    `state` is taken one tensor at a time, and each of theirs goes to the disk as soon as it is made. Returns the type
    of the written tensors (the first one's). Raises ValueError for names that do not fit.
    """
    if shard_bytes < 1:
        raise ValueError(f"shard_bytes must be at least 1; got {shard_bytes}")
    left = sum(len(json.dumps(name)) + _ENTRY_BYTES for name in tensors.write)
    shards = [_Shard(folder / _part(0), left)]
    parameters, kept = 0, None
    try:
        for name, tensor in _made(state, tensors):
            exact = tensors.buffers.issuperset(tensors.write[name].sources)  # those of routers, which keep their type
            tensor = tensor.detach().to(device="cpu", dtype=tensor.dtype if exact else dtype or tensor.dtype)
            kept = kept or tensor.dtype
            if not shards[-1].takes(tensor, shard_bytes):
                shards[-1].close()
                shards.append(_Shard(folder / _part(len(shards)), left))
            shards[-1].write(name, tensor)
            parameters, left = parameters + tensor.numel(), left - len(json.dumps(name)) - _ENTRY_BYTES
        shards[-1].close()
    except BaseException:
        shards[-1].abandon()
        raise
    _name_shards(folder, shards, parameters)
    return kept or torch.get_default_dtype()


class _Shard:
    """A safetensors file that is written one tensor after another.

    Its header, which stands first, is known last: it gets `room` bytes, and blanks fill what is left of them.
    """

    def __init__(self, path: Path, room: int) -> None:
        self.path, self.room = path, (room + 64) // 8 * 8  # tensors of any type begin at multiples of their size
        self.entries: dict[str, Any] = {}
        self.size = 0
        self._file = open(path, "wb")  # noqa: SIM115 (closed by close)
        self._file.seek(8 + self.room)

    def takes(self, tensor: Tensor, most: int) -> bool:
        """Whether a tensor fits behind the others: by its size, and by its type, for there are no gaps."""
        return not self.entries or (self.size + tensor.nbytes <= most and self.size % tensor.itemsize == 0)

    def write(self, name: str, tensor: Tensor) -> None:
        places = [self.size, self.size + tensor.nbytes]
        self.entries[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": places}
        self.size = places[1]
        self._file.write(tensor.flatten().view(torch.uint8).numpy().data)

    def close(self) -> None:
        """Writes the header, and returns when the file is on the disk."""
        with self._file:
            header = json.dumps(_METADATA | self.entries, separators=(",", ":")).encode()
            assert len(header) <= self.room
            self._file.seek(0)
            self._file.write(self.room.to_bytes(8, "little") + header.ljust(self.room))
            self._file.flush()
            os.fsync(self._file.fileno())

    def abandon(self) -> None:
        """Closes a file that will be removed; what is left in its buffer may not fit on the disk."""
        with contextlib.suppress(OSError):
            self._file.close()


def _name_shards(folder: Path, shards: list[_Shard], parameters: int) -> None:
    """Shards get their names when their number is known; a single one is no shard and has no index."""
    if len(shards) == 1:
        shards[0].path.rename(folder / SINGLE)
        return
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    weight_map = {}
    for shard, file in zip(shards, names, strict=True):
        shard.path.rename(folder / file)
        weight_map |= dict.fromkeys(shard.entries, file)
    metadata = {"total_parameters": parameters, "total_size": sum(shard.size for shard in shards)}
    write_json(folder / INDEX, {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))})


def _part(number: int) -> str:
    return f"part-{number}.safetensors"


def _made(state: Iterable[tuple[str, Tensor | Entries]], tensors: Tensors) -> Iterator[tuple[str, Tensor]]:
    """Their tensors, each as soon as all of ours that it is made of have come by."""
    users: dict[str, list[str]] = {}
    for theirs, recipe in tensors.write.items():
        for source in recipe.sources:
            users.setdefault(source, []).append(theirs)
    waiting: dict[str, dict[str, Tensor | Entries]] = {theirs: {} for theirs in tensors.write}
    for name, tensor in state:
        if name.startswith(tensors.left_out):
            continue
        if name in tensors.fixed:
            _check_fixed(name, tensor, tensors.fixed[name])
            continue
        if name not in users:
            raise ValueError(f"the model's parameters must be those of its settings; got {name}")
        for theirs in users.pop(name):
            held = waiting[theirs]
            held[name] = tensor
            recipe = tensors.write[theirs]
            if len(held) == len(set(recipe.sources)):
                del waiting[theirs]
                yield theirs, recipe.whole(*(held[source] for source in recipe.sources))
    if waiting:
        raise ValueError(f"the model's parameters must be those of its settings; missing: {listed(set(users))}")


def _check_fixed(name: str, tensor: Tensor | Entries, value: float | None) -> None:
    if value is not None and isinstance(tensor, Tensor) and bool((tensor != value).any()):
        raise ValueError(
            f"{name} must be {value:g}, since models of this family have no such tensor; got other values. Choose a "
            "family that has it, or train with feed_forward.bias_rate=0"
        )


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def copy_files(files: Iterable[Path], folder: Path) -> None:
    for file in files:
        if file.is_dir():
            shutil.copytree(file, folder / file.name)
        else:
            shutil.copyfile(file, folder / file.name)


def check_new(path: Path, setting: str = "path") -> None:
    """Raises ValueError unless nothing, or an empty folder, is at `path`."""
    try:
        taken = path.exists() and (not path.is_dir() or any(path.iterdir()))
        files = [parent for parent in path.parents if parent.exists() and not parent.is_dir()]
    except OSError as error:
        raise ValueError(f"{setting} must be a folder that can be made; got {path}: {error}. Choose another") from None
    if files:
        raise ValueError(f"{setting} must be a folder that can be made; got {path} below a file. Choose another")
    if taken:
        raise ValueError(f"{setting} must be a new or empty folder; got {path}. Choose another")


@contextlib.contextmanager
def new_folder(path: Path, setting: str = "path") -> Iterator[Path]:
    """A folder beside `path` that takes its name when the block ends well, and goes when it does not.

    setting: that gives `path`, for messages. Raises ValueError where something is there, and WriteError where the
    system does not let it be made or filled.
    """
    check_new(path, setting)
    folder = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder, ignore_errors=True)  # what an interrupted write may have left
        folder.mkdir()
        yield folder
        folder.replace(path)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise WriteError(
                f"{setting} must be a folder that can be written; got {path}: {error}. Nothing of it is left. Free "
                "space or make it writable, or choose another"
            ) from error
        raise


def listed(names: Iterable[str], most: int = 6) -> str:
    """Names in order, the first of them where there are many."""
    found = sorted(names)
    return ", ".join(found[:most]) + (f" and {len(found) - most} more" if len(found) > most else "")
