"""Ledger: `faults.jsonl` in run.dir, which says what a run skipped, where it went back, and in which rows it died."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

NAME = "faults.jsonl"
DEATHS = 2  # of one kind in the same rows, after which these are passed over


class Passage(NamedTuple):
    """Rows first .. stop - 1 of the training data, which the run passes over."""

    first: int
    stop: int
    reason: str

    @property
    def rows(self) -> str:
        return named_rows(self.first, self.stop)


def named_rows(first: int, stop: int) -> str:
    """Rows first .. stop - 1 in words."""
    return f"row {first}" if stop == first + 1 else f"rows {first} to {stop - 1}"


def beyond(row: int, count: int, passages: Collection[Passage]) -> int:
    """The first row, not before `row`, from which on `count` rows can be read without meeting one that is passed over.

    Rows in between, fewer than a step's, are passed over with them.
    """
    for passage in sorted(passages):
        if row < passage.stop and row + count > passage.first:
            row = passage.stop
    return row


class Ledger:
    """The lines of the file, one a fault, in the order in which they came.

    segment: what counts its rows from 0 (see `RowStream`): a stage, or the data since `data.restart`. Of a line without
    one, `stage` says what it is of; "" in a run without stages.

    Each has `time`, `kind`, `step`, `rows` ([first, stop]) and `reason`; kinds are

        skipped       the step changed no weight; `documents`: of each of its rows; `sources`: of each, of a mixture
        rollback      the run went back to the checkpoint of step `to`, and passes over the rows
        died          the run ended in that step, by an error of the type `reason`
        passed over   the rows were passed over, before that step
    """

    def __init__(self, folder: Path, segment: str = "", stage: str = "") -> None:
        self.path, self.segment, self.stage = folder / NAME, segment, stage

    def add(self, kind: str, step: int, rows: tuple[int, int], reason: str, **more: Any) -> None:
        """Adds a line; a disk that has no room for it costs the line alone, and neither those before nor after it."""
        more |= {key: value for key, value in (("stage", self.stage), ("segment", self.segment)) if value}
        line = {"time": time.strftime("%Y-%m-%d %H:%M:%S"), "kind": kind, "step": step, "rows": rows, "reason": reason}
        with suppress(OSError), self.path.open("a+b", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(end - 1, 0))
            torn = file.read(1) not in (b"", b"\n")  # by a kill, or a loss of power
            data = ("\n" * torn + json.dumps(line | more) + "\n").encode()
            if file.write(data) != len(data):
                file.truncate(end)

    def passages(self) -> list[Passage]:
        """What the segment passes over because of earlier ends and rollbacks."""
        lines = self._lines()
        passages = [
            Passage(first, stop, f"rolled back: {line['reason']}")
            for line in lines["rollback"]
            for first, stop in [line["rows"]]
        ]
        deaths = Counter((line["rows"], line["reason"]) for line in lines["died"])
        passages += [
            Passage(first, stop, f"the run died there {count} times: {reason}")
            for ((first, stop), reason), count in deaths.items()
            if count >= DEATHS
        ]
        return sorted(passages)

    def _lines(self) -> dict[str, list[dict[str, Any]]]:
        lines: dict[str, list[dict[str, Any]]] = {"rollback": [], "died": []}
        with suppress(OSError):
            for text in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
                with suppress(ValueError, KeyError, TypeError, AttributeError):  # a line that a kill has torn
                    line = json.loads(text)
                    own = self.segment if "segment" in line else self.stage
                    if line.get("segment", line.get("stage", "")) != own:
                        continue
                    first, stop = map(int, line["rows"])
                    lines.setdefault(line["kind"], []).append({"rows": (first, stop), "reason": str(line["reason"])})
        return lines
