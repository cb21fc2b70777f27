"""Aggregation: the words that a list holds most often."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import numpy as np

from .drawing import WORDS, Draw
from .task import Material, Problem, Task, check_range
from .text import beginning

INSTRUCTION = "Which words come most often in the list below?\n"
QUESTION = "\nThe words that come most often in the list,"


@dataclass(frozen=True)
class _WordList(Task):
    """A list of words in a drawn order that fills the problem, but for noise before it, and a question about it."""

    reads = "text"
    paper = "RULER, Hsieh et al., 2024, arXiv 2404.06654"

    words: int = 3  # that are asked for

    @property
    def answers(self) -> int:
        return self.words

    @property
    @abstractmethod
    def order(self) -> str:
        """How the question says in which order the words are asked for."""

    @abstractmethod
    def counts(self, material: Material, draw: Draw, room: int) -> list[tuple[list[int], int]]:
        """(ids, occurrences) of the words that fit into so many tokens, those that are asked for first."""

    @abstractmethod
    def asked(self, occurrences: np.ndarray) -> list[int]:
        """The numbers of the words asked for in their order; occurrences: of all words, in the order of the list."""

    def problem(self, material: Material, length: int, number: int, depth: float = 0.0) -> Problem:
        draw, encode = self.draw(material, number), material.encode
        before, question = beginning(material, INSTRUCTION), encode(f"{QUESTION} {self.order}:")
        counts = self.counts(material, draw, length)
        listed = np.repeat(np.arange(len(counts)), [occurrences for _, occurrences in counts])
        listed = listed[draw.permutation(len(listed))]
        asked = [counts[place][0] for place in self.asked(listed)]
        ids = [token for place in listed for token in counts[place][0]]
        rest = length - len(before) - len(ids) - len(question) - sum(map(len, asked))
        noise = np.resize(material.noise, rest)
        tokens = np.concatenate([before, noise, ids, question, *asked]).astype(np.int64)
        answers = np.repeat(np.arange(len(asked)), [len(word) for word in asked])
        return Problem.of(tokens, length - len(answers) + np.arange(len(answers)), answers)

    def fixed(self, material: Material) -> int:
        """Tokens besides the list, the answers, and noise."""
        return len(beginning(material, INSTRUCTION)) + len(material.encode(f"{QUESTION} {self.order}:"))


@dataclass(frozen=True)
class CommonWords(_WordList):
    """`words` words that come `frequency` times each among others that come `others` times each.

    They are asked for in the order in which they come first, so that one answer is right.
    """

    name = "common_words"

    words: int = 10
    frequency: int = 30
    others: int = 3

    @property
    def order(self) -> str:
        return "in the order in which they come first, are"

    def check(self, material: Material) -> None:
        check_range("words", self.words, 1, 1000)
        check_range("others", self.others, 1)
        check_range("frequency", self.frequency, self.others + 1)

    def asked(self, occurrences: np.ndarray) -> list[int]:
        first = [int(np.argmax(occurrences == word)) for word in range(self.words)]
        return sorted(range(self.words), key=first.__getitem__)

    def least(self, material: Material, number: int) -> int:
        common = self._words(material, self.draw(material, number), self.words)
        return self.fixed(material) + (self.frequency + 1) * sum(map(len, common))

    def counts(self, material: Material, draw: Draw, room: int) -> list[tuple[list[int], int]]:
        room -= self.fixed(material)
        words = self._words(material, draw, self.words + min(WORDS // 2, room // self.others))
        common, rare = words[: self.words], words[self.words :]
        room -= (self.frequency + 1) * sum(map(len, common))
        fit = int(np.searchsorted(np.cumsum([self.others * len(word) for word in rare]), room, side="right"))
        return [*((word, self.frequency) for word in common), *((word, self.others) for word in rare[:fit])]

    def _words(self, material: Material, draw: Draw, count: int) -> list[list[int]]:
        return [material.encode(f" {word}") for word in draw.words(count)]


@dataclass(frozen=True)
class FrequentWords(_WordList):
    """Words whose frequencies follow a power law: word number n comes in proportion to n^−alpha.

    The most frequent ones are asked for, the most frequent first.
    """

    name = "frequent_words"

    alpha: float = 2.0

    @property
    def order(self) -> str:
        return "the most frequent first, are"

    def check(self, material: Material) -> None:
        check_range("words", self.words, 1, 100)
        if not self.alpha > 1:
            raise ValueError(f"alpha must be more than 1; got {self.alpha}. RULER's is 2.0")

    def asked(self, occurrences: np.ndarray) -> list[int]:
        return list(range(self.words))

    def least(self, material: Material, number: int) -> int:
        words = self._words(material, self.draw(material, number), self.words + 1)
        occurrences = self._of(0, len(words))
        answers = sum(map(len, words[:-1]))
        return self.fixed(material) + answers + sum(n * len(word) for n, word in zip(occurrences, words, strict=True))

    def counts(self, material: Material, draw: Draw, room: int) -> list[tuple[list[int], int]]:
        words = self._words(material, draw, self.words + 1 + room // 50)
        sizes = np.array([len(word) for word in words])
        room -= self.fixed(material) + int(sizes[: self.words].sum())
        low, high = 0, room + 1  # as many occurrences as fit
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if int((self._of(middle, len(words)) * sizes).sum()) <= room else (low, middle)
        occurrences = self._of(low, len(words))
        return [(word, int(count)) for word, count in zip(words, occurrences, strict=True) if count]

    def _of(self, total: int, words: int) -> np.ndarray:
        """int64 `[words]`: about `total` occurrences; of those asked for each has more than the next word."""
        shares = np.arange(1, words + 1) ** -self.alpha
        counts = np.floor(total * shares / shares.sum()).astype(np.int64)
        counts[self.words] = max(counts[self.words], 1)
        for place in range(self.words - 1, -1, -1):
            counts[place] = max(counts[place], counts[place + 1] + 1)
        return counts

    def _words(self, material: Material, draw: Draw, count: int) -> list[list[int]]:
        return [material.encode(f" {word}") for word in draw.words(count)]
