"""Processes: the default process group, whichever launcher started this process, or none."""

from __future__ import annotations

import atexit
import os
import sys
import warnings
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from ..run.failure import AGAIN
from . import launchers, peers
from .launchers import LAUNCHED


def start(timeout_minutes: float = 10.0, device: str = "auto", *, deterministic: bool | None = None) -> torch.device:
    """Joins the processes of torchrun, deepspeed, srun or mpirun into one group; returns this rank's device.

    Without a launcher the group is this process alone, and no port is opened. `device` is `auto` (CUDA where there is
    any), `cuda` or `cpu`. Collectives on the host's memory work on every device. A rank that is silent in a collective
    for `timeout_minutes` ends the run. `deterministic` asks torch and libraries for the same bits at every run, once
    for the process; None does on a CPU, where it costs nothing. Makes no group where one exists.
    Raises ValueError for a device that is not there, for an incomplete environment, and where the processes do not
    meet.
    """
    launchers.adopt()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|deepspeed)\b")
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it, without a launcher too
    chosen = _device(device)
    if deterministic or (deterministic is None and chosen.type == "cpu"):
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if dist.is_initialized():
        return chosen
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    timeout = timedelta(minutes=timeout_minutes)
    missing = [name for name in LAUNCHED if name not in os.environ]
    if not missing:
        _meet(backend, timeout)
    elif int(os.environ.get("WORLD_SIZE", "1")) == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        raise ValueError(
            f"the launcher must set {', '.join(LAUNCHED)}; {', '.join(missing)} is not set although WORLD_SIZE is "
            f"{os.environ['WORLD_SIZE']}. Start the run with torchrun or deepspeed"
        )
    return chosen


def limit_waiting() -> None:
    """Has groups that a library has made wait no longer than that of all ranks; their own limit is half an hour.

    By private means of torch, as DeepSpeed gives no limit to its groups: a rank that is silent would hold the others.
    """
    host = torch.device("cpu")
    whole = distributed_c10d._get_default_group()
    limit = whole._get_backend(host).options._timeout
    for group in list(distributed_c10d._world.pg_map):
        if group is not whole and dist.get_rank(group) >= 0:
            distributed_c10d._set_pg_timeout(limit, group)


def _meet(backend: str, timeout: timedelta) -> None:
    try:
        dist.init_process_group(backend, timeout=timeout)
        peers.join()
    except dist.DistError as error:
        where, size = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}", os.environ["WORLD_SIZE"]
        if "EADDRINUSE" in str(error):
            raise ValueError(
                f"MASTER_PORT must be a free port of {os.environ['MASTER_ADDR']}; got {os.environ['MASTER_PORT']}, "
                "which is in use. Give another"
            ) from None
        raise ValueError(
            f"the {size} processes of WORLD_SIZE must all be started, and reach {where}; rank {os.environ['RANK']} did "
            f"not meet them ({str(error).splitlines()[0]}). Start all, and check MASTER_ADDR and MASTER_PORT"
        ) from None


def end() -> None:
    """Leaves the default process group, if there is one."""
    peers.leave()
    if dist.is_initialized():
        dist.destroy_process_group()


def leave(status: int) -> None:
    """Ends this process with a status, without taking down the interpreter and C++'s static objects.

    Threads of communicators that were still alive then were seen to abort a rank after a complete run ("terminate
    called without an active exception"), and those of a broken run may wait for ever. Where the work is done, which the
    statuses 0 and AGAIN say, exit handlers run.
    """
    if status in (0, AGAIN):
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # a full disk must not change the status, nor keep the process here
            stream.flush()
    os._exit(status)


def _device(name: str) -> torch.device:
    if name not in ("auto", "cuda", "cpu"):
        raise ValueError(f"device must be auto, cuda or cpu; got {name!r}")
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("device must be cpu on a machine without CUDA; got cuda")
    local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if count == 1 and launchers.one_gpu_a_process():
        local = 0
    if local >= count:
        raise ValueError(f"processes on one machine must not exceed its {count} GPU(s); got local rank {local}")
    return torch.device("cuda", local)
