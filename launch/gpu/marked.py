"""The tests that are marked `gpu`: each file in a process of its own, so that a fault of memory ends only that file."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

from ... import __path__ as package
from .step import Here, Step

MARK = "@pytest.mark.gpu"
ENOUGH = 5  # failures of one file
LINES = 40  # of pytest's account of them
LAST_SECONDS = 2.0  # left for the report


def steps(here: Here) -> list[Step]:
    import pytest  # noqa: F401 (where it is missing, that is said instead)

    root = Path(package[0]).resolve()
    files = sorted(path for path in (root / "tests").rglob("test_*.py") if MARK in path.read_text(encoding="utf-8"))
    if not files:
        raise ModuleNotFoundError(f"no tests in {root}", name="the tests of a checkout")
    return [Step(str(path.relative_to(root)), partial(_test, root, path)) for path in files]


def _test(root: Path, path: Path, here: Here) -> None:
    name, text = str(path.relative_to(root)), path.read_text(encoding="utf-8")
    if not here.on_gpu:
        here.skip(name, f"{text.count(MARK)} functions of it need a GPU")
        return
    if "from hypothesis" in text and importlib.util.find_spec("hypothesis") is None:
        here.skip(name, "it needs hypothesis, which is not installed")
        return
    command = [sys.executable, "-m", "pytest", name, "-m", "gpu", "-vv", "--tb=short", f"--maxfail={ENOUGH}"]
    process = subprocess.Popen(
        [*command, "-p", "no:cacheprovider"], cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    ending = threading.Timer(max(here.left - LAST_SECONDS, 0.0), process.kill)
    ending.start()
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line.rstrip())
    code = process.wait()
    cut = not ending.is_alive()
    ending.cancel()
    row, account = told(lines)
    here.row("Tests", **{"file": name, **row, "ended": "cut off" if cut else "complete"})
    if not cut and code not in (0, 5):  # 5: pytest found no test
        here.fail(f"pytest ended with exit code {code}", account)


def told(lines: list[str]) -> tuple[dict[str, int], list[str]]:
    """How many tests ended how, by the lines of `pytest -v`, and what it says about failures."""
    verdicts = [found[1] for line in lines if (found := re.search(r"::.* (PASSED|FAILED|ERROR|SKIPPED)\b", line))]
    counts = {kind.lower(): verdicts.count(kind) for kind in ("PASSED", "FAILED", "SKIPPED")}
    begins = next((n for n, line in enumerate(lines) if re.match(r"=+ (FAILURES|ERRORS) =+", line)), len(lines) - LINES)
    return counts, lines[max(begins, 0) :][:LINES]
