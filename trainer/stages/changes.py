"""Changes: what a stage may change of the settings, and the settings that result."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Mapping
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from ..preparation import changed
from ..settings import Settings

# Groups and settings that a stage may change: what leaves parameters, tokens and the run's files as they are.
CHANGEABLE = (
    "model", "data", "parallel", "schedule", "optimizer", "engine", "trainer.activation_checkpointing",
    "trainer.tile_tokens", "trainer.offload_activations", "trainer.clip", "trainer.max_skipped_steps",
    "trainer.max_rollbacks", "trainer.spike_deviations", "trainer.spike_window", "checkpoint.every", "evaluation.every",
    "evaluation.rows", "evaluation.context", "evaluation.context_rows", "evaluation.positions",
)  # fmt: skip
# What they must not change of these groups: other ids, other held-out documents, other states, what is fixed when
# processes meet.
FIXED = (
    "data.tokenizer", "data.bos", "data.vocabulary_size", "data.validation_fraction", "data.cache_dir",
    "data.audit", "data.restart", "schedule.extension", "schedule.extended", "model.vocabulary", "optimizer.kind",
    "parallel.timeout_minutes",
)  # fmt: skip

Holder = TypeVar("Holder")


def changed_by(settings: Settings, entry: Mapping[str, Any]) -> tuple[Settings, dict[str, Any]]:
    """The settings with an entry's changes, and these by dotted name; what is not changed is shared, not copied.

    Settings of the model may be new ones, of a part that the model has; a mapping with a `_target_` or a `kind` takes
    the place of what was there, another one changes single settings of it. Raises ValueError for a name that is no
    setting, one that a stage must not change, and a value of the wrong type.
    """
    changes = dict(_flat(entry, settings, ""))
    for name, value in changes.items():
        _check_changeable(name, settings)
        settings = _replaced(settings, name.split("."), value, name, free=settings.init_from is not None)
    return settings, changes


def _flat(entry: Mapping[str, Any], holder: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Every change by its dotted name, of entries that write `data: {sequence_length: 512}` too."""
    for key, value in entry.items():
        name = f"{prefix}{key}"
        inner = getattr(holder, key, None) if key.isidentifier() else None
        if dataclasses.is_dataclass(inner) and isinstance(value, Mapping):
            yield from _flat(value, inner, f"{name}.")
        else:
            yield name, value


def _check_changeable(name: str, settings: Settings) -> None:
    if _changeable(name):
        return
    names = list(_names(settings, ""))
    if name in names or name in FIXED:
        raise ValueError(
            f"{name} must stay the same in all stages; got it in one of them. Give it for the whole run: stages change "
            f"{', '.join(CHANGEABLE)}"
        )
    hint = _near(name, [*filter(_changeable, names), "steps", "tokens", "tokens_per_step", "name"])
    raise ValueError(f"{name} must be a setting, or one of a stage's own; got a name that nothing reads. {hint}")


def _changeable(name: str) -> bool:
    return name not in FIXED and any(name == each or name.startswith(f"{each}.") for each in CHANGEABLE)


def _replaced(holder: Any, path: list[str], value: Any, name: str, free: bool) -> Any:
    """The holder with the setting at `path` replaced. free: a mapping may get parts that it does not have."""
    head, *rest = path
    if dataclasses.is_dataclass(holder) and not isinstance(holder, type):
        fields = [field.name for field in dataclasses.fields(holder)]
        if head not in fields:
            prefix = name.removesuffix(".".join(path))
            raise ValueError(f"{name} must be a setting; got a name that nothing reads. {_near(head, fields, prefix)}")
        before, hint = getattr(holder, head), get_type_hints(type(holder))[head]
        part = get_args(hint)[1] if get_origin(hint) is dict else None
        if dataclasses.is_dataclass(part):
            for key in reversed(rest):
                value = {key: value}
            value = _with_parts(before, part, value, name.removesuffix("".join(f".{key}" for key in rest)))
        elif rest:
            value = _replaced(before, rest, value, name, free)
        else:
            value = _typed(value, hint, before, name)
        return dataclasses.replace(holder, **{head: value})
    if not isinstance(holder, Mapping):
        raise ValueError(f"{name} must be a setting; got a name below {name.removesuffix('.' + '.'.join(path))}")
    if not rest:
        return changed(holder, {head: value})
    if head not in holder and not free:
        prefix = name.removesuffix(".".join(path))
        raise ValueError(f"{name} must be a setting of a part that is there. {_near(head, list(holder), prefix)}")
    return {**holder, head: _replaced(holder.get(head) or {}, rest, value, name, free)}


def _with_parts(before: Mapping[str, Any], part: Any, changes: Any, name: str) -> dict[str, Any]:
    """Parts by name, such as the sources of a mixture, some of them changed, added, or removed by null; all by null."""
    if changes is None:
        return {}
    if not isinstance(changes, Mapping):
        raise ValueError(f"{name} must be a mapping, or null to leave out all of it; got {changes!r}")
    made = dict(before)
    for key, value in changes.items():
        if value is None:
            if made.pop(key, None) is None:
                raise ValueError(
                    f"{name}.{key} must be there to be left out by null. {_near(key, list(before), name + '.')}"
                )
            if not made:
                raise ValueError(
                    f"{name} must keep one of {', '.join(before)}; got null for each. Give null for {name} itself, and "
                    "say what is read instead"
                )
            continue
        made[key] = made.get(key, part())
        if not isinstance(value, Mapping):
            raise ValueError(f"{name}.{key} must be a mapping of its settings, or null to leave it out; got {value!r}")
        for setting, chosen in value.items():
            made[key] = _replaced(made[key], [setting], chosen, f"{name}.{key}.{setting}", free=False)
    return made


def _typed(value: Any, hint: Any, before: Any, name: str) -> Any:
    """The value as the field's type has it. Raises ValueError for another type."""
    if isinstance(before, Mapping) and isinstance(value, Mapping):
        return changed(before, value)
    for option in get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,):
        kind = get_origin(option) or option
        plain = not isinstance(value, bool)
        if kind is float and plain and isinstance(value, int | float):
            return float(value)
        if kind is str and plain and isinstance(value, int | float):
            return str(value)
        if kind is int and plain and isinstance(value, float) and value.is_integer():
            return int(value)
        if kind is tuple and isinstance(value, list):
            return tuple(value)
        if kind is Any or (isinstance(value, kind) and (plain or kind is bool)):
            return value
    told = hint.__name__ if isinstance(hint, type) else str(hint)
    raise ValueError(f"{name} must be of type {told}; got {value!r}")


def _names(value: Any, prefix: str) -> Iterator[str]:
    for field in dataclasses.fields(value):
        inner = getattr(value, field.name)
        yield f"{prefix}{field.name}"
        if dataclasses.is_dataclass(inner):
            yield from _names(inner, f"{prefix}{field.name}.")


def _near(name: str, known: list[str], prefix: str = "") -> str:
    """A hint at what was meant: a name like it, or all that there are, without a prefix those that end alike."""
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return f"Did you mean {prefix}{near[0]}?"
    last = name.rpartition(".")[2]
    known = [each for each in known if prefix or each.rpartition(".")[2] == last]
    return f"Known: {', '.join(prefix + each for each in known)}" if known else "Remove it"
