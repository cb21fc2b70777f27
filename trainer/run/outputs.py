"""Outputs: what the first rank shows and keeps of a run; the other ranks' are silent."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from ..settings import Settings
from .directory import RunDirectory, unwritable
from .environment import keep as keep_environment
from .failure import remedy
from .metrics import BEFORE_STAGE, MetricsFile
from .plots import LossCurves
from .progress import RunProgress
from .tracking import Tracker


class Outputs:
    """Terminal, metrics.jsonl, samples.txt, environment.json, plots and W&B of the first rank.

    A file that cannot be written (a full disk) is reported once for each run of failures, and the run goes on; lines of
    metrics and the configuration are written when there is room again. Raises ValueError if metrics.jsonl cannot be
    brought back to `step`.

    step: the last one that has been taken, from which the run goes on. stage: the one that goes on, in every line of
    metrics, where the run has stages; beginning: whether it has taken no step yet. bring_up: called before each line of
    metrics, so that it writes those of earlier steps first, where any are still to be read. environment: what the run
    was started with and on (see `environment.describe`).
    """

    def __init__(
        self,
        settings: Settings,
        directory: RunDirectory,
        *,
        first: bool,
        step: int,
        stage: str = "",
        beginning: bool = False,
        bring_up: Callable[[], None] = lambda: None,
        environment: dict[str, Any] | None = None,
    ) -> None:
        self.directory, self.first, self.stage, self._bring_up = directory, first, stage, bring_up
        self.progress = RunProgress(settings.trainer.steps, step, settings.logger.print_every, quiet=not first)
        self.metrics = MetricsFile(directory.metrics)
        self.curves = LossCurves()
        self.tracker: Tracker | None = None
        self._failing = False
        self._config: dict[str, Any] | None = None  # while it is still to be written
        self._environment, self._step = environment if first else None, step  # the same
        if first:
            lines: list[dict[str, Any]] = []

            def keep(record: dict[str, Any]) -> None:
                self.curves.add(record)
                lines.append(record)

            try:
                self.metrics.resume_at(step, keep, stage if beginning else None)
                before = sorted([*lines, *directory.read_samples(step)], key=lambda record: record["step"])
            except OSError as error:
                raise unwritable(directory.path, error) from None
            self._config = asdict(settings)
            self._keep(self._flush)
            config = asdict(settings)
            if environment is not None:  # W&B lists packages itself
                config["environment"] = {key: value for key, value in environment.items() if key != "packages"}
            self.tracker = Tracker(settings.logger.wandb, directory.path, config, self.say, before)
            self.progress.start()

    def say(self, message: str) -> None:
        self.progress.say(message)

    def log(self, record: dict[str, Any]) -> None:
        """Adds a line to metrics.jsonl, W&B and, if it has a loss, the curves. Raises ValueError if it has no step."""
        if "step" not in record:
            raise ValueError(f"a line of metrics must have a step; got {record}. Add it: {{'step': trainer.step, ...}}")

        def write() -> None:
            self.metrics.write(record)
            self._flush()

        self._bring_up()
        if self.stage:
            record = record | {"stage": self.stage}
        if self.first:
            self.curves.add(record)
            self._keep(write)
            if self.tracker is not None:
                self.tracker.log(record)

    def training(self, record: dict[str, Any]) -> None:
        """A finished step."""
        self.log(record)
        self.progress.step(record["step"], record, record["seconds"])

    def validation(self, record: dict[str, Any]) -> None:
        self.log(record)
        bits = f"{record['bits_per_byte']:.4f} bits per byte  " if "bits_per_byte" in record else ""
        figures = f"validation loss {record['validation_loss']:.4f}  {bits}accuracy {record['accuracy']:.2%}"
        where = f"step {record['step']}" + (f", before stage {self.stage}" if record.get(BEFORE_STAGE) else "")
        self.say(f"{where}  {figures}")
        self.plot()

    def sample(self, step: int, text: str) -> None:
        if self.first:
            self._keep(lambda: self.directory.add_sample(step, text))
            if self.tracker is not None:
                self.tracker.sample(step, text)

    def plot(self) -> None:
        if self.first:
            title = self.directory.path.name
            self._keep(lambda: self.curves.draw(self.directory.plot, title))

    def unkept(self) -> list[str]:
        """What still cannot be written at the end."""
        try:
            self._flush()
        except OSError as error:
            parts = ["config.yaml"] if self._config is not None else []
            parts += ["environment.json"] if self._environment is not None else []
            parts += [f"the last {self.metrics.unwritten} line(s) of metrics.jsonl"] if self.metrics.unwritten else []
            return [f"{' and '.join(parts)} could not be written: {error}; {remedy(error)}"]
        return []

    def _flush(self) -> None:
        self.metrics.flush()
        if self._config is not None:
            self.directory.write_config(self._config)
            self._config = None
        if self._environment is not None:
            keep_environment(self.directory.path, self._step, self._environment)
            self._environment = None

    def close(self, *, failed: bool = False) -> None:
        self.progress.close()
        if self.tracker is not None:
            self.tracker.close(failed=failed)

    def _keep(self, write: Callable[[], None]) -> None:
        try:
            write()
            self._failing = False
        except OSError as error:
            if not self._failing:
                self.say(f"run.dir cannot be written: {error}. The run goes on; {remedy(error)}")
            self._failing = True


def show_log(first: bool) -> None:
    """LongReach's own log on the terminal: of the first rank all, of the others errors."""
    log = logging.getLogger("longreach")
    log.disabled = False  # Hydra's job_logging=disabled switches off the loggers that were there before it
    log.setLevel(logging.INFO if first else logging.ERROR)
    if not log.handlers:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
        log.propagate = False
