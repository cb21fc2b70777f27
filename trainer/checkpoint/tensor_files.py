"""Tensor files: the safetensors format, written piece by piece and read through the page cache, float32 only."""

from __future__ import annotations

import contextlib
import json
import math
import os
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

READ_BYTES = 1 << 24


class Place(NamedTuple):
    """Where a tensor lies in a file: its shape and its first byte."""

    shape: tuple[int, ...]
    offset: int

    @property
    def bytes(self) -> int:
        return 4 * math.prod(self.shape)


class TensorWriter:
    """Writes the tensors of `shapes` to `path` in this order, each in as many pieces as one likes. Raises OSError."""

    def __init__(self, path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
        header = _header(shapes)
        self.path, self.size = path, len(header) + sum(4 * math.prod(shape) for shape in shapes.values())
        self.checksums = dict.fromkeys(shapes, 0)
        self._file = open(path, "wb")  # noqa: SIM115 (closed by close)
        self._file.write(header)

    def write(self, name: str, piece: Tensor) -> None:
        """The next elements of `name`, float32 `[n]`."""
        data = piece.detach().cpu().contiguous().numpy().data.cast("B")
        self.checksums[name] = zlib.crc32(data, self.checksums[name])
        self._file.write(data)

    def close(self) -> None:
        """Returns when the file is on the disk."""
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())

    def abandon(self) -> None:
        """Closes a file that will be removed; what is left in its buffer may not fit on the disk."""
        with contextlib.suppress(OSError):
            self._file.close()


def _header(shapes: dict[str, tuple[int, ...]]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        stop = offset + 4 * math.prod(shape)
        entries[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    return len(text).to_bytes(8, "little") + text


def read_places(path: Path) -> dict[str, Place]:
    """The tensors of a file. Raises OSError, or ValueError where the header is not that of such a file."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            raise ValueError("its header is longer than the file")
        entries = json.loads(file.read(length))
    places = {}
    for name, entry in entries.items():
        if name == "__metadata__":
            continue
        start, stop = entry["data_offsets"]
        place = Place(tuple(entry["shape"]), 8 + length + start)
        if entry["dtype"] != "F32" or stop - start != place.bytes:
            raise ValueError(f"its header contradicts itself about {name}")
        places[name] = place
    return places


def map_tensor(path: Path, place: Place) -> Tensor:
    """float32, read from the disk where it is touched; writing to it does not change the file."""
    if not place.bytes:
        return torch.empty(place.shape)
    return torch.from_numpy(np.memmap(path, dtype="<f4", mode="c", offset=place.offset, shape=place.shape))


def checksum(path: Path, place: Place) -> int:
    """CRC-32 of a tensor's bytes in the file."""
    value, left = 0, place.bytes
    with open(path, "rb") as file:
        file.seek(place.offset)
        while left and (data := file.read(min(left, READ_BYTES))):
            value, left = zlib.crc32(data, value), left - len(data)
    return value
