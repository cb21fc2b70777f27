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
    """`write` is the inverse of `read`; both note what does not fit as a problem, and go on."""

    def read(self, reader: ConfigReader) -> Any:
        raise NotImplementedError

    def write(self, writer: ConfigWriter, setting: str, value: Any) -> None:
        """Puts the `value` of `setting`, such as `model.mixers.full.heads`, into the config."""
        raise NotImplementedError


@dataclass(frozen=True)
class Key(Field):
    """The value of a key as it is."""

    key: str

    def write(self, writer: ConfigWriter, setting: str, value: Any) -> None:
        writer.put(self.key, value, setting)


@dataclass(frozen=True)
class Integer(Key):
    """A positive integer. Where the key is absent or null: `default`, which may be another key, or a quotient of two.

    absent: the default where the key is absent alone, for config classes that distinguish the two.
    divides: the key of an earlier field that the value divides; in a config.json that gives `unless`, it need not.
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
        if value is None or (self.divides and writer.config.get(self.divides, 0) % value):
            writer.refuse(setting, value, f", which must divide {self.divides}" if value and self.divides else "")
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
    """A setting that has one value in every model of the family; no key says it."""

    value: Any

    def read(self, reader: ConfigReader) -> Any:
        return self.value

    def write(self, writer: ConfigWriter, setting: str, value: Any) -> None:
        if value != self.value:
            writer.refuse(setting, value)


@dataclass(frozen=True)
class Unread(Field):
    """A setting that reading leaves to its default. With a key, it is written there, and must agree with others."""

    key: str | None = None

    def write(self, writer: ConfigWriter, setting: str, value: Any) -> None:
        if self.key is not None:
            writer.put(self.key, value, setting)


class Rule:
    """What a config.json must fulfil beside its fields."""

    def read(self, reader: ConfigReader) -> None:
        raise NotImplementedError

    def write(self, writer: ConfigWriter) -> None:
        """After all fields are written."""


@dataclass(frozen=True)
class Only(Rule):
    """The only values of a key that the family's models compute; the first is written, and meant by an absent key."""

    key: str
    allowed: tuple[Any, ...]

    def read(self, reader: ConfigReader) -> None:
        reader.only(self.key, *self.allowed)

    def write(self, writer: ConfigWriter) -> None:
        writer.config[self.key] = self.allowed[0]


@dataclass(frozen=True)
class Absent(Rule):
    """The key may not say anything, and is not written."""

    key: str
    why: str

    def read(self, reader: ConfigReader) -> None:
        reader.absent(self.key, self.why)
