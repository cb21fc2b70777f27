"""Processes find one another under a launcher and do without one."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

from longreach.trainer.ranks import processes

PROGRAM = """
import torch
import torch.distributed as dist
from longreach.trainer.ranks import processes
device = processes.start(0.5, "cpu")
total = torch.ones(1, device=device)
dist.all_reduce(total)
print(f"ranks {int(total)} {dist.get_world_size()}\\n", end="", flush=True)
processes.end()
assert not dist.is_initialized()
processes.end()
processes.leave(0)
"""


def run(program, *launcher, **environment):
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")}
    kept.update(OMP_NUM_THREADS="1", PYTHONSAFEPATH="1", **environment)
    return subprocess.run([sys.executable, *launcher, *program], env=kept, capture_output=True, text=True, timeout=120)


DETERMINISM = """
import torch
from longreach.trainer.ranks import processes
for chosen in ({}, {"deterministic": False}, {"deterministic": True}):
    torch.use_deterministic_algorithms(False)
    processes.start(0.5, "cpu", **chosen)
    print(torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory)
"""


@pytest.mark.slow
def test_a_process_on_a_cpu_is_deterministic_unless_it_is_told_otherwise():
    result = run(["-c", DETERMINISM])
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["True", "False", "False", "False", "True", "False"]


def test_output_that_cannot_be_written_changes_no_status(monkeypatch):
    left = []
    monkeypatch.setattr(os, "_exit", left.append)
    with suppress(OSError), open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        print("still in the buffer")
        processes.leave(1)
    assert left == [1]


@pytest.mark.slow
def test_one_process_needs_no_launcher_and_no_port():
    result = run(["-c", PROGRAM])
    assert result.returncode == 0, result.stderr
    assert result.stdout == "ranks 1 1\n"
    assert result.stderr == ""


@pytest.mark.slow
def test_torchrun_ranks_find_one_another(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    result = run([str(tmp_path / "program.py")], "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("ranks 2 2\n") == 2


RESTARTED = """
import os, pathlib, sys
with pathlib.Path(sys.argv[1]).open("a") as file:
    file.write(".")
sys.exit(int(sys.argv[2]) if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" else 0)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("status", "ends", "starts"), [(75, 75, 2), (7, 0, 4)])
def test_ranks_that_were_told_to_end_are_not_started_again(tmp_path, status, ends, starts):
    """And ranks that fail are, as torchrun's --max-restarts says."""
    (tmp_path / "program.py").write_text(RESTARTED)
    launcher = ["-m", "longreach.trainer.ranks.torchrun", "--standalone", "--nproc-per-node=2", "--max-restarts=3"]
    result = run([str(tmp_path / "program.py"), str(tmp_path / "starts"), str(status)], *launcher)
    assert result.returncode == ends, result.stderr
    assert len((tmp_path / "starts").read_text()) == starts


FAILING = """
import os, signal, sys, time
if os.environ["RANK"] == "1":
    time.sleep(60)
if sys.argv[1] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit("error: why")
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["leaves", "killed"])
def test_what_a_rank_says_stands_alone_and_what_was_killed_is_named(tmp_path, how):
    (tmp_path / "program.py").write_text(FAILING)
    launcher = ["-m", "longreach.trainer.ranks.torchrun", "--standalone", "--nproc-per-node=2"]
    result = run([str(tmp_path / "program.py"), how], *launcher)
    assert result.returncode == 1
    if how == "leaves":
        assert result.stderr == "error: why\n"
    else:
        assert "failed (exitcode: -9) local_rank: 0" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["srun", "mpirun"])
def test_tasks_of_srun_and_mpirun_find_one_another(launcher):
    def variables(rank):
        job = str(os.getpid())
        if launcher == "mpirun":
            names = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK")
            sizes = dict.fromkeys(("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"), "2")
            return dict.fromkeys(names, str(rank)) | sizes | {"PMIX_NAMESPACE": job}
        place = dict.fromkeys(("SLURM_PROCID", "SLURM_LOCALID"), str(rank))
        return place | {"SLURM_NTASKS": "2", "SLURM_STEP_ID": "0", "SLURM_JOB_ID": job, "SLURM_NNODES": "1"}

    with ThreadPoolExecutor() as both:
        results = list(both.map(lambda rank: run(["-c", PROGRAM], **variables(rank)), range(2)))
    for result in results:
        assert result.returncode == 0, result.stderr
        assert result.stdout == "ranks 2 2\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "environment", "message"),
    [
        (PROGRAM, {"WORLD_SIZE": "2"}, "RANK, MASTER_ADDR, MASTER_PORT is not set although WORLD_SIZE is 2"),
        (PROGRAM.replace('"cpu"', '"tpu"'), {}, "device must be auto, cuda or cpu; got 'tpu'"),
    ],
)
def test_a_wrong_start_is_told(program, environment, message):
    result = run(["-c", program], **environment)
    assert result.returncode == 1
    assert message in result.stderr


SLOW_NODE = """
import os, sys, time
from longreach.parallel.mesh import Mesh
from longreach.trainer.data import token_cache
from longreach.trainer.ranks import processes
from longreach.trainer.data.corpus import open_corpus
from longreach.trainer.data.settings import DataSettings
from longreach.trainer.ranks.exchange import prepare, together
processes.start(0.05, "cpu")  # three seconds
mesh, tokenize = Mesh.create(2), token_cache.tokenize
def slowly(*given, **options):
    time.sleep(6 * mesh.rank)
    tokenize(*given, **options)
token_cache.tokenize = slowly
data = DataSettings("text", sys.argv[1], tokenizer="bytes", sequence_length=64)
corpus = prepare(mesh, lambda: open_corpus(data, f"{sys.argv[2]}/{mesh.rank}"))
together(mesh, lambda: None)
print(f"{corpus.fingerprint}\\n", end="", flush=True)
processes.end()
processes.leave(0)
"""


@pytest.mark.slow
def test_nodes_with_caches_of_their_own_may_tokenise_at_different_speeds(tmp_path):
    (tmp_path / "texts").mkdir()
    for number in range(30):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"document {number}\n" * 9)
    (tmp_path / "program.py").write_text(SLOW_NODE)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    result = run([str(tmp_path / "program.py"), str(tmp_path / "texts"), str(tmp_path / "caches")], *launcher)
    assert result.returncode == 0, result.stderr
    first, second = result.stdout.split()
    assert first == second
    assert len(list((tmp_path / "caches").glob("*/text-*/metadata.json"))) == 2
