"""The loss on held-out rows: what the model gives for each batch, added up on the device and read once."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longreach.parallel.layout import Layout
from longreach.parallel.mesh import Mesh
from longreach.parallel.strategy import Strategy
from longreach.trainer.data.packing import NO_TARGET, TokenStream
from longreach.trainer.evaluation import evaluation
from longreach.trainer.evaluation.evaluation import Loss, evaluate, evaluate_truncated


class Documents:
    lengths = np.array([5, 14, 3, 9])

    def __getitem__(self, document: int) -> np.ndarray:
        return np.arange(self.lengths[document]) + 20 * document


class Engine:
    """The loss of a target is its token's number, and targets after even tokens are right."""

    def __init__(self) -> None:
        self.mesh, self.device, self.batches = Mesh(), torch.device("cpu"), 0
        self.module: Any = SimpleNamespace(eval=lambda: None, train=lambda: None)

    def __call__(self, tokens: Tensor, seq: object, targets: Tensor, correct: bool) -> tuple[Tensor, Tensor, Tensor]:
        self.batches += 1
        there = targets != NO_TARGET
        return tokens[there].sum().float(), there.sum(), (there & (tokens % 2 == 0)).sum()


def stream() -> TokenStream:
    return TokenStream(Documents(), np.arange(4), length=12)


def expected() -> Loss:
    kept = [ids[:-1] for ids in (Documents()[each] for each in range(4))]
    return Loss(
        float(sum(ids.sum() for ids in kept)),
        sum(len(ids) for ids in kept),
        sum(int((ids % 2 == 0).sum()) for ids in kept),
    )


def test_the_loss_is_that_of_all_rows_and_is_read_once(monkeypatch) -> None:
    read, original = [], evaluation.gather_numbers
    monkeypatch.setattr(evaluation, "gather_numbers", lambda sums, mesh: read.append(sums) or original(sums, mesh))
    engine: Any = Engine()
    assert evaluate(engine, stream(), Layout(12), Strategy(), rows=3, micro_batch=2) == expected()
    assert (engine.batches, len(read)) == (2, 1)
    # With one token of context each target has a piece of its own, predicted from the same token.
    assert evaluate_truncated(engine, stream(), rows=3, context=1, places=4) == expected()
    assert len(read) == 2
