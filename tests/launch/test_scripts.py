"""The shell scripts, with stand-ins for Python, Slurm's commands and GPUs: what they start, and with what."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
SLURM = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_ID": "42", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_PER_TASK": "8"}


def program(folder: Path, name: str, text: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A Python that counts `$GPUS` devices, finds a free port, installs nothing, and prints what it is to run."""
    program(
        tmp_path / "venv" / "bin",
        "python",
        'case "$*" in *device_count*) echo "${GPUS:-0}";; *socket*) echo 4567;; *install.py*|*"import longreach"*) ;;'
        ' *) echo "$@"; echo "working in $PWD"; exit "${STATUS:-0}";; esac',
    )
    hidden = ("SLURM_", "OMPI_", "CUDA_VISIBLE", "RANKS", "PORT", "HOSTFILE", "NODES")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    return kept | {"VIRTUAL_ENV": str(tmp_path / "venv")}


def started(script: str, environment: dict[str, str], **more: str) -> str:
    done = subprocess.run(
        ["bash", str(LAUNCH / script), "a=1"], env=environment | more, capture_output=True, text=True, timeout=30
    )
    return done.stdout if done.returncode == 0 else f"refused: {done.stderr}"


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"GPUS": "2", "CUDA_VISIBLE_DEVICES": "5,7"}, "--master_port 4567 --include localhost:5,7 --module"),
        ({"GPUS": "3", "CUDA_VISIBLE_DEVICES": "5, 7,1", "RANKS": "2"}, "--include localhost:5,7 --module"),
        ({"GPUS": "4"}, "--master_port 4567 --num_gpus 4 --module"),
        ({"PORT": "99"}, "--master_port 99 --num_gpus 2 --module"),
        ({"GPUS": "8", "HOSTFILE": "hosts"}, "--num_gpus 8 --master_port 29500 --hostfile hosts --module"),
        ({"GPUS": "2", "CUDA_VISIBLE_DEVICES": "GPU-ab,GPU-cd"}, "refused: CUDA_VISIBLE_DEVICES must hold numbers"),
        ({"GPUS": "2", "CUDA_VISIBLE_DEVICES": "0,1", "RANKS": "3"}, "refused: RANKS must be at most the 2 GPU"),
    ],
)
def test_deepspeed_takes_the_visible_gpus_and_a_free_port(
    environment: dict[str, str], variables: dict[str, str], expected: str
) -> None:
    assert expected in started("deepspeed.sh", environment, **variables)


@pytest.mark.parametrize("script", ["torchrun.sh", "deepspeed.sh", "quickstart.sh"])
@pytest.mark.parametrize(
    "tasks", [{"SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2"}, {"OMPI_COMM_WORLD_SIZE": "2"}]
)
def test_a_script_that_is_started_twice_is_refused(
    environment: dict[str, str], script: str, tasks: dict[str, str]
) -> None:
    said = started(script, environment, **tasks)
    assert said.startswith("refused: this script must be started once; got 2 tasks")
    assert "started once" not in started(script, environment, SLURM_NTASKS="2")  # salloc's shell


@pytest.mark.parametrize("script", ["torchrun.sh", "deepspeed.sh", "quickstart.sh"])
def test_a_script_stays_in_the_users_folder(environment: dict[str, str], tmp_path: Path, script: str) -> None:
    done = subprocess.run(
        ["bash", str(LAUNCH / script)], env=environment, capture_output=True, text=True, timeout=30, cwd=tmp_path
    )
    assert f"working in {tmp_path}" in done.stdout


@pytest.mark.parametrize("script", ["torchrun.sh", "deepspeed.sh"])
@pytest.mark.parametrize(("status", "times"), [("75", 3), ("0", 1), ("1", 1)])
def test_a_run_that_a_signal_has_ended_is_started_again(
    environment: dict[str, str], script: str, status: str, times: int
) -> None:
    command = ["bash", str(LAUNCH / script), "a=1"]
    variables = environment | {"STATUS": status, "RESTARTS": "2"}
    done = subprocess.run([*command, "run.dir=x"], env=variables, capture_output=True, text=True, timeout=30)
    assert done.returncode == int(status)
    assert done.stdout.count("longreach.launch.train a=1 run.dir=x") == times
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    assert "RESTARTS must come with run.dir=" in done.stderr


STEP = """
import os, signal, sys, time
assert signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN  # as torchrun, which would die of it
heard = []
signal.signal(signal.SIGUSR1, lambda *a: heard.append(1))
open(os.environ["STARTED"], "w").write(str(os.getpid()))
end = time.monotonic() + float(os.environ["SECONDS_LONG"])
while not heard and time.monotonic() < end:
    time.sleep(0.01)
time.sleep(0.1)
sys.exit(int(os.environ.get("STATUS", 0)))
"""


def batch(tmp_path: Path, environment: dict[str, str], ask: int | None, **more: str) -> tuple[int, list[str]]:
    """The status of slurm.sbatch, and what it called of Slurm; `ask`: what it hears."""
    tools, log, begun = tmp_path / "tools", tmp_path / "log", tmp_path / "started"
    (tmp_path / "step.py").write_text(STEP)
    record = f'echo "$(basename "$0") $*" >>{log}'
    program(tools, "scontrol", f'if [ "$1" = show ]; then printf "n1\\nn2\\n"; else {record}; fi')
    program(tools, "scancel", f"{record}; kill -USR1 $(cat {begun})")
    program(tools, "srun", f'{record}; while [[ $1 == --* ]]; do shift; done; SLURM_NODEID=0 exec "$@"')
    program(
        tmp_path / "launch",
        "torchrun.sh",
        f'set -- "$@" "$NODES" "$HEAD"; {record}; exec python {tmp_path / "step.py"}',
    )
    variables = environment | SLURM | {"SLURM_SUBMIT_DIR": str(tmp_path), "STARTED": str(begun)} | more
    variables["PATH"] = f"{tools}:{os.environ['PATH']}"
    job = subprocess.Popen(["bash", str(LAUNCH / "slurm.sbatch"), "model=x", "run.name=a b"], env=variables)
    deadline = time.monotonic() + 20
    while not (begun.exists() and begun.read_text()):
        assert job.poll() is None or begun.exists()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    if ask is not None:
        job.send_signal(ask)
    return job.wait(20), log.read_text().splitlines()


def test_slurm_gives_the_cpus_to_its_tasks(tmp_path: Path, environment: dict[str, str]) -> None:
    status, called = batch(tmp_path, environment, ask=None, SECONDS_LONG="0.1")
    assert status == 0
    assert "--cpus-per-task=8" in called[0]
    assert called[-1].endswith("run.dir=runs/slurm-42 model=x run.name=a b 2 n1")
    assert "#SBATCH --signal=B:USR1@" in (LAUNCH / "slurm.sbatch").read_text()


def test_slurm_queues_a_run_again_that_saved_before_its_time_limit(tmp_path: Path, environment: dict[str, str]) -> None:
    status, called = batch(tmp_path, environment, signal.SIGUSR1, SECONDS_LONG="15", STATUS="75")
    assert status == 0
    assert called[-2:] == ["scancel --signal=USR1 42", "scontrol requeue 42"]
    assert not list(tmp_path.glob("*.interrupted"))


def test_slurm_queues_a_run_again_whose_ranks_heard_of_it_first(tmp_path: Path, environment: dict[str, str]) -> None:
    status, called = batch(tmp_path, environment, None, SECONDS_LONG="0.1", STATUS="75")
    assert status == 0
    assert called[-1] == "scontrol requeue 42"


@pytest.mark.parametrize("status", [0, 3])
def test_slurm_does_not_queue_a_run_again_that_failed_or_came_to_its_end(
    tmp_path: Path, environment: dict[str, str], status: int
) -> None:
    got, called = batch(tmp_path, environment, signal.SIGUSR1, SECONDS_LONG="15", STATUS=str(status))
    assert got == status
    assert called[-1] == "scancel --signal=USR1 42"


def test_slurm_does_not_queue_a_run_again_that_was_cancelled(tmp_path: Path, environment: dict[str, str]) -> None:
    status, called = batch(tmp_path, environment, signal.SIGTERM, SECONDS_LONG="0.5", STATUS="75")
    assert status == 75
    assert not any("requeue" in line for line in called)
