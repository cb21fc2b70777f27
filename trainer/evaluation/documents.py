"""Documents that are evaluated whole: long ones, each from its beginning, and the text that things are hidden in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from ..data.corpus import Corpus
from ..data.packing import NO_TARGET, Row, RowStream
from ..data.settings import DataSettings
from ..data.sources import open_source
from ..data.tokenizers import Tokenizer


class Texts(Protocol):
    """Documents as token ids, each begun and ended as the tokenizer does."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> np.ndarray: ...


class HeldOut(Sequence[np.ndarray]):
    """The held-out documents of a corpus, in the order of their hashes: a fair choice, where some are read."""

    def __init__(self, corpus: Corpus) -> None:
        self._corpus, self._members = corpus, corpus.members["validation"]

    def __len__(self) -> int:
        return len(self._members)

    def __getitem__(self, number):  # noqa: ANN001
        return self._corpus.cache[int(self._members[number])]


def read_texts(path: str, tokenizer: Tokenizer, setting: str) -> list[np.ndarray]:
    """The documents of files of text. Raises ValueError, in the name of `setting`, where there are none to read."""
    try:
        source = open_source(DataSettings("text", path))
        texts = [text for text in source.read({}) if isinstance(text, str) and text.strip()]  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(str(error).replace("data.path", setting)) from None
    if not texts:
        raise ValueError(f"{setting} must hold readable text; got {path}, which has none. Name another")
    return tokenizer.encode_documents(texts)


def as_haystack(texts: Texts, tokenizer: Tokenizer, most: int) -> np.ndarray:
    """int64: the texts one after the other, without what begins and ends documents, up to at least `most` tokens."""
    marks, parts, tokens = [*tokenizer.beginning, tokenizer.end_of_text], list[np.ndarray](), 0
    for number in range(len(texts)):
        ids = texts[number]
        parts.append(ids[~np.isin(ids, marks)].astype(np.int64))
        tokens += len(parts[-1])
        if tokens >= most:
            break
    return np.concatenate(parts)


class LongDocuments(RowStream):
    """The first `tokens` of each document that has so many, and a target behind each of them, one document a row.

    length: of rows, `tokens` or more, the rest padding. Raises ValueError, naming `setting`, where no document is as
    long.
    """

    def __init__(self, texts: Texts, tokens: int, length: int, setting: str) -> None:
        super().__init__(length, "")
        self._texts, self._tokens = texts, tokens
        lengths = [len(texts[number]) for number in range(len(texts))]
        self._members = [number for number, n in enumerate(lengths) if n > tokens]
        if not self._members:
            raise ValueError(
                f"{setting} must be less than the longest of the {len(lengths):,} documents, {max(lengths):,} tokens; "
                f"got {tokens}. Lower it, or name longer texts"
            )

    def _begin(self) -> None:
        pass

    @property
    def rows(self) -> int:
        return len(self._members)

    def row(self, number: int) -> Row:
        tokens, targets = np.zeros(self.length, np.int64), np.full(self.length, NO_TARGET, np.int64)
        if number >= len(self._members):
            return Row(tokens, targets, [])
        ids = self._texts[self._members[number]][: self._tokens + 1]
        tokens[: self._tokens], targets[: self._tokens] = ids[:-1], ids[1:]
        return Row(tokens, targets, [self._tokens])
