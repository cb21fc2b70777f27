"""Kept documents: what was read of a source that may fail, on disk, so that it is not read again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path


def read_on(file: Path, read_from: Callable[[int], Iterator[str]]) -> Iterator[str]:
    """The documents that `file` keeps, then those from there on, each of which it keeps as well.

    `read_from(n)` reads the documents from number n on. A line of the file is a number and a text; it is unbuffered, so
    that a process which dies loses no whole document.
    """
    number, size = 0, 0
    with open(file, "a+b", buffering=0) as kept:
        with open(file, "rb") as lines:
            for line in lines:
                document = _parsed(line, number)
                if document is None:  # cut off when its writer died
                    break
                yield document
                number, size = number + 1, size + len(line)
        kept.truncate(size)
        for document in read_from(number):
            kept.write(json.dumps([number, document]).encode() + b"\n")
            yield document
            number += 1


def _parsed(line: bytes, number: int) -> str | None:
    try:
        index, document = json.loads(line)
    except ValueError:
        return None
    return document if index == number and line.endswith(b"\n") else None
