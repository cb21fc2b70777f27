"""Progress: a live bar on the first rank's terminal, plain lines where there is none, nothing on other ranks."""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..memory.allocations import size


class _Terminal(Console):
    """Rich's, but a process that has lost whoever read its output (`| tee`) goes on: rich would end it."""

    def on_broken_pipe(self) -> None:
        with suppress(SystemExit):
            super().on_broken_pipe()


class RunProgress:
    """Shows step, loss, tokens/s, meters and time left; `say` prints a message above the bar, in one write.

    What cannot be printed, since the disk that the output goes to is full or nobody reads it any more, ends no run.
    """

    def __init__(self, steps: int, first: int, every: int, *, quiet: bool, console: Console | None = None) -> None:
        self.steps, self.every, self.quiet = steps, every, quiet
        # A wide line where the output is a file: wrapping is the reader's business.
        self.console = console or _Terminal(highlight=False, soft_wrap=True)
        self._seconds: deque[float] = deque(maxlen=50)
        self._first = first
        self._bar: Progress | None = None
        self._task: Any = None

    def start(self) -> None:
        """Shows the bar, where there is a terminal."""
        if not self.quiet and self.console.is_terminal:
            self._bar = Progress(
                TextColumn("[bold]step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[figures]}"),
                TimeElapsedColumn(),
                console=self.console,
                refresh_per_second=4,
            )
            self._task = self._bar.add_task("train", total=self.steps, completed=self._first, figures="")
            self._bar.start()

    def step(self, step: int, record: dict[str, Any], seconds: float) -> None:
        """Reports a finished step, `record` being its line of metrics."""
        if self.quiet:
            return
        self._seconds.append(seconds)
        left = duration(sum(self._seconds) / len(self._seconds) * (self.steps - step))
        rate = f"{count(record['tokens_per_second'])} tokens/s{_meters(record)}"
        if self._bar is not None:
            figures = f"loss {record['loss']:.4f}  {rate}  {left} left"
            self._bar.update(self._task, completed=step, figures=figures)
        elif step == self._first + 1 or step % self.every == 0 or step == self.steps:
            self.say(
                f"step {step}/{self.steps}  loss {record['loss']:.4f}  grad_norm {record['grad_norm']:.3f}  "
                f"learning_rate {record['learning_rate']:.2e}  {rate}  {left} left"
            )

    def say(self, message: str) -> None:
        if not self.quiet:
            with suppress(OSError):
                self.console.print(message, markup=False, soft_wrap=True)

    def close(self) -> None:
        if self._bar is not None:
            with suppress(OSError):
                self._bar.stop()
            self._bar = None


def _meters(record: dict[str, Any]) -> str:
    """What there is of a step's meters, each behind two spaces; what is nothing is not shown."""
    shown = []
    if mfu := record.get("mfu"):
        shown.append(f"{mfu:.1%} MFU")
    if memory := record.get("peak_memory_bytes"):
        shown.append(size(memory))
    if waited := record.get("communication_seconds"):
        shown.append(f"{waited / record['seconds']:.0%} waiting")
    if (padding := record.get("padding", 0.0)) >= 0.005:
        shown.append(f"{padding:.0%} padding")
    return "".join(f"  {each}" for each in shown)


def duration(seconds: float) -> str:
    """42 s, 3:05 min, 2:10 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    return f"{whole // 3600}:{whole % 3600 // 60:02d} h"


def count(number: float) -> str:
    """874, 12.3k, 1.20M."""
    for unit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            scaled = number / unit
            return f"{scaled:.1f}{suffix}" if scaled >= 10 else f"{scaled:.2f}{suffix}"
    return f"{number:.0f}"
