"""Classes of transformers as oracles: what they compute in torch, whatever libraries of kernels are installed.

Some of transformers' modules look for flash-linear-attention and others when they are imported, and run its kernels
from then on, which need a GPU. Tests that import such a module here get the definitions, whichever test came first.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest

KERNELS = ("fla", "causal_conv1d", "mamba_ssm")  # which transformers' classes run where they are installed


@contextmanager
def definitions_alone() -> Iterator[None]:
    """What transformers imports meanwhile runs its own definitions in torch, not the kernels of libraries."""
    found: dict[str, Any] = {name: sys.modules.get(name) for name in KERNELS}
    sys.modules.update(dict.fromkeys(KERNELS))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name, module in found.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def definitions_of(family: str) -> ModuleType:
    """transformers' module with the classes of a family, such as "qwen3_next"; skips the test without transformers."""
    with definitions_alone():
        return pytest.importorskip(f"transformers.models.{family}.modeling_{family}", reason="needs the extra hf")
