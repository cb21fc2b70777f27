"""Where documents come from: files of text, JSON lines or Parquet, the hub, and the standard library itself."""

from __future__ import annotations

import glob
import gzip
import json
import os
import sysconfig
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .data_settings import DataSettings, RecallSettings

SUFFIXES = {
    "text": (),
    "jsonl": (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz"),
    "parquet": (".parquet",),
    "pretokenized": (".parquet",),
}
STDLIB_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
STDLIB_BYTES = 4_000_000  # a full standard library has about 12 MB; minimal packages of Python have far less
ROWS_READ_AT_ONCE = 1024

Document = str | np.ndarray


@dataclass(frozen=True)
class Source:
    """Documents and what tells them from others.

    `identity` is JSON-able and cheap: the files with their sizes and times, or the name of a hub data set. `read`
    yields the documents, in a fixed order, as text or (pretokenized) as int64 token ids; it adds what it leaves out to
    the counter it is given, as "invalid UTF-8" or "blank". `setting` and `place` name it in messages.
    """

    identity: dict[str, Any]
    read: Callable[[Counter[str]], Iterator[Document]]
    setting: str
    place: str


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
        return _hub(settings)
    if kind == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        files = _stdlib_files(root)
        return Source(_identity(kind, files), lambda skipped: _read_text(files, skipped), "data=stdlib", str(root))
    files = find_files(settings.path, kind)
    column = settings.column or ("input_ids" if kind == "pretokenized" else "text")
    if kind == "text":
        return Source(_identity(kind, files), lambda s: _read_text(files, s), "data.path", str(settings.path))
    readers: dict[str, Callable[[Counter[str]], Iterator[Document]]] = {
        "jsonl": lambda skipped: _read_jsonl(files, column, skipped),
        "parquet": lambda skipped: _read_parquet(files, column, skipped),
        "pretokenized": lambda skipped: _read_token_ids(files, column, vocabulary, skipped),
    }
    return Source(_identity(kind, files) | {"column": column}, readers[kind], "data.path", str(settings.path))


def find_files(path: str | None, kind: str) -> list[Path]:
    """The files of a file, folder or glob pattern, sorted; hidden ones are left out of a folder."""
    if not path:
        raise ValueError(f"data.path must be given with data={kind}; got nothing. Name a file, a folder or a pattern")
    place = Path(path).expanduser()
    suffixes = SUFFIXES[kind]
    try:
        if place.is_dir():
            files = [f for f in _walk(place) if not suffixes or f.name.lower().endswith(suffixes)]
        elif place.is_file():
            files = [place]
        else:
            files = sorted(Path(f) for f in glob.glob(str(place), recursive=True) if Path(f).is_file())
    except OSError as error:
        raise _unreadable(place, error) from None
    if not files and place.is_dir():
        wanted = f"at least one {' or '.join(suffixes)} file" if suffixes else "at least one file"
        raise ValueError(f"data.path must hold {wanted}; got {path}, which holds none. Name another path")
    if not files:
        raise ValueError(f"data.path must be a file, a folder or a pattern that matches files; got {path}. Check it")
    return [file.absolute() for file in files]


def _walk(root: Path, skipped: frozenset[str] | set[str] = frozenset()) -> list[Path]:
    def refuse(error: OSError) -> None:
        raise error

    files = []
    for folder, folders, names in os.walk(root, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in skipped)
        files += [Path(folder, name) for name in names if not name.startswith(".") and Path(folder, name).is_file()]
    return sorted(files)


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


def _unreadable(file: Path, error: Exception) -> ValueError:
    return ValueError(f"data.path must be readable; got {file}: {error}. Check the file and its permissions")


def _stdlib_files(root: Path) -> list[Path]:
    files = [file for file in _walk(root, STDLIB_SKIPPED) if file.suffix == ".py"] if root.is_dir() else []
    files = [file for file in files if not _is_codec_table(file)]
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


def _read_text(files: list[Path], skipped: Counter[str]) -> Iterator[str]:
    for file in files:
        try:
            # A byte-order mark says how the file is encoded; it is no part of its text.
            yield file.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError:
            skipped["invalid UTF-8"] += 1
        except OSError as error:
            raise _unreadable(file, error) from None


def _read_jsonl(files: list[Path], column: str, skipped: Counter[str]) -> Iterator[str]:
    for file in files:
        try:
            with gzip.open(file, "rb") if file.suffix == ".gz" else open(file, "rb") as lines:
                for number, line in enumerate(lines, 1):
                    try:
                        text = line.decode("utf-8-sig")
                    except UnicodeDecodeError:
                        skipped["invalid UTF-8"] += 1
                        continue
                    if text.strip():
                        yield _json_field(text.rstrip(), column, f"{file}:{number}")
        except (OSError, EOFError, zlib.error) as error:
            raise _unreadable(file, error) from None


def _json_field(line: str, column: str, where: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        message = f"data.path must hold one JSON object a line; got {where}: {error.msg} at column {error.colno}"
        raise ValueError(f"{message}. Repair or remove that line") from None
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
        raise _unreadable(file, error) from None
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
        raise _unreadable(file, error) from None


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_id_list(kind: pa.DataType) -> bool:
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return any(is_list(kind) for is_list in lists) and pa.types.is_integer(kind.value_type)


def _read_parquet(files: list[Path], column: str, skipped: Counter[str]) -> Iterator[str]:
    for file in files:
        for chunk in _parquet_chunks(file, column, _is_text, "text"):
            # As bytes: Parquet writers need not have checked that what they call a string is UTF-8.
            for text in chunk.cast(pa.large_binary()).to_pylist():
                try:
                    yield (text or b"").decode("utf-8")
                except UnicodeDecodeError:
                    skipped["invalid UTF-8"] += 1


def _read_token_ids(
    files: list[Path], column: str, vocabulary: int | None, skipped: Counter[str]
) -> Iterator[np.ndarray]:
    for file in files:
        row = 0
        for chunk in _parquet_chunks(file, column, _is_id_list, "integer lists"):
            lengths = pc.fill_null(pc.call_function("list_value_length", [chunk]), 0).to_numpy(zero_copy_only=False)
            values = chunk.flatten()
            ids = values.to_numpy(zero_copy_only=False).astype(np.int64) if not values.null_count else None
            if ids is None or (ids.size and (ids.min() < 0 or (vocabulary is not None and ids.max() >= vocabulary))):
                found = "an empty id" if ids is None else f"ids from {ids.min()} to {ids.max()}"
                raise ValueError(
                    f"data.column must hold ids of data.tokenizer, 0 to {(vocabulary or 0) - 1}; got {found} "
                    f"in {file}, rows {row} to {row + len(chunk) - 1}. Name the tokenizer that made the ids"
                )
            yield from np.split(ids, np.cumsum(lengths)[:-1])
            row += len(chunk)


def _hub(settings: DataSettings) -> Source:
    if not settings.name:
        raise ValueError("data.name must be given with data=hub; got nothing. Name a data set as owner/name")
    if settings.max_documents is not None and settings.max_documents < 1:
        raise ValueError(f"data.max_documents must be at least 1; got {settings.max_documents}. Raise or remove it")
    identity = {
        "source": "hub",
        "name": settings.name,
        "subset": settings.subset,
        "split": settings.split or "train",
        "column": settings.column or "text",
        "max_documents": settings.max_documents,
    }

    def read(skipped: Counter[str]) -> Iterator[str]:
        for example in islice(_stream(identity), settings.max_documents):
            column = identity["column"]
            if column not in example:
                raise ValueError(
                    f"data.column must be a field of {settings.name}; got {column!r}. It has {', '.join(example)}"
                )
            text = example[column]
            if text is not None and not isinstance(text, str):
                kind = type(text).__name__
                raise ValueError(f"data.column must be a field of text; got {column!r}, which is {kind}. Change it")
            yield text or ""

    return Source(identity, read, "data.name", settings.name)


def _stream(identity: dict[str, Any]) -> Iterator[dict[str, Any]]:
    import datasets  # a second to import, which only this source has to spend

    try:
        yield from datasets.load_dataset(identity["name"], identity["subset"], split=identity["split"], streaming=True)
    except Exception as error:  # the hub's client raises errors of many kinds
        raise ValueError(
            f"data.name must be a data set that can be read from the hub or its cache; got {identity['name']} "
            f"(subset {identity['subset']}, split {identity['split']}): {type(error).__name__}: {error}. "
            "Check the name, the network and HF_HUB_OFFLINE"
        ) from error
