"""Report: the rows of a diagnosis; what passed on one screen, and the likeliest cause of a failure in detail."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table
from rich.text import Text

PASS, FAIL, NOT_TESTED = "PASS", "FAIL", "NOT TESTED"
COLOURS = {PASS: "green", FAIL: "bold red", NOT_TESTED: "yellow"}
COLUMNS = 80
RELATIVE = "of the largest expected entry"
TYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Row:
    """One check. where: the place of the error, or why it was not tested. precedence: culprits sort by it.

    unit: of the error and its limit. extent: in which layouts, and how many of what was compared, it fails.
    """

    check: str
    verdict: str
    error: float | None = None
    limit: float | None = None
    where: str = ""
    ran: str = ""
    precedence: int = 9
    unit: str = RELATIVE
    extent: str = ""

    @property
    def family(self) -> tuple[str, str]:
        """(the common name of checks of this kind, the name of this check among them)."""
        kind, _, name = self.check.partition(" ")
        if kind == "function":
            return "functions of a token", name
        if kind == "op":
            return "ops in float64", name
        if kind.startswith("activation_checkpointing="):
            return "recomputation", kind.partition("=")[2]
        if kind.rstrip(":") in TYPES and name.startswith("op "):
            return f"ops in {kind.rstrip(':')}", name.removeprefix("op ")
        stage, colon, name = self.check.partition(": ")
        if colon and stage.startswith("ZeRO-") and "," not in stage:
            return name, stage
        return self.check, ""

    def explains(self, other: Row) -> bool:
        """Whether `other` would fail too if this is at fault: an op's error is in its mixer, and in the model."""
        if self.check.startswith(("groups", "rows")):
            return other.check.startswith("ZeRO")
        if self.check == "gradient = difference of losses" or self.verdict != FAIL:
            return False
        mine, others = self.check.partition(":")[0], other.check.partition(":")[0]
        if mine in TYPES:
            return mine == others and ": op " in self.check and ": op " not in other.check
        if self.check.startswith("op ") and others in TYPES and ": op " in other.check:
            return other.check.endswith(f": {self.check}")
        if other.check.startswith(("groups", "rows", "gradient = ")):
            return False
        return self.precedence < other.precedence


@dataclass
class Report:
    """All rows; `failed` decides the exit code. unseen: what was made small, and so is not tested."""

    title: str
    rows: list[Row] = field(default_factory=list)
    unseen: list[str] = field(default_factory=list)

    @property
    def failures(self) -> list[Row]:
        """The failures, starting with the one that says most about the cause."""
        return sorted((row for row in self.rows if row.verdict == FAIL), key=lambda row: row.precedence)

    @property
    def failed(self) -> bool:
        return bool(self.failures)

    @property
    def culprits(self) -> list[Row]:
        """Failures that no other explains; the same failure on several ZeRO stages counts once."""
        failures = self.failures
        culprits: list[Row] = []
        for row in failures:
            staged = row.check.startswith("ZeRO-") and any(row.family[0] == other.family[0] for other in culprits)
            if not staged and not any(cause.explains(row) for cause in failures):
                culprits.append(row)
        return culprits

    def verdict(self) -> str:
        """The last line."""
        tested = sum(row.verdict != NOT_TESTED for row in self.rows)
        if not self.failed:
            return f"PASS: {tested} checks passed, {len(self.rows) - tested} were not tested"
        failed, culprit = len(self.failures), self.culprits[0]
        return f"FAIL: {failed} of {tested} checks failed, first to look at: {culprit.check}: {culprit.where}"

    def show(self, console: Console, *, verbose: bool = False) -> None:
        """Prints a line for each kind of check, details of failures, what was not tested, and the verdict.

        verbose: a table with every check's numbers besides.
        """
        if verbose:
            console.print(self._table())
        for line in self._lines():
            console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _lines(self) -> Iterator[str | Text]:
        yield from _wrapped(self.title)
        yield ""
        for family, rows in self._families().items():
            yield from self._summary(family, rows)
        for row in self.culprits:
            yield from self._details(row)
        yield ""
        for line in self.unseen:
            yield from _wrapped(line, "not seen    ")
        for why, names in self._untested().items():
            yield from _wrapped(f"{', '.join(names)}: {why}", "not tested  ")
        yield ""
        yield from _wrapped(self.verdict())

    def _families(self) -> dict[str, list[Row]]:
        families: dict[str, list[Row]] = {}
        for row in self.rows:
            if row.verdict != NOT_TESTED:
                families.setdefault(row.family[0], []).append(row)
        return families

    def _summary(self, family: str, rows: list[Row]) -> Iterator[Text]:
        """A line where all of a kind passed; else one for those that did, and one for each way to fail."""
        culprits = self.culprits
        for verdict, note, chosen in (
            (PASS, "", [row for row in rows if row.verdict == PASS]),
            (FAIL, "", [row for row in rows if row in culprits]),
            (FAIL, " (follows)", [row for row in rows if row.verdict == FAIL and row not in culprits]),
        ):
            if chosen:
                names = ", ".join(row.family[1] for row in chosen if row.family[1])
                for number, line in enumerate(_wrapped(f"{family}{note}{': ' if names else ''}{names}", "      ")):
                    mark = verdict if number == 0 else ""
                    yield Text.assemble((f"{mark:6}", COLOURS[verdict]), line[6:])

    def _details(self, row: Row) -> Iterator[str | Text]:
        yield ""
        yield Text.assemble(("FAIL", COLOURS[FAIL]), f"  {row.check}")
        yield from _wrapped(row.where, "      where   ")
        if row.error is not None and row.limit is not None:
            yield from _wrapped(f"{_number(row.error)} {row.unit}; at most {_number(row.limit)}", "      error   ")
        if row.extent:
            yield from _wrapped(row.extent, "      extent  ")
        if row.ran:
            yield from _wrapped(row.ran, "      ran     ")
        alike = row.family[0] if row.check.startswith("ZeRO-") else None
        rest = [other for other in self.failures if other not in self.culprits]
        following = [other.check for other in rest if row.explains(other) or other.family[0] == alike]
        if following:
            yield from _wrapped(", ".join(following), "      so too  ")

    def _untested(self) -> dict[str, list[str]]:
        untested: dict[str, list[str]] = {}
        for row in self.rows:
            if row.verdict == NOT_TESTED:
                untested.setdefault(row.where, []).append(row.check)
        return untested

    def _table(self) -> Table:
        table = Table(title="all checks", title_justify="left", pad_edge=False, show_lines=False)
        for column in ("check", "verdict", "error", "at most", "unit", "where", "ran"):
            table.add_column(column, overflow="fold")
        for row in self.rows:
            cells = (
                _number(row.error),
                _number(row.limit),
                row.unit if row.error is not None else "",
                row.where,
                row.ran,
            )
            table.add_row(Text(row.check), Text(row.verdict, COLOURS[row.verdict]), *map(Text, cells))
        return table


def _wrapped(text: str, first: str = "") -> Iterable[str]:
    """Lines of `COLUMNS`, the first after `first` and the others indented as far."""
    return textwrap.wrap(
        text, COLUMNS, initial_indent=first, subsequent_indent=" " * len(first), break_long_words=False,
        break_on_hyphens=False,
    ) or [first]  # fmt: skip


def _number(value: float | None) -> str:
    return "" if value is None else "0" if value == 0 else f"{value:.1e}"
