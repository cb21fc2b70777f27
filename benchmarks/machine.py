"""The machine that benchmarks run on: its name, the memory that a process holds, and where results are kept."""

from __future__ import annotations

import ctypes
import datetime
import gc
import platform
from collections.abc import Callable
from pathlib import Path

import torch

CHECKOUT = Path(__file__).resolve().parents[1]
RESULTS = CHECKOUT / "benchmarks" / "results"


def replace(page: Path, markers: tuple[str, str], text: str) -> None:
    """Puts the text in the place of that between a page's markers; what is said about it stays."""
    before, first, rest = page.read_text().partition(markers[0])
    _, last, after = rest.partition(markers[1])
    if not (first and last):
        raise SystemExit(f"{page} must hold the lines {markers[0]} and {markers[1]}. Put them back")
    page.write_text(f"{before}{first}\n{text}\n{last}{after}")


def machine(device: str) -> str:
    chip = (
        torch.cuda.get_device_name()
        if device == "cuda"
        else f"{platform.machine()} CPU, {torch.get_num_threads()} thread"
    )
    return f"{datetime.date.today()}; {chip}; torch {torch.__version__}, Python {platform.python_version()}"


def peak_bytes(run: Callable[[], object], device: str) -> int:
    """The most memory that the pass held beyond what was there before it."""
    gc.collect()
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


def resident(name: str) -> int:
    """Bytes of this process's memory: "VmRSS" now, "VmHWM" at most since the peak started."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def keep_memory() -> None:
    """From now on glibc keeps what is freed: giving large tensors back costs page faults for each of the next ones."""
    _set_options(((-4, 0), (-1, 2**31 - 1)))  # M_MMAP_MAX, M_TRIM_THRESHOLD


def return_memory() -> None:
    """From now on glibc gives back what is freed, so that what is resident is in use."""
    _set_options(((-4, 2**20), (-3, 2**16), (-1, 2**16), (-2, 0)))  # and M_MMAP_THRESHOLD, M_TOP_PAD


def _set_options(options: tuple[tuple[int, int], ...]) -> None:
    libc = ctypes.CDLL(None)
    for option, value in options:
        if not libc.mallopt(option, value):
            raise OSError("mallopt must be that of glibc; it refused an option. Run this on Linux")
