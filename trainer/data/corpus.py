"""The training data: the corpus that the settings open."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..run.progress import count
from .files import LeftOut
from .packing import TokenStream
from .recall import RecallCorpus, open_recall
from .settings import DataSettings, MixtureSource
from .sources import Document, Source, open_source
from .streams.joined import JoinedDocuments
from .streams.mixture import MixtureStream, Shares
from .token_cache import TokenCache, open_token_cache, open_tokenizer
from .tokenization import FORMAT
from .tokenizers import (
    BOS,
    Tokenizer,
    check_vocabulary_size,
    checkpoint_tokenizer,
    load_tokenizer,
    refuse_bos,
)

DEFAULT_CACHE = "~/.cache/longreach"
DEFAULT_VOCABULARY = 4096
DOCUMENTS_LOOKED_AT = 1000

log = logging.getLogger("longreach")


class CorpusPart(NamedTuple):
    """A source of a mixture: its documents, its share of the rows, and its held-out documents, if there are any.

    bytes_per_token: of text, for each target that is held out; see `Corpus.bytes_per_token`.
    """

    weight: float
    train: TokenStream
    validation: TokenStream | None
    bytes_per_token: float


@dataclass(frozen=True)
class Corpus:
    """Tokenized documents in two streams of rows: `train`, endless and shuffled, and `validation`, held out.

    `fingerprint` is a hash of all token ids, the split and the tokenizer, the same wherever the data lie. `members` are
    the documents of either split in `cache`. `parts` are the sources of a mixture by name; without one, there are none.
    """

    tokenizer: Tokenizer
    train: TokenStream | MixtureStream
    validation: TokenStream
    cache: TokenCache | JoinedDocuments
    fingerprint: str
    members: dict[str, np.ndarray]
    parts: dict[str, CorpusPart] = field(default_factory=dict)

    @property
    def vocabulary_size(self) -> int:
        """Ids are smaller."""
        return self.tokenizer.vocabulary_size

    @property
    def summary(self) -> str:
        tokens = f"{count(self.train.tokens)} training tokens, {count(self.validation.tokens)} held out"
        if not self.parts:
            return tokens
        whole = sum(part.weight for part in self.parts.values())
        shares = (
            f"{name} {part.weight / whole:.0%} of the rows, {count(part.train.tokens)}"
            for name, part in self.parts.items()
        )
        return f"{tokens} ({'; '.join(shares)})"

    def stream(self, split: str) -> TokenStream | MixtureStream:
        """The stream of "train" or "validation"."""
        return {"train": self.train, "validation": self.validation}[split]

    def text_bytes(self, split: str) -> int:
        """UTF-8 bytes of the documents of a split."""
        return int(self.cache.bytes[self.members[split]].sum())

    def bytes_per_token(self, split: str) -> float:
        """Bytes of text for each *target* of a split: bits per byte = mean loss / ln 2 / bytes_per_token.

        Every token but the first of each document is a target, end of text included. Where documents begin with BOS,
        all of their text is among the targets; BOS itself is none, and has no bytes.
        """
        return _bytes_per_token(self.cache, self.members[split])


def _bytes_per_token(cache: TokenCache | JoinedDocuments, members: np.ndarray) -> float:
    return int(cache.bytes[members].sum()) / int((cache.lengths[members] - 1).sum())


def open_corpus(
    settings: DataSettings,
    cache_dir: str | Path | None = None,
    seed: int = 0,
    tokenizer: Tokenizer | None = None,
) -> Corpus | RecallCorpus:
    """The corpus of `data.*`; every rank calls it, one of them builds the token cache and the others wait for its file.

    `cache_dir` overrides `data.cache_dir`; `seed` orders the training documents; `tokenizer` takes the place of
    `data.tokenizer`, for a run that has one and gets other data. What was left out of the data is logged as a warning.
    Raises ValueError for settings or data that cannot be used.
    """
    if settings.source == "recall":
        return open_recall(settings)
    _check(settings)
    bos = settings.bos.lower()  # as a command line's true becomes the text True
    if settings.tokenizer == "bpe":
        refuse_bos(bos, "bpe")
    if tokenizer is None and settings.tokenizer != "bpe":
        tokenizer = load_tokenizer(settings.tokenizer, bos)
    root = Path(cache_dir or settings.cache_dir or DEFAULT_CACHE).expanduser()
    if settings.mixture or settings.source == "mixture":
        return _mixed(settings, root, tokenizer, seed)
    # The cache's tokenizer may have been another's, with the same ids and another chat template.
    cache = _open_cache(settings, root, tokenizer)
    chosen = tokenizer or cache.tokenizer
    train, validation, members = _streams(settings, cache, seed, settings.source)
    if validation is None:
        raise ValueError("data.path must hold documents for every split; got a split without tokens. Add documents")
    corpus = Corpus(chosen, train, validation, cache, train.fingerprint, members)
    _note_beginning(settings, cache, chosen)
    return corpus


def tokenizer_of_run(settings: DataSettings, start: Path | None) -> Tokenizer | None:
    """With `data.restart`, the tokenizer of the checkpoint that a run goes on from, for its new data; otherwise None.

    Raises ValueError where there is no checkpoint, and for another tokenizer, whose ids the model does not know.
    """
    if not settings.restart:
        return None
    if start is None:
        raise ValueError(
            "data.restart must be left out of a run that begins; got true, and no checkpoint to go on from. Remove it"
        )
    if settings.source == "recall":
        return None
    own = checkpoint_tokenizer(start)
    if (
        settings.tokenizer != "bpe"
        and load_tokenizer(settings.tokenizer, settings.bos.lower()).identity != own.identity
    ):
        raise ValueError(
            f"data.tokenizer must be the run's own with data.restart=true; got {settings.tokenizer}, with other ids. "
            f"Use {start / 'tokenizer'}"
        )
    return own


def _open_cache(settings: DataSettings, root: Path, tokenizer: Tokenizer | None) -> TokenCache:
    """The token cache of one source."""
    source = open_source(settings, None if tokenizer is None else tokenizer.vocabulary_size)
    vocabulary_size = settings.vocabulary_size or DEFAULT_VOCABULARY
    made_of = {
        "format": FORMAT,
        "source": source.identity,
        "tokenizer": ["bpe", vocabulary_size] if tokenizer is None else tokenizer.identity,
        "validation_fraction": settings.validation_fraction,
    }
    cache = open_token_cache(
        root / f"{settings.source}-{_key(made_of)}",
        source,
        tokenizer,
        vocabulary_size=vocabulary_size,
        validation_fraction=settings.validation_fraction,
    )
    for note in [*source.notes, *cache.metadata["notes"]]:
        log.warning("%s", note)
    return cache


def _key(made_of: dict[str, object]) -> str:
    return hashlib.blake2b(json.dumps(made_of, sort_keys=True).encode(), digest_size=12).hexdigest()


def _mixed(settings: DataSettings, root: Path, tokenizer: Tokenizer | None, seed: int) -> Corpus:
    """The corpus of a mixture: a token cache for each source, or one for the buckets of a source, and one tokenizer."""
    sources = settings.sources()
    Shares({name: part.weight for name, part in settings.mixture.items()})
    tokenizer = tokenizer or _shared_tokenizer(sources, root)
    caches: dict[str, TokenCache] = {}
    parts: dict[str, CorpusPart] = {}
    members: dict[str, list[np.ndarray]] = {"train": [], "validation": []}
    keys = {name: json.dumps(_given(own)) for name, own in sources.items()}
    for name, own in sources.items():
        if keys[name] not in caches:
            caches[keys[name]] = _open_cache(own, root, tokenizer)
            _note_beginning(own, caches[keys[name]], tokenizer)
    joined = JoinedDocuments(list(caches.values()))
    firsts = dict(zip(caches, joined.firsts, strict=True))
    for name, own in sources.items():
        cache, part = caches[keys[name]], settings.mixture[name]
        train, validation, theirs = _streams(own, cache, seed, name, part)
        if validation is None:
            log.warning("data.mixture.%s: no document is held out, so that it has no validation loss", name)
        scale = _bytes_per_token(cache, theirs["validation"]) if validation else 0.0
        parts[name] = CorpusPart(part.weight, train, validation, scale)
        for split, documents in theirs.items():
            members[split].append(documents + firsts[keys[name]])
    whole = {split: np.unique(np.concatenate(documents)) for split, documents in members.items()}
    whole["validation"] = _by_hash(joined, whole["validation"])
    stream = MixtureStream(
        {name: part.train for name, part in parts.items()}, {name: part.weight for name, part in parts.items()}
    )
    shared = {"length": settings.sequence_length, "padding": tokenizer.end_of_text, "packing": settings.packing}
    held_out = TokenStream(joined, whole["validation"], fingerprint=stream.fingerprint, **shared)
    return Corpus(tokenizer, stream, held_out, joined, stream.fingerprint, whole, parts)


def _given(own: DataSettings) -> list[object]:
    """What tells the documents of a source from those of others."""
    return [own.source, own.path, own.name, own.subset, own.split, own.column, own.max_documents]


def _shared_tokenizer(sources: dict[str, DataSettings], root: Path) -> Tokenizer:
    """A BPE of the training documents of all sources."""
    opened = {json.dumps(_given(own)): open_source(own) for own in sources.values()}
    first = next(iter(sources.values()))
    vocabulary_size = first.vocabulary_size or DEFAULT_VOCABULARY

    def read(left_out: LeftOut) -> Iterator[Document]:
        for source in opened.values():
            yield from source.read(left_out)

    made_of = {
        "format": FORMAT,
        "sources": [source.identity for source in opened.values()],
        "vocabulary_size": vocabulary_size,
        "validation_fraction": first.validation_fraction,
    }
    places = ", ".join(source.place for source in opened.values())
    return open_tokenizer(
        root / f"tokenizer-{_key(made_of)}",
        Source(made_of, read, "data.mixture", places),
        vocabulary_size=vocabulary_size,
        validation_fraction=first.validation_fraction,
    )


def _streams(
    settings: DataSettings, cache: TokenCache, seed: int, name: str, part: MixtureSource | None = None
) -> tuple[TokenStream, TokenStream | None, dict[str, np.ndarray]]:
    """The two streams of a source, of its documents of the lengths that `part` wants, and their members."""
    fingerprint = f"{cache.metadata['fingerprint']}-{cache.metadata['validation_fraction']}"
    wanted = np.ones(len(cache), bool)
    if part is not None and (part.min_length is not None or part.max_length is not None):
        fingerprint += f"-{part.min_length}-{part.max_length}"
        wanted &= cache.lengths >= (part.min_length or 0)
        wanted &= cache.lengths <= (part.max_length or np.iinfo(np.int64).max)
    members = {
        "train": np.flatnonzero(wanted & ~cache.held_out),
        "validation": _by_hash(cache, np.flatnonzero(wanted & cache.held_out)),
    }
    if not len(members["train"]):
        raise ValueError(
            f"data.mixture.{name} must have documents to train on; got none of its lengths, of {len(cache):,}. Change "
            "min_length or max_length, or leave it out"
        )
    shared = {
        "length": settings.sequence_length,
        "fingerprint": fingerprint,
        "padding": cache.tokenizer.end_of_text,
        "packing": settings.packing,
        "name": name,
    }
    held_out = TokenStream(cache, members["validation"], **shared) if len(members["validation"]) else None
    return TokenStream(cache, members["train"], seed=seed, **shared), held_out, members


def _by_hash(documents: TokenCache | JoinedDocuments, members: np.ndarray) -> np.ndarray:
    """In the order of their hashes: each row is a fair choice of documents, for when only some are evaluated."""
    return members[np.argsort(documents.hashes[members], kind="stable")]


def _note_beginning(settings: DataSettings, cache: TokenCache, tokenizer: Tokenizer) -> None:
    """Says where prompts begin otherwise than all of the first documents: rows may hold parts of documents."""
    if settings.source != "pretokenized":
        return
    begin = tokenizer.beginning
    first = (cache[number][: len(begin)] for number in range(min(len(cache), DOCUMENTS_LOOKED_AT)))
    if not any(tuple(ids.tolist()) == begin for ids in first):
        log.warning("data.bos: prompts begin with BOS and no document does; data.bos=false leaves it out of prompts")


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
    kinds = {settings.source, *(part.source for part in settings.mixture.values())}
    if "pretokenized" in kinds and settings.tokenizer == "bpe":
        raise ValueError(
            "data.tokenizer must be the path or name of the tokenizer that made the ids with data=pretokenized; got bpe"
            ". Name it"
        )
