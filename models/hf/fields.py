"""Fields: how one setting of a part of a model reads from a key of config.json and writes to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from .config import ConfigReader, ConfigWriter


class Quotient(NamedTuple):
    """`dividend // divisor` of two keys, at least 1: a default."""

    dividend: str
    divisor: str


class Field:
    """`write` is the inverse of `read`; both note a value that does not fit as a problem, and go on."""

    def read(self, reader: ConfigReader) -> Any:
        raise NotImplementedError

    def write(self, writer: ConfigWriter, setting: str, value: Any) -> None:
        """Writes a value; `setting` is its path in the settings, such as `model.mixers.full.heads`."""
        raise NotImplementedError


@dataclass(frozen=True)
class Key(Field):
    """A key that holds the value of the setting."""

    key: str

    def write(self, writer: ConfigWriter, setting: str, value: Any) -> None:
        writer.put(self.key, value, setting)


@dataclass(frozen=True)
class Integer(Key):
    """A positive integer. Where the key is absent or null: `default`, which may be another key, or a quotient of two.

    absent: the default where the key is absent, for config classes that treat null otherwise.
    divides: the key of an earlier field, which the value must divide; not in a config.json that has the key `unless`.
    """

    default: int | str | Quotient | None = None
    absent: int | None = None
    divides: str | None = None
    unless: str | None = None

    def read(self, reader: ConfigReader) -> int:
        value = reader.integer(self.key, self._default(reader))
        if self.divides and (self.unless is None or reader.config.get(self.unless) is None):
            multiple = reader.integer(self.divides)
            if multiple % value:
                reader.problem(f"{self.key} must divide {self.divides} = {multiple}; got {value}")
        return value

    def _default(self, reader: ConfigReader) -> int | None:
        if self.absent is not None and self.key not in reader.config:
            return self.absent
        if isinstance(self.default, Quotient):
            return max(1, reader.integer(self.default.dividend) // reader.integer(self.default.divisor))
        return reader.integer(self.default) if isinstance(self.default, str) else self.default

    def write(self, writer: ConfigWriter, setting: str, value: Any) -> None:
        if value is None:
            writer.refuse(setting, value)
        elif self.divides and writer.config.get(self.divides, 0) % value:
            writer.refuse(setting, value, f", which must divide {self.divides}")
        else:
            writer.put(self.key, value, setting)


@dataclass(frozen=True)
class Number(Key):
    """A positive number; `default` where the key is absent or null."""

    default: float

    def read(self, reader: ConfigReader) -> float:
        return reader.number(self.key, self.default)


@dataclass(frozen=True)
class Flag(Key):
    """True or false; `default` where the key is absent or null."""

    default: bool = False

    def read(self, reader: ConfigReader) -> bool:
        return reader.flag(self.key, self.default)


@dataclass(frozen=True)
class Fixed(Field):
    """A setting that has the same value in every model of the family, and no key."""

    value: Any

    def read(self, reader: ConfigReader) -> Any:
        return self.value

    def write(self, writer: ConfigWriter, setting: str, value: Any) -> None:
        if value != self.value:
            writer.refuse(setting, value)


@dataclass(frozen=True)
class Unread(Field):
    """A setting that is not read, and written only if it has a key: it says nothing of what the weights compute, or
    another field reads the key, whose setting must then be equal.
    """

    key: str | None = None

    def write(self, writer: ConfigWriter, setting: str, value: Any) -> None:
        if self.key is not None:
            writer.put(self.key, value, setting)


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
