"""The plan of a run: its stages, the steps and the settings of each, from the configuration alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ...models.moved import with_current_paths
from ..data.settings import DataSettings
from ..schedule import Schedule
from ..settings import Settings, check, expand_paths
from .changes import changed_by

OWN = ("name", "steps", "tokens", "tokens_per_step")  # of an entry itself; all else are changes of settings


@dataclass(frozen=True)
class Stage:
    """Steps `first` + 1 .. `stop` of a run, which are taken with `settings`.

    name: "" for that of a run without stages.   changes: what it changes of the stage before, by dotted name.
    schedule: the learning rate of each step of the run.   rows: that it reads; None for a run without stages.
    """

    number: int
    name: str
    first: int
    stop: int
    settings: Settings
    schedule: Schedule
    changes: dict[str, Any] = field(default_factory=dict)
    rows: int | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint says of the stage that it is of."""
        return {"name": self.name, "first": self.first}

    @property
    def setting(self) -> str:
        """As messages call it: "stages[1] (long)"."""
        return f"stages[{self.number}] ({self.name})" if self.name else ""

    @contextmanager
    def checked(self) -> Iterator[None]:
        """Errors within say of which stage they are."""
        with _named(self.setting):
            yield


@dataclass(frozen=True)
class Plan:
    """All stages of a run, at least one; `settings` are those of the run, as they were configured."""

    settings: Settings
    stages: tuple[Stage, ...]

    @property
    def staged(self) -> bool:
        return bool(self.settings.stages)

    def at(self, step: int) -> Stage:
        """The stage that goes on after so many steps: at a border the one that begins."""
        return next((stage for stage in self.stages if step < stage.stop), self.stages[-1])

    def behind(self, step: int) -> Stage:
        """The stage of the last of so many steps: at a border the one that ends."""
        return next((stage for stage in self.stages if step <= stage.stop), self.stages[-1])

    @property
    def borders(self) -> tuple[int, ...]:
        """The last step of each stage but the last."""
        return tuple(stage.stop for stage in self.stages[:-1])

    def check(self, world_size: int, device: torch.device | None = None) -> None:
        """Raises ValueError, naming stage, setting and remedy, for what can be known without data, model or device."""
        for stage in self.stages:
            with stage.checked():
                check(stage.settings, world_size, device)
                if self.borders and not stage.settings.checkpoint.every:
                    raise ValueError(
                        "checkpoint.every must be at least 1 with stages, each of which begins from the checkpoint of "
                        "the one before; got 0"
                    )
            if self.staged and (extension := stage.settings.schedule.extension) != "stretch":
                raise ValueError(
                    f"schedule.extension must be left out with stages; got {extension}. Add a stage with a schedule of "
                    "its own instead"
                )

    def table(self) -> list[str]:
        """A line for each stage: its name, its steps, and what it changes."""
        rows = [(s.name, f"steps {s.first + 1}..{s.stop}", _told(s.changes)) for s in self.stages]
        width, steps = (max(len(row[column]) for row in rows) for column in (0, 1))
        return [f"  {name:<{width}}  {span:<{steps}}  {changes}".rstrip() for name, span, changes in rows]


def plan_of(settings: Settings) -> Plan:
    """The plan of a run: one stage where `stages` is empty; otherwise `trainer.steps` becomes the sum of theirs.

    A stage has the settings of the one before it, the first one those of the run, with its own changes: changes stay.
    A schedule begins with the first stage and with each one that changes `schedule` or `optimizer.learning_rate`, and
    runs until the next that does. Raises ValueError for what no stage can be.
    """
    expand_paths(settings)
    if not settings.stages:
        schedule = Schedule(settings.schedule, settings.optimizer.learning_rate, settings.trainer.steps)
        return Plan(settings, (Stage(0, "", 0, settings.trainer.steps, settings, schedule),))
    if settings.schedule.extension != "stretch":
        raise ValueError(
            f"schedule.extension must be left out with stages; got {settings.schedule.extension}. A stage that is "
            "added at the end names a schedule of its own, or the one before it is stretched"
        )
    entries = [_Entry.read(number, entry) for number, entry in enumerate(settings.stages)]
    if len({entry.name for entry in entries}) < len(entries):
        names = ", ".join(entry.name for entry in entries)
        raise ValueError(f"stages must have names of their own; got {names}. Rename one")
    made: list[tuple[_Entry, Settings, dict[str, Any], int]] = []
    current = settings
    for entry in entries:
        with _named(entry.setting):
            current, changes = changed_by(replace(current), entry.changes)
            current.model = with_current_paths(current.model)
            expand_paths(current)
            current, changes = entry.with_rows(current, changes)
            made.append((entry, current, changes, entry.count(current.data)))
    settings.trainer.steps = sum(steps for *_, steps in made)
    return Plan(settings, tuple(_stages(settings, made)))


@dataclass(frozen=True)
class _Entry:
    """An entry of the list, its own keys apart from the changes of settings."""

    number: int
    name: str
    own: dict[str, Any]
    changes: dict[str, Any]

    @classmethod
    def read(cls, number: int, entry: Mapping[str, Any]) -> _Entry:
        own = {key: entry[key] for key in OWN if entry.get(key) is not None}
        name = str(own.pop("name", number + 1))
        made = cls(number, name, own, {key: value for key, value in entry.items() if key not in OWN})
        with _named(made.setting):
            if ("steps" in own) == ("tokens" in own):
                raise ValueError(f"steps or tokens must say how long it is; got {'both' if own else 'neither'} of them")
            for key, value in own.items():
                if isinstance(value, bool) or not isinstance(value, int | float) or value < 1 or value % 1:
                    raise ValueError(f"{key} must be a whole number of at least 1; got {value!r}")
        return made

    @property
    def setting(self) -> str:
        return f"stages[{self.number}] ({self.name})"

    def with_rows(self, settings: Settings, changes: dict[str, Any]) -> tuple[Settings, dict[str, Any]]:
        """With the rows per step that `tokens_per_step` asks for. Raises ValueError where these are no whole rows."""
        if (tokens := self.own.get("tokens_per_step")) is None:
            return settings, changes
        length = settings.data.sequence_length
        if "data.rows_per_step" in changes or tokens % length:
            raise ValueError(
                f"tokens_per_step must be a multiple of data.sequence_length={length}, without data.rows_per_step "
                f"beside it; got {tokens}. Use {max(1, round(tokens / length)) * length}"
            )
        rows = int(tokens // length)
        data = replace(settings.data, rows_per_step=rows)
        return replace(settings, data=data), changes | {"data.rows_per_step": rows}

    def count(self, data: DataSettings) -> int:
        """The steps: those given, or as many as the tokens need, the last step whole."""
        if "steps" in self.own:
            return int(self.own["steps"])
        return math.ceil(self.own["tokens"] / (data.rows_per_step * data.sequence_length))


def _stages(base: Settings, made: list[tuple[_Entry, Settings, dict[str, Any], int]]) -> Iterator[Stage]:
    first = 0
    borders = [sum(steps for *_, steps in made[:number]) for number in range(len(made) + 1)]
    begins = [0] + [n for n, (_, _, changes, _) in enumerate(made) if n and any(map(_reschedules, changes))]
    for entry, settings, changes, steps in made:
        stop = first + steps
        begin = max(number for number in begins if number <= entry.number)
        end = next((number for number in begins if number > entry.number), len(made))
        length = borders[end] - borders[begin]
        # The group may be the run's own, or that of a stage with a setting of its own.
        settings.trainer = replace(settings.trainer, steps=base.trainer.steps)
        with _named(entry.setting):
            rate, span = settings.optimizer.learning_rate, "the steps of the stages that share a schedule"
            schedule = Schedule(settings.schedule, rate, length, first=borders[begin], span=span)
        rows = steps * settings.data.rows_per_step
        yield Stage(entry.number, entry.name, first, stop, settings, schedule, changes, rows)
        first = stop


def _reschedules(name: str) -> bool:
    return name.partition(".")[0] == "schedule" or name == "optimizer.learning_rate"


def _told(changes: Mapping[str, Any]) -> str:
    def short(value: Any) -> Any:
        return value["_target_"].rpartition(".")[2] if isinstance(value, Mapping) and "_target_" in value else value

    return " ".join(f"{name}={short(value)}" for name, value in changes.items())


@contextmanager
def _named(setting: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise (type(error)(f"{setting}: {error}") if setting else error) from None
