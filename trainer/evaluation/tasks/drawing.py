"""Drawing: random numbers from a seed, a task and a problem's number alone, the same on every machine."""

from __future__ import annotations

import hashlib

import numpy as np

CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"
SYLLABLES = [consonant + vowel for consonant in CONSONANTS for vowel in VOWELS]
WORDS = len(SYLLABLES) ** 3  # that `word` knows


class Draw:
    """What problem `number` of a task is drawn from, value after value: the same for every length and depth."""

    def __init__(self, seed: int, task: str, number: int) -> None:
        name = int.from_bytes(hashlib.blake2b(task.encode(), digest_size=8).digest(), "little")
        key = np.array([seed, name], np.uint64)
        # Raw bits: numpy promises that these stay the same, not that what it makes of them does.
        self._raw = np.random.Philox(key=key, counter=np.array([0, number, 0, 0], np.uint64)).random_raw

    def below(self, bound: int, count: int) -> np.ndarray:
        """int64 `[count]` of 0 .. bound − 1, each alike."""
        return (self._raw(count) % np.uint64(bound)).astype(np.int64)

    def one(self, bound: int) -> int:
        """One of 0 .. bound − 1."""
        return int(self.below(bound, 1)[0])

    def permutation(self, count: int) -> np.ndarray:
        """int64 `[count]`: 0 .. count − 1 in a drawn order."""
        return np.argsort(self._raw(count), kind="stable")

    def distinct(self, bound: int, count: int) -> list[int]:
        """`count` different ones of 0 .. bound − 1, in the order in which they were drawn; at most bound of them."""
        if 2 * count > bound:
            return self.permutation(bound)[:count].tolist()
        found: dict[int, None] = {}
        while len(found) < count:
            found.setdefault(self.one(bound))
        return list(found)

    def fractions(self, count: int) -> np.ndarray:
        """float64 `[count]` in 0 .. 1, each alike."""
        return (self._raw(count) >> np.uint64(11)) * 2.0**-53

    def words(self, count: int) -> list[str]:
        """Different words that are no words of a language, so that no text holds them by chance."""
        return [word(number) for number in self.distinct(WORDS, count)]


def word(number: int) -> str:
    """Word `number` of those of three syllables."""
    n = len(SYLLABLES)
    return "".join(SYLLABLES[number // n**place % n] for place in (2, 1, 0))
