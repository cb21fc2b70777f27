"""The machine: versions, and what its device reaches in a plain matrix product and a copy."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ... import __path__ as package
from .step import Here, Step

PACKAGES = ("deepspeed", "hydra-core", "transformers", "flash-attn", "flash-linear-attention", "liger-kernel", "pytest")
FACTS, RATES = "Versions", "What the device reaches"


def steps(here: Here) -> list[Step]:
    return [Step("versions", versions), Step("rates", rates)]


def versions(here: Here) -> None:
    """A row for each fact; the report's head repeats them."""
    for what, value in facts(here.on_gpu).items():
        here.row(FACTS, what=what, value=value)


def facts(on_gpu: bool) -> dict[str, str]:
    found = {"commit": _commit(), "Python": platform.python_version(), "torch": torch.__version__}
    found["CUDA"] = torch.version.cuda or "none"
    found["Triton"] = _version("triton")
    found |= {name: _version(name) for name in PACKAGES}
    found["CPU cores"] = str(os.cpu_count())
    if on_gpu:
        device = torch.cuda.get_device_properties(0)
        found["driver"] = _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "unknown"
        found["GPU"] = f"{device.name}, {device.total_memory / 2**30:.0f} GiB, sm_{device.major}{device.minor}"
        found["processors"] = str(device.multi_processor_count)
        found["cuDNN"] = str(torch.backends.cudnn.version())
    else:
        found["GPU"] = "none: every part runs on the CPU, at small sizes; no figure here says anything about a GPU"
    return found


def rates(here: Here) -> None:
    """TFLOP/s of a square matrix product and TB/s of a copy: the best of several, after one that warms up."""
    n, dtype = (8192, torch.bfloat16) if here.on_gpu else (512, torch.float32)
    x, y = (torch.randn(n, n, device=here.device, dtype=dtype) for _ in range(2))
    product = best_seconds(lambda: torch.mm(x, y), here)
    here.row(RATES, what=f"matrix product of {n}, {dtype}", rate=2 * n**3 / product / 1e12, unit="TFLOP/s")
    source = torch.empty(2**30 if here.on_gpu else 2**24, dtype=torch.uint8, device=here.device)
    target = torch.empty_like(source)
    copy = best_seconds(lambda: target.copy_(source), here)
    here.row(RATES, what="copy, bytes read and written", rate=2 * source.numel() / copy / 1e12, unit="TB/s")


def best_seconds(run: Callable[[], object], here: Here, times: int = 10) -> float:
    """The shortest of several runs."""
    run()
    best = float("inf")
    for _ in range(times):
        if here.on_gpu:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            torch.cuda.synchronize()
            best = min(best, begin.elapsed_time(end) / 1e3)
        else:
            started = time.perf_counter()
            run()
            best = min(best, time.perf_counter() - started)
    return best


def _commit() -> str:
    """The commit of the checkout, and whether it has changes."""
    folder = str(Path(package[0]).resolve())
    commit = _said("git", "-C", folder, "rev-parse", "--short=10", "HEAD")
    if not commit:
        return "unknown: this is no git checkout"
    return commit + (" with changes" if _said("git", "-C", folder, "status", "--porcelain", "-uno") else "")


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _said(*command: str) -> str:
    """The first line that a command prints, or nothing where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.splitlines()[0].strip() if done.stdout.strip() else ""
