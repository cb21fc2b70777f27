"""Report: what a check found, written whole after every piece, as Markdown to read and as JSON to compare."""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

NOT_RUN = "not run"


@dataclass
class Table:
    """Rows of named values, and what the columns mean."""

    title: str
    rows: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Failure:
    """What went wrong in a step: the error, what it was about (shapes, errors of results), and where it arose."""

    step: str
    error: str
    details: list[str] = field(default_factory=list)
    traceback: list[str] = field(default_factory=list)


@dataclass
class PartReport:
    """What one part found.

    limit: the seconds that it had; seconds: those that it took, once it has ended. outcome: how it ended. skipped: what
    it did not do, and why. expected, met: kernels that it should have launched, and those that it did.
    """

    name: str
    title: str
    limit: float = 0.0
    seconds: float | None = None
    outcome: str = NOT_RUN
    tables: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    expected: list[str] = field(default_factory=list)
    met: list[str] = field(default_factory=list)

    def add(self, record: dict[str, Any]) -> str:
        """Adds what a worker has sent, and says it in one line."""
        kind, value = record["kind"], record["value"]
        if kind == "row":
            title = record["table"]
            table = next((table for table in self.tables if table.title == title), None)
            if table is None:
                self.tables.append(table := Table(title))
            table.rows.append(value)
            return ", ".join(f"{name} {shown(x)}" for name, x in value.items() if shown(x))
        if kind == "failure":
            self.failures.append(Failure(**value))
            return f"FAILED {value['step']}: {value['error']}"
        if kind == "skipped":
            self.skipped.append((value["what"], value["why"]))
            return f"skipped {value['what']}: {value['why']}"
        if kind == "note":
            self.notes.append(value)
            return value
        assert kind in ("expected", "met"), record
        known = getattr(self, kind)
        known.extend(name for name in value if name not in known)
        return ""


@dataclass
class Report:
    """A whole check. facts: where and how it ran, by name; parts: in their order, those not run yet too."""

    facts: dict[str, str]
    parts: list[PartReport]

    @property
    def failed(self) -> bool:
        """Whether anything that was tried has failed."""
        return any(part.failures for part in self.parts)

    def save(self, stem: Path) -> None:
        """Writes STEM.md and STEM.json; each is replaced at once, so that an end by force leaves a whole file."""
        for ending, text in ((".json", json.dumps(asdict(self), indent=1)), (".md", self.markdown())):
            aside = stem.with_name(f"{stem.name}{ending}.partial")
            aside.write_text(text + "\n", encoding="utf-8")
            os.replace(aside, stem.with_name(stem.name + ending))

    def markdown(self) -> str:
        lines = [f"# GPU check: {self.facts.get('device', 'a device')}, {self.facts.get('date', '')}", ""]
        lines += [f"- {name}: {value}" for name, value in self.facts.items()]
        lines += ["", "| part | outcome | seconds | of | failures | skipped |", "|---|---|---|---|---|---|"]
        for part in self.parts:
            taken = "" if part.seconds is None else f"{part.seconds:.0f}"
            given = f"{part.limit:.0f}" if part.limit else ""
            lines.append(
                f"| {part.title} (`{part.name}`) | {cell(part.outcome)} | {taken} | {given} | {len(part.failures)} "
                f"| {len(part.skipped)} |"
            )
        failures = [(part, failure) for part in self.parts for failure in part.failures]
        lines += ["", *(f"- FAILED {part.name}: {failure.step}: {cell(failure.error)}" for part, failure in failures)]
        for part in self.parts:
            if part.outcome != NOT_RUN:
                lines += ["", *_section(part)]
        return re.sub(r"\n{3,}", "\n\n", "\n".join(lines))


def _section(part: PartReport) -> list[str]:
    lines = [f"## {part.title}", ""]
    for table in part.tables:
        columns = list(dict.fromkeys(name for row in table.rows for name in row))
        lines += [f"{table.title}:", "", f"| {' | '.join(map(cell, columns))} |", f"|{'---|' * len(columns)}"]
        lines += [f"| {' | '.join(cell(shown(row.get(name))) for name in columns)} |" for row in table.rows]
        lines.append("")
    lines += [f"- {note}" for note in part.notes]
    if part.expected:
        missed = [name for name in part.expected if name not in part.met]
        lines.append(f"- Of {len(part.expected)} kernels {len(part.expected) - len(missed)} were launched.")
        lines += [f"- Not launched: {', '.join(f'`{name}`' for name in missed)}."] if missed else []
    if part.skipped:
        lines += ["", "Skipped:", "", *(f"- {what}: {why}" for what, why in part.skipped)]
    for failure in part.failures:
        lines += ["", f"### FAILED: {failure.step}", "", "```", failure.error, *failure.details, *failure.traceback]
        lines.append("```")
    return lines


def shown(value: Any) -> str:
    """A value as a reader wants it: three digits of a fraction, thousands apart, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def cell(text: str) -> str:
    """The text on one line, without what would end a cell of a table."""
    return re.sub(r"\s+", " ", text).replace("|", "\\|")


def free_stem(folder: Path, device: str, date: str) -> Path:
    """FOLDER/DEVICE_DATE, or with _2, _3 … after it where there is a report of that name."""
    name = re.sub(r"[^a-z0-9]+", "_", device.lower().replace("nvidia", "")).strip("_") or "device"
    number, stem = 1, folder / f"{name}_{date}"
    while any(stem.with_name(stem.name + ending).exists() for ending in (".md", ".json")):
        number += 1
        stem = folder / f"{name}_{date}_{number}"
    return stem
