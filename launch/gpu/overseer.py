"""Overseer: runs the steps of a part in processes of their own, and writes what they tell to the report at once."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from ... import __path__ as package
from .parts import Part
from .report import PartReport

LOG_LINES = 15  # of what a process printed before it died
START_SECONDS = 15.0  # a worker is not started for less


class Worker:
    """One process of a part, what it is doing, and the log of what it prints."""

    def __init__(self, part: Part, number: int, deadline: float, folder: Path) -> None:
        self.log = folder / f"{part.name}-{number}.log"
        self.step: int | None = None
        self.begun, self.until = 0.0, float("inf")
        self.buffer = b""
        reading, writing = os.pipe()
        command = [sys.executable, "-u", "-m", f"{__package__}.worker", part.name, part.module, str(deadline)]
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                [*command, str(writing), str(folder)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=[writing],
                env=environment(),
                start_new_session=True,
            )
        os.close(writing)
        self.pipe: IO[bytes] = os.fdopen(reading, "rb", buffering=0)
        os.set_blocking(reading, False)

    def give(self, number: int, until: float) -> None:
        """Has it run a step."""
        self.step, self.begun, self.until = number, time.monotonic(), until
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it has died; the end of its pipe says so
            self.process.stdin.write(f"{number}\n".encode())
            self.process.stdin.flush()

    def records(self) -> list[dict[str, Any]] | None:
        """What it has sent since; None at its end."""
        data = self.pipe.read()
        if data == b"":
            return None
        *lines, self.buffer = (self.buffer + (data or b"")).split(b"\n")
        return [json.loads(line) for line in lines]

    def end(self) -> int:
        """Ends the process and all that it has started; its exit code, negative for a signal."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.pipe.close()
        return self.process.wait()

    def last_lines(self) -> list[str]:
        return self.log.read_text(errors="replace").splitlines()[-LOG_LINES:]


class Overseer:
    """Runs one part until `deadline`, by `time.monotonic`; `told` is called with a line after each piece of news."""

    def __init__(
        self, part: Part, report: PartReport, deadline: float, folder: Path, workers: int, told: Callable[[str], None]
    ) -> None:
        self.part, self.report, self.deadline, self.folder, self.told = part, report, deadline, folder, told
        self.allowed, self.started = workers, 0
        self.steps: list[tuple[str, float | None]] | None = None
        self.waiting: list[int] = []  # steps that nobody has begun
        self.cut = False  # whether a step was ended for its time
        self.workers: list[Worker] = []
        self.selector = selectors.DefaultSelector()

    def run(self) -> None:
        begun = time.monotonic()
        self.report.limit, self.report.outcome = self.deadline - begun, "running"
        self.told("")
        outcome = "stopped from outside"
        try:
            self._start()
            while self.workers:
                self._wait()
            outcome = "cut short" if self.cut or self.waiting or self.steps is None else "complete"
        finally:
            for worker in list(self.workers):
                self._drop(worker)
            left = [self.steps[number][0] for number in self.waiting] if self.steps else []
            if left:
                self._tell("skipped", {"what": ", ".join(left), "why": "the part's time was over"})
            elif self.steps is None and not self.report.failures:
                self._tell("skipped", {"what": "all of it", "why": "its time was over before its first step"})
            self.report.seconds, self.report.outcome = time.monotonic() - begun, outcome
            self.told("")

    def _start(self) -> None:
        worker = Worker(self.part, self.started, self.deadline, self.folder)
        self.started += 1
        self.workers.append(worker)
        self.selector.register(worker.pipe, selectors.EVENT_READ, worker)

    def _wait(self) -> None:
        """Hears from the workers, or ends those whose time is over."""
        until = min([self.deadline, *(worker.until for worker in self.workers)])
        for key, _ in self.selector.select(max(until - time.monotonic(), 0.0)):
            worker = key.data
            records = worker.records()
            if records is None:
                self._died(worker)
                continue
            for record in records:
                self._hear(worker, record)
        now = time.monotonic()
        for worker in [worker for worker in self.workers if now >= min(worker.until, self.deadline)]:
            name = self._name(worker)
            self._drop(worker)
            if name:
                limit = "the part's time was over" if now >= self.deadline else "that is its own limit"
                self.cut = True
                self._tell("skipped", {"what": name, "why": f"ended after {now - worker.begun:.0f} s: {limit}"})
            if now < self.deadline:
                self._go_on()

    def _hear(self, worker: Worker, record: dict[str, Any]) -> None:
        if record["kind"] == "steps":
            if self.steps is None:
                self.steps = [(name, seconds) for name, seconds in record["value"]]
                self.waiting = list(range(len(self.steps)))
                for _ in range(min(self.allowed, len(self.steps)) - 1):
                    self._start()
            self._next(worker)
        elif record["kind"] in ("done", "lost"):
            worker.step, worker.until = None, float("inf")
            if record["kind"] == "done":  # else it ends, and another takes its place
                self._next(worker)
        else:
            self.told(self.report.add(record))

    def _next(self, worker: Worker) -> None:
        """Gives the worker another step, or lets it go."""
        assert self.steps is not None
        if not self.waiting:
            self._drop(worker)
            return
        number = self.waiting.pop(0)
        seconds = self.steps[number][1]
        worker.give(number, float("inf") if seconds is None else time.monotonic() + seconds)

    def _died(self, worker: Worker) -> None:
        """A worker has ended by itself: what it did has failed, unless it said so, and another goes on."""
        name, code = self._name(worker), self._drop(worker)
        if name or self.steps is None:
            how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            error = f"the process ended with {how}"
            value = {"step": name or "start", "error": error, "traceback": worker.last_lines()}
            self._tell("failure", value)
        if self.steps is not None:
            self._go_on()

    def _go_on(self) -> None:
        """Starts a worker in place of one that has gone, if there is something for it to do and time to do it."""
        if self.waiting and self.deadline - time.monotonic() > START_SECONDS:
            self._start()

    def _name(self, worker: Worker) -> str:
        return self.steps[worker.step][0] if self.steps is not None and worker.step is not None else ""

    def _drop(self, worker: Worker) -> int:
        self.workers.remove(worker)
        self.selector.unregister(worker.pipe)
        return worker.end()

    def _tell(self, kind: str, value: dict[str, Any]) -> None:
        self.told(self.report.add({"kind": kind, "value": value}))


def environment() -> dict[str, str]:
    """That of this process, in which `longreach` is the package that runs, and no folder of it is found by itself."""
    above = Path(package[0]).parent
    paths = [str(above)] if Path(package[0]).name == "longreach" else []
    paths += [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)), "PYTHONSAFEPATH": "1"}
