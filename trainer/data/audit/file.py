"""audit.bin: one frame for each source and for each step, appended as they come."""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

NAME = "audit.bin"  # in run.dir
HEADER = struct.Struct("<4sqqII")  # kind, step, row, bytes of the content, their CRC-32
SOURCE, STEP, PASSED = b"SRC1", b"STP1", b"PAS1"
COLUMNS = 4  # of a step's content: source, document, first token, tokens


class AuditSource(NamedTuple):
    """Documents that a run reads, by number, and their lengths, int64."""

    name: str
    fingerprint: str
    documents: np.ndarray
    lengths: np.ndarray


class AuditRows(NamedTuple):
    """Rows that a step has read, or that the run has passed over before it.

    row: the number of the first of them in its segment.   rows: how many.
    pieces: int64 `[n, 4]`, in order: which source of the file, its document, first token, tokens.
    """

    step: int
    row: int
    rows: int
    pieces: np.ndarray
    passed: bool = False


def packed(record: AuditSource | AuditRows) -> bytes:
    """A frame."""
    if isinstance(record, AuditSource):
        told = json.dumps([record.name, record.fingerprint, len(record.documents)]).encode()
        columns = np.stack([np.diff(record.documents, prepend=0), record.lengths]).astype("<i8")
        return _frame(SOURCE, 0, 0, struct.pack("<I", len(told)) + told + columns.tobytes())
    numbers = struct.pack("<q", record.rows) + record.pieces.T.astype("<i8").tobytes()
    return _frame(PASSED if record.passed else STEP, record.step, record.row, numbers)


def _frame(kind: bytes, step: int, row: int, content: bytes) -> bytes:
    content = zlib.compress(content, 1)
    return HEADER.pack(kind, step, row, len(content), zlib.crc32(content)) + content


@dataclass
class AuditFile:
    """The frames of a run's file, in the order of steps; a frame that a kill has torn ends it."""

    path: Path

    def frames(self) -> Iterator[tuple[int, AuditSource | AuditRows]]:
        """Each record, with the place in the file where it ends."""
        with self.path.open("rb") as file:
            while True:
                header = file.read(HEADER.size)
                if len(header) < HEADER.size:
                    return
                kind, step, row, size, check = HEADER.unpack(header)
                content = file.read(size)
                if kind not in (SOURCE, STEP, PASSED) or len(content) < size or zlib.crc32(content) != check:
                    return
                yield file.tell(), _unpacked(kind, step, row, zlib.decompress(content))

    def resume_at(self, step: int) -> list[AuditSource | AuditRows]:
        """Cuts off what comes after that step, and returns the sources and the last rows that remain."""
        kept: list[AuditSource | AuditRows] = []
        end, last = 0, None
        if self.path.exists():
            for place, record in self.frames():
                if isinstance(record, AuditRows) and record.step > step:
                    break
                end = place
                if isinstance(record, AuditSource):
                    kept.append(record)
                else:
                    last = record
            with self.path.open("r+b") as file:
                file.truncate(end)
        return [*kept, *([last] if last is not None else [])]

    def append(self, frames: bytes, *, sync: bool = False) -> None:
        """Raises OSError, with nothing added, where there is no room. sync: so that a loss of power loses nothing."""
        with self.path.open("ab", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            try:
                if file.write(frames) != len(frames):
                    raise OSError(f"no room for {self.path}")
                if sync:
                    os.fsync(file.fileno())
            except OSError:
                file.truncate(end)
                raise


def _unpacked(kind: bytes, step: int, row: int, content: bytes) -> AuditSource | AuditRows:
    if kind == SOURCE:
        (size,) = struct.unpack_from("<I", content)
        name, fingerprint, _ = json.loads(content[4 : 4 + size])
        apart, lengths = np.frombuffer(content, "<i8", offset=4 + size).reshape(2, -1)
        return AuditSource(name, fingerprint, np.cumsum(apart), lengths)
    (rows,) = struct.unpack_from("<q", content)
    pieces = np.frombuffer(content, "<i8", offset=8).reshape(COLUMNS, -1).T
    return AuditRows(step, row, rows, pieces, kind == PASSED)
