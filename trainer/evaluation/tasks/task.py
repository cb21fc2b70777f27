"""Task: what every task of long contexts has in common, and what its problems are made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, NamedTuple

import numpy as np

from ...data.packing import NO_TARGET
from ...data.tokenizers import Tokenizer
from .drawing import Draw

NO_ANSWER = -1
NOISE = (
    " The grass is green. The sky is blue. The sun is warm. The road goes on over the hill. A bird sings in a tree, "
    "and another one answers it."
)


class Question(NamedTuple):
    """A question that a text answers."""

    context: str
    question: str
    answer: str


@dataclass(frozen=True, eq=False)
class Material:
    """What problems are made of.

    vocabulary: ids are smaller. tokenizer: of the model's text; None where it has none. text: int64 ids of long text,
    without those of documents' beginnings and ends, for tasks that hide something in it (`haystack=documents`).
    """

    vocabulary: int
    seed: int = 0
    tokenizer: Tokenizer | None = None
    text: np.ndarray | None = None
    questions: tuple[Question, ...] = ()
    _known: dict[str, list[int]] = field(default_factory=dict, repr=False)

    def encode(self, text: str) -> list[int]:
        """The ids of a piece of text alone; the same piece has the same ids wherever it stands."""
        assert self.tokenizer is not None
        if text not in self._known:
            self._known[text] = self.tokenizer.encode(text)
        return self._known[text]

    @cached_property
    def noise(self) -> np.ndarray:
        """int64 ids of the sentences that tell nothing."""
        return np.array(self.encode(NOISE), np.int64)

    def filler(self, haystack: str, count: int, draw: Draw) -> np.ndarray:
        """int64 `[count]` of a haystack: "noise" from its start, or "documents" from a drawn place on, over again."""
        if haystack == "noise":
            return np.resize(self.noise, count)
        assert self.text is not None
        return np.resize(np.roll(self.text, -draw.one(len(self.text))), count)


class Problem(NamedTuple):
    """A problem of N tokens, its answers included.

    tokens, targets: int64 `[N]`; the target at a place is what follows there, −100 where nothing is asked. answers:
    int64 `[N]`, which of the task's answers a target belongs to, −1 where there is none. others: for tasks with
    choices, wrong answers in place of all the targets, each of as many tokens.
    """

    tokens: np.ndarray
    targets: np.ndarray
    answers: np.ndarray
    others: tuple[list[int], ...] = ()

    @classmethod
    def of(
        cls, tokens: np.ndarray, places: np.ndarray, answers: np.ndarray, others: tuple[list[int], ...] = ()
    ) -> Problem:
        """tokens of which those at `places` are to be predicted, each from those before it."""
        targets, belongs = np.full(len(tokens), NO_TARGET, np.int64), np.full(len(tokens), NO_ANSWER, np.int64)
        targets[places - 1], belongs[places - 1] = tokens[places], answers
        return cls(tokens, targets, belongs, others)

    def choice(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and targets with the right answer (0), or with one of the others (1, …)."""
        if number == 0:
            return self.tokens, self.targets
        places = np.flatnonzero(self.targets != NO_TARGET)
        tokens, targets = self.tokens.copy(), self.targets.copy()
        tokens[places + 1] = targets[places] = self.others[number - 1]
        return tokens, targets


@dataclass(frozen=True)
class Task(ABC):
    """A kind of problem; its fields are its settings. `paper` is what it follows."""

    paper: ClassVar[str]
    reads: ClassVar[str] = "ids"  # what it is made of: "ids" of any vocabulary, "text", or "questions" about text
    name: ClassVar[str]

    @property
    def answers(self) -> int:
        """Of a problem, each right or wrong."""
        return 1

    @property
    def choices(self) -> int:
        """How many answers the likeliest is chosen from, the right one among them; 0 where there are none."""
        return 0

    @property
    def by_depth(self) -> bool:
        """Whether what is asked for stands at a depth that is asked for."""
        return False

    @property
    def haystack_of_documents(self) -> bool:
        """Whether it hides something in the user's own text."""
        return False

    def chance(self, vocabulary: int) -> float:
        """The share of answers that guessing gets right, where that is not next to nothing."""
        return 0.0

    def draw(self, material: Material, number: int) -> Draw:
        return Draw(material.seed, self.name, number)

    @abstractmethod
    def check(self, material: Material) -> None:
        """Raises ValueError for settings that cannot be with this vocabulary."""

    @abstractmethod
    def least(self, material: Material, number: int) -> int:
        """The tokens without which problem `number` cannot be."""

    @abstractmethod
    def problem(self, material: Material, length: int, number: int, depth: float = 0.0) -> Problem:
        """Problem `number` of `length` tokens, which are at least `least`; depth: 0 is the beginning, 1 the end."""


def check_range(name: str, value: int | None, least: int, most: int | None = None) -> None:
    """Raises ValueError for a setting of a task out of its range; None stands for a default."""
    if value is not None and (value < least or (most is not None and value > most)):
        rule = f"be at least {least}" if most is None else f"lie within {least}..{most}"
        raise ValueError(f"{name} must {rule}; got {value}. Change it")


def check_vocabulary(vocabulary: int, needed: int, what: str) -> None:
    """Raises ValueError for a vocabulary that does not hold the ids of a task."""
    if vocabulary < needed:
        raise ValueError(
            f"the model's vocabulary must be at least {needed}, {what}; got {vocabulary}. Ask for fewer, or leave the "
            "task out"
        )
