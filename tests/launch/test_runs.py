"""What befalls runs: killed and started again, started twice, their folder gone, their disk full, their rate too high.

On two ranks, by the real command line, where ranks have to agree: none hangs, all end, and the reason is shown once.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import Command

Process = subprocess.Popen[str] | Command
pytestmark = pytest.mark.slow

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}
ALONE = ["longreach.launch.train"]
TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
TWO += ["longreach.launch.train", "parallel.sequence=2"]
SETTINGS = (
    "model=llama_tiny",
    "model.width=32",
    "model.depth=2",
    "model.mixers.softmax.heads=2",
    "model.mixers.softmax.kv_heads=2",
    "data.tokenizer=bytes",
    "data.sequence_length=64",
    "data.rows_per_step=2",
    "evaluation.every=0",
    "evaluation.sample_tokens=0",
    "checkpoint.every=2",
    "logger.wandb.mode=disabled",
    "logger.memory=false",
    "logger.print_every=1",
)
ENDLESS = "trainer.steps=100000"


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, str]:
    folder = tmp_path_factory.mktemp("texts")
    for number in range(40):
        (folder / f"{number}.txt").write_text(f"text {number}, and then some more of it. " * 20)
    cache = tmp_path_factory.mktemp("cache")
    return "data=text", f"data.path={folder}", f"data.cache_dir={cache}"


@pytest.fixture
def start(texts: tuple[str, ...], tmp_path: Path):
    """Starts a training command in `tmp_path`; what still runs at the end of the test is killed."""
    started: list[Process] = []

    def begin(program: list[str], *overrides: str) -> Process:
        chosen = {word.partition("=")[0]: word for word in (*SETTINGS, *texts, *overrides)}
        return launch([*program, *chosen.values()])

    def launch(command: list[str]) -> Process:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        started.append(
            subprocess.Popen(command, env=ENVIRONMENT, cwd=tmp_path, text=True, **pipes)
            if command[0] == sys.executable
            else Command(*command, folder=tmp_path, environment=ENVIRONMENT)
        )
        return started[-1]

    begin.launch = launch  # type: ignore[attr-defined]
    yield begin
    for process in started:
        kill(process)


@pytest.fixture(scope="module")
def four_steps(texts: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of four steps, which saved after the second and the fourth."""
    folder = tmp_path_factory.mktemp("four")
    settings = (*SETTINGS, *texts, "run.dir=run", "trainer.steps=4")
    finish(Command(*ALONE, *settings, folder=folder, environment=ENVIRONMENT))
    return folder / "run"


@pytest.fixture
def run(four_steps: Path, tmp_path: Path) -> Path:
    """A copy of that folder, as `run` of the test's own."""
    return Path(shutil.copytree(four_steps, tmp_path / "run"))


def finish(process: Process, status: int = 0) -> str:
    said, _ = process.communicate(timeout=120)
    assert process.returncode == status, said[-3000:]
    return said


def wait_for(process: Process, there: Callable[[], object]) -> None:
    deadline = time.monotonic() + 120
    while not there():
        assert process.poll() is None, process.communicate()[0][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def kill(process: Process) -> None:
    """Launcher and ranks at once, as a node that fails."""
    ranks = children(process.pid)
    process.kill()
    for rank in ranks:
        os.kill(rank, signal.SIGKILL)
    if isinstance(process, Command) or (process.stdout and not process.stdout.closed):
        process.communicate()


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def saved(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").glob("step-*"))


def rates(run: Path) -> dict[int, float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["learning_rate"] for record in records if "loss" in record}


def printed(said: str) -> list[str]:
    """The command that a run printed to go on with."""
    (line,) = [line for line in said.splitlines() if line.startswith("to resume ")]
    words = shlex.split(line.removeprefix("to resume"))
    assert words[:2] == ["python", "-m"]
    return words[2:]


def test_a_checkpoint_with_old_paths_of_classes_is_resumed_generated_from_and_exported(
    start, run: Path, tmp_path: Path
) -> None:
    checkpoint = run / "checkpoints/step-00000004"
    for file in (run / "config.yaml", checkpoint / "config.yaml", checkpoint / "index.json"):
        now = file.read_text()
        before = now.replace(".mixers.softmax.softmax_attention.", ".mixers.softmax_attention.")
        before = before.replace(".feed_forward.swiglu.", ".feed_forward.")
        assert before != now
        file.write_text(re.sub(r',\s*"crc32": \d+\s*}\s*$', "}", before))  # as the index was then
    model = "model.mixers.softmax._target_=longreach.models.mixers.softmax_attention.SoftmaxAttention"
    finish(start(ALONE, "run.dir=other", "trainer.steps=1", f"init_from={checkpoint}"))
    assert saved(tmp_path / "other")
    generate = ["longreach.launch.generate", "max_new_tokens=4", "prompt=a"]
    assert finish(start.launch([*generate, f"checkpoint={checkpoint}"])).startswith("a")
    export = ["longreach.launch.export", f"checkpoint={checkpoint}", "path=exported"]
    finish(start.launch(export))
    assert "resum" in finish(start(ALONE, "run.dir=run", "trainer.steps=6", model))
    assert saved(run)[-1] == "step-00000006"
    assert ".mixers.softmax.softmax_attention." in (run / "config.yaml").read_text()


def test_a_job_that_is_queued_again_goes_on_from_its_own_checkpoints(start, run: Path, tmp_path: Path) -> None:
    run.rename(tmp_path / "first")
    settings = ("run.dir=second", "checkpoint.resume=first/checkpoints/step-00000004", "trainer.steps=3000")
    process = start(ALONE, *settings)
    wait_for(process, lambda: len(saved(tmp_path / "second")) == 2)
    kill(process)
    assert (tmp_path / "second/lock.json").exists()
    newest = saved(tmp_path / "second")[-1]
    shutil.rmtree(tmp_path / "first")
    process = start(TWO, *settings)
    wait_for(process, lambda: saved(tmp_path / "second")[-1] > newest)
    os.kill(process.pid, signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert "lock.json was left by process" in said
    assert "checkpoint.resume=first/checkpoints/step-00000004 counts for a run's first start" in said
    assert f"from second/checkpoints/{newest}" in said or f"from {tmp_path}/second/checkpoints/{newest}" in said
    assert sorted(rates(tmp_path / "second")) == list(range(5, len(rates(tmp_path / "second")) + 5))
    assert not (tmp_path / "second/lock.json").exists()


def test_a_run_passes_over_a_damaged_checkpoint(start, run: Path) -> None:
    weights = next((run / "checkpoints/step-00000004").glob("weights-*"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    said = finish(start(TWO, "run.dir=run", "trainer.steps=4"))
    assert said.count("passed over: checkpoint run/checkpoints/step-00000004 must be complete and undamaged") == 1
    assert "going on after step 2" in said
    assert "passed over" not in finish(start(ALONE, "run.dir=run", "trainer.steps=4"))


STUCK = """
import threading
import time

from longreach.trainer.callback import Callback
from longreach.trainer.checkpoint.tensor_files import TensorWriter


class Stuck(Callback):
    def after_step(self, trainer):
        if trainer.step == 3:  # from the second checkpoint on, the thread that writes stops after its first piece
            original = TensorWriter.write

            def write(writer, name, piece):
                original(writer, name, piece)
                if threading.current_thread() is not threading.main_thread():
                    writer._file.flush()
                    time.sleep(3600)

            TensorWriter.write = write
"""


def test_a_kill_while_a_checkpoint_is_being_written_leaves_the_one_before(start, tmp_path: Path) -> None:
    (tmp_path / "stuck.py").write_text(STUCK)
    run = tmp_path / "run"
    half_written = run / "checkpoints/.step-00000004.writing"
    process = start(TWO, "run.dir=run", ENDLESS, "+callbacks.stuck._target_=stuck.Stuck")
    # Training goes on beside it, until the next checkpoint is due.
    wait_for(process, lambda: half_written.exists() and len(rates(run)) == 6)
    assert len(list(half_written.glob("*.safetensors"))) >= 1
    kill(process)
    assert saved(run) == ["step-00000002"]
    said = finish(start(TWO, "run.dir=run", "trainer.steps=6"))
    assert "going on after step 2" in said
    assert "passed over" not in said
    assert saved(run) == ["step-00000004", "step-00000006"]
    assert not half_written.exists()
    assert sorted(rates(run)) == [1, 2, 3, 4, 5, 6]


def test_a_run_that_saves_nothing_says_so_where_a_signal_ends_it(start, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(ALONE, "run.dir=run", ENDLESS, "checkpoint.every=0")
    wait_for(process, lambda: (run / "metrics.jsonl").exists() and rates(run))
    os.kill(process.pid, signal.SIGTERM)
    said = finish(process, status=75)
    assert f"ended after step {max(rates(run))}, as SIGTERM asks; no checkpoint was saved" in said
    assert saved(run) == []


def test_a_run_is_refused_where_another_goes_on(start, tmp_path: Path) -> None:
    first = start(ALONE, "run.dir=run", ENDLESS)
    wait_for(first, lambda: saved(tmp_path / "run"))
    said = finish(start(TWO, "run.dir=run", ENDLESS), status=1)
    assert said.count("error: run.dir must be of one run at a time; got run, in which process") == 1
    assert "Give" in said or "give this one another run.dir" in said
    assert first.poll() is None
    kill(first)
    finish(start(ALONE, "run.dir=run", f"trainer.steps={int(saved(tmp_path / 'run')[-1][5:]) + 1}"))


def test_runs_that_are_started_together_have_folders_of_their_own(start, tmp_path: Path) -> None:
    both = [start(ALONE, "run.name=twin", "trainer.steps=4") for _ in range(2)]
    for process in both:
        finish(process)
    runs = list((tmp_path / "runs/twin").iterdir())
    assert len(runs) == 2
    for run in runs:
        assert sorted(rates(run)) == [1, 2, 3, 4]
        assert saved(run) == ["step-00000002", "step-00000004"]


@pytest.mark.parametrize("fate", ["removed", "emptied", "a file", "moved"])
def test_a_folder_that_vanishes_ends_the_run_and_does_not_come_back(start, tmp_path: Path, fate: str) -> None:
    run = tmp_path / "run"
    process = start(TWO if fate == "removed" else ALONE, "run.dir=run", ENDLESS, "logger.wandb.mode=offline")
    wait_for(process, lambda: saved(run))
    if fate == "emptied":
        for path in run.iterdir():
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
    else:
        run.rename(tmp_path / "elsewhere")
    if fate == "removed":
        shutil.rmtree(tmp_path / "elsewhere")
    if fate == "a file":
        run.write_text("in its place")
    said = finish(process, status=1)
    assert said.count("error: run.dir must stay this run's until it ends; run was moved, removed or emptied") == 1
    assert "free space" not in said
    assert not (run / "config.yaml").exists()
    assert fate == "emptied" or not run.is_dir()


def test_a_last_checkpoint_that_cannot_be_written_fails_the_run(start, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoints").write_text("in the way")
    said = finish(start(TWO, "run.dir=run", "trainer.steps=3"), status=1)
    assert said.count("could not be written: ") == 3  # after step 2, in the summary, and as the reason
    assert "The run goes on and saves again after step 3" in said
    assert "NOT KEPT      checkpoint run/checkpoints/step-00000003 could not be written" in said
    assert said.count("error: the run has trained to its end, but not all of it is kept: checkpoint run/") == 1
    assert sorted(rates(tmp_path / "run")) == [1, 2, 3]
    assert "no checkpoint was saved yet" in said


def test_gradients_that_are_never_finite_end_the_run(start, tmp_path: Path) -> None:
    hybrid = ("model=minimax_01_tiny", "model.width=64", "model.depth=8", "model.mixers.lightning.heads=2")
    said = finish(
        start(
            TWO, "run.dir=run", "trainer.steps=60", "optimizer.learning_rate=1e4", *hybrid, "trainer.max_rollbacks=0"
        ),
        1,
    )
    assert said.count("the gradient is not finite; the weights stay as they are") == 9
    assert said.count("error: the gradient must be finite; got 10 step(s) in a row, ") == 1


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_the_printed_command_goes_on_without_a_jump(start, tmp_path: Path, schedule: str) -> None:
    said = finish(start(ALONE, "run.dir=run", "trainer.steps=20", f"schedule={schedule}"))
    before = rates(tmp_path / "run")
    again = finish(start.launch(printed(said)))
    assert "the schedule has changed: trainer.steps was 20 and is 40" in again
    run = tmp_path / ("run" if schedule == "cosine" else "run-to-40")
    after = rates(run)
    first = 21 if schedule == "cosine" else min(after)
    assert after[first] == pytest.approx(before[first - 1], rel=1e-5)
    assert max(after) == 40
    assert all(after[step] <= after[step - 1] * (1 + 1e-9) for step in range(first + 1, 41))


def test_a_longer_schedule_is_announced(start, tmp_path: Path) -> None:
    finish(start(ALONE, "run.dir=run", "trainer.steps=10"))
    said = finish(start(TWO, "run.dir=run", "trainer.steps=12"))
    old, new = rates(tmp_path / "run")[10], rates(tmp_path / "run")[11]
    assert said.count(f"The learning rate was {old:.3g} at step 10 and is {new:.3g} at step 11") == 1
