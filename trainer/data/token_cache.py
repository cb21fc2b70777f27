"""The token cache: a source's documents as token ids in memory-mapped Arrow, built once and shared by all processes."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import time
import uuid
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from . import kept
from .sources import Source
from .tokenization import METADATA_FILE, TOKENIZER_DIRECTORY, TOKENS_FILE, held_out, tokenize, train_tokenizer
from .tokenizers import Tokenizer, load_tokenizer

WAIT_S = 24 * 3600.0  # for another process that is alive and building; a dead one is noticed at once
POLL_S = 0.1

log = logging.getLogger("longreach")


class TokenCache:
    """The documents of a cache directory as read-only views of its memory-mapped ids.

    `lengths` and `bytes` are int64, `hashes` uint64 and `held_out` bool `[documents]`; `cache[i]` is the ids of
    document i, the last of them end of text, in the type they are stored in. No id is larger than `largest_id`.
    """

    def __init__(self, directory: Path) -> None:
        self.metadata: dict[str, Any] = json.loads((directory / METADATA_FILE).read_text(encoding="utf-8"))
        self.tokenizer = load_tokenizer(directory / TOKENIZER_DIRECTORY)
        self.largest_id = int(self.metadata["largest_id"])
        reader = pa.ipc.open_file(pa.memory_map(str(directory / TOKENS_FILE)))
        batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        self._offsets = [batch.column("ids").offsets.to_numpy() for batch in batches]
        self._values = [batch.column("ids").values.to_numpy() for batch in batches]
        self._firsts = [0, *np.cumsum([batch.num_rows for batch in batches]).tolist()]
        self.lengths = np.concatenate([np.diff(offsets) for offsets in self._offsets])
        self.bytes = np.concatenate([batch.column("bytes").to_numpy() for batch in batches])
        self.hashes = np.concatenate([batch.column("hash").to_numpy() for batch in batches])
        self.held_out = held_out(self.hashes, self.metadata["validation_fraction"])

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, document: int) -> np.ndarray:
        part = bisect_right(self._firsts, document) - 1
        offsets, place = self._offsets[part], document - self._firsts[part]
        return self._values[part][offsets[place] : offsets[place + 1]]


def open_token_cache(
    directory: Path,
    source: Source,
    tokenizer: Tokenizer | None,
    *,
    vocabulary_size: int,
    validation_fraction: float,
    wait_s: float = WAIT_S,
) -> TokenCache:
    """The cache of `source` at `directory`, built by the first process that asks while the others wait for its file.

    `tokenizer` None trains a BPE of `vocabulary_size` on the documents that are not held out. Nobody waits in a
    collective: a builder that fails leaves its error for those who wait, one that dies leaves the work to the next.
    Documents of a source with `read_from` are kept on disk until the cache is complete.
    Raises ValueError for unusable data or cache folder.
    """

    def build(temporary: Path) -> None:
        started = time.monotonic()
        documents, read_from, read = directory.with_name(directory.name + ".documents"), source.read_from, source
        if read_from is not None:
            read = replace(source, read=lambda left_out: kept.read_on(documents, read_from))
        tokenize(temporary, read, tokenizer, vocabulary_size=vocabulary_size, validation_fraction=validation_fraction)
        documents.unlink(missing_ok=True)
        log.info("token cache %s built in %.1f s", directory, time.monotonic() - started)

    if not (directory / METADATA_FILE).is_file():
        _make(directory, build, wait_s)
    try:
        return TokenCache(directory)
    except (OSError, ValueError, KeyError) as error:  # Arrow's and JSON's complaints are ValueErrors
        message = f"data.cache_dir must hold whole token caches; got {directory}: {error}. Delete that folder"
        raise ValueError(message) from None


def open_tokenizer(
    directory: Path, source: Source, *, vocabulary_size: int, validation_fraction: float, wait_s: float = WAIT_S
) -> Tokenizer:
    """A BPE trained on the documents of `source`, kept at `directory`; made and waited for as `open_token_cache` does.

    Raises ValueError for unusable data or cache folder.
    """

    def build(temporary: Path) -> None:
        train_tokenizer(temporary, source, vocabulary_size=vocabulary_size, validation_fraction=validation_fraction)

    if not directory.is_dir():
        _make(directory, build, wait_s)
    return load_tokenizer(directory)


def _make(directory: Path, build: Callable[[Path], None], wait_s: float) -> None:
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        _build_once(directory, build, wait_s)
    except OSError as error:
        message = f"data.cache_dir must be a folder with room that can be written; got {directory.parent}: {error}"
        raise ValueError(f"{message}. Name another") from None


def _build_once(directory: Path, build: Callable[[Path], None], wait_s: float) -> None:
    failure = directory.with_name(directory.name + ".error")
    before = _read(failure)
    with _locked(directory.with_name(directory.name + ".lock"), wait_s) as waited:
        if directory.is_dir():
            return
        told = _read(failure)
        if waited and told and told != before:
            raise ValueError(told.split("\n", 1)[1])
        temporary = directory.with_name(f"{directory.name}.{uuid.uuid4().hex}.building")
        try:
            temporary.mkdir()
            build(temporary)
            _move(temporary, directory)
            failure.unlink(missing_ok=True)
        except Exception as error:
            # The first line identifies this failure, so that a waiting process does not take an earlier one for it.
            failure.write_text(f"{uuid.uuid4().hex}\n{error}", encoding="utf-8")
            raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _move(temporary: Path, directory: Path) -> None:
    try:
        temporary.rename(directory)
    except OSError:
        # On a file system without locks another process may have built the same meanwhile.
        if not directory.is_dir():
            raise


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError:
        return ""


@contextmanager
def _locked(file: Path, wait_s: float) -> Iterator[bool]:
    """Holds an exclusive lock, which the system releases if this process dies; yields whether another held it."""
    waited, deadline = False, time.monotonic() + wait_s
    descriptor = os.open(file, os.O_CREAT | os.O_RDWR)
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not waited:
                    log.info("waiting for the token cache that another process builds in %s", file.parent)
                waited = True
            except OSError:
                break  # no locks on this file system: each process builds, and the first to finish is kept
            if time.monotonic() > deadline:
                raise ValueError(
                    f"data.cache_dir must be free within {wait_s:.0f} s; got {file}, which another process holds. "
                    "End that process or name another folder"
                )
            time.sleep(POLL_S)
        yield waited
    finally:
        os.close(descriptor)
