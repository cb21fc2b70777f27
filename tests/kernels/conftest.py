"""Property tests draw the same examples at every run, and a busy machine does not fail them."""

import os

import pytest
from hypothesis import settings

settings.register_profile("longreach", deadline=None, derandomize=True, database=None)
settings.load_profile("longreach")


@pytest.fixture
def repaired_bf16(monkeypatch):
    """Triton's interpreter with true bfloat16 arithmetic; nothing where kernels run on a GPU."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        import interpreter

        interpreter.repair(monkeypatch)
