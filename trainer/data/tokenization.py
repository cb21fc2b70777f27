"""From a source's documents to the files of a token cache, in one pass over the source and bounded memory."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from .files import LeftOut
from .sources import Document, Source
from .tokenizers import Tokenizer, train_bpe

FORMAT = 2
TOKENS_FILE, METADATA_FILE, TOKENIZER_DIRECTORY = "tokens.arrow", "metadata.json", "tokenizer"
STAGE_FILE = "text.arrow"
BYTES_AT_ONCE = 8 << 20  # of text held in memory
BPE_BYTES = 1 << 30  # of text that merges are learnt from: more changes them little and takes the memory of the whole
SPREAD = 0x9E3779B97F4A7C15  # an odd number: hashes times it are a choice of their own, unlike that of the split

STAGE_SCHEMA = pa.schema([("text", pa.large_string()), ("hash", pa.uint64()), ("bytes", pa.int64())])

log = logging.getLogger("longreach")


class Entry(NamedTuple):
    """A document on its way into the cache: its content, the hash that decides its split, and its bytes of text."""

    content: Document
    hash: int
    bytes: int


def tokenize(
    directory: Path, source: Source, tokenizer: Tokenizer | None, *, vocabulary_size: int, validation_fraction: float
) -> None:
    """Writes tokens, tokenizer and metadata of `source` into `directory`.

    `tokenizer` None trains a BPE of `vocabulary_size` on the documents that are not held out; the text is then staged
    on disk, so that a source is read once. Raises ValueError where nothing readable remains or nothing can be held out.
    """
    skipped = LeftOut()
    notes: list[str] = []
    log.info("reading %s (%s) into the token cache", source.place, source.setting)
    batches = _batches(_at_least_two(_entries(source, tokenizer, skipped), validation_fraction, notes))
    if tokenizer is None:
        staged = directory / STAGE_FILE
        hashes, size = _stage(staged, batches)
        _refuse_nothing(len(hashes), source, skipped)
        tokenizer = _train(staged, hashes, size, vocabulary_size, validation_fraction)
        batches = _staged(staged)
    totals, hashes = _write_tokens(directory / TOKENS_FILE, batches, tokenizer, skipped)
    _refuse_nothing(totals["documents"], source, skipped)
    held_out(hashes, validation_fraction)
    for reason, said in (("invalid UTF-8", "not valid UTF-8"), ("blank", "blank")):
        # A blank file may be an oversight; blank lines and rows are what every corpus has.
        if (number := skipped[reason]) and (reason != "blank" or skipped.named(reason)):
            documents = "1 document is" if number == 1 else f"{number:,} documents are"
            left_out = "was left out" if number == 1 else "were left out"
            notes.append(f"{source.setting}: {documents} {said} and {left_out}{skipped.named(reason)}")
    (directory / STAGE_FILE).unlink(missing_ok=True)
    tokenizer.save(directory / TOKENIZER_DIRECTORY)
    metadata = {"format": FORMAT, "validation_fraction": validation_fraction, "notes": notes, "skipped": dict(skipped)}
    content = json.dumps(metadata | totals, indent=2)
    (directory / METADATA_FILE).write_text(content + "\n", encoding="utf-8")


def train_tokenizer(directory: Path, source: Source, *, vocabulary_size: int, validation_fraction: float) -> None:
    """Writes a BPE of the documents of `source` that are not held out into `directory`, and nothing else."""
    skipped = LeftOut()
    staged = directory / STAGE_FILE
    hashes, size = _stage(staged, _batches(_at_least_two(_entries(source, None, skipped), validation_fraction, [])))
    _refuse_nothing(len(hashes), source, skipped)
    _train(staged, hashes, size, vocabulary_size, validation_fraction).save(directory)
    staged.unlink()


def held_out(hashes: np.ndarray, fraction: float) -> np.ndarray:
    """Which documents are held out: those whose hash is small, so that equal documents stay on one side.

    At least one document is on either side. Raises ValueError if all are equal.
    """
    distinct = np.unique(hashes)
    if len(distinct) < 2:
        raise ValueError(
            "data.path must hold at least 2 different documents, to train on and to hold out for validation; "
            f"got {len(hashes)} equal. Add documents"
        )
    threshold = min(max(int(fraction * 2**64), int(distinct[0]) + 1), int(distinct[-1]))
    return hashes < np.uint64(threshold)


def _refuse_nothing(documents: int, source: Source, skipped: LeftOut) -> None:
    if not documents:
        left_out = ", ".join(f"{count:,} {reason}" for reason, count in sorted(skipped.items())) or "no document"
        remedy = "Convert it to UTF-8, or name another" if skipped["invalid UTF-8"] else "Name another"
        raise ValueError(f"{source.setting} must hold readable text; got {source.place} ({left_out}). {remedy}")


def _entries(source: Source, tokenizer: Tokenizer | None, skipped: LeftOut) -> Iterator[Entry]:
    """Documents with their hashes; blank ones and text that UTF-8 cannot hold are counted and left out."""
    for document in source.read(skipped):
        if not isinstance(document, str):
            assert tokenizer is not None
            yield from _id_entries(document, tokenizer, skipped)
        elif not document.strip():
            skipped["blank"] += 1
        else:
            try:
                content = document.encode()
            except UnicodeEncodeError:  # half a surrogate pair, which JSON can spell
                skipped["invalid UTF-8"] += 1
                continue
            yield Entry(document, _hash(content), len(content))


def _id_entries(ids: np.ndarray, tokenizer: Tokenizer, skipped: LeftOut) -> Iterator[Entry]:
    """The documents of a row of ids: end of text ends one, wherever it stands, and the row's end does too."""
    parts = np.split(ids, np.flatnonzero(ids == tokenizer.end_of_text) + 1)
    for part in parts if len(parts) == 1 or parts[-1].size else parts[:-1]:
        ended = part if part.size and part[-1] == tokenizer.end_of_text else np.append(part, tokenizer.end_of_text)
        if tokenizer.is_blank(ended):
            skipped["blank"] += 1
        else:
            yield Entry(ended, _hash(ended.astype("<i8").tobytes()), len(tokenizer.decode(ended).encode()))


def _hash(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def _at_least_two(entries: Iterator[Entry], fraction: float, notes: list[str]) -> Iterator[Entry]:
    """The entries; a single one is cut in two, its end held out, since one file is what many try first."""
    first, second = next(entries, None), next(entries, None)
    if first is None or second is not None:
        yield from (entry for entry in (first, second) if entry is not None)
        yield from entries
        return
    content = first.content
    cut = int(len(content) * (1 - fraction))
    if isinstance(content, str):
        cut = content.rfind("\n", 0, cut) + 1 or cut
        head, tail = content[:cut], content[cut:]
        size, whole = len(tail.encode()), head.strip() and tail.strip()
    else:
        head, tail = np.append(content[:cut], content[-1]), content[cut:]
        size, whole = round(first.bytes * len(tail) / len(content)), min(len(head), len(tail)) > 1
    if not whole:
        raise ValueError("data.path must hold at least 2 documents, to train on and to hold out; got 1. Add documents")
    notes.append(f"the data hold a single document: its last {fraction:.0%} is held out for validation")
    # The greatest and the least hash fall on their sides of any threshold.
    yield Entry(head, 2**64 - 1, first.bytes - size)
    yield Entry(tail, 0, size)


def _batches(entries: Iterable[Entry]) -> Iterator[list[Entry]]:
    batch, size = [], 0
    for entry in entries:
        batch.append(entry)
        size += entry.bytes
        if size >= BYTES_AT_ONCE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _stage(file: Path, batches: Iterable[list[Entry]]) -> tuple[np.ndarray, int]:
    """Keeps the text on disk; returns the hashes and the bytes of all of it."""
    hashes, size = [np.empty(0, np.uint64)], 0
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, STAGE_SCHEMA) as writer:
        for batch in batches:
            writer.write_batch(pa.record_batch([list(column) for column in zip(*batch, strict=True)], STAGE_SCHEMA))
            hashes.append(np.array([entry.hash for entry in batch], np.uint64))
            size += sum(entry.bytes for entry in batch)
    return np.concatenate(hashes), size


def _staged(file: Path) -> Iterator[list[Entry]]:
    with pa.memory_map(str(file)) as mapped:
        reader = pa.ipc.open_file(mapped)
        for number in range(reader.num_record_batches):
            columns = (column.to_pylist() for column in reader.get_batch(number).columns)
            yield [Entry(*values) for values in zip(*columns, strict=True)]


def _train(file: Path, hashes: np.ndarray, size: int, vocabulary_size: int, fraction: float) -> Tokenizer:
    """BPE of the staged documents that are not held out, of a fair choice of them where they are too many."""
    chosen = ~held_out(hashes, fraction)
    if size > BPE_BYTES:
        chosen &= hashes * np.uint64(SPREAD) < np.uint64(int(BPE_BYTES / size * 2**64))

    def texts() -> Iterator[list[str]]:
        first = 0
        for batch in _staged(file):
            kept = chosen[first : first + len(batch)]
            yield [str(entry.content) for entry, keep in zip(batch, kept, strict=True) if keep]
            first += len(batch)

    return train_bpe(texts(), vocabulary_size)


def _write_tokens(
    file: Path, batches: Iterable[list[Entry]], tokenizer: Tokenizer, skipped: LeftOut
) -> tuple[dict[str, Any], np.ndarray]:
    """Writes the ids; returns totals with the fingerprint, which is that of the content wherever it came from."""
    dtype = tokenizer.id_type
    ids_type = pa.large_list(pa.from_numpy_dtype(dtype))
    schema = pa.schema([("ids", ids_type), ("bytes", pa.int64()), ("hash", pa.uint64())])
    totals: dict[str, Any] = {"documents": 0, "tokens": 0, "bytes": 0, "largest_id": 0}
    ids_digest, documents_digest = hashlib.blake2b(digest_size=16), hashlib.blake2b(digest_size=16)
    hashes = [np.empty(0, np.uint64)]
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for batch in batches:
            kept, documents = _encode(batch, tokenizer, skipped)
            if not kept:
                continue
            values = np.concatenate(documents).astype(dtype, copy=False)
            offsets = np.cumsum([0, *map(len, documents)], dtype=np.int64)
            ids = pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(values))
            sizes = np.array([entry.bytes for entry in kept], np.int64)
            hashes.append(np.array([entry.hash for entry in kept], np.uint64))
            writer.write_batch(pa.record_batch([ids, pa.array(sizes), pa.array(hashes[-1])], schema))
            ids_digest.update(values.tobytes())
            documents_digest.update(np.stack([np.diff(offsets), hashes[-1].view(np.int64)], axis=1).tobytes())
            totals["documents"] += len(kept)
            totals["tokens"] += len(values)
            totals["bytes"] += int(sizes.sum())
            totals["largest_id"] = max(totals["largest_id"], int(values.max()))
    parts = (ids_digest.hexdigest(), documents_digest.hexdigest(), tokenizer.identity)
    totals["fingerprint"] = hashlib.blake2b("".join(parts).encode(), digest_size=16).hexdigest()
    return totals, np.concatenate(hashes)


def _encode(batch: list[Entry], tokenizer: Tokenizer, skipped: LeftOut) -> tuple[list[Entry], list[np.ndarray]]:
    texts = [entry.content for entry in batch if isinstance(entry.content, str)]
    encoded = tokenizer.encode_documents(texts) if texts else [np.asarray(entry.content) for entry in batch]
    # A tokenizer that normalises can reduce a text to its beginning and its end.
    pairs = [(entry, ids) for entry, ids in zip(batch, encoded, strict=True) if not tokenizer.is_blank(ids)]
    if len(pairs) < len(batch):
        skipped["blank"] += len(batch) - len(pairs)
    return [entry for entry, _ in pairs], [ids for _, ids in pairs]
