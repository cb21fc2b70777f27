"""The catalogue of tasks: from what a configuration names to tasks, with everything checked that can be known early."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

from .copying import SelectiveCopying
from .induction import InductionHeads
from .mqar import MultiQueryRecall
from .needles import Needles, PassKey
from .question_answering import QuestionAnswering
from .state_tracking import Parity, Permutations
from .task import Task
from .variables import VariableTracking
from .words import CommonWords, FrequentWords

TASKS = {
    "mqar": MultiQueryRecall,
    "copying": SelectiveCopying,
    "induction": InductionHeads,
    "parity": Parity,
    "permutations": Permutations,
    "passkey": PassKey,
    "needle": Needles,
    "needle_multikey": partial(Needles, keys=4),
    "needle_multivalue": partial(Needles, values=4),
    "needle_multiquery": partial(Needles, keys=4, queries=4),
    "variables": VariableTracking,
    "common_words": CommonWords,
    "frequent_words": FrequentWords,
    "question_answering": QuestionAnswering,
}


class Chosen(NamedTuple):
    """A task as a configuration names it; `label` tells it from the same one with other settings."""

    label: str
    task: Task


def tasks_of(entries: Sequence[Any], setting: str) -> tuple[Chosen, ...]:
    """The tasks of a list of names, or of mappings {task: NAME, SETTING: VALUE}.

    Raises ValueError for a name that is not known, a setting that its task does not have, a value of another type, and
    what is there twice.
    """
    made = [_chosen(entry, f"{setting}[{number}]") for number, entry in enumerate(entries)]
    labels = [each.label for each in made]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise ValueError(f"{setting} must name each task once; got {twice[0]} twice. Remove one, or change a setting")
    return tuple(made)


def _chosen(entry: Any, setting: str) -> Chosen:
    name, given = entry, dict[str, Any]()
    if isinstance(entry, Mapping):
        given = dict(entry)
        name = given.pop("task", None)
    if name not in TASKS:
        near = difflib.get_close_matches(str(name), TASKS, n=1)
        hint = f"Did you mean {near[0]}?" if near else f"Known: {', '.join(TASKS)}"
        raise ValueError(f"{setting} must name a task; got {name!r}. {hint}")
    made: Any = TASKS[name]
    known = {field.name: field.type for field in dataclasses.fields(getattr(made, "func", made))}
    for key, value in given.items():
        if key not in known:
            hint = f"Known: {', '.join(known)}" if known else "It has none"
            raise ValueError(f"{setting}.{key} must be a setting of {name}; got a name that it does not read. {hint}")
        given[key] = _typed(value, str(known[key]), f"{setting}.{key}")
    label = "_".join([name, *(f"{key}_{value}".replace(".", "_") for key, value in sorted(given.items()))])
    return Chosen(label, made(**given))


def _typed(value: Any, kinds: str, setting: str) -> Any:
    """The value, if it is of one of a field's types, as "int | None" names them."""
    for kind in kinds.split(" | "):
        if kind == "float" and type(value) is int:
            return float(value)
        if type(value).__name__ == kind or (kind == "None" and value is None):
            return value
    raise ValueError(f"{setting} must be of type {kinds}; got {value!r}. Change it")


@contextmanager
def named(label: str, setting: str) -> Iterator[None]:
    """Puts setting and task in front of what a task refuses."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{setting} ({label}): {error}") from None
