"""Whole runs from the command line: every launcher, a killed rank, and text from a checkpoint on its own."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import commands
import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}
LAUNCHERS = {
    "alone": [sys.executable, "-m"],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"],
    "torchrun.sh": [
        sys.executable,
        "-m",
        "longreach.trainer.ranks.torchrun",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
    ],
    "deepspeed": [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus=2", "--master_port=29571", "--module"],
}
SETTINGS = (
    "model=minimax_01_tiny",
    "model.width=64",
    "model.mixers.lightning.heads=2",
    "model.mixers.softmax.heads=2",
    "data.tokenizer=bytes",
    "data.sequence_length=128",
    "data.rows_per_step=2",
    "evaluation.sample_tokens=4",
    "evaluation.prompt=def ",
    "logger.wandb.mode=disabled",
    "logger.print_every=1",
)


def command(launcher: str, run: Path, *overrides: str) -> list[str]:
    ranks = 1 if launcher == "alone" else 2
    given = [*SETTINGS, f"parallel.sequence={ranks}", f"run.dir={run}", *overrides]
    chosen = {setting.partition("=")[0]: setting for setting in given}
    return [*LAUNCHERS[launcher], "longreach.launch.train", *chosen.values()]


def train(launcher: str, run: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    environment = {**ENVIRONMENT, "MASTER_PORT": "29571", "DS_ACCELERATOR": "cpu"}
    if launcher == "alone":
        return commands.run(*command(launcher, run, *overrides)[2:], folder=run.parent, environment=environment)
    return subprocess.run(
        command(launcher, run, *overrides), env=environment, capture_output=True, text=True, timeout=300, cwd=run.parent
    )


def lines(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps on two ranks, with an awkward name."""
    folder = tmp_path_factory.mktemp("launch") / "a run, of six × steps"
    settings = ("trainer.steps=6", "evaluation.every=3", "evaluation.rows=2", "checkpoint.every=2")
    done = train("torchrun", folder, *settings, "logger.wandb.mode=offline")
    assert done.returncode == 0, done.stderr[-3000:]
    for said in ("step 1/6", "validation loss", "bits per byte", "W&B offline", "loss curve", "to resume     torchrun"):
        assert said in done.stdout
    return folder


def test_a_run_leaves_the_files_of_the_contract(run: Path) -> None:
    present = {path.name for path in run.iterdir()}
    assert present == {
        "config.yaml", "metrics.jsonl", "environment.json", "checkpoints", "plots", "samples.txt", "wandb",
    }  # fmt: skip
    (start,) = json.loads((run / "environment.json").read_text())
    assert start["step"] == 0
    assert start["variables"]["WORLD_SIZE"] == "2"
    assert "trainer.steps=6" in start["command"]
    assert (run / "plots" / "loss.png").exists()
    assert list((run / "wandb").glob("offline-run-*/*.wandb"))
    training = [line for line in lines(run) if "loss" in line]
    wanted = {"step", "tokens", "loss", "grad_norm", "learning_rate", "tokens_per_second", "peak_memory_bytes"}
    assert all(wanted <= set(line) for line in training)
    assert ["memory" in line for line in training] == [True] + [False] * (len(training) - 1)
    assert {"parameters", "moments", "kept: lightning", "peak of a rank"} < set(training[0]["memory"])
    validation = [line for line in lines(run) if "validation_loss" in line]
    assert all({"step", "validation_loss", "bits_per_byte"} <= set(line) for line in validation)


@pytest.mark.parametrize("launcher", ["alone", "deepspeed"])
def test_every_launcher_trains_the_same(run: Path, tmp_path: Path, launcher: str) -> None:
    done = train(launcher, tmp_path / "run", "trainer.steps=6", "evaluation.every=0", "checkpoint.every=0")
    assert done.returncode == 0, done.stderr[-3000:]
    expected = [line for line in lines(run) if "loss" in line]
    for line, other in zip(lines(tmp_path / "run"), expected, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


def children(pid: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == pid:
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def started(launcher: str, run: Path, *overrides: str) -> tuple[subprocess.Popen[str], dict[int, int]]:
    """A run that has saved a checkpoint and is three steps further than it was, and its processes by rank."""
    before, saved = (len(lines(run)) if run.exists() else 0), run / "checkpoints"
    process = subprocess.Popen(
        command(launcher, run, "evaluation.every=0", "checkpoint.every=2", "trainer.steps=100000", *overrides),
        env={**ENVIRONMENT, "DS_ACCELERATOR": "cpu", "MASTER_PORT": "29573"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 240
    while not any(saved.glob("step-*")) or len(lines(run)) < before + 3:  # saving goes on beside steps
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    # DeepSpeed has a launcher in between.
    below = [child for pid in (process.pid, *children(process.pid)) for child in children(pid)]
    return process, {rank: pid for pid in below if (rank := rank_of(pid)) is not None}


def rank_of(pid: int) -> int | None:
    """The rank of a process that trains; None for others, such as W&B's."""
    try:
        program, variables = (Path(f"/proc/{pid}/{name}").read_bytes().split(b"\0") for name in ("cmdline", "environ"))
    except OSError:
        return None
    given = [entry for entry in variables if entry.startswith(b"RANK=")]
    return int(given[0][5:]) if given and b"longreach.launch.train" in program else None


NEEDS_PROC = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc to find the ranks")


@NEEDS_PROC
def test_a_rank_that_deepspeed_started_and_that_was_killed_is_named(tmp_path: Path) -> None:
    process, ranks = started("deepspeed", tmp_path / "run")
    assert set(ranks) == {0, 1}
    os.kill(ranks[0], signal.SIGKILL)
    said, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    names_the_rank(said, 0)
    assert "to resume from step-" in said


def names_the_rank(said: str, victim: int) -> None:
    """What the other ranks say where one has died, whatever the launcher."""
    assert said.count(f"rank {victim} was killed or stopped answering; the others end too") == 1
    assert said.count("killed or stopped answering") == 1
    assert "ended by SIGTERM" not in said


@NEEDS_PROC
def test_a_run_that_is_asked_to_end_saves_on_all_ranks_and_goes_on_later(tmp_path: Path) -> None:
    run = tmp_path / "run"
    process, ranks = started("torchrun.sh", run)
    os.kill(ranks[1], signal.SIGUSR1)  # one rank has heard; all end after the same step
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 75, said[-3000:]
    last = int(lines(run)[-1]["step"])
    assert f"ended after step {last}, as SIGUSR1 asks; step-{last:08d} is saved" in said
    assert "to resume     torchrun" in said
    for number in (signal.SIGTERM, signal.SIGINT):
        process, ranks = started("torchrun.sh", run)
        process.send_signal(number)  # as the launcher gets it
        said, _ = process.communicate(timeout=60)
        assert process.returncode == 75, said[-3000:]
        assert f"going on after step {last} from" in said
        assert "Traceback" not in said
        assert int(lines(run)[-1]["step"]) > last
        last = int(lines(run)[-1]["step"])
        assert (run / "checkpoints" / f"step-{last:08d}").exists()
        assert f"ended after step {last}, as {number.name} asks; step-{last:08d} is saved" in said


MIXER = """
from longreach.models.mixers.linear.lightning_attention import LightningAttention


class Mine(LightningAttention):
    pass
"""


def test_a_script_trains_a_mixer_of_the_users_folder(tmp_path: Path) -> None:
    (tmp_path / "users_mixer.py").write_text(MIXER)
    settings = [*SETTINGS, "model.mixers.lightning._target_=users_mixer.Mine", "trainer.steps=1", "run.dir=~/run"]
    done = subprocess.run(
        ["bash", str(ROOT / "launch" / "torchrun.sh"), *settings, "evaluation.every=0", "checkpoint.every=0"],
        env={**ENVIRONMENT, "RANKS": "1", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(lines(tmp_path / "run")) >= 1


def slurm(task: int, tasks: int = 2) -> dict[str, str]:
    place = dict.fromkeys(("SLURM_PROCID", "SLURM_LOCALID"), str(task))
    return place | {
        "SLURM_NTASKS": str(tasks),
        "SLURM_STEP_ID": "0",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_NNODES": "1",
    }


def test_two_tasks_of_slurm_are_one_run(run: Path, tmp_path: Path) -> None:
    more = ("parallel.sequence=2", "trainer.steps=2", "evaluation.every=0", f"run.dir={tmp_path / 'run'}")
    program = ["longreach.launch.train", *SETTINGS, *more]
    settings = {"folder": tmp_path, "stderr": subprocess.PIPE}
    both = [commands.Command(*program, environment=ENVIRONMENT | slurm(task), **settings) for task in (0, 1)]
    said = [process.communicate(timeout=200)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert "1 data x 2 sequence rank(s)" in said[0]
    assert "to resume     srun -n 2 python -m longreach.launch.train" in said[0]
    assert said[1] == ""
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2]
    shown = [generate(f"checkpoint={run}", "prompt=a", "max_new_tokens=2", more=slurm(task)).stdout for task in (0, 1)]
    assert shown[0].startswith("a")
    assert shown[1] == ""  # a command of one process runs once


@NEEDS_PROC
def test_a_killed_rank_ends_the_run_which_then_resumes(run: Path, tmp_path: Path) -> None:
    target = tmp_path / "run"
    more = ("trainer.steps=6", "evaluation.every=3", "evaluation.rows=2", "checkpoint.every=2")
    # Killed once a checkpoint is there: slow enough to be met in between, as each step is printed and flushed.
    process = subprocess.Popen(
        command("torchrun", target, *more), env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + 240
    while not (target / "checkpoints" / "step-00000002").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    ranks = {rank: pid for pid in children(process.pid) if (rank := rank_of(pid)) is not None}
    assert set(ranks) == {0, 1}
    os.kill(ranks[1], signal.SIGKILL)
    killed = time.monotonic()
    said, _ = process.communicate(timeout=60)
    assert time.monotonic() - killed < 60
    assert process.returncode != 0
    assert "SIGKILL" in said or "lost another rank" in said
    names_the_rank(said, 1)
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks.values())
    done = train("torchrun", target, *more)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "going on after step" in done.stdout
    exact = ("step", "tokens", "loss", "grad_norm", "learning_rate", "validation_loss", "bits_per_byte")
    got = [{key: line.get(key) for key in exact} for line in lines(target)]
    assert got == [{key: line.get(key) for key in exact} for line in lines(run)]


def generate(*overrides: str, more: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    environment = ENVIRONMENT | (more or {})
    return commands.run("longreach.launch.generate", *overrides, folder=Path.cwd(), environment=environment)


def test_a_checkpoint_alone_is_enough_to_generate(run: Path, tmp_path: Path) -> None:
    moved = tmp_path / "somewhere else"
    shutil.copytree(run / "checkpoints" / "step-00000006", moved)
    drawn = ("prompt=def f(x):", "max_new_tokens=12", "temperature=0.9", "seed=3")
    program = [sys.executable, "-X", "importtime", "-m", "longreach.launch.generate", f"checkpoint={moved}", *drawn]
    shown = subprocess.run(program, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert shown.returncode == 0, shown.stderr[-2000:]
    assert shown.stdout.startswith("def f(x):")
    assert len(shown.stdout) > len("def f(x):\n")
    assert "deepspeed" not in shown.stderr  # which lists all that was imported
    again = generate(f"checkpoint={run}", *drawn)
    assert again.stdout == shown.stdout


def test_generation_says_what_is_wrong(run: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(run / "checkpoints" / "step-00000006", broken)
    shard = next(broken.glob("weights-*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-10])
    for overrides, message in (
        ([f"checkpoint={broken}", "prompt=a"], "must be complete and undamaged"),
        ([f"checkpoint={tmp_path / 'none'}", "prompt=a"], "checkpoint must be a checkpoint's folder"),
        ([f"checkpoint={run}"], "prompt must be a text"),
        ([f"checkpoint={run}", "prompt=a", "temprature=1"], "Did you mean temperature?"),
    ):
        shown = generate(*overrides)
        assert shown.returncode == 1
        assert message in shown.stderr
        assert "Traceback" not in shown.stderr


def test_heads_that_the_ranks_cannot_split_end_both_before_a_folder_is_made(tmp_path: Path) -> None:
    heads = ("parallel.attention=ulysses", "model.mixers.softmax.heads=1", "model.mixers.softmax.kv_heads=1")
    done = train("torchrun", tmp_path / "run", *heads, "trainer.steps=1")
    assert done.returncode == 1
    assert done.stderr.count("error: model.mixers.softmax (SoftmaxAttention), layer 7: heads must be a multiple") == 1
    assert not (tmp_path / "run").exists()
