"""The settings of evaluation: validation on held-out rows, its comparisons, and the sample of text."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..requirements import at_least
from .suite import SuiteSettings


@dataclass
class EvaluationSettings:
    """Validation on held-out documents, and a sample of text."""

    every: int = 100  # steps; 0 = never
    at_start: bool = False  # validate before the first step too, as step 0: what `init_from` begins with
    rows: int | None = 16  # held-out rows; null = all of them
    positions: bool = False  # also the loss by position in the document, in buckets 0..15, 16..31, … up to a whole row
    context: int | None = None  # at the end, also score held-out tokens from their last so many tokens alone
    context_rows: int = 8  # held-out rows that this is done on; costs `context` times as much as with whole rows
    tasks: list[Any] = field(default_factory=list)  # also score these: docs/evaluation.md; names, or {task: NAME, …}
    lengths: list[int] = field(default_factory=list)  # tokens of a task's problems; empty: data.sequence_length
    problems: int | None = None  # of each task, length and depth; null: 32
    depths: list[float] = field(default_factory=list)  # where needles stand; empty: 0, 0.25, 0.5, 0.75, 1
    questions: str | None = None  # JSON Lines of context, question and answer, for the task question_answering
    task_seed: int | None = None  # of the problems, which trainer.seed does not change; null: 0
    baselines: bool = False  # at the end, also count unigrams and bigrams of the training text; recall: chance
    prompt: str = ""  # the sample begins with it; empty: with the start of a document
    sample_tokens: int = 128  # length of the sample; 0 = none, as with data=recall, which has no text
    temperature: float = 0.8  # of the sample; 0 = the likeliest token

    @property
    def suite(self) -> SuiteSettings:
        """What of them is about tasks. Raises ValueError as `SuiteSettings` does."""
        given = {"tasks": self.tasks, "lengths": self.lengths, "problems": self.problems, "depths": self.depths}
        return SuiteSettings(**given, questions=self.questions, seed=self.task_seed, prefix="evaluation.")

    def check(self, source: str) -> None:
        """Raises ValueError for what cannot be, or has no effect on data of this source."""
        at_least("evaluation.every", self.every, 0)
        at_least("evaluation.rows", self.rows, 1)
        if self.positions and not (self.every or self.at_start):
            raise ValueError(
                "evaluation.positions must be false with evaluation.every=0, which validates nothing; got true. "
                "Set one of the two"
            )
        self._check_tasks(source)
        at_least("evaluation.context", self.context, 1)
        at_least("evaluation.context_rows", self.context_rows, 1)
        at_least("evaluation.sample_tokens", self.sample_tokens, 0)
        if source == "recall" and self.prompt:
            raise ValueError(
                f"evaluation.prompt must be left out with data=recall, which has no text; got {self.prompt!r}"
            )
        at_least("evaluation.temperature", self.temperature, 0)

    def _check_tasks(self, source: str) -> None:
        suite = self.suite
        if self.task_seed is not None and not (self.tasks and 0 <= self.task_seed < 2**64):
            raise ValueError(
                f"evaluation.task_seed must lie within 0..2^64-1, with evaluation.tasks; got {self.task_seed}"
            )
        if self.tasks and not (self.every or self.at_start):
            raise ValueError(
                "evaluation.tasks must be left out with evaluation.every=0, which validates nothing; got "
                f"{self.tasks}. Set evaluation.every"
            )
        if source == "recall" and suite.reads_text:
            raise ValueError(
                f"evaluation.tasks must be tasks of ids with data=recall, which has no text; got {self.tasks}. "
                "Leave out those of text"
            )
