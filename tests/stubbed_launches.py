"""A step on tensors without data through the launchers of the Triton kernels, which launch nothing."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from longreach.kernels.pointwise import triton as pointwise

DEVICE = "meta"


@contextmanager
def stubbed() -> Iterator[None]:
    """Kernels, token-local ones too, are those of a GPU for tensors on `meta`; a launch only looks at its arguments."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(InterpretedFunction, "run", _launch)
        for name, module in list(sys.modules.items()):
            if name.startswith("longreach.") and hasattr(module, "by_kernels"):
                monkeypatch.setattr(module, "by_kernels", lambda op, x: pointwise if x.device.type == DEVICE else None)
        yield


def _launch(kernel: InterpretedFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    named = {**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}
    wrong = [name for name, x in named.items() if isinstance(x, Tensor) and x.device.type != DEVICE]
    if wrong:
        raise RuntimeError(f"{kernel.fn.__name__} got {', '.join(wrong)} on another device than {DEVICE}")
    if callable(grid):
        grid(named)
