"""How the tensors of a Hugging Face checkpoint and the parameters of a `LanguageModel` make one another."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


def _same(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class Recipe:
    """A tensor of one side, made from tensors of the other: `make(*sources)`; by default its only source itself."""

    sources: tuple[str, ...]
    make: Callable[..., Tensor] = _same


@dataclass(frozen=True)
class Tensors:
    """`read` makes each of our parameters from their tensors, `write` each of their tensors from our parameters.

    `duplicates` names tensors that a checkpoint may hold a second time (tied heads) and of which they must then be
    equal copies; names that end in one of `ignored` hold nothing that was learned. Of our parameters, those whose names
    begin with one of `left_out` are not written.
    """

    read: Mapping[str, Recipe]
    write: Mapping[str, Recipe]
    duplicates: Mapping[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    @classmethod
    def renamed(cls, names: Mapping[str, str], **more: Any) -> Tensors:
        """Tensors that differ by their names alone: ours to theirs."""
        read = {ours: Recipe((theirs,)) for ours, theirs in names.items()}
        return cls(read, {theirs: Recipe((ours,)) for ours, theirs in names.items()}, **more)
