"""Launchers: which rank of which world the environment makes this process, whoever started it.

torchrun and DeepSpeed's launcher set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; what srun and mpirun set is
translated into these. What cannot form a world is refused: processes that each thought themselves alone would train
several times into one folder.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import MutableMapping
from typing import NamedTuple

LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
ADOPTED = "LONGREACH_LAUNCHER"  # srun or mpirun, once its variables have been translated
Environment = MutableMapping[str, str]


class _Mpi(NamedTuple):
    """The variables of one kind of mpirun; one of those in `job` distinguishes jobs on the same machine."""

    name: str
    size: str
    rank: str
    local_rank: str
    local_size: str
    job: tuple[str, ...] = ()


MPI = (
    _Mpi(
        "Open MPI",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
        ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "OMPI_MCA_orte_hnp_uri"),
    ),
    _Mpi("MPICH", "PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    _Mpi(
        "MVAPICH",
        "MV2_COMM_WORLD_SIZE",
        "MV2_COMM_WORLD_RANK",
        "MV2_COMM_WORLD_LOCAL_RANK",
        "MV2_COMM_WORLD_LOCAL_SIZE",
    ),
)


def adopt(environment: Environment = os.environ) -> str | None:
    """Sets torchrun's variables from those of srun or mpirun, where those started this process; returns what to say.

    A rank from torchrun or DeepSpeed is kept, inside an srun or mpirun too. Raises ValueError, on every
    process alike, where the variables say that this is one of several but not how they meet.
    """
    if environment.get("RANK") and environment.get("WORLD_SIZE"):
        return None
    note = None
    # mpirun may itself have been started by srun, whose variables then count its daemons; and srun may set some of
    # mpirun's variables, but not all.
    started = [mpi for mpi in MPI if _number(environment, mpi.size, 1) > 1]
    whole = [mpi for mpi in started if not _missing(environment, (mpi.rank, mpi.local_rank))]
    if whole:
        _adopt_mpi(environment, whole[0])
    elif _number(environment, "SLURM_STEP_NUM_TASKS", _number(environment, "SLURM_NTASKS", 1)) > 1:
        note = _adopt_slurm(environment)
    elif started:
        _require(environment, started[0].name, (started[0].rank, started[0].local_rank), started[0].size)
    if environment.get("RANK") or _number(environment, "WORLD_SIZE", 1) > 1:
        _require(environment, "the launcher", LAUNCHED, "RANK", "WORLD_SIZE")
    return note


def rank(environment: Environment = os.environ) -> int:
    """This process's rank as its launcher counts, before anything is checked: for commands that run once."""
    names = ("RANK", *(mpi.rank for mpi in MPI), "SLURM_PROCID")
    return next((int(value) for name in names if (value := environment.get(name, "")).isdecimal()), 0)


def command(environment: Environment = os.environ) -> list[str]:
    """What started this process, as the beginning of a command line; empty where it was Python alone."""
    launcher, ranks = environment.get(ADOPTED), environment.get("WORLD_SIZE", "1")
    return [launcher, "-n", ranks] if launcher else []


def one_gpu_a_process(environment: Environment = os.environ) -> bool:
    """Whether Slurm shows each of its tasks the GPU that is its own, as device 0."""
    binding = ("SLURM_GPUS_PER_TASK", "SLURM_GPU_BIND", "SLURM_NTASKS_PER_GPU")
    return environment.get(ADOPTED) == "srun" and any(environment.get(name) for name in binding)


def _adopt_slurm(environment: Environment) -> str | None:
    tasks = environment.get("SLURM_NTASKS")
    if not environment.get("SLURM_STEP_ID"):
        if not environment.get("SLURM_PROCID"):
            # A shell of salloc: whoever starts one process there gets one.
            return f"SLURM_NTASKS is {tasks}, but srun did not start this process: it trains alone"
        raise ValueError(
            f"Slurm's {tasks} tasks must be started by srun; SLURM_STEP_ID is not set, as in a batch script, and this "
            "process would train alone. Start the run with srun or torchrun (launch/slurm.sbatch does), or unset "
            "SLURM_NTASKS to train in one process"
        )
    size = _number(environment, "SLURM_STEP_NUM_TASKS", _number(environment, "SLURM_NTASKS", 1))
    _require(environment, "srun", ("SLURM_PROCID", "SLURM_LOCALID"), "SLURM_NTASKS")
    hosts = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST") or ""
    first = first_host(hosts)
    nodes = _number(environment, "SLURM_STEP_NUM_NODES", _number(environment, "SLURM_NNODES", int(first == hosts)))
    job = "-".join(environment.get(name, "0") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    head = "127.0.0.1" if nodes == 1 else first or environment.get("SLURM_LAUNCH_NODE_IPADDR", "")
    local_size = size if nodes == 1 else None
    rank, local = _number(environment, "SLURM_PROCID", 0), _number(environment, "SLURM_LOCALID", 0)
    _set(environment, "srun", rank, size, local, local_size, head, job)
    return None


def _adopt_mpi(environment: Environment, mpi: _Mpi) -> None:
    size, local_size = _number(environment, mpi.size, 1), _number(environment, mpi.local_size, 0)
    hosts = environment.get("SLURM_JOB_NODELIST") or ""
    head = "127.0.0.1" if local_size == size else first_host(hosts)
    job = next((environment[name] for name in mpi.job if environment.get(name)), None)
    rank, local = _number(environment, mpi.rank, 0), _number(environment, mpi.local_rank, 0)
    _set(environment, "mpirun", rank, size, local, local_size or None, head, job)


def _set(
    environment: Environment,
    launcher: str,
    rank: int,
    size: int,
    local_rank: int,
    local_size: int | None,
    head: str,
    job: str | None,
) -> None:
    """`job` distinguishes this run from others on the machine: their ports differ. MASTER_ADDR and MASTER_PORT win."""
    head = environment.get("MASTER_ADDR") or head
    if not 0 <= rank < size:
        raise ValueError(f"{launcher} must number its processes from 0 to {size - 1}; got {rank}. Use torchrun instead")
    if not head:
        raise ValueError(
            f"MASTER_ADDR must be the address of the first process's machine; {launcher} started {size} processes on "
            f"several machines and it is not set. Give it ({launcher} -x MASTER_ADDR=HOST), or use torchrun"
        )
    port = str(29500 if job is None else 20000 + zlib.crc32(job.encode()) % 12000)
    environment.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(local_rank), MASTER_ADDR=head)
    environment["MASTER_PORT"] = environment.get("MASTER_PORT") or port
    if local_size is not None:
        environment["LOCAL_WORLD_SIZE"] = str(local_size)
    environment[ADOPTED] = launcher


def first_host(hosts: str) -> str:
    """The first of Slurm's list of nodes: node003 of `node[003-010,12],gpu1`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", hosts)
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first.group() if first else "")


def _missing(environment: Environment, names: tuple[str, ...]) -> list[str]:
    return [name for name in names if not environment.get(name)]


def _require(environment: Environment, launcher: str, names: tuple[str, ...], *although: str) -> None:
    """Raises ValueError where one of `names` is not set although other variables announce several processes."""
    if missing := _missing(environment, names):
        values = " and ".join(f"{name} is {environment[name]}" for name in although if environment.get(name))
        raise ValueError(
            f"{launcher} must set {', '.join(names)}; {', '.join(missing)} is not set although {values}. "
            "Start the run with torchrun or deepspeed"
        )


def _number(environment: Environment, name: str, default: int) -> int:
    value = environment.get(name)
    if not value:
        return default
    try:
        return int(value)
    except ValueError:
        raise ValueError(f"{name} must be a number; got {value!r}. Unset it, or start the run with torchrun") from None
