"""Report: the rows of a diagnosis, as a table that names the culprit first."""

from __future__ import annotations

from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table

PASS, FAIL, NOT_TESTED = "PASS", "FAIL", "NOT TESTED"


@dataclass(frozen=True)
class Row:
    """One check. where: the place of the worst error, or why it was not tested. rank: culprits sort by it."""

    check: str
    verdict: str
    error: float | None = None
    limit: float | None = None
    where: str = ""
    ran: str = ""
    precedence: int = 9


@dataclass
class Report:
    """All rows; `failed` decides the exit code."""

    title: str
    rows: list[Row] = field(default_factory=list)

    @property
    def failures(self) -> list[Row]:
        """What failed, that which tells most about the cause first."""
        return sorted((row for row in self.rows if row.verdict == FAIL), key=lambda row: row.precedence)

    @property
    def failed(self) -> bool:
        return bool(self.failures)

    def verdict(self) -> str:
        """The last line."""
        tested = sum(row.verdict != NOT_TESTED for row in self.rows)
        if not self.failed:
            return f"PASS: {tested} checks passed, {len(self.rows) - tested} were not tested"
        failed, culprit = len(self.failures), self.failures[0]
        return f"FAIL: {failed} of {tested} checks failed, first to look at: {culprit.check}: {culprit.where}"

    def show(self, console: Console) -> None:
        """Prints the table and the verdict."""
        table = Table(title=self.title, title_justify="left", pad_edge=False, show_lines=False)
        for column in ("check", "verdict", "worst error", "at most", "where", "ran"):
            table.add_column(column, overflow="fold")
        colours = {PASS: "green", FAIL: "bold red", NOT_TESTED: "yellow"}
        for row in self.rows:
            table.add_row(
                row.check, f"[{colours[row.verdict]}]{row.verdict}[/]", _number(row.error), _number(row.limit),
                row.where.replace("[", "\\["), row.ran,
            )  # fmt: skip
        console.print(table)
        console.print(self.verdict(), markup=False, highlight=False, soft_wrap=True)


def _number(value: float | None) -> str:
    return "" if value is None else "0" if value == 0 else f"{value:.1e}"
