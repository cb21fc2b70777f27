"""Fields of settings that may be none or are: by a null, or by a flag of config.json."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .config import ConfigReader, ConfigWriter
from .fields import Field, Key


@dataclass(frozen=True)
class OptionalInteger(Key):
    """A positive integer, or None where the key is null. absent: the value where there is no such key."""

    absent: int | None = None

    def read(self, reader: ConfigReader) -> int | None:
        return None if reader.get(self.key, self.absent) is None else reader.integer(self.key, self.absent)


@dataclass(frozen=True)
class OptionalNumber(Key):
    """A positive number, or None where the key is null. absent: the value where there is no such key."""

    absent: float | None = None

    def read(self, reader: ConfigReader) -> float | None:
        value = reader.get(self.key, self.absent)
        return None if value is None else reader.positive(self.key, value)


@dataclass(frozen=True)
class Switch(Key):
    """A setting with the value `on` where the key is true, and None where it is not; `default` without the key."""

    on: Any
    default: bool

    def read(self, reader: ConfigReader) -> Any:
        return self.on if reader.flag(self.key, self.default) else None

    def write(self, writer: ConfigWriter, setting: str, value: Any) -> None:
        if value not in (None, self.on):
            writer.refuse(setting, value)
        else:
            writer.put(self.key, value is not None, setting)


@dataclass(frozen=True)
class Where(Key):
    """Another field where the key is true, and None where it is not; `default` without the key."""

    field: Field
    default: bool

    def read(self, reader: ConfigReader) -> Any:
        value = self.field.read(reader)
        return value if reader.flag(self.key, self.default) else None

    def write(self, writer: ConfigWriter, setting: str, value: Any) -> None:
        writer.put(self.key, value is not None, setting)
        if value is not None:
            self.field.write(writer, setting, value)


@dataclass(frozen=True)
class Never(Key):
    """A setting that is false in every model of the family, and so must be the key."""

    why: str

    def read(self, reader: ConfigReader) -> bool:
        reader.absent(self.key, self.why)
        return False

    def write(self, writer: ConfigWriter, setting: str, value: Any) -> None:
        if value:
            writer.refuse(setting, value)
        else:
            writer.put(self.key, False, setting)
