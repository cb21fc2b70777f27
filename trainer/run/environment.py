"""Environment: what a run was started with and on, kept in run.dir so that it can be done again."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch.cuda import nccl

NAME = "environment.json"
STARTS_KEPT = 100
GIT_SECONDS = 10.0
# What changes numbers, speed or place of a run. Never all of them: others hold keys and passwords.
VARIABLES = (
    "CUBLAS_WORKSPACE_CONFIG", "CUDA_DEVICE_MAX_CONNECTIONS", "CUDA_LAUNCH_BLOCKING", "CUDA_VISIBLE_DEVICES",
    "HF_HUB_OFFLINE", "LOCAL_WORLD_SIZE", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MKL_NUM_THREADS",
    "NCCL_ALGO", "NCCL_DEBUG", "NCCL_IB_DISABLE", "NCCL_NVLS_ENABLE", "NCCL_P2P_DISABLE", "NCCL_PROTO",
    "NCCL_SOCKET_IFNAME", "NVIDIA_TF32_OVERRIDE", "OMP_NUM_THREADS", "PYTHONHASHSEED", "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF", "SLURM_JOB_ID", "SLURM_JOB_NODELIST", "TORCHELASTIC_RESTART_COUNT",
    "TORCHELASTIC_RUN_ID", "TORCH_NCCL_ASYNC_ERROR_HANDLING", "TRITON_INTERPRET", "WORLD_SIZE",
)  # fmt: skip


def describe(command: list[str], device: torch.device) -> dict[str, Any]:
    """This start of a run: command, code, versions, machine, and the variables of `VARIABLES` that are set."""
    return {
        "time": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "command": shlex.join(command),
        "folder": os.getcwd(),
        "git": {
            "longreach": git_state(Path(__file__).resolve().parents[2], whole=True),
            "folder": git_state(Path.cwd()),
        },
        "host": socket.gethostname(),
        "system": platform.platform(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "torch": {
            "version": torch.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version() if device.type == "cuda" else None,
            "nccl": ".".join(map(str, nccl.version())) if device.type == "cuda" else None,
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "threads": torch.get_num_threads(),
        },
        "gpus": _gpus(device),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "packages": packages(),
    }


def packages() -> dict[str, str]:
    """The version of every distribution that is installed, by name."""
    return dict(sorted((each.name, each.version) for each in importlib.metadata.distributions() if each.name))


def git_state(folder: Path, *, whole: bool = False) -> dict[str, Any] | None:
    """Commit and branch of the checkout that holds a folder, and what differs from it; None where there is none.

    whole: the folder is all of the checkout, or there is none: what is installed below another project is not its code.
    changed: tracked files that were. diff_sha256: of the difference itself, which is not kept.
    """
    commit, top = _git(folder, "rev-parse", "HEAD"), _git(folder, "rev-parse", "--show-toplevel")
    if commit is None or top is None or (whole and Path(top).resolve() != folder):
        return None
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    diff = _git(folder, "diff", "HEAD") if changed else None
    return {
        "commit": commit,
        "branch": _git(folder, "rev-parse", "--abbrev-ref", "HEAD"),
        "dirty": None if changed is None else bool(changed),
        "changed": [line[2:].strip() for line in (changed or "").splitlines()],
        "diff_sha256": hashlib.sha256(diff.encode()).hexdigest() if diff is not None else None,
    }


def keep(folder: Path, step: int, start: dict[str, Any]) -> None:
    """Adds a start of the run, from after `step`, to its environment.json, a list. Raises OSError."""
    path, aside = folder / NAME, folder / f"{NAME}.partial"
    starts: list[Any] = []
    with suppress(FileNotFoundError, ValueError):
        before = json.loads(path.read_text(encoding="utf-8"))
        starts = before if isinstance(before, list) else []
    try:
        text = json.dumps([*starts, {"step": step, **start}][-STARTS_KEPT:], indent=1)
        aside.write_text(text + "\n", encoding="utf-8")
        os.replace(aside, path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


def _gpus(device: torch.device) -> list[dict[str, Any]]:
    if device.type != "cuda":
        return []
    found = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    return [{"name": gpu.name, "memory_bytes": gpu.total_memory, "sm": f"{gpu.major}.{gpu.minor}"} for gpu in found]


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, timeout=GIT_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode(errors="replace").rstrip("\n")
