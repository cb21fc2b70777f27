"""The training data: the corpus that the settings open."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..run.progress import count
from .packing import TokenStream
from .recall import RecallCorpus, open_recall
from .settings import DataSettings
from .sources import open_source
from .token_cache import TokenCache, open_token_cache
from .tokenization import FORMAT
from .tokenizers import BOS, Tokenizer, check_vocabulary_size, load_tokenizer, refuse_bos

DEFAULT_CACHE = "~/.cache/longreach"
DEFAULT_VOCABULARY = 4096
DOCUMENTS_LOOKED_AT = 1000

log = logging.getLogger("longreach")


@dataclass(frozen=True)
class Corpus:
    """Tokenized documents in two streams of rows: `train`, endless and shuffled, and `validation`, held out.

    `fingerprint` is a hash of all token ids, the split and the tokenizer, the same wherever the data lie.
    """

    tokenizer: Tokenizer
    train: TokenStream
    validation: TokenStream
    cache: TokenCache
    fingerprint: str

    @property
    def vocabulary_size(self) -> int:
        """Ids are smaller."""
        return self.tokenizer.vocabulary_size

    @property
    def summary(self) -> str:
        return f"{count(self.train.tokens)} training tokens, {count(self.validation.tokens)} held out"

    def stream(self, split: str) -> TokenStream:
        """The stream of "train" or "validation"."""
        return {"train": self.train, "validation": self.validation}[split]

    def text_bytes(self, split: str) -> int:
        """UTF-8 bytes of the documents of a split."""
        return int(self.cache.bytes[self.stream(split).members].sum())

    def bytes_per_token(self, split: str) -> float:
        """Bytes of text for each *target* of a split: bits per byte = mean loss / ln 2 / bytes_per_token.

        Every token but the first of each document is a target, end of text included. Where documents begin with BOS,
        all of their text is among the targets; BOS itself is none, and has no bytes.
        """
        return self.text_bytes(split) / self.stream(split).targets


def open_corpus(settings: DataSettings, cache_dir: str | Path | None = None, seed: int = 0) -> Corpus | RecallCorpus:
    """The corpus of `data.*`; every rank calls it, one of them builds the token cache and the others wait for its file.

    `cache_dir` overrides `data.cache_dir`; `seed` orders the training documents. What was left out of the data is
    logged as a warning. Raises ValueError for settings or data that cannot be used.
    """
    if settings.source == "recall":
        return open_recall(settings)
    _check(settings)
    bos = settings.bos.lower()  # as a command line's true becomes the text True
    if settings.tokenizer == "bpe":
        refuse_bos(bos, "bpe")
    tokenizer = None if settings.tokenizer == "bpe" else load_tokenizer(settings.tokenizer, bos)
    source = open_source(settings, None if tokenizer is None else tokenizer.vocabulary_size)
    vocabulary_size = settings.vocabulary_size or DEFAULT_VOCABULARY
    made_of = {
        "format": FORMAT,
        "source": source.identity,
        "tokenizer": ["bpe", vocabulary_size] if tokenizer is None else tokenizer.identity,
        "validation_fraction": settings.validation_fraction,
    }
    key = hashlib.blake2b(json.dumps(made_of, sort_keys=True).encode(), digest_size=12).hexdigest()
    root = Path(cache_dir or settings.cache_dir or DEFAULT_CACHE).expanduser()
    cache = open_token_cache(
        root / f"{settings.source}-{key}",
        source,
        tokenizer,
        vocabulary_size=vocabulary_size,
        validation_fraction=settings.validation_fraction,
    )
    for note in [*source.notes, *cache.metadata["notes"]]:
        log.warning("%s", note)
    # The cache's may have been another's, with the same ids and another chat template.
    corpus = _corpus(cache, tokenizer or cache.tokenizer, settings.sequence_length, seed)
    if settings.source == "pretokenized" and not _begins(corpus):
        log.warning("data.bos: prompts begin with BOS and no document does; data.bos=false leaves it out of prompts")
    return corpus


def _begins(corpus: Corpus) -> bool:
    """Whether prompts begin as the first documents do, or one of them at least: rows may hold parts of documents."""
    begin = corpus.tokenizer.beginning
    first = (corpus.cache[number][: len(begin)] for number in range(min(len(corpus.cache), DOCUMENTS_LOOKED_AT)))
    return any(tuple(ids.tolist()) == begin for ids in first)


def _corpus(cache: TokenCache, tokenizer: Tokenizer, length: int, seed: int) -> Corpus:
    fingerprint, padding = cache.metadata["fingerprint"], cache.tokenizer.end_of_text
    fingerprint = f"{fingerprint}-{cache.metadata['validation_fraction']}"
    training, validation = np.flatnonzero(~cache.held_out), np.flatnonzero(cache.held_out)
    # In the order of their hashes, so that each row is a fair choice of documents, for when only some are evaluated.
    validation = validation[np.argsort(cache.hashes[validation], kind="stable")]
    shared = {"length": length, "fingerprint": fingerprint, "padding": padding}
    return Corpus(
        tokenizer,
        TokenStream(cache, training, seed=seed, **shared),
        TokenStream(cache, validation, **shared),
        cache,
        fingerprint,
    )


def _check(settings: DataSettings) -> None:
    if settings.bos.lower() not in BOS:
        raise ValueError(f"data.bos must be one of {', '.join(BOS)}; got {settings.bos}. Choose one")
    if not 0 < settings.validation_fraction < 1:
        raise ValueError(
            f"data.validation_fraction must lie between 0 and 1; got {settings.validation_fraction}. Try 0.05"
        )
    if settings.vocabulary_size is not None:
        if settings.tokenizer != "bpe":
            raise ValueError(
                f"data.vocabulary_size must be left out with data.tokenizer={settings.tokenizer}, which has its own; "
                f"got {settings.vocabulary_size}. Remove it or choose data.tokenizer=bpe"
            )
        check_vocabulary_size(settings.vocabulary_size)
    if settings.source == "pretokenized" and settings.tokenizer == "bpe":
        raise ValueError(
            "data.tokenizer must be the path or name of the tokenizer that made the ids with data=pretokenized; got bpe"
            ". Name it"
        )
