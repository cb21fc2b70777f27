"""How far a call travels from a mixer to the function that computes it."""

import inspect
import re
from pathlib import Path

import pytest
import torch
from distributed import run_ranks
from parallel_cases import shared

import longreach
from longreach.kernels.delta_rule import chunked as delta
from longreach.kernels.documents import Documents
from longreach.kernels.gated_linear import chunked as gated
from longreach.kernels.softmax import chunked as softmax
from longreach.parallel import ops

PACKAGE = str(Path(longreach.__file__).resolve().parent)
# The op, and the function that runs it on one rank and on several.
OPS = {
    "gated_linear_attention": (gated, "forward", "forward"),
    "delta_rule": (delta, "forward", "begin"),
    "softmax_attention": (softmax, "attend", "attend"),
}
MOST = 8


class Reached(Exception):
    """Raised where the backend's function would begin: the frames of the package down to there."""

    def __init__(self, frames: list[str]) -> None:
        super().__init__(", ".join(frames))
        self.frames = frames


def reached(*args: object, **settings: object) -> None:
    stack = [frame for frame in inspect.stack()[1:] if str(Path(frame.filename).resolve()).startswith(PACKAGE)]
    names = [frame.function for frame in reversed(stack) if not re.search("/tests/|/site-packages/", frame.filename)]
    raise Reached([*names, "the backend's function"])


def frames(rank: int, world: int, name: str) -> list[str]:
    module, alone, among_ranks = OPS[name]
    function = alone if world == 1 else among_ranks
    original = getattr(module, function)
    setattr(module, function, reached)
    x = torch.randn(1, 8, 2, 4)
    try:
        getattr(ops, name)(x, x, x, seq=shared(world, 1, Documents.whole(1, 8 * world)))
    except Reached as end:
        return end.frames[end.frames.index(name) :]
    finally:
        setattr(module, function, original)
    raise AssertionError("the backend's function was not reached")


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("name", OPS)
def test_few_frames_lie_between_a_mixer_and_the_backend(name: str, world: int) -> None:
    for found in run_ranks(world, frames, name):
        assert len(found) <= MOST, found
