"""Step: one piece of a part, and how it tells what it finds."""

from __future__ import annotations

import json
import math
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

FRAMES = 8  # of a traceback, the innermost


@dataclass(frozen=True)
class Step:
    """A piece of a part that fails alone.

    seconds: after so many its process is ended and the part goes on with the next step; None: only by the part's own
    limit.
    """

    name: str
    run: Callable[[Here], None]
    seconds: float | None = None


class Here:
    """Where a step runs: the device, until when, a folder for its files, and the way to the report.

    Everything told arrives at once: what a process has told before it dies is kept. `deadline` is by `time.monotonic`.
    """

    def __init__(self, device: torch.device, deadline: float, folder: Path, pipe: int) -> None:
        self.device, self.deadline, self.folder, self._pipe = device, deadline, folder, pipe
        self.step = ""
        self._lock = threading.Lock()

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def left(self) -> float:
        """Seconds until the part has to have ended."""
        return self.deadline - time.monotonic()

    def send(self, kind: str, **record: Any) -> None:
        """Sends one record to the process that writes the report."""
        line = (json.dumps({"kind": kind, **record}) + "\n").encode()
        with self._lock:
            while line:
                line = line[os.write(self._pipe, line) :]

    def row(self, table: str, **values: Any) -> None:
        """A row of a table; columns are the names of the values. JSON has no number for what is not finite."""
        finite = {name: str(x) if isinstance(x, float) and not math.isfinite(x) else x for name, x in values.items()}
        self.send("row", table=table, value=finite)

    def note(self, text: str) -> None:
        self.send("note", value=text)

    def skip(self, what: str, why: str) -> None:
        """Says what is not done, and why."""
        self.send("skipped", value={"what": what, "why": why})

    def fail(self, error: str | BaseException, details: Iterable[str] = (), step: str | None = None) -> None:
        """A failure of this step: an exception, or a result that is wrong, with shapes and errors as details."""
        frames: list[str] = []
        if isinstance(error, BaseException):
            frames, error = frames_of(error), said(error)
        value = {"step": step or self.step, "error": error, "details": list(details), "traceback": frames}
        self.send("failure", value=value)


def said(error: BaseException) -> str:
    """The kind of an exception and the first lines of its message."""
    lines = [line for line in str(error).splitlines() if line.strip()][:4]
    return "\n".join([f"{type(error).__name__}: {lines[0] if lines else 'no message'}", *lines[1:]])


def frames_of(error: BaseException) -> list[str]:
    """The innermost frames of an exception, each as its place and its line."""
    frames = traceback.extract_tb(error.__traceback__)[-FRAMES:]
    return [f"  {_short(frame.filename)}:{frame.lineno} {frame.name}: {frame.line}" for frame in frames]


def _short(path: str) -> str:
    return "/".join(Path(path).parts[-3:])
