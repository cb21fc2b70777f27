"""Dispatch: which implementation of an op runs, and why."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

logger = logging.getLogger("longreach")

# Every op of this package has the first three; some can run by the kernels of a library.
IMPLEMENTATIONS = ("triton", "chunked", "reference")
BACKENDS = (*IMPLEMENTATIONS, "library")

# What "library" stands for, as a module and the package that brings it, where an op has no other.
LIBRARIES = {
    "gated_linear_attention": ("fla", "flash-linear-attention"),
    "delta_rule": ("fla", "flash-linear-attention"),
    "grouped_matmul": ("torch", "torch"),
    "rms_norm": ("liger_kernel", "liger-kernel"),
    "swiglu": ("liger_kernel", "liger-kernel"),
    "cross_entropy": ("liger_kernel", "liger-kernel"),
}

AWAY_FROM_CPU = 32  # times as many numbers are made at a time

_choices: dict[str, str] = {}
_announced: set[tuple[str, str, str, str]] = set()
_noted: ContextVar[set[str] | None] = ContextVar("noted", default=None)


def choose(choices: Mapping[str, str], device: torch.device | str) -> None:
    """Says what "auto" means for the ops named, in this process from now on; of the others, what `resolve` says.

    To be called once, before anything runs on `device`. Raises ValueError, naming `kernels.<op>`, for Triton and
    libraries where they cannot run, and for a library that is not installed.
    """
    _choices.clear()
    for op, backend in choices.items():
        module, package = LIBRARIES.get(op, ("torch", "torch"))
        if backend == "library" and find_spec(module) is None:
            raise ValueError(
                f"kernels.{op} must be one that is installed; got 'library', which is {package}. "
                f"Install it (pip install {package}), or use auto"
            )
        if backend in ("triton", "library") and torch.device(device).type != "cuda" and not interpreted():
            raise ValueError(
                f"kernels.{op} must be one that runs on {torch.device(device).type}; got {backend!r}, which needs CUDA "
                "or Triton's interpreter (TRITON_INTERPRET=1 before Python starts). Use auto or chunked"
            )
    _choices.update(choices)


def asked(op: str, backend: str) -> str:
    """The backend asked for: for "auto", the one chosen for the op in this process."""
    note(op)
    return _choices.get(op, "auto") if backend == "auto" else backend


@contextmanager
def noting() -> Iterator[set[str]]:
    """Within, in this thread, the names of all ops that run, or would on tensors with data, join the set."""
    found = set[str]()
    before = _noted.set(found)
    try:
        yield found
    finally:
        _noted.reset(before)


def note(op: str) -> None:
    """Tells `noting` of an op that runs."""
    if (found := _noted.get()) is not None:
        found.add(op)


def best(device: torch.device | str, dtype: torch.dtype) -> str:
    """The implementation of this package that suits tensors of `dtype` on a device: Triton on CUDA, but for float64."""
    return "triton" if torch.device(device).type == "cuda" and dtype != torch.float64 else "chunked"


def resolve(
    op: str,
    backend: str,
    tensor_device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    offered: tuple[str, ...] = IMPLEMENTATIONS,
    why: str | None = None,
) -> str:
    """The implementation of `op` that runs for tensors of `dtype` on `tensor_device`, one of those `offered`.

    "auto" is what `choose` was told. By default it is Triton on CUDA, and chunked torch on other devices and for
    float64, which the kernels do not support; never a library, whose op asks by itself.
    "reference", the recurrence or the dense matrix as it is written, runs only on request, or where nothing else is
    offered: an op can have no other, and of a single token there are no chunks.
    "triton" on request also runs on other devices, under Triton's interpreter. There is no silent fallback: an unknown
    backend, or one that cannot run, raises ValueError. The choice is announced with its reason: `why`, or
    whether it was asked for.
    """
    device = torch.device(tensor_device).type
    chosen = asked(op, backend)
    backend = chosen if device != "meta" else backend
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend must be 'auto' or one of {', '.join(BACKENDS)}; got {backend!r}. Choose one")
    own = best(device, dtype)
    preferred = dict.fromkeys((own, "chunked", "reference"))
    chosen = backend if backend != "auto" else next((name for name in preferred if name in offered), own)
    if chosen not in offered:
        raise ValueError(
            f"backend must be one that {op} has, {' or '.join(offered)}; got {backend!r} on {device}, which is "
            f"{chosen}. Choose one, or give the op a {chosen}.py"
        )
    if backend == "triton":
        if dtype == torch.float64:
            raise ValueError(f"backend must not be 'triton' for float64 tensors; {op} got them. Use 'chunked' there")
        if device != "cuda" and not interpreted():
            raise ValueError(
                f"backend must be one that runs on {device}; {op} got 'triton', which needs CUDA or Triton's "
                "interpreter (TRITON_INTERPRET=1 before Python starts). Use 'auto' or 'chunked'"
            )
    announce(op, device, chosen, why or ("chosen for this device" if backend == "auto" else "by request"))
    return chosen


def announce(op: str, device: str, chosen: str, why: str) -> None:
    """Tells the logger "longreach" what runs an op on a kind of device and why: every choice, each of them once.

    A choice can change with the data, so an op may be announced more than once.
    """
    choice = (op, device, chosen, why)
    if device != "meta" and choice not in _announced:  # tensors on meta are not computed
        _announced.add(choice)
        logger.info("%s on %s: %s, %s", *choice)


def by_kernels(op: str, x: Tensor) -> ModuleType | None:
    """The Triton kernels of token-local math if they run for x, else None.

    Under torch.compile it is None too, since torch.compile fuses the torch form with the code around it; and where a
    library was chosen, for what does not go to it. Raises ValueError where Triton was chosen and cannot run.
    """
    if torch.compiler.is_compiling() or (chosen := asked(op, "auto")) == "library":
        return None
    if x.device.type != "cuda" and chosen != "triton":
        return None
    if resolve(op, "auto", x.device, x.dtype) != "triton":
        return None
    from .pointwise import triton as kernels

    return kernels


def by_library(op: str, x: Tensor) -> bool:
    """Whether a library was chosen for token-local math, and x is something to compute; not under torch.compile."""
    if torch.compiler.is_compiling() or asked(op, "auto") != "library":
        return False
    return x.device.type != "meta" and x.numel() > 0


def unrecorded() -> saved_tensors_hooks:
    """Within, what is saved for backward is no part of what activation checkpointing recomputes: for trials."""
    return saved_tensors_hooks(lambda x: x, lambda x: x)


def interpreted() -> bool:
    """Whether Triton's kernels run under its interpreter in this process, on tensors of any device."""
    from triton import knobs

    return bool(knobs.runtime.interpret)


_stood_for: ContextVar[str | None] = ContextVar("stood_for", default=None)


@contextmanager
def standing_for(kind: str) -> Iterator[None]:
    """Within, torch forms cut tensors on `meta` as they cut those of a device of this kind, "cpu" or "cuda"."""
    token = _stood_for.set(kind)
    try:
        yield
    finally:
        _stood_for.reset(token)


def kind_of(device: torch.device) -> str:
    """The type of the device, or what `meta` stands for."""
    return (_stood_for.get() if device.type == "meta" else None) or device.type


def at_a_time(numbers: int, device: torch.device) -> int:
    """How many numbers a torch form makes at a time, given how many suit a CPU's cache.

    Elsewhere they are more, so that starting the work does not take longer than doing it; they are still independent of
    the length of the rows.
    """
    return numbers if kind_of(device) == "cpu" else AWAY_FROM_CPU * numbers


def starts(length: int, size: int, device: torch.device) -> range:
    """Where the parts of `size` start that a row is computed in, one after the other.

    On `meta`, where nothing is computed, those of the first two: no later one holds more than they do.
    """
    return range(0, min(length, 2 * size) if device.type == "meta" else length, size)
