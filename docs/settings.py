"""Writes the table of settings into README.md, from the schema itself: `python docs/settings.py`."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import re
import textwrap
from pathlib import Path
from typing import Any

from longreach.trainer.settings import Settings

README = Path(__file__).resolve().parent.parent / "README.md"
MARKERS = ("<!-- settings: made by docs/settings.py -->", "<!-- end of settings -->")


def comments(schema: type) -> dict[str, str]:
    """What the source says behind each field of a dataclass."""
    lines = textwrap.dedent(inspect.getsource(schema)).splitlines()
    (definition,) = ast.parse("\n".join(lines)).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for node in definition.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            _, _, comment = lines[(node.end_lineno or node.lineno) - 1].partition("  # ")
            found[node.target.id] = comment.strip()
    return found


def rows(settings: Any, prefix: str = "") -> list[str]:
    """One row a setting: name, default, meaning."""
    said = comments(type(settings))
    table = []
    for field in dataclasses.fields(settings):
        value, name = getattr(settings, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            table += rows(value, f"{name}.")
        elif name != "model":
            default = json.dumps(value)  # as YAML and the command line write it
            table.append(f"| `{name}` | `{default}` | {said[field.name].replace('|', '∣')} |")
    return table


def section() -> str:
    """The table between its markers."""
    table = ["| setting | default | meaning |", "|---|---|---|", *rows(Settings())]
    return "\n".join([MARKERS[0], *table, MARKERS[1]])


def updated(readme: str) -> str:
    """The README with the table of today's schema."""
    pattern = re.compile(re.escape(MARKERS[0]) + ".*?" + re.escape(MARKERS[1]), re.DOTALL)
    return pattern.sub(lambda _: section(), readme)


if __name__ == "__main__":
    README.write_text(updated(README.read_text()))
