"""The same bits at every run: every mixer's loss and gradients on a CPU, by several threads, on two ranks."""

import copy

import pytest
import torch
from distributed import run_threads
from model_presets import few_or_many, small_hybrid, tokens, total_loss
from torch import Tensor

from longreach.kernels.documents import Documents
from longreach.models.language_model import LanguageModel
from longreach.parallel.layout import Layout
from longreach.parallel.mesh import Mesh
from longreach.parallel.sequence import Sequence
from longreach.parallel.strategy import Strategy

LENGTH = 64
PACKED = Documents.from_lengths([[9, 30, 1, 24], [LENGTH]], LENGTH)


@pytest.fixture
def threads():
    """More than one, whose sums could meet in any order."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(before)


def step(model: LanguageModel, seq: Sequence) -> list[Tensor]:
    """The loss and all gradients of this rank."""
    own = copy.deepcopy(model)
    targets = tokens(2, LENGTH).roll(-1, dims=1)
    targets[:, -1] = -100
    loss, _ = total_loss(own, seq.shard(tokens(2, LENGTH)), seq, seq.shard(targets))
    loss.backward()
    return [loss.detach(), *(x.grad for x in own.parameters() if x.grad is not None)]


@pytest.mark.slow
@pytest.mark.parametrize("name", few_or_many())
def test_a_step_gives_the_same_bits_again(name: str, threads: None) -> None:
    model = small_hybrid(name, dtype=torch.float32, depth=2)

    def on_one_of(rank: int, world: int) -> list[Tensor]:
        return step(model, Sequence.shared(PACKED, Layout(LENGTH, world), Mesh.create(world), Strategy()))

    for one, other in zip(run_threads(2, on_one_of), run_threads(2, on_one_of), strict=True):
        assert len(one) > 1
        assert all(torch.equal(*both) for both in zip(one, other, strict=True))
