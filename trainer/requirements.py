"""Requirements: what the value of a setting must be, in the words of every such error."""

from __future__ import annotations


def one_of(setting: str, value: object, allowed: tuple[object, ...]) -> None:
    """Raises ValueError unless the value is one of those."""
    if value not in allowed:
        raise ValueError(f"{setting} must be one of {', '.join(map(str, allowed))}; got {value!r}")


def at_least(setting: str, value: float | None, minimum: int) -> None:
    """Raises ValueError for a smaller value; None stands for a default and passes."""
    if value is not None and not value >= minimum:
        raise ValueError(f"{setting} must be at least {minimum}; got {value}")
