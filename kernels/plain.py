"""Plain: frozen dataclasses as tuples of plain values, by which compiled graphs can be keyed."""

from __future__ import annotations

from dataclasses import fields
from functools import lru_cache
from typing import Any


class Plain:
    """Base of frozen dataclasses of plain values. A subclass with a `__post_init__` of its own calls this one."""

    settings: tuple[Any, ...]
    """(class, arguments), from which `made_of` makes the object again."""

    def __post_init__(self) -> None:
        values = (getattr(self, each.name) for each in fields(self))  # type: ignore[arg-type]
        object.__setattr__(self, "settings", (type(self), *values))


@lru_cache(maxsize=256)
def made_of(settings: Any) -> Any:
    """The object that has these `settings`; anything else is returned as it is."""
    return settings[0](*settings[1:]) if isinstance(settings, tuple) else settings
