"""Selective copying."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .task import Material, Problem, Task, check_range, check_vocabulary

BLANK, END = 0, 1  # ids of their own


@dataclass(frozen=True)
class SelectiveCopying(Task):
    """Tokens at drawn places among blank ones, an end mark, and the tokens again in their order, to be copied."""

    name = "copying"
    paper = "Gu and Dao, 2023, arXiv 2312.00752"

    tokens: int = 16  # to be copied
    kinds: int | None = None  # of these tokens; null: the whole vocabulary

    @property
    def answers(self) -> int:
        return self.tokens

    def chance(self, vocabulary: int) -> float:
        return 1 / self._kinds(vocabulary)

    def check(self, material: Material) -> None:
        check_range("tokens", self.tokens, 1)
        check_range("kinds", self.kinds, 2)
        check_vocabulary(material.vocabulary, 2 + (self.kinds or 2), "a blank, an end mark and what is copied")

    def least(self, material: Material, number: int) -> int:
        return 2 * self.tokens + 1

    def problem(self, material: Material, length: int, number: int, depth: float = 0.0) -> Problem:
        draw = self.draw(material, number)
        copied = END + 1 + draw.below(self._kinds(material.vocabulary), self.tokens)
        tokens = np.full(length, BLANK, np.int64)
        places = np.arange(length - self.tokens, length)
        tokens[np.sort(draw.permutation(places[0] - 1)[: self.tokens])] = copied
        tokens[places[0] - 1], tokens[places] = END, copied
        return Problem.of(tokens, places, np.arange(self.tokens))

    def _kinds(self, vocabulary: int) -> int:
        return vocabulary - END - 1 if self.kinds is None else self.kinds
