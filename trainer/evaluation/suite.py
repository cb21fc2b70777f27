"""The suite: tasks at lengths and depths, checked before a model is made, and what their scores are logged as."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...parallel.layout import Layout
from ...parallel.strategy import Strategy
from ..requirements import at_least
from .evaluation import Scored
from .scoring import Cell, score
from .tasks.catalogue import Chosen, named, tasks_of
from .tasks.question_answering import read_questions
from .tasks.task import Material

PROBLEMS = 32
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class SuiteSettings:
    """What is scored; `prefix` is what the names of settings begin with, for messages."""

    tasks: Sequence[Any]
    lengths: Sequence[int] = ()
    problems: int | None = None
    depths: Sequence[float] = ()
    questions: str | None = None
    seed: int | None = None
    prefix: str = ""
    chosen: tuple[Chosen, ...] = field(init=False)

    def __post_init__(self) -> None:
        """Raises ValueError for what cannot be, or has no effect."""
        name = self.prefix
        object.__setattr__(self, "chosen", tasks_of(self.tasks, f"{name}tasks"))
        for setting in ("lengths", "problems", "depths", "questions"):
            if (value := getattr(self, setting)) not in (None, (), []) and not self.tasks:
                raise ValueError(f"{name}{setting} must be left out without {name}tasks; got {value}. Name tasks")
        at_least(f"{name}problems", self.problems, 1)
        for number, length in enumerate(self.lengths):
            at_least(f"{name}lengths[{number}]", length, 2)
        self._refuse_twice("lengths", self.lengths)
        self._refuse_twice("depths", self.depths)
        if wrong := [depth for depth in self.depths if not 0 <= depth <= 1]:
            raise ValueError(f"{name}depths must lie within 0..1; got {wrong[0]}. 0 is the beginning, 1 the end")
        if self.depths and not any(each.task.by_depth for each in self.chosen):
            raise ValueError(f"{name}depths must be left out of tasks without one; got {list(self.depths)}. Remove it")
        asking = [each.label for each in self.chosen if each.task.reads == "questions"]
        if asking and self.questions is None:
            raise ValueError(
                f"{name}questions must be a file for {asking[0]}; got none. Give JSON Lines of context, question and "
                "answer"
            )
        if self.questions is not None and not asking:
            raise ValueError(
                f"{name}questions must be left out without the task question_answering; got {self.questions}. Remove it"
            )

    def _refuse_twice(self, setting: str, values: Sequence[float]) -> None:
        if len(set(values)) < len(values):
            raise ValueError(f"{self.prefix}{setting} must not repeat a value; got {list(values)}. Remove one")

    @property
    def reads_documents(self) -> bool:
        """Whether a task hides something in documents."""
        return any(each.task.haystack_of_documents for each in self.chosen)

    @property
    def reads_text(self) -> bool:
        """Whether a task needs a tokenizer."""
        return any(each.task.reads != "ids" for each in self.chosen)


@dataclass(frozen=True)
class Suite:
    """Tasks at lengths and depths, of one material.

    Raises ValueError for a length that is too short for a problem, for text without a tokenizer, and for what a task
    refuses.
    """

    settings: SuiteSettings
    lengths: tuple[int, ...]
    material: Material

    def __post_init__(self) -> None:
        prefix = self.settings.prefix
        for label, task in self.settings.chosen:
            with named(label, f"{prefix}tasks"):
                if task.reads != "ids" and self.material.tokenizer is None:
                    raise ValueError("its model must have a tokenizer; got one without text. Choose tasks of ids")
                task.check(self.material)
            needed = max(task.least(self.material, number) for number in range(self.problems))
            if (shortest := min(self.lengths)) < needed:
                raise ValueError(
                    f"{prefix}lengths must be at least {needed} for {label}; got {shortest}. Raise it, or leave the "
                    "task out"
                )

    @property
    def problems(self) -> int:
        return PROBLEMS if self.settings.problems is None else self.settings.problems

    def cells(self) -> Iterator[tuple[str, Cell]]:
        """What is scored, with the label of its task: lengths in the order given, tasks within them."""
        for length in self.lengths:
            for label, task in self.settings.chosen:
                for depth in (self.settings.depths or DEPTHS) if task.by_depth else (0.0,):
                    yield label, Cell(task, length, depth, self.problems)

    def score(
        self, model: Scored, ranks: int, spans: int, strategy: Strategy, rows_at_once: int = 1
    ) -> list[dict[str, Any]]:
        """A line for each task, length and depth; every rank calls it. Rows are padded to what the ranks can share.

        rows_at_once: of the longest problems; of shorter ones as many as have so many tokens.
        """
        places, lines = rows_at_once * layout_for(max(self.lengths), ranks, spans).local_length, []
        for label, cell in self.cells():
            layout = layout_for(cell.length, ranks, spans)
            scores = score(model, cell, self.material, layout, strategy, places)
            line: dict[str, Any] = {"task": label, "length": cell.length}
            line["depth"] = cell.depth if cell.task.by_depth else None
            line |= {"problems": cell.problems, **scores._asdict()}
            lines.append(line | {"chance": cell.task.chance(self.material.vocabulary)})
        return lines


def open_suite(
    settings: SuiteSettings, default_length: int, vocabulary: int, tokenizer: Any = None, text: Any = None
) -> Suite:
    """The suite of a model with this vocabulary and tokenizer. text: ids for tasks that hide something in documents.

    Raises ValueError as `Suite` does, and for questions that cannot be read.
    """
    questions = () if settings.questions is None else read_questions(settings.questions, f"{settings.prefix}questions")
    material = Material(vocabulary, settings.seed or 0, tokenizer, text, questions)
    return Suite(settings, tuple(settings.lengths) or (default_length,), material)


def layout_for(length: int, ranks: int, spans: int) -> Layout:
    """The layout of rows that hold `length` tokens: as many, or a few more, so that ranks and spans divide them."""
    return Layout(-(-length // (ranks * spans)) * ranks * spans, ranks, spans)


def metrics(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The lines as they are logged: all of them as `tasks`, and the mean of each task and length by name."""
    finite = [{name: _finite(value) for name, value in line.items()} for line in lines]
    found: dict[str, Any] = {"tasks": finite}
    for (label, length), group in grouped(lines).items():
        for measure in ("accuracy", "exact", "loss", "choice"):
            values = [line[measure] for line in group]
            if None not in values:
                found[f"task_{label}_{length}_{measure}"] = sum(values) / len(values)
    return found


def _finite(value: Any) -> Any:
    """The value, or None for a number that JSON does not have."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def grouped(lines: Sequence[dict[str, Any]]) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """The lines of each task and length."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for line in lines:
        groups.setdefault((line["task"], line["length"]), []).append(line)
    return groups


def table(lines: Sequence[dict[str, Any]]) -> list[str]:
    """The means of each task and length, to be printed."""
    made = ["task                             tokens  accuracy     exact    choice      loss"]
    for (label, length), group in grouped(lines).items():

        def mean(measure: str, group: list[dict[str, Any]] = group) -> float | None:
            values = [line[measure] for line in group]
            return None if None in values else sum(values) / len(values)

        shares = [mean("accuracy"), mean("exact"), mean("choice")]
        told = "".join("          " if share is None else f"{share:10.1%}" for share in shares)
        made.append(f"{label:<30} {length:>8}{told}{mean('loss'):10.4f}")
    return made
