"""Triton's interpreter as kernel tests need it."""

import os

import pytest


@pytest.fixture
def repaired_bf16(monkeypatch):
    """Triton's interpreter with true bfloat16 arithmetic; nothing where kernels run on a GPU."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        import interpreter

        interpreter.repair(monkeypatch)
