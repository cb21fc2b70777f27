"""Architecture: what one family's file says, and the little language in which it maps tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from inspect import Parameter, signature
from typing import Any

from torch import Tensor

Settings = dict[str, Any]


def _same(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class Recipe:
    """A tensor of one side, made from tensors of the other: `make(*sources)`; by default its only source itself."""

    sources: tuple[str, ...]
    make: Callable[..., Tensor] = _same


@dataclass(frozen=True)
class Tensors:
    """How the tensors of a Hugging Face checkpoint and the parameters of a `LanguageModel` make one another.

    `read` makes each of our parameters from theirs, `write` each of theirs from ours. `duplicates` names tensors that
    a checkpoint may hold a second time (tied heads) and of which they must then be equal copies; names that end in one
    of `ignored` hold nothing that was learned.
    """

    read: Mapping[str, Recipe]
    write: Mapping[str, Recipe]
    duplicates: Mapping[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()

    @classmethod
    def renamed(cls, names: Mapping[str, str], **more: Any) -> Tensors:
        """Tensors that differ by their names alone: ours to theirs."""
        read = {ours: Recipe((theirs,)) for ours, theirs in names.items()}
        return cls(read, {theirs: Recipe((ours,)) for ours, theirs in names.items()}, **more)


@dataclass(frozen=True)
class Architecture:
    """One family of Hugging Face models; each file of this folder that reads one names it `ARCHITECTURE`.

    `settings(config)` turns a config.json into the settings of a `LanguageModel`, nested dicts as in `conf/model`;
    `config(settings)` is its inverse and raises ValueError where the family cannot express them; `tensors(settings)`
    maps the tensors both ways.
    """

    model_types: tuple[str, ...]
    settings: Callable[[Mapping[str, Any]], Settings]
    config: Callable[[Settings], dict[str, Any]]
    tensors: Callable[[Settings], Tensors]


@dataclass(frozen=True)
class Node:
    """A `_target_` of the settings with its arguments: those given, or else the defaults of its signature."""

    target: str
    given: Mapping[str, Any]
    defaults: Mapping[str, Any]

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Node:
        target = settings["_target_"]
        module, _, name = target.rpartition(".")
        parameters = signature(getattr(import_module(module), name)).parameters.values()
        defaults = {p.name: p.default for p in parameters if p.default is not Parameter.empty}
        given = {key: value for key, value in settings.items() if key not in ("_target_", "_partial_", "_convert_")}
        return cls(target, given, defaults)

    def __getitem__(self, key: str) -> Any:
        return self.given[key] if key in self.given else self.defaults[key]

    def unexpressed(self, expressed: tuple[str, ...]) -> dict[str, Any]:
        """Arguments given other than `expressed` and unlike their defaults: what a family's config would lose."""
        return {
            key: value
            for key, value in self.given.items()
            if key not in expressed and (key not in self.defaults or value != self.defaults[key])
        }
