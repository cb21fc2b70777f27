"""Fields: how one setting of a part of a model reads from a key of config.json and writes to it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

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
        if value is None or value != int(value):
            writer.refuse(setting, value)
        elif self.divides and writer.config.get(self.divides, 0) % value:
            writer.refuse(setting, value, f", which must divide {self.divides}")
        else:
            writer.put(self.key, int(value), setting)


@dataclass(frozen=True)
class Number(Key):
    """A positive number; `default` where the key is absent or null."""

    default: float

    def read(self, reader: ConfigReader) -> float:
        return reader.number(self.key, self.default)

    def write(self, writer: ConfigWriter, setting: str, value: Any) -> None:
        if value is None:
            writer.refuse(setting, value)
        else:
            writer.put(self.key, value, setting)


@dataclass(frozen=True)
class Coefficient(Key):
    """A number that is not negative; `default` where the key is absent or null."""

    default: float

    def read(self, reader: ConfigReader) -> float:
        return reader.coefficient(self.key, self.default)


@dataclass(frozen=True)
class Product(Key):
    """The product of two keys, of which `size` is another field's; the defaults are for absent and null keys."""

    size: str
    default: int = 1
    default_size: int | None = None

    def read(self, reader: ConfigReader) -> int:
        return reader.integer(self.key, self.default) * reader.integer(self.size, self.default_size)

    def write(self, writer: ConfigWriter, setting: str, value: Any) -> None:
        size = writer.config.get(self.size) or 1
        if value < size or value % size:
            writer.refuse(setting, value, f", which must be a multiple of {self.size}={size}")
        else:
            writer.put(self.key, value // size, setting)


@dataclass(frozen=True)
class Root(Field):
    """The square root of a key that another field writes. dtype: in which that is kept."""

    key: str
    dtype: torch.dtype = torch.float64

    def read(self, reader: ConfigReader) -> float:
        return self._root(reader.integer(self.key))

    def write(self, writer: ConfigWriter, setting: str, value: Any) -> None:
        root = self._root(writer.config[self.key])
        if not math.isclose(value, root, rel_tol=1e-9):
            writer.refuse(setting, value, f", which must be {root:g}, the square root of {self.key}")

    def _root(self, value: int) -> float:
        return torch.tensor(math.sqrt(value), dtype=self.dtype).item()


@dataclass(frozen=True)
class InverseRoot(Key):
    """One over the square root of an integer; `default` where the key is absent or null."""

    default: int

    def read(self, reader: ConfigReader) -> float:
        return reader.integer(self.key, self.default) ** -0.5

    def write(self, writer: ConfigWriter, setting: str, value: Any) -> None:
        square = round(value**-2)
        if square < 1 or not math.isclose(square**-0.5, value, rel_tol=1e-9):
            writer.refuse(setting, value, f", which must be 1 / sqrt({self.key}) of an integer")
        else:
            writer.put(self.key, square, setting)


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


@dataclass(frozen=True)
class Equal(Field):
    """A number that all of the keys give; `default` where a key is absent or null."""

    keys: tuple[str, ...]
    default: float

    def read(self, reader: ConfigReader) -> float:
        first, *others = (reader.number(key, self.default) for key in self.keys)
        if any(other != first for other in others):
            reader.problem(f"{', '.join(self.keys)} must be equal; got {first:g}, {', '.join(map(str, others))}")
        return first

    def write(self, writer: ConfigWriter, setting: str, value: Any) -> None:
        for key in self.keys:
            writer.put(key, float(value), setting)


@dataclass(frozen=True)
class Chosen(Field):
    """A setting of training that config.json does not know: `value` in a model that is read."""

    value: Any

    def read(self, reader: ConfigReader) -> Any:
        return self.value

    def write(self, writer: ConfigWriter, setting: str, value: Any) -> None:
        pass


@dataclass(frozen=True)
class OfKind(Field):
    """Names of mixers: all those that are written as the component of this name."""

    kind: str

    def read(self, reader: ConfigReader) -> list[str]:
        return [self.kind]

    def write(self, writer: ConfigWriter, setting: str, value: Any) -> None:
        if value is None or set(value) != {name for name, kind in writer.kinds.items() if kind == self.kind}:
            writer.refuse(setting, value)


@dataclass(frozen=True)
class OfMixers(Field):
    """A dict of numbers by the names of mixers, of which each kind has a key; 1 where a key is absent or null."""

    keys: Mapping[str, str]

    def read(self, reader: ConfigReader) -> dict[str, float]:
        return {kind: reader.number(key, 1.0) for kind, key in self.keys.items()}

    def write(self, writer: ConfigWriter, setting: str, value: Any) -> None:
        for name, kind in writer.kinds.items():
            if kind in self.keys:
                writer.put(self.keys[kind], float((value or {}).get(name, 1.0)), f"{setting}.{name}")


@dataclass(frozen=True)
class Entries(Key):
    """A dict of numbers by these names, which the key lists in this order; all 1 where it is absent or null."""

    names: tuple[str, ...]

    def read(self, reader: ConfigReader) -> dict[str, float]:
        return dict(zip(self.names, reader.numbers(self.key, len(self.names)), strict=True))

    def write(self, writer: ConfigWriter, setting: str, value: Any) -> None:
        writer.put(self.key, [float((value or {}).get(name, 1.0)) for name in self.names], setting)


@dataclass(frozen=True)
class Entry(Key):
    """One of the `count` numbers that a key lists, the others of which other fields hold; 1 where absent or null."""

    number: int
    count: int

    def read(self, reader: ConfigReader) -> float:
        return reader.numbers(self.key, self.count)[self.number]

    def write(self, writer: ConfigWriter, setting: str, value: Any) -> None:
        numbers = writer.config.setdefault(self.key, [None] * self.count)
        if numbers[self.number] not in (None, value):
            writer.refuse(setting, value, f", which must be {numbers[self.number]!r} as elsewhere")
        numbers[self.number] = float(value)


@dataclass(frozen=True)
class Inverse(Key):
    """One over a positive number; `default` where the key is absent or null."""

    default: float = 1.0

    def read(self, reader: ConfigReader) -> float:
        return 1.0 / reader.number(self.key, self.default)

    def write(self, writer: ConfigWriter, setting: str, value: Any) -> None:
        writer.put(self.key, round(1.0 / value, 12), setting)
