"""Files: those that a path, a folder or a pattern names, each once, and what they hold, decompressed."""

from __future__ import annotations

import bz2
import fnmatch
import glob
import gzip
import io
import json
import lzma
import os
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa

# How names end in a folder, below the ending of a compressed file; no entry: any name.
SUFFIXES: dict[str, tuple[str, ...]] = {
    "text": (),
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "parquet": (".parquet",),
    "pretokenized": (".parquet",),
}
COMPRESSED = (".gz", ".gzip", ".zst", ".zstd", ".bz2", ".xz")
UNREADABLE = (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException)  # what reading a file can raise
NAMED = 5  # names in a message, and a count of all
LINE = 1 << 26  # bytes of a first line that are looked at


class LeftOut(Counter[str]):
    """What is left out: how many of each reason, and the first names of each."""

    def __init__(self) -> None:
        super().__init__()
        self.names: dict[str, list[str]] = {}

    def add(self, reason: str, name: object) -> None:
        self[reason] += 1
        names = self.names.setdefault(reason, [])
        if len(names) < NAMED:
            names.append(str(name))

    def named(self, reason: str) -> str:
        """The first names, in brackets, or nothing where none is known."""
        names = self.names.get(reason, [])
        more = ["..."] if names and self[reason] > len(names) else []
        return f" ({', '.join([*names, *more])})" if names else ""

    def notes(self, setting: str, what: str) -> list[str]:
        """A line for each reason."""
        return [
            f"{setting}: {count:,} {what}{'' if count == 1 else 's'} passed over: {reason}{self.named(reason)}"
            for reason, count in self.items()
        ]


def find_files(path: str | None, kind: str, column: str) -> tuple[list[Path], list[str]]:
    """The files of a file, folder or glob pattern, sorted, and notes of what is passed over of a folder or a pattern.

    Links are followed, and what is reached in two ways is read once. Of a folder those are taken whose names end as
    `kind` wants, with or without the ending of a compressed file, in any case; a `.json` must begin with an object that
    has `column`, since it need not be JSON lines. Hidden files and folders are passed over.
    Raises ValueError where no file remains.
    """
    if not path:
        raise ValueError(f"data.path must be given with data={kind}; got nothing. Name a file, a folder or a pattern")
    place = Path(path).expanduser()
    left_out = LeftOut()
    try:
        if place.is_dir():
            files = [file for file in walk(place, left_out) if _is_wanted(file, place, kind, column, left_out)]
        elif place.is_file():
            files = [place]
        else:
            files = _matches(str(place), left_out)
    except UNREADABLE as error:
        raise unreadable(place, error) from None
    notes = left_out.notes("data.path", "file")
    also = f" ({'; '.join(notes)})" if notes else ""
    if not files and place.is_dir():
        wanted = f"at least one {' or '.join(SUFFIXES[kind])} file" if SUFFIXES[kind] else "at least one file"
        raise ValueError(f"data.path must hold {wanted}; got {path}, which holds none{also}. Name another path")
    if not files:
        raise ValueError(
            f"data.path must be a file, a folder or a pattern that matches files; got {path}{also}. Check it"
        )
    return [file.absolute() for file in files], notes


def walk(
    root: Path, left_out: LeftOut, *, follow: bool = True, skipped: frozenset[str] | set[str] = frozenset()
) -> list[Path]:
    """The files below a folder, sorted; with `follow` those that links lead to as well, each file once."""

    def refuse(error: OSError) -> None:
        raise error

    read: set[str] = set()  # folders, by their real paths: a link may lead to one that contains it
    files: dict[str, Path] = {}  # by their real paths
    file_links: list[Path] = []
    folders = [root]
    while folders:
        start = folders.pop(0)
        for name, below, names in os.walk(start, onerror=refuse):
            folder, real = Path(name), os.path.realpath(name)
            if real in read:
                left_out.add("read under another name", folder.relative_to(root))
                below.clear()
                continue
            read.add(real)
            kept = []
            for entry in sorted(below):
                if entry.startswith("."):
                    left_out.add("hidden", f"{(folder / entry).relative_to(root)}/")
                elif entry not in skipped:
                    if not (folder / entry).is_symlink():
                        kept.append(entry)
                    elif follow:
                        folders.append(folder / entry)
            below[:] = kept
            for entry in names:
                file = folder / entry
                if entry.startswith("."):
                    left_out.add("hidden", file.relative_to(root))
                elif file.is_symlink():
                    file_links.append(file)
                elif file.is_file():
                    files[os.path.join(real, entry)] = file
                else:
                    left_out.add("no regular file", file.relative_to(root))
    _add_links(sorted(file_links), files, root, left_out)
    return sorted(files.values())


def _add_links(links: list[Path], files: dict[str, Path], root: Path, left_out: LeftOut) -> None:
    """Adds what links to files lead to, where it is not among the files already."""
    for link in links:
        if not link.is_file():
            left_out.add("link to nothing", link.relative_to(root))
        elif files.setdefault(os.path.realpath(link), link) is not link:
            left_out.add("read under another name", link.relative_to(root))


def _matches(pattern: str, left_out: LeftOut) -> list[Path]:
    if "**" in Path(pattern).parts:
        return _deep_matches(Path(pattern), left_out)
    files: dict[str, Path] = {}
    matches = [Path(match) for match in glob.glob(pattern)]
    for match in sorted(matches, key=lambda match: (match.is_symlink(), match)):
        if match.is_dir():
            left_out.add("folder, which needs /** in the pattern", match)
        elif not match.is_file():
            left_out.add("link to nothing or no regular file", match)
        elif files.setdefault(os.path.realpath(match), match) is not match:
            left_out.add("read under another name", match)
    return sorted(files.values())


def _deep_matches(pattern: Path, left_out: LeftOut) -> list[Path]:
    """Matches of a pattern with `**`, walked through: `glob` goes round and round where links do."""
    depth = pattern.parts.index("**")
    files: dict[str, Path] = {}
    for root in sorted(glob.glob(str(Path(*pattern.parts[:depth])))):
        for file in walk(Path(root), left_out) if Path(root).is_dir() else []:
            if _fits(file.relative_to(root).parts, pattern.parts[depth:]):
                files.setdefault(os.path.realpath(file), file)
    return sorted(files.values())


def _fits(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_fits(parts[start:], pattern[1:]) for start in range(len(parts) + 1))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], pattern[0]) and _fits(parts[1:], pattern[1:])


def _is_wanted(file: Path, root: Path, kind: str, column: str, left_out: LeftOut) -> bool:
    suffixes = SUFFIXES[kind]
    name = file.name.lower()
    plain = Path(name).stem if name.endswith(COMPRESSED) and kind == "jsonl" else name
    if suffixes and not plain.endswith(suffixes):
        packed = ", with or without .gz or .zst" if kind == "jsonl" else ""
        left_out.add(f"name does not end in {' or '.join(suffixes)}{packed}", file.relative_to(root))
        return False
    if plain.endswith(".json") and not _begins_with_an_object(file, column):
        left_out.add(f"not JSON lines with the field {column!r}", file.relative_to(root))
        return False
    return True


def _begins_with_an_object(file: Path, column: str) -> bool:
    with open_bytes(file) as lines:
        line = next((line for line in iter(lambda: lines.readline(LINE), b"") if line.strip()), b"")
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except ValueError:
        return len(line) == LINE and line.lstrip().startswith(b"{")
    return isinstance(record, dict) and column in record


def open_bytes(file: Path) -> BinaryIO:
    """A file's content, decompressed if it is gzip, Zstandard, bzip2 or xz, whatever its name says.

    It and its reader may raise what UNREADABLE lists.
    """
    with open(file, "rb") as raw:
        start = raw.read(10)
    if start.startswith(b"\x1f\x8b"):
        return gzip.open(file, "rb")  # type: ignore[return-value]
    # A Zstandard file may begin with a frame that is to be skipped.
    if start.startswith(b"\x28\xb5\x2f\xfd") or (start[1:4] == b"\x2a\x4d\x18" and start[0] & 0xF0 == 0x50):
        return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(file)), "zstd"))  # type: ignore[return-value]
    if start.startswith(b"BZh") and start[4:] == b"1AY&SY":
        return bz2.open(file, "rb")  # type: ignore[return-value]
    if start.startswith(b"\xfd7zXZ\x00"):
        return lzma.open(file, "rb")  # type: ignore[return-value]
    return open(file, "rb")


def unreadable(file: Path, error: Exception) -> ValueError:
    return ValueError(f"data.path must be readable; got {file}: {error}. Check the file and its permissions")
