"""The table of families in docs/checkpoints.md: `python tests/models/checkpoint_table.py [NAME…]` writes it.

It runs the tests of the families, or of those named, slow ones too, and takes the errors from what they note. Whose
checkpoints have a family's form no test can tell: the column "models" stays as the page has it, and is written there.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Collection
from pathlib import Path

from longreach.models import hf
from longreach.models.hf.family import RULES, Family
from longreach.models.hf.fields import Equal
from longreach.models.hf.layers import LayerTypes, OneWindow
from longreach.models.hf.rope import RopeScale
from longreach.models.hf.rules import Absent, Only, Rule, Same

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "checkpoints.md"
COMMAND = "python tests/models/checkpoint_table.py"
NOTES = "LONGREACH_CHECKPOINT_NOTES"  # names the file that tests add what they measure to
UNKNOWN = "—"
BOUNDS = {"logits in float32": 1e-4, "logits in float64": 1e-9, "gradients": 1e-8, "two ranks": 1e-9}
TESTS = ("test_hf_families.py", "test_hf_drawn.py", "test_fla_families.py")
ROW_TEST = "test_the_page_has_a_row_of_today_for_each_family"  # which fails until the row is made
EVERYWHERE = {rule.key for rule in RULES if isinstance(rule, Absent | Only)}
COLUMNS = ("family", "class", "models", *BOUNDS, "writes", "decodes", "refused")


# What a table says.


def refused(family: Family) -> str:
    """Keys that must be absent, or must have one value, beside those of all families."""
    texts = [_refused_by(rule) for rule in family.rules if getattr(rule, "key", None) not in EVERYWHERE]
    components = (family.model, family.block, *family.mixers.values(), *family.feed_forwards.values())
    for field in (field for component in components for field in component.fields.values()):
        if isinstance(field, Equal):
            texts.append("unequal " + ", ".join(f"`{key}`" for key in field.keys))
        if isinstance(field, RopeScale):
            without = ", ".join(kind for kind in RopeScale().kinds if kind not in field.kinds)
            texts.append("" if not without else f"`rope_type` {without}" if field.kinds else "scaled rotary positions")
    if isinstance(family.layers, OneWindow):
        texts.append("`layer_types` with and without windows")
    if isinstance(family.layers, LayerTypes) and family.layers.default is None:
        texts.append(f"no `{family.layers.key}`")
    return ", ".join(dict.fromkeys(filter(None, texts))) or UNKNOWN


def _refused_by(rule: Rule) -> str:
    match rule:
        case Absent(key=key):
            return f"`{key}`"
        case Only(key=key, allowed=(value, *_)):
            return f"`{key}` ≠ {json.dumps(value)}"
        case Same(key=key, other=other):
            return f"`{key}` ≠ `{other}`"
    return ""


# What is measured.


def measured(names: Collection[str]) -> dict[str, dict[str, float]]:
    """By family and column, the largest value that the tests note; with these names in their ids, or all."""
    with tempfile.TemporaryDirectory() as folder:
        notes = Path(folder, "notes")
        tests = [path for name in TESTS for path in map(str, Path(__file__).parent.glob(name))]
        chosen = ["-k", f"({' or '.join(names)}) and not {ROW_TEST}" if names else f"not {ROW_TEST}"]
        command = [sys.executable, "-m", "pytest", *tests, *chosen]
        if subprocess.call(command, cwd=ROOT, env={**os.environ, NOTES: str(notes)}):
            raise SystemExit(f"the tests of families must pass; they do not. {PAGE} is as it was")
        found: dict[str, dict[str, float]] = {}
        for line in map(json.loads, notes.read_text().splitlines()):
            of_family = found.setdefault(line["family"], {})
            of_family[line["column"]] = max(line["measured"], of_family.get(line["column"], 0.0))
    return found


# The page.


def row(family: Family, found: dict[str, float], models: str) -> str:
    errors = [f"{found[column]:.0e}" if column in found else UNKNOWN for column in BOUNDS]
    decodes = f"{found['decodes']:.0f} tokens" if "decodes" in found else UNKNOWN
    writes = "✓" if "writes" in found else UNKNOWN
    cells = (f"`{family.model_type}`", f"`{family.architecture}`", models, *errors, writes, decodes, refused(family))
    return f"| {' | '.join(cells)} |"


def rows_of(page: str) -> dict[str, list[str]]:
    """The cells of each family's row, by family."""
    begin, end = _table(page)
    lines = [line.split("|")[1:-1] for line in page[begin:end].splitlines()[2:]]
    return {cells[0].strip(" `"): [cell.strip() for cell in cells] for cells in lines}


def replaced(page: str, rows: dict[str, str]) -> str:
    """The page with these rows in its table, in place of those of the same families."""
    begin, end = _table(page)
    kept = {re.match(r"\| `(\w+)`", line)[1]: line for line in page[begin:end].splitlines()[2:]}  # type: ignore[index]
    whole = {name: line for name, line in (kept | rows).items() if name in hf.known_families()}
    head = [f"| {' | '.join(COLUMNS)} |", "| " + " | ".join(["---"] * len(COLUMNS)) + " |"]
    return page[:begin] + "\n".join([*head, *(whole[name] for name in sorted(whole))]) + page[end:]


def _table(page: str) -> tuple[int, int]:
    """Where it begins and ends."""
    begin = page.index("| family | class")
    return begin, page.index("\n\n", begin)


def main() -> None:
    names, page = sys.argv[1:], PAGE.read_text()
    known = hf.known_families()
    if unknown := set(names) - set(known):
        raise SystemExit(f"names must be families, {', '.join(known)}; got {', '.join(sorted(unknown))}")
    found, before = measured(names), rows_of(page)
    rows = {
        name: row(known[name], found.get(name, {}), before[name][2] if name in before else UNKNOWN)
        for name in names or known
    }
    PAGE.write_text(replaced(page, rows))
    print(f"written to {PAGE}")
    if missing := [name for name, cells in rows_of(PAGE.read_text()).items() if cells[2] == UNKNOWN]:
        print(f'write in the column "models" whose checkpoints have this form: {", ".join(missing)}')


if __name__ == "__main__":
    main()
