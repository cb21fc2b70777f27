"""Derived: what follows from a description of tokens alone, computed once, and for the next batch ahead of its step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

Value = TypeVar("Value")
Key = tuple[Hashable, ...]


class Deriving:
    """A description, such as the documents of a batch, that keeps what was derived from it.

    `make` is a function of a module or a plain method of the owner's class, and its arguments are hashable. So they
    name what is derived, and `Recipes` can derive the same of another batch.
    """

    @property
    def derived(self) -> dict[Key, Any]:
        """What was derived on the host, by (make, *arguments)."""
        return self.__dict__.setdefault("_derived", {})

    @property
    def copies(self) -> dict[Key, Any]:
        """Copies of derived tensors on devices, by (device, make, *arguments)."""
        return self.__dict__.setdefault("_copies", {})

    def derive(self, make: Callable[..., Value], *arguments: Hashable) -> Value:
        """`make(self, *arguments)`, computed once."""
        key = (make, *arguments)
        if key not in self.derived:
            with torch.device("cpu") if torch.get_default_device().type != "cpu" else nullcontext():
                self.derived[key] = make(self, *arguments)
        return self.derived[key]

    def on(self, device: torch.device | str, make: Callable[..., Value], *arguments: Hashable) -> Value:
        """The tensor, or the tuples of tensors, that `make(self, *arguments)` returns on the host, on a device.

        Copied once, without waiting for the device.
        """
        device = torch.device(device)
        if device.type == "cpu":
            return self.derive(make, *arguments)
        key = (device, make, *arguments)
        if key not in self.copies:
            self.copies[key] = mapped(partial(_copied, device=device), self.derive(make, *arguments))
        return self.copies[key]


class Recipes:
    """What batches so far derived from their descriptions, to derive the same of the next one ahead of its step.

    `learn` from a batch whose step is over, then `prepare` the next one: host values are computed, and all tensors go
    to their device in one copy. What is not prepared is derived when it is asked for.
    """

    def __init__(self) -> None:
        self._makes: dict[Key, Recipes] = {}
        self._copied: set[Key] = set()
        self._parts: dict[Hashable, Recipes] = {}

    def learn(self, owner: Deriving) -> None:
        """Adds what was derived from an owner, and from all that was derived from that."""
        self._learn(owner, set())

    def prepare(self, owner: Deriving) -> None:
        """Derives all that is known, and copies to devices what was used there."""
        wanted: list[tuple[Deriving, Key]] = []
        self._derive(owner, set(), wanted)
        _place(wanted)

    def _learn(self, owner: Deriving, seen: set[int]) -> None:
        if id(owner) in seen:
            return
        seen.add(id(owner))
        self._copied.update(owner.copies)
        for key, value in owner.derived.items():
            recipes = self._makes.setdefault(key, Recipes())
            for child in _owners(value):
                recipes._learn(child, seen)
        for name, child in _parts(owner):
            self._parts.setdefault(name, Recipes())._learn(child, seen)

    def _derive(self, owner: Deriving, seen: set[tuple[int, int]], wanted: list[tuple[Deriving, Key]]) -> None:
        if (id(self), id(owner)) in seen:
            return
        seen.add((id(self), id(owner)))
        for (make, *arguments), recipes in self._makes.items():
            for child in _owners(owner.derive(cast(Callable[..., Any], make), *arguments)):
                recipes._derive(child, seen, wanted)
        wanted += [(owner, key) for key in self._copied if key not in owner.copies]
        for name, child in _parts(owner):
            if name in self._parts:
                self._parts[name]._derive(child, seen, wanted)


def mapped(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The value with every tensor in it replaced; a tensor, None, or a (named) tuple of these."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple):
        parts = [mapped(function, part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in a tensor or a tuple, in the order of `mapped`."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from tensors_in(part)


def _owners(value: Any) -> Iterator[Deriving]:
    """What can derive, in a derived value: the value itself, or the parts of tuples and records."""
    if isinstance(value, Deriving):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from _owners(part)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _owners(getattr(value, field.name))


def _parts(owner: Deriving) -> Iterator[tuple[str, Deriving]]:
    """What can derive, in the fields of an owner."""
    if dataclasses.is_dataclass(owner):
        for field in dataclasses.fields(owner):
            for child in _owners(getattr(owner, field.name)):
                yield field.name, child


def _copied(x: Tensor, device: torch.device) -> Tensor:
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)


def _place(wanted: list[tuple[Deriving, Key]]) -> None:
    """Copies derived tensors to their devices: one message per device, from pinned memory where it is CUDA."""
    by_device: dict[torch.device, list[tuple[Deriving, Key]]] = {}
    for owner, key in wanted:
        by_device.setdefault(cast(torch.device, key[0]), []).append((owner, key))
    for device, entries in by_device.items():
        values = [owner.derive(cast(Callable[..., Any], key[1]), *key[2:]) for owner, key in entries]
        tensors = [x for value in values for x in tensors_in(value)]
        moved = iter(_together(tensors, device))
        for (owner, key), value in zip(entries, values, strict=True):
            owner.copies[key] = mapped(partial(_next, moved), value)


def _next(moved: Iterator[Tensor], _: Tensor) -> Tensor:
    return next(moved)


ALIGNMENT = 16  # bytes, as kernels want them


def _together(tensors: list[Tensor], device: torch.device) -> list[Tensor]:
    """Copies of host tensors, views of one buffer on the device."""
    sizes = [-(-x.numel() * x.element_size() // ALIGNMENT) * ALIGNMENT for x in tensors]
    buffer = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=device.type == "cuda")
    for place, x in zip(buffer.split(sizes), tensors, strict=True):
        _view(place, x).copy_(x)
    return [
        _view(place, x) for place, x in zip(buffer.to(device, non_blocking=True).split(sizes), tensors, strict=True)
    ]


def _view(place: Tensor, like: Tensor) -> Tensor:
    return place[: like.numel() * like.element_size()].view(like.dtype).view(like.shape)
