"""The proof: from the file of an audit, that every token was read once an epoch, and none left out.

It knows of intervals and lengths alone, nothing of how rows are made. Only what is left of an epoch that is not over is
asked of the code that makes them, by the state of the checkpoint that the run would go on from: with what has been read
it must be the epoch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...checkpoint.stored import CheckpointError, is_undamaged, step_of, verify
from ...checkpoint.stored import steps as checkpoints
from ..packing import TokenStream
from .file import NAME, AuditFile, AuditRows, AuditSource

NAMED = 5  # documents in a message


@dataclass
class Finding:
    """What has been read of a source: whole epochs, tokens, those of them passed over, and what is wrong with it.

    repeats, gaps: tokens read twice in an epoch, and never. problems: a line for each of the first documents.
    left: tokens of the present epoch that are yet to be read; None where no checkpoint tells.
    """

    source: AuditSource
    epochs: int = 0
    tokens: int = 0
    passed: int = 0
    repeats: int = 0
    gaps: int = 0
    left: int | None = None
    problems: list[str] = field(default_factory=list)


@dataclass
class Proof:
    """steps: that the file holds. findings: of each source. problems: of the steps themselves.

    goes_on: the last step up to which what is left to be read is known, and has been compared; None where there is no
    checkpoint.
    """

    steps: int
    findings: list[Finding]
    problems: list[str]
    goes_on: int | None = None

    @property
    def holds(self) -> bool:
        return not self.problems and not any(finding.problems for finding in self.findings)

    def table(self) -> list[str]:
        """A line for each source, and one for each problem."""
        head = ("source", "epochs", "tokens", "passed over", "repeats", "gaps", "left")
        rows = [
            (
                f.source.name,
                str(f.epochs),
                *(f"{n:,}" for n in (f.tokens, f.passed, f.repeats, f.gaps)),
                "?" if f.left is None else f"{f.left:,}",
            )
            for f in self.findings
        ]
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        lines = [
            "  ".join(f"{text:>{width}}" for text, width in zip(row, widths, strict=True)) for row in (head, *rows)
        ]
        problems = [*self.problems, *(problem for finding in self.findings for problem in finding.problems)]
        told = (
            f"what is left of an epoch is what the run reads after step {self.goes_on}"
            if self.goes_on is not None
            else "no checkpoint tells what is left to be read: of an epoch that is not over gaps are not proved"
        )
        return [f"{self.steps:,} steps", *lines, told, *problems]


class _Rest(NamedTuple):
    """The state of the data in a checkpoint, which is that after `step`."""

    step: int
    state: dict[str, Any]

    @classmethod
    def of(cls, run: Path, steps: int) -> _Rest | None:
        """Of the newest good checkpoint of a run whose audit holds so many steps."""
        for path in reversed(checkpoints(run / "checkpoints")):
            try:
                if step_of(path) <= steps:
                    return cls(step_of(path), verify(path).state["data"])
            except CheckpointError:
                continue
        return None

    def pieces(self, source: AuditSource) -> tuple[int, np.ndarray]:
        """The source's present epoch, and what is left of it, int64 `[n, 3]`: document, first token, tokens."""
        documents = _Lengths(np.zeros(int(source.documents[-1]) + 1, np.int64))
        documents.lengths[source.documents] = source.lengths
        stream = TokenStream(
            documents,
            source.documents,
            length=self.state["sequence_length"],
            seed=self.state["seed"],
            fingerprint=source.fingerprint,
        )
        stream.follow(self.state)
        epoch, left = stream.left()
        return epoch, np.array(left, np.int64).reshape(-1, 3)


@dataclass
class _Lengths:
    """Documents of which the lengths alone are known."""

    lengths: np.ndarray

    def __getitem__(self, document: int) -> np.ndarray:
        raise NotImplementedError


def prove(run: Path) -> Proof:
    """What the audit of a run's folder proves.

    Raises ValueError where there is none.
    """
    file = AuditFile(run / NAME)
    if not file.path.is_file():
        raise ValueError(f"run must be the folder of a run with data.audit=true; got {run}, which has no {NAME}")
    sources: list[AuditSource] = []
    steps: list[AuditRows] = []
    for _, record in file.frames():
        if isinstance(record, AuditSource):
            sources.append(record)
        else:
            steps.append(record)
    pieces = np.concatenate([np.empty((0, 4), np.int64), *(record.pieces for record in steps)])
    step = np.concatenate([np.empty(0, np.int64), *(np.full(len(r.pieces), r.step) for r in steps)])
    passed = np.concatenate([np.empty(0, bool), *(np.full(len(r.pieces), r.passed) for r in steps)])
    last = steps[-1].step if steps else 0
    rest = _Rest.of(run, last)
    findings = []
    for number, source in enumerate(sources):
        own = pieces[:, 0] == number
        finding = _examined(source, pieces[own, 1:], step[own])
        finding.passed = int(pieces[own & passed, 3].sum())
        if rest is not None and not finding.problems:
            before = own & (step <= rest.step)
            _compare_rest(finding, pieces[before, 1:], step[before], rest)
        findings.append(finding)
    return Proof(last, findings, [*_missing(steps), *_cut_off(run, last)], None if rest is None else rest.step)


def _cut_off(run: Path, last: int) -> list[str]:
    """What is wrong with the file's end: a checkpoint is written after the steps before it.

    A run that has passed over a damaged one comes to its step again.
    """
    later = (path for path in reversed(checkpoints(run / "checkpoints")) if step_of(path) > last)
    good = next(filter(is_undamaged, later), None)
    if good is None:
        return []
    step = step_of(good)
    return [f"{good.name} was saved after step {step}: steps {last + 1} to {step} are not in the audit"]


def _missing(records: list[AuditRows]) -> list[str]:
    """What is wrong with the steps: each must follow the one before, and so must its rows, or a segment begins."""
    problems = []
    step, row = 0, 0
    for record in records:
        if not record.passed:
            if record.step != step + 1:
                problems.append(f"step {record.step} follows step {step}: those between are not in the audit")
            step = record.step
        if record.row not in (row, 0):
            problems.append(f"step {record.step} begins with row {record.row}; rows {row} to {record.row - 1} are lost")
        row = record.row + record.rows
    return problems[:NAMED]


def _examined(source: AuditSource, pieces: np.ndarray, step: np.ndarray) -> Finding:
    """Of the pieces of a source (document, first, tokens) in the order in which they were read.

    Each run of as many tokens as the source has is an epoch, and must hold every document from end to end. What comes
    after the first epoch that does not is shifted, and not looked at.
    """
    whole, tokens = int(source.lengths.sum()), int(pieces[:, 2].sum())
    finding = Finding(source, tokens=tokens)
    for epoch in range(-(-tokens // whole)):
        start, stop = epoch * whole, min((epoch + 1) * whole, tokens)
        own, part = _between(pieces, start, stop)
        _compare(finding, part, step[own], epoch, complete=stop - start == whole)
        if finding.problems:
            break
        finding.epochs += stop - start == whole
    return finding


def _between(pieces: np.ndarray, start: int, stop: int) -> tuple[slice, np.ndarray]:
    """Which pieces hold tokens number start .. stop of those read, and what they hold of them: at least one token."""
    ends = np.cumsum(pieces[:, 2])
    own = slice(np.searchsorted(ends, start, side="right"), np.searchsorted(ends, stop) + 1)
    part = pieces[own].copy()
    # A piece at a seam counts on either side for what it has there.
    before = start - (ends[own][0] - part[0, 2])
    part[0, 1:] += (before, -before)
    part[-1, 2] -= ends[own][-1] - stop
    return own, part


def _compare_rest(finding: Finding, pieces: np.ndarray, step: np.ndarray, rest: _Rest) -> None:
    """Adds what is wrong with the epoch that is not over after `rest.step`, of the pieces until there."""
    whole, tokens = int(finding.source.lengths.sum()), int(pieces[:, 2].sum())
    epoch, (at, left) = tokens // whole, rest.pieces(finding.source)
    finding.left = int(left[:, 2].sum()) % whole
    if at != epoch:
        finding.problems.append(f"{finding.source.name}: in epoch {epoch + 1} until step {rest.step}, then in {at + 1}")
        left = left[:0]
    part, steps = left, np.full(len(left), rest.step + 1)
    if tokens % whole:
        own, read = _between(pieces, epoch * whole, tokens)
        part, steps = np.concatenate([read, part]), np.concatenate([step[own], steps])
    if len(part):
        _compare(finding, part, steps, epoch, complete=True, rest=rest.step)


def _compare(
    finding: Finding, part: np.ndarray, step: np.ndarray, epoch: int, *, complete: bool, rest: int | None = None
) -> None:
    """Adds what is read twice in an epoch and, where it is complete, what is not read.

    rest: the step after which those pieces that have not been read are to be read.
    """
    source = finding.source
    order = np.lexsort((part[:, 1], part[:, 0]))
    document, first, tokens = part[order].T
    place = np.minimum(np.searchsorted(source.documents, document), len(source.documents) - 1)
    known = source.documents[place] == document
    if not known.all() or (first < 0).any() or (first + tokens > source.lengths[place]).any():
        odd = document[~known | (first < 0) | (first + tokens > source.lengths[place])][:NAMED]
        numbers = ", ".join(map(str, odd.tolist()))
        finding.problems.append(f"{source.name}: documents {numbers} are not of the source, or are shorter")
        return
    # One number for each token, in the order of documents: what is read before a piece is the greatest end until there.
    base = np.concatenate([[0], np.cumsum(source.lengths)])
    begin = base[place] + first
    end = np.maximum.accumulate(begin + tokens)
    reached = np.concatenate([[0], end[:-1]])
    twice = np.maximum(np.minimum(reached, begin + tokens) - begin, 0)
    finding.repeats += int(twice.sum())
    for index in np.flatnonzero(twice)[:NAMED]:
        # What was read twice until `rest` has been found before.
        again = (
            f"read again in step {step[order][index]}" if rest is None else f"read until step {rest} and to be again"
        )
        finding.problems.append(
            f"{source.name}: document {document[index]}, tokens {first[index]} to {first[index] + tokens[index] - 1}, "
            f"{again}, in epoch {epoch + 1}"
        )
    if not complete:
        return
    starts, stops = np.append(reached, end[-1]), np.append(begin, base[-1])
    for start, stop in zip(*(x[starts < stops] for x in (starts, stops)), strict=True):
        finding.gaps += int(stop - start)
        for index in range(np.searchsorted(base, start, side="right") - 1, np.searchsorted(base, stop)):
            low, high = max(start, base[index]) - base[index], min(stop, base[index + 1]) - base[index]
            if sum("not read" in problem for problem in finding.problems) < NAMED:
                never = "not read" if rest is None else f"not read until step {rest}, nor left to be read,"
                finding.problems.append(
                    f"{source.name}: document {source.documents[index]}, tokens {low} to {high - 1}, {never} in epoch "
                    f"{epoch + 1}"
                )
            else:
                break
