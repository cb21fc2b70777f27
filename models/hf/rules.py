"""Keys of config.json that belong to no setting: what must hold for them, and what is written there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .config import ConfigReader, ConfigWriter


class Rule:
    """What holds for a key of config.json that belongs to no setting."""

    def read(self, reader: ConfigReader) -> None:
        raise NotImplementedError

    def write(self, writer: ConfigWriter) -> None:
        """Called after all fields have been written."""


@dataclass(frozen=True)
class Only(Rule):
    """A key with these values only; the first is written."""

    key: str
    allowed: tuple[Any, ...]

    def read(self, reader: ConfigReader) -> None:
        reader.only(self.key, *self.allowed)

    def write(self, writer: ConfigWriter) -> None:
        writer.config[self.key] = self.allowed[0]


@dataclass(frozen=True)
class Absent(Rule):
    """A key that must be absent, null, false or empty; it is not written."""

    key: str
    why: str

    def read(self, reader: ConfigReader) -> None:
        reader.absent(self.key, self.why)

    def write(self, writer: ConfigWriter) -> None:
        pass


@dataclass(frozen=True)
class Known(Rule):
    """Keys that say nothing more about the function that the weights compute; they are not written."""

    keys: tuple[str, ...]

    def read(self, reader: ConfigReader) -> None:
        for key in self.keys:
            reader.get(key)

    def write(self, writer: ConfigWriter) -> None:
        pass


@dataclass(frozen=True)
class Same(Rule):
    """A key that must be equal to another one, or absent. default: what both are where they are absent or null."""

    key: str
    other: str
    default: Any = None

    def read(self, reader: ConfigReader) -> None:
        value, other = (self.default if reader.get(key) is None else reader.get(key) for key in (self.key, self.other))
        if value is not None and value != other:
            reader.problem(f"{self.key} must be {self.other} = {other!r}; got {value!r}")

    def write(self, writer: ConfigWriter) -> None:
        writer.config[self.key] = writer.config.get(self.other)


@dataclass(frozen=True)
class Replaced(Rule):
    """A key whose value does not count when it is read, and that is written with this one."""

    key: str
    value: Any

    def read(self, reader: ConfigReader) -> None:
        reader.get(self.key)

    def write(self, writer: ConfigWriter) -> None:
        writer.config[self.key] = self.value
