"""python -m longreach.launch.gpu_check: its arguments, its budget, what a failure leaves, and all of it on a CPU."""

import gzip
import itertools
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from longreach.kernels.documents import Documents
from longreach.launch import gpu_check
from longreach.launch.gpu import marked, overseer, parts, training
from longreach.launch.gpu.cases import trials
from longreach.launch.gpu.ops import TOLERANCES, allowances, run
from longreach.launch.gpu.overseer import Overseer, environment
from longreach.launch.gpu.parts import PARTS, Part, limit
from longreach.launch.gpu.report import PartReport, Report, free_stem, shown
from longreach.parallel.sequence import Sequence


def test_by_default_every_part_runs_in_540_seconds() -> None:
    options = gpu_check.read([])
    assert (options.budget, options.parts, options.out) == (540, PARTS, Path("benchmarks/results"))
    assert sum(part.seconds for part in PARTS) == parts.BUDGET_SECONDS


def test_arguments_change_the_budget_the_parts_and_the_folder() -> None:
    options = gpu_check.read(["only=training,ops", "budget=60.5", "out=/tmp/reports"])
    assert [part.name for part in options.parts] == ["ops", "training"]  # in their own order
    assert (options.budget, options.out) == (60.5, Path("/tmp/reports"))
    assert [part.name for part in gpu_check.read(["only=[machine,tests]"]).parts] == ["machine", "tests"]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("budgt=3", r"known name; got budgt=3\. Did you mean budget=…\?"),
        ("--help", r"an argument must be NAME=VALUE with a known name; got --help\. Known: budget, only, out"),
        ("only=op", r"only must be among machine, .*; got op\. Did you mean ops\?"),
        ("only=", "only must be among"),
        ("budget=ten", r"budget must be a number of seconds, at least 30; got ten\. Use budget=540"),
        ("budget=5", "at least 30; got 5"),
        ("budget=inf", "at least 30; got inf"),
    ],
)
def test_a_wrong_argument_is_one_error(argument: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gpu_check.read([argument])


def test_what_a_part_does_not_use_goes_to_the_later_ones_and_all_end_in_time() -> None:
    for used in (1.0, 0.3):
        left = 540.0
        for number, part in enumerate(PARTS):
            given = limit(part, PARTS[number + 1 :], left)
            assert given >= part.seconds - 1e-9
            left -= used * given
        assert left >= -1e-9
    assert limit(PARTS[-1], (), 12.5) == 12.5
    assert limit(PARTS[0], PARTS[1:], -3.0) == 0.0


def test_a_part_is_a_module_that_lists_steps() -> None:
    folder = Path(parts.__file__).parent
    for part in PARTS:
        assert "def steps(here: Here) -> list[Step]:" in (folder / f"{part.module[1:]}.py").read_text()


def test_a_report_is_read_by_people_and_by_programs(tmp_path: Path) -> None:
    ops, later = PartReport("ops", "Every op", limit=60.0), PartReport("tests", "Tests")
    report = Report({"device": "NVIDIA H200", "date": "2026-11-26", "command": "`python …`"}, [ops, later])
    ops.outcome, ops.seconds = "complete", 12.0
    ops.add({"kind": "row", "table": "Errors", "value": {"op": "softmax", "error": 0.00123456, "tokens": 131072}})
    ops.add({"kind": "row", "table": "Errors", "value": {"op": "a|b", "peer": 2.5, "error": None}})
    said = ops.add(
        {
            "kind": "failure",
            "value": {"step": "scan", "error": "off by 3", "details": ["q [1, 2]"], "traceback": ["at x"]},
        }
    )
    ops.add({"kind": "skipped", "value": {"what": "cuDNN", "why": "it needs a GPU"}})
    ops.add({"kind": "expected", "value": ["a/x", "a/y"]})
    ops.add({"kind": "met", "value": ["a/y"]})
    assert said == "FAILED scan: off by 3"
    report.save(tmp_path / "h200")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["h200.json", "h200.md"]
    text = (tmp_path / "h200.md").read_text()
    assert text.startswith("# GPU check: NVIDIA H200, 2026-11-26\n")
    assert "| Every op (`ops`) | complete | 12 | 60 | 1 | 1 |\n| Tests (`tests`) | not run |" in text
    assert (
        "| op | error | tokens | peer |\n|---|---|---|---|\n| softmax | 0.00123 | 131,072 |  |\n| a\\|b |  |  | 2.5 |"
        in text
    )
    assert "\n- FAILED ops: scan: off by 3\n" in text
    assert "\n\n\n" not in text
    assert "### FAILED: scan\n\n```\noff by 3\nq [1, 2]\nat x\n```" in text
    assert "- cuDNN: it needs a GPU" in text
    assert "Of 2 kernels 1 were launched." in text
    assert "Not launched: `a/x`." in text
    assert "## Tests" not in text
    read = json.loads((tmp_path / "h200.json").read_text())
    assert read["parts"][0]["tables"][0]["rows"][0] == {"op": "softmax", "error": 0.00123456, "tokens": 131072}
    assert report.failed


def test_a_report_never_replaces_another(tmp_path: Path) -> None:
    first = free_stem(tmp_path, "NVIDIA H100 80GB HBM3", "2026-11-26")
    assert first.name == "h100_80gb_hbm3_2026-11-26"
    first.with_name(first.name + ".md").touch()
    assert free_stem(tmp_path, "NVIDIA H100 80GB HBM3", "2026-11-26").name == f"{first.name}_2"


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, ""), (True, "yes"), (12345, "12,345"), (0.123456, "0.123"), (1234.5, "1,234"), ("x", "x")],
)
def test_values_are_short(value: object, text: str) -> None:
    assert shown(value) == text


def test_what_pytest_says_is_counted() -> None:
    lines = [
        "a.py::test_one[a b] PASSED [ 25%]", "a.py::test_two SKIPPED (needs x) [ 50%]",
        "a.py::test_three FAILED [ 75%]", "=== FAILURES ===", "E  assert 1 == 2",
    ]  # fmt: skip
    assert marked.told(lines) == ({"passed": 1, "failed": 1, "skipped": 1}, lines[3:])


def test_the_longest_kernels_of_a_trace(tmp_path: Path) -> None:
    events = [{"cat": "kernel", "name": f"kernel {n % 12}", "dur": 1000.0 * (n % 12)} for n in range(24)]
    events += [{"cat": "cpu_op", "name": "aten::mm", "dur": 1e9}, {"name": "no time", "cat": "kernel"}]
    with gzip.open(tmp_path / "rank-0.json.gz", "wt") as file:
        json.dump({"traceEvents": events}, file)
    longest, total = training.longest_kernels(tmp_path / "rank-0.json.gz")
    assert longest[0] == ("kernel 11", 2, pytest.approx(0.022))
    assert [name for name, *_ in longest] == [f"kernel {n}" for n in range(11, 1, -1)]
    assert total == pytest.approx(2 * sum(range(12)) / 1000)


def test_text_to_train_on_is_python_source_in_pieces_of_a_size() -> None:
    first, second = itertools.islice(training.pieces(5000), 2)
    assert min(len(first), len(second)) >= 5000
    assert b"def " in first
    assert first != second


def test_processes_of_a_part_import_the_package_that_runs() -> None:
    found = subprocess.run(
        [sys.executable, "-c", "import longreach; print(longreach.__path__[0])"],
        env=environment(), capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert Path(found.stdout.strip()).samefile(Path(gpu_check.__file__).parents[1])


@pytest.mark.slow
def test_a_step_fails_alone_and_what_it_said_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = str(Path(__file__).parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([here, os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setattr(overseer, "START_SECONDS", 1.0)
    part, report, told = Part("planted", "Planted", 60, "planted_steps"), PartReport("planted", "Planted"), []

    def tell(line: str) -> None:
        told.append(line)
        if "it never ends" in report.notes:  # the last step: the part's time need not be longer
            running.deadline = min(running.deadline, time.monotonic() + 1)

    running = Overseer(part, report, time.monotonic() + 60, tmp_path, 1, tell)
    running.run()
    assert time.monotonic() < running.deadline + 5
    assert [row["op"] for row in report.tables[0].rows] == ["a|b", "before the end"]
    by_step = {failure.step: failure for failure in report.failures}
    assert list(by_step) == ["wrong", "dies", "loses_the_device", "off"]
    assert len(report.failures) == len(by_step)
    assert by_step["wrong"].error == "ValueError: q must be right; got [1, 2]\nand more"
    assert "planted_steps.py" in by_step["wrong"].traceback[-1]
    assert "SIGSEGV" in by_step["dies"].error
    assert "the last words" in by_step["dies"].traceback
    assert by_step["off"].details == ["q [1, 2]: error 3"]
    assert report.notes == ["it hangs", "it never ends"]
    skipped = dict(report.skipped)
    assert re.fullmatch(r"ended after 1 s: that is its own limit", skipped["hangs"])
    assert "no_such_package, which is not installed" in skipped["lacks"]
    assert "the part's time was over" in skipped["never_ends"]
    assert report.outcome == "cut short"
    assert told


@pytest.mark.slow
def test_it_runs_to_its_end_on_a_cpu(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "longreach.launch.gpu_check", "budget=170", f"out={tmp_path}"]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    (path,) = tmp_path.glob("*.json")
    read = json.loads(path.read_text())
    failures = [failure for part in read["parts"] for failure in part["failures"]]
    assert done.returncode == 0, failures
    assert [part["name"] for part in read["parts"]] == [part.name for part in PARTS]
    assert {part["outcome"] for part in read["parts"]} <= {"complete", "cut short"}  # cut on a machine that is busy
    assert all(part["tables"] or part["skipped"] for part in read["parts"])
    text = path.with_suffix(".md").read_text()
    assert "no figure here says anything about a GPU" in text
    assert "its kernels need a GPU" in text
    assert sorted(tmp_path.iterdir()) == [path, path.with_suffix(".md")]


def test_errors_in_float32_may_be_larger_only_where_the_form_in_torch_has_them() -> None:
    """Keys of WKV near -1000 are rounded to 6e-5; nothing of SwiGLU is."""
    documents = Documents.from_lengths([[1, 300, 200]], 512)
    by_name = {trial.name: trial for trial in trials()}
    for name, more in (("wkv", True), ("SwiGLU", False)):
        inputs, dout = by_name[name].draw(documents, torch.float32, torch.device("cpu"))
        expected = run(by_name[name], [x.double() for x in inputs], dout, Sequence.single(documents))
        allowed = allowances(by_name[name], inputs, dout, documents, expected)
        assert (max(allowed) > TOLERANCES[torch.float32]) == more
        assert min(allowed) >= TOLERANCES[torch.float32]
