"""Text tasks: a problem's draft, and filler until the problem has exactly as many tokens as are asked for."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .task import NO_ANSWER, Material, Problem, Task

HAYSTACKS = ("noise", "documents")


class Said(NamedTuple):
    """Ids at a problem's end; answer: which answer they are, −1 for what is given."""

    ids: list[int]
    answer: int = NO_ANSWER


class Hidden(NamedTuple):
    """Ids that stand within the filler, after the share `depth` of its tokens; None: at the depth asked for."""

    ids: list[int]
    depth: float | None = None


@dataclass(frozen=True)
class Draft:
    """A problem but for its filler: ids before it, within it, and after it, the answers among them."""

    before: list[int]
    hidden: list[Hidden]
    ending: list[Said]
    others: tuple[list[int], ...] = ()

    @property
    def size(self) -> int:
        return len(self.before) + sum(len(part.ids) for part in (*self.hidden, *self.ending))

    def around(self, filler: np.ndarray, depth: float) -> Problem:
        """The problem with this filler; what stands at one depth stays in its order."""
        parts, at = [np.array(self.before, np.int64)], 0
        depths = [depth if part.depth is None else part.depth for part in self.hidden]
        for number in sorted(range(len(depths)), key=depths.__getitem__):
            stop = round(depths[number] * len(filler))
            parts += [filler[at:stop], np.array(self.hidden[number].ids, np.int64)]
            at = stop
        parts.append(filler[at:])
        parts += [np.array(said.ids, np.int64) for said in self.ending]
        tokens = np.concatenate(parts)
        answers = np.concatenate([np.full(len(said.ids), said.answer) for said in self.ending])
        places = len(tokens) - len(answers) + np.flatnonzero(answers != NO_ANSWER)
        return Problem.of(tokens, places, answers[answers != NO_ANSWER], self.others)


@dataclass(frozen=True)
class TextTask(Task):
    """A task in the tokens of a text: pieces of text are encoded one by one, and joined as tokens.

    So what is hidden stands at its depth to the token, and an answer has the tokens that it has in the text. Words and
    numbers are drawn until all answers that are compared have equally many tokens.
    """

    reads = "text"

    def least(self, material: Material, number: int) -> int:
        return self.draft(material, number).size

    def problem(self, material: Material, length: int, number: int, depth: float = 0.0) -> Problem:
        draft, draw = self.draft(material, number), self.draw(material, number)
        return draft.around(material.filler(self.filled_with, length - draft.size, draw), depth)

    @property
    def filled_with(self) -> str:
        """The haystack."""
        return "noise"

    @property
    def haystack_of_documents(self) -> bool:
        return self.filled_with == "documents"

    @abstractmethod
    def draft(self, material: Material, number: int) -> Draft:
        """Problem `number` without its filler."""


def beginning(material: Material, instruction: str) -> list[int]:
    """How a problem begins: as documents do, with what is asked for."""
    assert material.tokenizer is not None
    return [*material.tokenizer.beginning, *material.encode(instruction)]


def check_haystack(haystack: str) -> None:
    """Raises ValueError for one that is not known."""
    if haystack not in HAYSTACKS:
        raise ValueError(f"haystack must be one of {', '.join(HAYSTACKS)}; got {haystack!r}. Choose one")
