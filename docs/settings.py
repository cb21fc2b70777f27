"""Writes the table of settings, docs/settings.md, from the schema itself: `python docs/settings.py`."""

from __future__ import annotations

import re
from pathlib import Path

from longreach.launch.configuration.page import rows
from longreach.trainer.settings import Settings

PAGE = Path(__file__).resolve().with_suffix(".md")
MARKERS = ("<!-- settings: made by docs/settings.py -->", "<!-- end of settings -->")


def section() -> str:
    """The table between its markers."""
    table = [f"| `{name}` | `{default}` | {meaning.replace('|', '∣')} |" for name, default, meaning in rows(Settings())]
    return "\n".join([MARKERS[0], "| setting | default | meaning |", "|---|---|---|", *table, MARKERS[1]])


def updated(page: str) -> str:
    """The page with the table of today's schema."""
    pattern = re.compile(re.escape(MARKERS[0]) + ".*?" + re.escape(MARKERS[1]), re.DOTALL)
    return pattern.sub(lambda _: section(), page)


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text()))
