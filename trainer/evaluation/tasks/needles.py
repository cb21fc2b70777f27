"""Needles in a haystack: a pass key, one sentence at a depth, and several keys, values and queries."""

from __future__ import annotations

from dataclasses import dataclass

from .drawing import Draw
from .task import Material, check_range
from .text import Draft, Hidden, Said, TextTask, beginning, check_haystack

CHOICES = 4


@dataclass(frozen=True)
class PassKey(TextTask):
    """A number of five digits, said twice at the depth asked for, in sentences that repeat."""

    name = "passkey"
    paper = "Mohtashami and Jaggi, 2023, arXiv 2305.16300"

    candidates: int = CHOICES  # that the number is chosen from, itself among them; 0: no choice, and so much less work

    @property
    def by_depth(self) -> bool:
        return True

    @property
    def choices(self) -> int:
        return self.candidates

    def check(self, material: Material) -> None:
        _check_candidates(self.candidates)

    def draft(self, material: Material, number: int) -> Draft:
        key, *others = _numbers(material, self.draw(material, number), max(1, self.candidates), digits=5)
        encode = material.encode
        said = [*encode("\nThe pass key is"), *key, *encode(". Remember it:"), *key, *encode(" is the pass key.\n")]
        return Draft(
            beginning(material, "A pass key is hidden in the text below. Find it and remember it.\n"),
            [Hidden(said)],
            [Said(encode("\nWhat is the pass key? The pass key is")), Said(key, 0)],
            tuple(others),
        )


@dataclass(frozen=True)
class Needles(TextTask):
    """`keys` words with `values` numbers each, a sentence for each number; `queries` of the words are asked for.

    One sentence alone stands at the depth asked for, several anywhere alike. Where one number is the answer, it is also
    chosen from `candidates`: against other numbers of the text, or, where there are no more, against drawn ones.
    """

    name = "needle"
    paper = "Kamradt, 2023; RULER, Hsieh et al., 2024, arXiv 2404.06654"

    keys: int = 1
    values: int = 1
    queries: int = 1
    digits: int = 7
    haystack: str = "noise"  # or documents: held-out ones
    candidates: int = CHOICES  # 0: no choice, and so much less work

    @property
    def by_depth(self) -> bool:
        return self.keys * self.values == 1

    @property
    def answers(self) -> int:
        return self.queries * self.values

    @property
    def choices(self) -> int:
        return self.candidates if self.answers == 1 else 0

    @property
    def filled_with(self) -> str:
        return self.haystack

    def check(self, material: Material) -> None:
        check_haystack(self.haystack)
        check_range("keys", self.keys, 1)
        check_range("values", self.values, 1)
        check_range("queries", self.queries, 1, self.keys)
        check_range("digits", self.digits, 4, 12)
        _check_candidates(self.candidates)
        if self.answers > 1 and self.candidates != CHOICES:
            raise ValueError(f"candidates must be left out with several answers; got {self.candidates}. Remove it")

    def draft(self, material: Material, number: int) -> Draft:
        draw, encode = self.draw(material, number), material.encode
        words = draw.words(self.keys)
        numbers = _numbers(material, draw, max(self.keys * self.values, self.choices), self.digits)
        of = [numbers[key * self.values : (key + 1) * self.values] for key in range(self.keys)]
        depths = iter([None] if self.by_depth else draw.fractions(self.keys * self.values).tolist())
        hidden, ordered = list[Hidden](), list[list[list[int]]]()
        for word, theirs in zip(words, of, strict=True):
            at = [next(depths) for _ in theirs]
            before, after = encode(f"\nThe special number for {word} is:"), encode(".\n")
            hidden += [Hidden([*before, *value, *after], depth) for value, depth in zip(theirs, at, strict=True)]
            ordered.append([theirs[place] for place in sorted(range(len(at)), key=lambda place: at[place] or 0.0)])
        asked = draw.distinct(self.keys, self.queries)
        ending = [Said(encode("\nWhat are the special numbers, in the order of the text?"))]
        for query, key in enumerate(asked):
            ending.append(Said(encode(f"\nThe special number for {words[key]} is:")))
            for place, value in enumerate(ordered[key]):
                ending += [Said(encode(" and"))] if place else []
                ending.append(Said(value, query * self.values + place))
        others = [value for value in numbers if value is not ordered[asked[0]][0]]
        instruction = "Special numbers are hidden in the text below. Remember them.\n"
        return Draft(beginning(material, instruction), hidden, ending, tuple(others[: max(0, self.choices - 1)]))


def _check_candidates(candidates: int) -> None:
    check_range("candidates", candidates, 0, 100)
    if candidates == 1:
        raise ValueError("candidates must be 0, for no choice, or at least 2; got 1. Change it")


def _numbers(material: Material, draw: Draw, count: int, digits: int) -> list[list[int]]:
    """The ids of different numbers of so many digits, each of as many tokens."""
    least, found = 10 ** (digits - 1), dict[int, list[int]]()
    while len(found) < count:
        number = least + draw.one(9 * least)
        ids = material.encode(f" {number}")
        if not found or len(ids) == len(next(iter(found.values()))):
            found.setdefault(number, ids)
    return list(found.values())
