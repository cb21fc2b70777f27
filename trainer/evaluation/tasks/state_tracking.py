"""State tracking: parity, and permutations of five things."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import permutations

import numpy as np

from .task import Material, Problem, Task, check_vocabulary


@dataclass(frozen=True)
class Parity(Task):
    """Bits, a mark, and whether the number of ones is odd: id 0 or 1, as the bits themselves. 2 is the mark."""

    name = "parity"
    paper = "Merrill et al., 2024, arXiv 2404.08819; Grazzi et al., 2024, arXiv 2411.12537"

    @property
    def choices(self) -> int:
        return 2

    def chance(self, vocabulary: int) -> float:
        return 0.5

    def check(self, material: Material) -> None:
        check_vocabulary(material.vocabulary, 3, "two bits and a mark")

    def least(self, material: Material, number: int) -> int:
        return 3

    def problem(self, material: Material, length: int, number: int, depth: float = 0.0) -> Problem:
        bits = self.draw(material, number).below(2, length - 2)
        odd = int(bits.sum() % 2)
        tokens = np.concatenate([bits, [2, odd]])
        return Problem.of(tokens, np.array([length - 1]), np.zeros(1, np.int64), ([1 - odd],))


@dataclass(frozen=True)
class Permutations(Task):
    """Permutations of five things, one after the other, a mark, and the permutation that they make together.

    Id n is number n of the 120 permutations in the order of their names, 120 the mark: the word problem of S_5, which
    is complete for NC^1.
    """

    name = "permutations"
    paper = "Merrill et al., 2024, arXiv 2404.08819"

    def chance(self, vocabulary: int) -> float:
        return 1 / 120

    def check(self, material: Material) -> None:
        check_vocabulary(material.vocabulary, 121, "the permutations of five and a mark")

    def least(self, material: Material, number: int) -> int:
        return 3

    def problem(self, material: Material, length: int, number: int, depth: float = 0.0) -> Problem:
        steps = self.draw(material, number).below(120, length - 2)
        tokens = np.concatenate([steps, [120, _together(steps)]])
        return Problem.of(tokens, np.array([length - 1]), np.zeros(1, np.int64))


def _together(steps: np.ndarray) -> int:
    """What the steps make together, the first of them first: neighbours are joined until one is left."""
    joined = _joined()
    while len(steps) > 1:
        rest = steps[len(steps) // 2 * 2 :]
        steps = np.concatenate([joined[steps[: len(steps) // 2 * 2 : 2], steps[1::2]], rest])
    return int(steps[0])


@cache
def _joined() -> np.ndarray:
    """int64 `[120, 120]`: the permutation that moves things as the first one and then the second one does."""
    elements = np.array(list(permutations(range(5))))
    number = {tuple(element): place for place, element in enumerate(elements.tolist())}
    return np.array([[number[tuple(second[first].tolist())] for second in elements] for first in elements])
