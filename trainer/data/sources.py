"""Where documents come from: files of text, JSON lines or Parquet, the hub, and the standard library itself."""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .files import SUFFIXES, UNREADABLE, LeftOut, find_files, open_bytes, unreadable, walk
from .hub import HubDataset
from .settings import DataSettings, RecallSettings

STDLIB_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
STDLIB_BYTES = 4_000_000  # a full standard library has about 12 MB; minimal packages of Python have far less
ROWS_READ_AT_ONCE = 1024

Document = str | np.ndarray


@dataclass(frozen=True)
class Source:
    """Documents, with an identity that distinguishes them from others.

    `identity` is JSON-able and cheap: the files with their sizes and times, or the name of a hub data set. `read`
    yields the documents, in a fixed order, as text or (pretokenized) as int64 token ids; it adds what it leaves out to
    what it is given, as "invalid UTF-8" or "blank". `setting` and `place` name it in messages. `notes` says what was
    passed over when it was opened. `read_from`, where reading is slow or may fail at any document, reads those from a
    number on, so that what was read can be kept.
    """

    identity: dict[str, Any]
    read: Callable[[LeftOut], Iterator[Document]]
    setting: str
    place: str
    notes: list[str] = field(default_factory=list)
    read_from: Callable[[int], Iterator[str]] | None = None


def open_source(settings: DataSettings, vocabulary: int | None = None) -> Source:
    """The source that `data.*` names, its files found but not yet read.

    `vocabulary` bounds the ids of a pretokenized source. Raises ValueError for a path without files and for settings
    that the source lacks or would ignore.
    """
    kind = settings.source
    known = ("stdlib", *SUFFIXES, "hub")
    if kind not in known:
        raise ValueError(
            f"data.source must be one of {', '.join(known)}, recall; got {kind!r}. Choose one with data=NAME"
        )
    refuse_ignored(settings)
    if kind == "hub":
        data_set = HubDataset.of(settings)
        return Source(
            data_set.identity,
            lambda left_out: data_set.read_from(0),
            "data.name",
            data_set.name,
            read_from=data_set.read_from,
        )
    if kind == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        files = _stdlib_files(root)
        # Its empty files are nobody's oversight.
        return Source(_identity(kind, files), lambda left_out: _read_text(files, LeftOut()), "data=stdlib", str(root))
    column = settings.column or ("input_ids" if kind == "pretokenized" else "text")
    files, notes = find_files(settings.path, kind, column)
    readers: dict[str, Callable[[LeftOut], Iterator[Document]]] = {
        "text": lambda left_out: _read_text(files, left_out),
        "jsonl": lambda left_out: _read_jsonl(files, column, left_out),
        "parquet": lambda left_out: _read_parquet(files, column, left_out),
        "pretokenized": lambda left_out: _read_token_ids(files, column, vocabulary),
    }
    identity = _identity(kind, files) | ({} if kind == "text" else {"column": column})
    return Source(identity, readers[kind], "data.path", str(settings.path), notes)


def _identity(kind: str, files: list[Path]) -> dict[str, Any]:
    stats = [(str(file), file.stat()) for file in files]
    return {"source": kind, "files": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]}


def refuse_ignored(settings: DataSettings) -> None:
    """Raises ValueError for a setting that the source does not use."""
    used = {
        "path": tuple(SUFFIXES),
        "name": ("hub",),
        "subset": ("hub",),
        "split": ("hub",),
        "max_documents": ("hub", "recall"),
        "column": ("jsonl", "parquet", "hub", "pretokenized"),
    }
    for setting, kinds in used.items():
        value = getattr(settings, setting)
        if value is not None and settings.source not in kinds:
            raise ValueError(
                f"data.{setting} must be left out with data={settings.source}, which does not use it; got {value!r}. "
                f"Remove it or choose data={'|'.join(kinds)}"
            )
    if settings.source != "recall" and settings.recall != RecallSettings():
        raise ValueError(
            f"data.recall must be left out with data={settings.source}, which does not use it; got {settings.recall}. "
            "Remove it or choose data=recall"
        )


def _stdlib_files(root: Path) -> list[Path]:
    files = walk(root, LeftOut(), follow=False, skipped=STDLIB_SKIPPED) if root.is_dir() else []
    files = [file for file in files if file.suffix == ".py" and not _is_codec_table(file)]
    size = sum(file.stat().st_size for file in files)
    if size < STDLIB_BYTES:
        raise ValueError(
            f"data=stdlib must find at least {STDLIB_BYTES:,} bytes of Python source in the interpreter's standard "
            f"library; got {size:,} in {root}. Use a full Python, or data=text with data.path"
        )
    return files


def _is_codec_table(file: Path) -> bool:
    """Whether it is one of the generated tables of `encodings`: thousands of lines of one shape."""
    if file.parent.name != "encodings":
        return False
    text = file.read_text(encoding="utf-8", errors="replace")
    return "decoding_table = (" in text or "decoding_map" in text


def _read_text(files: list[Path], left_out: LeftOut) -> Iterator[str]:
    for file in files:
        try:
            with open_bytes(file) as content:
                # A byte-order mark says how the file is encoded; it is no part of its text.
                text = content.read().decode("utf-8-sig")
        except UnicodeDecodeError:
            left_out.add("invalid UTF-8", file)
            continue
        except UNREADABLE as error:
            raise unreadable(file, error) from None
        if text and not text.isspace():
            yield text
        else:
            left_out.add("blank", file)


def _read_jsonl(files: list[Path], column: str, left_out: LeftOut) -> Iterator[str]:
    for file in files:
        try:
            with open_bytes(file) as lines:
                for number, line in enumerate(lines, 1):
                    try:
                        text = line.decode("utf-8-sig")
                    except UnicodeDecodeError:
                        left_out.add("invalid UTF-8", f"{file}:{number}")
                        continue
                    if text.strip():
                        yield _json_field(text.rstrip(), column, file, number)
        except UNREADABLE as error:
            raise unreadable(file, error) from None


def _json_field(line: str, column: str, file: Path, number: int) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        place = f"{file}:{number}: {error.msg} at column {error.colno}"
        raise ValueError(
            f"data.path must hold one JSON object a line; got {place}. Repair or remove that line"
        ) from None
    where = f"{file}:{number}"
    if not isinstance(record, dict):
        raise ValueError(f"data.path must hold one JSON object a line; got {where}: {type(record).__name__}. Repair it")
    if column not in record:
        raise ValueError(
            f"data.column must be a field of every line; got {column!r}, which {where} lacks. "
            f"It has {', '.join(record) or 'no field'}"
        )
    text = record[column]
    if text is not None and not isinstance(text, str):
        raise ValueError(
            f"data.column must be a field of text; got {column!r}, which is {type(text).__name__} in {where}. "
            "Name another field"
        )
    return text or ""


def _open_parquet(file: Path, column: str) -> pq.ParquetFile:
    try:
        parquet = pq.ParquetFile(file)
    except (OSError, pa.ArrowException) as error:
        raise unreadable(file, error) from None
    if column not in parquet.schema_arrow.names:
        raise ValueError(
            f"data.column must be a column of every file; got {column!r}, which {file} lacks. "
            f"It has {', '.join(parquet.schema_arrow.names) or 'no column'}"
        )
    return parquet


def _parquet_chunks(file: Path, column: str, accepted: Callable[[pa.DataType], bool], want: str) -> Iterator[pa.Array]:
    parquet = _open_parquet(file, column)
    kind = parquet.schema_arrow.field(column).type
    if not accepted(kind):
        raise ValueError(
            f"data.column must be a column of {want}; got {column!r}, which is {kind} in {file}. Change it"
        )
    try:
        for batch in parquet.iter_batches(batch_size=ROWS_READ_AT_ONCE, columns=[column]):
            yield batch.column(0)
    except (OSError, pa.ArrowException) as error:
        raise unreadable(file, error) from None


def _is_text(kind: pa.DataType) -> bool:
    """Whether it is read as text, however it is stored: views, dictionaries, bytes, JSON, or only nulls."""
    if isinstance(kind, pa.BaseExtensionType):
        return _is_text(kind.storage_type)
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    texts = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view", "null")
    return any(getattr(pa.types, f"is_{name}")(kind) for name in texts)


def _is_id_list(kind: pa.DataType) -> bool:
    lists = ("list", "large_list", "fixed_size_list", "list_view", "large_list_view")
    return any(getattr(pa.types, f"is_{name}")(kind) for name in lists) and pa.types.is_integer(kind.value_type)


def _read_parquet(files: list[Path], column: str, left_out: LeftOut) -> Iterator[str]:
    for file in files:
        row = 0
        for chunk in _parquet_chunks(file, column, _is_text, "text"):
            stored = chunk.storage if isinstance(chunk, pa.ExtensionArray) else chunk
            # As bytes: Parquet writers need not have checked that what they call a string is UTF-8.
            for text in stored.cast(pa.large_binary()).to_pylist():
                try:
                    yield (text or b"").decode("utf-8")
                except UnicodeDecodeError:
                    left_out.add("invalid UTF-8", f"{file}, row {row}")
                row += 1


def _read_token_ids(files: list[Path], column: str, vocabulary: int | None) -> Iterator[np.ndarray]:
    for file in files:
        row = 0
        for chunk in _parquet_chunks(file, column, _is_id_list, "integer lists"):
            lengths = pc.fill_null(pc.call_function("list_value_length", [chunk]), 0).to_numpy(zero_copy_only=False)
            values = chunk.flatten()
            ids = values.to_numpy(zero_copy_only=False).astype(np.int64) if not values.null_count else None
            if ids is None or (ids.size and (ids.min() < 0 or (vocabulary is not None and ids.max() >= vocabulary))):
                got = "an empty id" if ids is None else f"ids from {ids.min()} to {ids.max()}"
                raise ValueError(
                    f"data.column must hold ids of data.tokenizer, 0 to {(vocabulary or 0) - 1}; got {got} "
                    f"in {file}, rows {row} to {row + len(chunk) - 1}. Name the tokenizer that made the ids"
                )
            yield from np.split(ids, np.cumsum(lengths)[:-1])
            row += len(chunk)
