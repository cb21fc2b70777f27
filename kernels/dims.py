"""Dims: the shapes of an op's inputs, written as letters.

"B T G K" are four dimensions; `|` stands between the forms that an input may have. Every letter is one size over all
inputs of a call, but G, the groups of an input, divides H, the heads. "K+1" is one more than K, "K+V" the sum of both,
a number is itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

from torch import Tensor

Sizes = dict[str, int]


def sizes_of(dims: Mapping[str, str], inputs: Sequence[Tensor | None]) -> Sizes:
    """What each letter stands for: its size in the first input that has it."""
    sizes: Sizes = {}
    for forms, x in zip(dims.values(), inputs, strict=True):
        for letters in _forms(forms):
            if x is not None and len(letters) == x.dim():
                for letter, size in zip(letters, x.shape, strict=True):
                    if not letter.isdigit():
                        sizes.setdefault(letter, size)
    return sizes


def shape_of(dims: str, sizes: Sizes) -> tuple[int, ...]:
    """The shape that letters, their successors and numbers stand for."""
    return tuple(_size(dim, sizes) for dim in _forms(dims)[0])


def require_shapes(dims: Mapping[str, str], inputs: Sequence[Tensor | None]) -> Sizes:
    """The sizes. Raises ValueError for an input whose shape is none of its forms."""
    sizes = sizes_of(dims, inputs)
    known = {**sizes, "G": "G"}
    for (name, joined), x in zip(dims.items(), inputs, strict=True):
        if x is not None and not any(_fits(x, letters, sizes) for letters in _forms(joined)):
            forms = joined.split(" | ")
            shapes = [" ".join(str(known.get(letter, letter)) for letter in letters) for letters in _forms(joined)]
            sizes_told = f" = {' or '.join(map(named, shapes))}" if shapes != forms else ""
            groups = f" with G dividing H = {known.get('H', 'H')}" if "G" in joined else ""
            raise ValueError(
                f"{name} must be {' or '.join(map(named, forms))}{sizes_told}{groups}; "
                f"got {list(x.shape)}. Put time in dimension 1, and check the heads and dims of the mixer"
            )
    return sizes


def named(dims: str) -> str:
    """ "B T D" as it is written of a tensor: "[B, T, D]"."""
    return f"[{dims.replace(' ', ', ').replace('+', ' + ')}]"


@cache
def _forms(dims: str) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(form.split()) for form in dims.split(" | "))


def _size(dim: str, sizes: Sizes) -> int:
    if dim in sizes:
        return sizes[dim]
    return sum(int(part) if part.isdigit() else sizes[part] for part in dim.split("+"))


def _fits(x: Tensor, letters: tuple[str, ...], sizes: Sizes) -> bool:
    if x.dim() != len(letters):
        return False
    for letter, size in zip(letters, x.shape, strict=True):
        if letter == "G":
            if size == 0 or sizes.get("H", 0) % size:
                return False
        elif _size(letter, sizes) != size:
            return False
    return True
