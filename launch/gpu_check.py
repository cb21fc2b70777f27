"""python -m longreach.launch.gpu_check [budget=540] [only=ops,training] [out=benchmarks/results]

Tests, measures and reports what this GPU does with LongReach, within `budget` seconds: docs/gpu.md says what each part
shows. It needs torch and Triton; parts that need more say so where it is missing. Without a GPU every part still runs,
at small sizes, and says what it could not do.
"""

from __future__ import annotations

import datetime
import difflib
import math
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from .gpu.overseer import Overseer
from .gpu.parts import BUDGET_SECONDS, PARTS, Part, limit
from .gpu.report import PartReport, Report, free_stem

LEAST_SECONDS = 30
ENDING_SECONDS = 3.0  # in which the last processes end and the report is written
OPTIONS = ("budget", "only", "out")


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    budget: float = BUDGET_SECONDS  # seconds for everything
    parts: tuple[Part, ...] = PARTS  # those that run, in their order
    out: Path = Path("benchmarks/results")  # folder of the reports


def read(arguments: list[str]) -> Options:
    """The options of the command line. Raises ValueError for one that cannot be."""
    given: dict[str, str] = {}
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name not in OPTIONS or not equals:
            near = difflib.get_close_matches(name, OPTIONS, n=1)
            hint = f"Did you mean {near[0]}=…?" if near else f"Known: {', '.join(OPTIONS)}"
            raise ValueError(f"an argument must be NAME=VALUE with a known name; got {argument}. {hint}")
        given[name] = value
    names = [part.name for part in PARTS]
    chosen = [name.strip() for name in given.get("only", ",".join(names)).strip("[]").split(",")]
    if unknown := [name for name in chosen if name not in names]:
        near = difflib.get_close_matches(unknown[0], names, n=1)
        hint = f"Did you mean {near[0]}?" if near else "Name some of them, with commas between"
        raise ValueError(f"only must be among {', '.join(names)}; got {', '.join(unknown)}. {hint}")
    try:
        budget = float(given.get("budget", BUDGET_SECONDS))
    except ValueError:
        budget = math.nan
    if not LEAST_SECONDS <= budget < math.inf:
        raise ValueError(
            f"budget must be a number of seconds, at least {LEAST_SECONDS}; got {given['budget']}. "
            f"Use budget={BUDGET_SECONDS:.0f}"
        )
    parts = tuple(part for part in PARTS if part.name in chosen)
    return Options(budget, parts, Path(given.get("out", Options.out)).expanduser())


def device_name() -> str:
    """The name of the first GPU, or "cpu", without a context on it."""
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
        if found and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
            return found[0].strip()
    except (OSError, subprocess.SubprocessError):
        pass
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def check(options: Options, started: float) -> Report:
    """Runs the parts; `started` is when the budget began, by `time.monotonic`."""
    device, date = device_name(), datetime.date.today().isoformat()
    options.out.mkdir(parents=True, exist_ok=True)
    stem = free_stem(options.out, device, date)
    command = shlex.join(["python", "-m", "longreach.launch.gpu_check", *sys.argv[1:]])
    facts = {"device": device, "date": date, "command": f"`{command}`", "budget": f"{options.budget:.0f} s"}
    reports = [PartReport(part.name, part.title) for part in options.parts]
    report = Report(facts, reports)

    def told(line: str) -> None:
        report.save(stem)
        if line:
            print(f"{time.monotonic() - started:5.0f} s  {line}", flush=True)

    end = started + options.budget - ENDING_SECONDS
    print(f"report        {stem}.md and .json", flush=True)
    with tempfile.TemporaryDirectory(prefix="longreach-gpu-", ignore_cleanup_errors=True) as folder:
        for number, (part, mine) in enumerate(zip(options.parts, reports, strict=True)):
            now = time.monotonic()
            seconds = limit(part, options.parts[number + 1 :], end - now)
            print(f"{now - started:5.0f} s  == {part.title} (within {seconds:.0f} s)", flush=True)
            workers = 1 if device == "cpu" else max(1, min(part.workers, (os.cpu_count() or 1) - 2))
            Overseer(part, mine, now + seconds, Path(folder), workers, told).run()
            if part.name == "machine" and mine.tables:
                facts.update({str(row["what"]): str(row["value"]) for row in mine.tables[0].rows})
    facts["took"] = f"{time.monotonic() - started:.0f} s"
    told("")
    return report


def _stop(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> None:
    started = time.monotonic()
    try:
        options = read(sys.argv[1:])
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    signal.signal(signal.SIGTERM, _stop)  # workers are ended, and the report says so
    try:
        report = check(options, started)
    except KeyboardInterrupt:
        print("stopped; the report holds what was found until now", file=sys.stderr)
        sys.exit(130)
    failures = sum(len(part.failures) for part in report.parts)
    print(f"{failures} failure(s)" if failures else "nothing failed")
    sys.exit(1 if report.failed else 0)


if __name__ == "__main__":
    main()
