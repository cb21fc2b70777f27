"""Multi-query associative recall."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...data.packing import NO_TARGET
from ...data.recall import FILLERS, RecallTask
from .task import NO_ANSWER, Material, Problem, Task, check_range, check_vocabulary


@dataclass(frozen=True)
class MultiQueryRecall(Task):
    """Key/value pairs, then keys that come again, each before its value; the held-out problems of data=recall.

    `trainer/data/recall.py` says how they are drawn, and what the settings mean.
    """

    name = "mqar"
    paper = "Arora et al., 2023, arXiv 2312.04927"

    pairs: int = 16
    queries: int | None = None  # null: every key once
    power: float = 0.01
    filler: str = "blank"
    spread: int | None = None

    @property
    def answers(self) -> int:
        return self.pairs if self.queries is None else self.queries

    def chance(self, vocabulary: int) -> float:
        return 1 / (vocabulary - vocabulary // 2)

    def check(self, material: Material) -> None:
        check_range("pairs", self.pairs, 1)
        check_range("queries", self.queries, 1)
        check_range("spread", self.spread, 2 * self.pairs)
        if not 0 < self.power <= 1:
            raise ValueError(f"power must lie in (0, 1]; got {self.power}. 1 is anywhere alike, 0.01 near")
        if self.filler not in FILLERS:
            raise ValueError(f"filler must be one of {', '.join(FILLERS)}; got {self.filler!r}. Choose one")
        check_vocabulary(material.vocabulary, 2 * (self.pairs + 1), f"half of it for {self.pairs} keys and a blank")

    def least(self, material: Material, number: int) -> int:
        return self._task(material, 0).before_queries + 2 * self.answers

    def problem(self, material: Material, length: int, number: int, depth: float = 0.0) -> Problem:
        tokens, targets = self._task(material, length).problem("validation", number)
        answers, places = np.full(length, NO_ANSWER, np.int64), np.flatnonzero(targets != NO_TARGET)
        answers[places] = np.arange(len(places))
        return Problem(tokens, targets, answers)

    def _task(self, material: Material, length: int) -> RecallTask:
        return RecallTask(
            length=length,
            pairs=self.pairs,
            queries=self.answers,
            vocabulary=material.vocabulary,
            power=self.power,
            filler=self.filler,
            seed=material.seed,
            spread=self.spread,
        )
