"""Induction heads."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .task import Material, Problem, Task, check_range, check_vocabulary

MARK = 1  # an id of its own


@dataclass(frozen=True)
class InductionHeads(Task):
    """A mark and a token at the depth asked for, among drawn tokens; the mark at the end asks for that token again."""

    name = "induction"
    paper = "Fu et al., 2022, arXiv 2212.14052; Olsson et al., 2022, arXiv 2209.11895"

    kinds: int | None = None  # of tokens; null: the whole vocabulary

    @property
    def by_depth(self) -> bool:
        return True

    def chance(self, vocabulary: int) -> float:
        return 1 / self._kinds(vocabulary)

    def check(self, material: Material) -> None:
        check_range("kinds", self.kinds, 2)
        check_vocabulary(material.vocabulary, 2 + (self.kinds or 2), "a mark and what follows it")

    def least(self, material: Material, number: int) -> int:
        return 4

    def problem(self, material: Material, length: int, number: int, depth: float = 0.0) -> Problem:
        draw = self.draw(material, number)
        answer, *tokens = MARK + 1 + draw.below(self._kinds(material.vocabulary), length - 3)
        tokens = self._with_pair(tokens, round(depth * (length - 4)), answer)
        return Problem.of(tokens, np.array([length - 1]), np.zeros(1, np.int64))

    @staticmethod
    def _with_pair(others: list[int], at: int, answer: int) -> np.ndarray:
        """The pair after `at` of the other tokens, and at the end once more."""
        return np.array([*others[:at], MARK, answer, *others[at:], MARK, answer], np.int64)

    def _kinds(self, vocabulary: int) -> int:
        return vocabulary - MARK - 1 if self.kinds is None else self.kinds
