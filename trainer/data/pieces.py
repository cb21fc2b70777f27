"""Pieces: a long text encoded a piece at a time, with the ids of the whole and the memory of a piece."""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers

PIECE = 1 << 17  # characters: the library takes about 200 bytes of memory for each
WINDOW = 2048  # characters on either side of a cut in which it must change no id
NEAR = 256  # and in which it must change no word, wherever one begins to read
PHASES = 12  # beginnings that are tried: words of up to so many characters may be counted off, as digits in threes are
AT_ONCE = 16  # pieces encoded in parallel
PATIENCE = 8  # cuts that proved wrong before the piece grows
UNCUT = 1 << 24  # characters in one piece that are worth a warning

# Where a cut is likely to divide words, the likeliest first; in the last one anything is possible.
PLACES = [re.compile(pattern) for pattern in (r"(?<=\w)(?= \w)", r"(?<=\S)(?=\s)", r"\b", r"(?<=\s)(?=\S)")]
PLACES_TRIED = 8
# What depends on all of the text before or behind a place: counting from its start, looking around without end, and
# counting further than PHASES.
FAR_SIGHTED = re.compile(
    rb'"FixedLength"|\{\d*,?(?:1[3-9]|[2-9]\d|\d{3,})\}'
    rb"|\(\?<?[=!][^)]*?(?:(?<!\\)\.|\[\^[^]]*\]|\[\\\\[sSdDwW]\\\\[sSdDwW]\])[*+{]"
)
ANYWHERE_TRIED = 32

log = logging.getLogger("longreach")


class Joint(NamedTuple):
    """A cut: the piece before is `text[:end]`, the one after `text[start:]`, whose own start brings back a space
    between the two. `tail` and `head` are what their ids must end and begin with."""

    end: int
    start: int
    tail: list[int]
    head: list[int]


class _Piece(NamedTuple):
    start: int
    joint: Joint | None  # at its end
    ids: np.ndarray


class PieceEncoder:
    """The ids that `library` gives a text, without its ever seeing more than about `piece` characters.

    A cut is taken only where the `window` characters on either side have the same ids apart as together, and where the
    two whole pieces have these ids beside the cut too. The last makes it exact:

    - Normalizers and pre-tokenizers go through a text from left to right and look no further than some characters or a
      run of one kind. Where they count within a run that is longer than what is looked at, as digits in threes, the
      words near the cut would change with where one begins to read. Those that look around without end are recognised,
      and the text is not cut for them.
    - Merging (BPE) divides a word at a cut if and only if it keeps the two tokens beside the cut apart: until a merge
      across the cut, either side is merged as if it were alone. So a long word may be cut as well.
    - Other models choose tokens by the whole word, which is not cut for them; in Unigram even rounding, and with it
      which of two equal choices is taken, depends on all that stands before.

    Where there is no such cut, the piece grows, in the worst case to the whole text.
    """

    def __init__(self, library: tokenizers.Tokenizer, *, piece: int = PIECE, window: int = WINDOW) -> None:
        assert piece >= 4 * window
        self.library, self.piece, self.window = library, piece, window
        self._inner = _without_prefix(library)
        model: Any = library.model
        self._cuts_words = isinstance(model, models.BPE) and not (
            model.continuing_subword_prefix or model.end_of_word_suffix or model.dropout
        )
        parts = (library.normalizer, library.pre_tokenizer)
        self._far_sighted = any(part is not None and FAR_SIGHTED.search(part.__getstate__()) for part in parts)

    def encode(self, text: str, dtype: Any = np.int64) -> np.ndarray:
        """`library.encode(text).ids`, without special tokens."""
        pieces: list[_Piece] = []
        wrong: set[int] = set()
        failures: Counter[int] = Counter()  # by the start of the piece
        start = 0
        while start < len(text):
            for piece in self._encoded(text, self._ahead(text, start, wrong, failures[start]), dtype):
                before = pieces[-1].joint if pieces else None
                if before is not None and piece.ids[: len(before.head)].tolist() != before.head:
                    last = pieces.pop()
                    wrong.add(before.end)
                    failures[last.start] += 1
                    start = last.start
                    break
                if piece.joint is not None and piece.ids[-len(piece.joint.tail) :].tolist() != piece.joint.tail:
                    wrong.add(piece.joint.end)
                    failures[piece.start] += 1
                    break
                pieces.append(piece)
                start = piece.joint.start if piece.joint is not None else len(text)
        return np.concatenate([np.empty(0, dtype), *(piece.ids for piece in pieces)])

    def _ahead(self, text: str, start: int, wrong: set[int], failures: int) -> list[tuple[int, Joint | None]]:
        """The next pieces from `start`: where each begins, and the joint at its end, which has yet to prove right."""
        ahead = []
        while len(ahead) < AT_ONCE and start < len(text):
            joint = self._next_joint(text, start, wrong, self.piece << failures // PATIENCE)
            ahead.append((start, joint))
            start, failures = joint.start if joint is not None else len(text), 0
        return ahead

    def _encoded(self, text: str, ahead: list[tuple[int, Joint | None]], dtype: Any) -> list[_Piece]:
        texts = [text[start : joint.end if joint is not None else len(text)] for start, joint in ahead]
        if max(map(len, texts)) > UNCUT:
            log.warning(
                "data.tokenizer has no sure place to cut %s characters of one document, which are encoded at once and "
                "take memory",
                f"{max(map(len, texts)):,}",
            )
        if ahead[0][0] == 0:
            first = self.library.encode_batch_fast(texts[:1], add_special_tokens=False)[0].ids
            ids = [first, *self._ids(*texts[1:])]
        else:
            ids = self._ids(*texts)
        return [_Piece(*place, np.array(own, dtype)) for place, own in zip(ahead, ids, strict=True)]

    def _ids(self, *texts: str) -> list[list[int]]:
        return [encoding.ids for encoding in self._inner.encode_batch_fast(list(texts), add_special_tokens=False)]

    def _next_joint(self, text: str, start: int, wrong: set[int], size: int) -> Joint | None:
        while start + size + self.piece // 2 < len(text) and not self._far_sighted:
            for end, following in self._candidates(text, start + size):
                if end not in wrong and (joint := self._joint(text, end, following)) is not None:
                    return joint
            size *= 2
        return None

    def _candidates(self, text: str, limit: int) -> Iterator[tuple[int, int]]:
        """Where the text may be cut before `limit`."""
        for number, end in enumerate(places(text, limit, self.piece // 4)):
            yield end, end
            # Tokenizers that begin every text with a space of their own put back the one that is left out.
            if number < PLACES_TRIED and text[end] == " ":
                yield end, end + 1

    def _joint(self, text: str, end: int, start: int) -> Joint | None:
        before, after = text[end - self.window : end], text[start : start + self.window]
        around = text[end - self.window : start + self.window]
        tail, head, whole = self._ids(before, after, around)
        if min(len(tail), len(head)) < 2 or tail + head != whole:
            return None
        if not self._words_stay(text, end, start):
            return None
        # The window's own far end cuts words too: what counts is the half beside the joint.
        return Joint(end, start, tail[-(len(tail) // 2) :], head[: len(head) // 2])

    def _words_stay(self, text: str, end: int, start: int) -> bool:
        """Whether the words near a cut are the same with and without it, and wherever one begins and ends to read."""
        near = min(NEAR, self.window)
        seen = {self._near_end(text[end - near - phase : end], near // 2) for phase in range(PHASES)}
        ahead = {self._near_start(text[start : start + near + phase], near // 2) for phase in range(PHASES)}
        if len(seen) > 1 or len(ahead) > 1:
            return False
        parts = [self._words(text[end - near : end]), self._words(text[start : start + near])]
        before, after = ([word for word, _ in words] for _, words in parts)
        whole = [word for word, _ in self._words(text[end - near : start + near])[1]]
        joined = [*before[:-1], before[-1] + after[0], *after[1:]] if before and after else []
        return whole == before + after or (self._cuts_words and whole == joined)

    def _words(self, text: str) -> tuple[str, list[tuple[str, tuple[int, int]]]]:
        """The normalized text, and its words with their places in it."""
        normalizer, splitter = self._inner.normalizer, self._inner.pre_tokenizer
        normal = normalizer.normalize_str(text) if normalizer is not None else text
        return normal, splitter.pre_tokenize_str(normal) if splitter is not None else [(normal, (0, len(normal)))]

    def _near_end(self, text: str, reach: int) -> tuple[str, tuple[int, ...]]:
        normal, words = self._words(text)
        size = len(normal)
        return normal[-reach:], tuple(size - place for _, ends in words for place in ends if 0 <= size - place < reach)

    def _near_start(self, text: str, reach: int) -> tuple[str, tuple[int, ...]]:
        normal, words = self._words(text)
        return normal[:reach], tuple(place for _, ends in words for place in ends if place < reach)


def _without_prefix(library: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The tokenizer for a text's middle: without the space that some put before every text.

    Where added tokens divide texts, that space stands behind each of them too, and the tokenizer stays as it is.
    """
    if not all(token.special for token in library.get_added_tokens_decoder().values()):
        return library
    content = json.loads(library.to_str())
    content["normalizer"], first = _strip(content["normalizer"])
    content["pre_tokenizer"], second = _strip(content["pre_tokenizer"])
    if not (first or second):
        return library
    inner = tokenizers.Tokenizer.from_str(json.dumps(content))
    inner.encode_special_tokens = library.encode_special_tokens
    return inner


def _strip(part: dict[str, Any] | None) -> tuple[dict[str, Any] | None, bool]:
    """A component without what puts a space before a text, and whether there was any."""
    if part is None:
        return None, False
    for name in ("normalizers", "pretokenizers"):
        if name in part:
            stripped = [_strip(inner) for inner in part[name]]
            kept = [inner for inner, _ in stripped if inner is not None]
            return part | {name: kept}, any(changed for _, changed in stripped)
    if part["type"] == "Prepend":
        return None, True
    if part["type"] == "Metaspace" and part["prepend_scheme"] != "never":
        return part | {"prepend_scheme": "never"}, True
    if part.get("add_prefix_space"):
        return part | {"add_prefix_space": False}, True
    return part, False


def places(text: str, limit: int, reach: int) -> Iterator[int]:
    """Places to cut `text` within `reach` characters before `limit`, the likeliest to divide words first."""
    first = limit - reach
    near = text[first - 1 : limit + 2]  # with what the patterns look at
    for pattern in PLACES:
        near_places = [first - 1 + match.start() for match in pattern.finditer(near)]
        yield from [place for place in near_places if first <= place <= limit][: -PLACES_TRIED - 1 : -1]
    yield from range(limit, max(first, limit - ANYWHERE_TRIED), -1)


def cut_for_training(
    text: str, splitter: pre_tokenizers.PreTokenizer, *, piece: int = PIECE, window: int = WINDOW
) -> list[str]:
    """Pieces of `text` with the words of the whole; only a word of thousands of characters is cut apart."""

    def words(start: int, end: int) -> list[str]:
        return [word for word, _ in splitter.pre_tokenize_str(text[start:end])]

    def divides(place: int) -> bool:
        first, last = place - window, place + window
        return words(first, place) + words(place, last) == words(first, last)

    cuts = [0]
    while cuts[-1] + piece + piece // 2 < len(text):
        limit = cuts[-1] + piece
        cuts.append(next((place for place in places(text, limit, piece // 4) if divides(place)), limit))
    return [text[start:end] for start, end in pairwise([*cuts, len(text)])]
