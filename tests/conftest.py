"""Where there is no GPU, Triton's kernels run under its interpreter: decided before anything imports Triton.

Property tests draw the same examples at every run, and a busy machine does not fail them.
"""

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

with suppress(ModuleNotFoundError):  # a bare GPU machine has none, and most tests that need a GPU need none
    from hypothesis import settings

    settings.register_profile("longreach", deadline=None, derandomize=True, database=None)
    settings.load_profile("longreach")

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


# Thousands of tests and their libraries stay until the end: the garbage collector need not walk through them again and
# again, neither while they are collected nor during tests.
gc.disable()


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture
def module_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to import from, whose modules are forgotten with the test: others may have one of the same name."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "").parent == tmp_path:
            del sys.modules[name]


@pytest.fixture(autouse=True)
def leaves_the_process_as_it_was() -> Iterator[None]:
    """What a test leaves behind is found by another one of its process, in whichever order they run: it fails here."""
    before = process()
    yield
    assert process() == before


def process() -> dict[str, object]:
    compiler = sys.modules.get("torch._dynamo.eval_frame")
    return {
        "working directory": os.getcwd(),
        "type": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "gradients": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "dispatch mode": is_in_torch_dispatch_mode(),
        "compilation": "default" if compiler is None else compiler._stance.stance,
    }


# Files that take minutes begin first, the longest ahead: none is then left to one core when the other has ended.
LONGEST = (
    "test_runs", "test_train", "test_compilation", "test_compiled_blocks", "test_diagnosis", "test_gpu_check",
    "test_compile", "test_equivalence", "test_rounding",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The interpreter takes milliseconds for what a GPU does in microseconds: its tests are slow ones.

    So are those that run only when asked for: `-m "not slow"` takes the place of the `-m "not many"` of pyproject.toml.
    """
    for item in items:
        if Path(item.path).stem.endswith("_triton") or item.get_closest_marker("many"):
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: (*LONGEST, item.path.stem).index(item.path.stem))
