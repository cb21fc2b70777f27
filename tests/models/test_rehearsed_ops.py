"""A rehearsal on tensors without data names the ops that a step runs, whatever the mixer and the strategy."""

import pytest
import torch
from model_presets import MIXERS, small_hybrid

from longreach.kernels.dispatch import noting
from longreach.kernels.documents import Documents
from longreach.models.language_model import LanguageModel
from longreach.parallel.layout import Layout
from longreach.parallel.sequence import Sequence
from longreach.parallel.strategy import Strategy
from longreach.trainer.settings import KernelSettings

DOCUMENTS = Documents.whole(1, 64)
OPS = vars(KernelSettings()).keys()


def noted(model: LanguageModel, seq: Sequence, device: str) -> set[str]:
    tokens = torch.zeros(1, 64, dtype=torch.int64, device=device)
    with noting() as ops:
        model(tokens[:, : seq.layout.local_length], seq, tokens[:, : seq.layout.local_length])
    return ops & OPS


@pytest.mark.slow
@pytest.mark.parametrize("mixer", MIXERS)
def test_a_rehearsal_names_the_ops_of_a_step(mixer: str) -> None:
    run = noted(small_hybrid(mixer, dtype=torch.float32, depth=2), Sequence.single(DOCUMENTS), "cpu")
    assert run >= {"softmax_attention", "rms_norm", "swiglu", "cross_entropy"}
    with torch.device("meta"):
        model = small_hybrid(mixer, dtype=torch.float32, depth=2).to("meta")
    for layout, strategy, ulysses in (
        (Layout(64), Strategy(), 1),
        (Layout(64, 2, 2), Strategy("gather"), 1),
        (Layout(64, 2), Strategy("ulysses", "ulysses"), 2),
    ):
        assert noted(model, Sequence.rehearsal(DOCUMENTS, layout, strategy, ulysses), "meta") == run


def test_nothing_is_noted_elsewhere() -> None:
    model = small_hybrid("mamba2", dtype=torch.float32, depth=2)
    with noting() as outer:
        with noting() as inner:
            model(torch.zeros(1, 64, dtype=torch.int64), Sequence.single(DOCUMENTS))
        assert inner
        assert not outer
    noted(model, Sequence.single(DOCUMENTS), "cpu")
    assert not outer
