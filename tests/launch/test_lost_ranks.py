"""Ranks that stop answering, and nodes that are lost: all ranks end, with the reason, and fewer go on."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import Command
from test_runs import ENVIRONMENT, SETTINGS, children, kill, saved, wait_for
from test_train import slurm

pytestmark = pytest.mark.slow


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number}.txt").write_text(f"text {number}, and then some more of it. " * 20)
    return ["data=text", f"data.path={folder}", f"data.cache_dir={tmp_path / 'cache'}"]


def test_a_rank_that_hangs_ends_the_others_in_the_time_that_is_set(texts: list[str], tmp_path: Path) -> None:
    given = [*SETTINGS, *texts, "run.dir=run", "parallel.sequence=2", "trainer.steps=100000"]
    program = ["longreach.launch.train", *given, "parallel.timeout_minutes=0.1"]
    first, second = (
        Command(*program, folder=tmp_path, environment=ENVIRONMENT | slurm(task), stderr=subprocess.PIPE)
        for task in (0, 1)
    )
    try:
        wait_for(first, lambda: saved(tmp_path / "run"))
        os.kill(second.pid, signal.SIGSTOP)
        said, reason = first.communicate(timeout=60)
        assert first.returncode == 1, said[-3000:]
        assert reason.count("rank 1 was killed or stopped answering; the others end too") == 1
        newest = saved(tmp_path / "run")[-1]
        assert f"to resume from {newest}: srun -n 2 python -m longreach.launch.train" in reason
        os.kill(second.pid, signal.SIGCONT)
        _, also = second.communicate(timeout=60)
        assert second.returncode == 1
        assert "Traceback" not in also
    finally:
        for process in (first, second):
            kill(process)
    again = Command("longreach.launch.train", *given[:-2], "trainer.steps=1", folder=tmp_path, environment=ENVIRONMENT)
    assert f"going on after step {int(newest[5:])} from" in again.communicate(timeout=120)[0]


@pytest.mark.many
def test_a_node_that_is_lost_leaves_the_run_to_the_others(texts: list[str], tmp_path: Path) -> None:
    """Two agents of torchrun, of a process each, stand for two nodes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        end = f"localhost:{free.getsockname()[1]}"
    elastic = ["--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=3", "--rdzv-backend=c10d", "--rdzv-id=night"]
    program = [sys.executable, "-m", "longreach.trainer.ranks.torchrun", *elastic, f"--rdzv-endpoint={end}"]
    program += ["-m", "longreach.launch.train", *SETTINGS, *texts, "run.dir=run", "trainer.steps=120"]
    nodes = []
    for name in ("first", "second"):
        with (tmp_path / name).open("w") as output:
            pipes = {"stdout": output, "stderr": subprocess.STDOUT}
            nodes.append(subprocess.Popen(program, env=ENVIRONMENT, cwd=tmp_path, text=True, **pipes))
        time.sleep(3)  # the first one to come has the store, without which the others cannot go on
    try:
        wait_for(nodes[0], lambda: len(saved(tmp_path / "run")) > 1)
        assert len(children(nodes[1].pid)) == 1
        kill(nodes[1])
        assert nodes[0].wait(180) == 0, (tmp_path / "first").read_text()[-3000:]
    finally:
        for node in nodes:
            kill(node)
    said = (tmp_path / "first").read_text()
    assert said.count("was killed or stopped answering; the others end too") == 1
    assert "on 2 data x 1 sequence rank(s)" in said
    assert "on 1 data x 1 sequence rank(s)" in said
    assert said.count("going on after step") == 1
    steps = [json.loads(line)["step"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 121))
    starts = json.loads((tmp_path / "run/environment.json").read_text())
    assert [start["variables"]["WORLD_SIZE"] for start in starts] == ["2", "1"]
