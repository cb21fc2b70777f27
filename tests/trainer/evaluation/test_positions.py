"""The loss by position: against the logits of each document by itself, however many ranks share rows."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from distributed import run_threads
from torch.nn import functional as F

from longreach.kernels.documents import Documents
from longreach.launch.build import build
from longreach.parallel.layout import Layout
from longreach.parallel.mesh import Mesh
from longreach.parallel.sequence import Sequence
from longreach.parallel.strategy import Strategy
from longreach.trainer.data.packing import TokenStream
from longreach.trainer.evaluation import evaluation
from longreach.trainer.evaluation.evaluation import Loss, evaluate
from longreach.trainer.evaluation.settings import EvaluationSettings

LENGTH, ROWS, VOCABULARY = 48, 4, 19
MIXERS = "longreach.models.mixers"
MODEL = {
    "_target_": "longreach.models.language_model.LanguageModel",
    "vocabulary": VOCABULARY,
    "width": 16,
    "depth": 2,
    "pattern": ["lightning", "softmax"],
    "mixers": {
        "softmax": {"_target_": f"{MIXERS}.softmax.softmax_attention.SoftmaxAttention", "_partial_": True, "heads": 2},
        "lightning": {
            "_target_": f"{MIXERS}.linear.lightning_attention.LightningAttention",
            "_partial_": True,
            "heads": 2,
        },
    },
    "feed_forward": {"_target_": "longreach.models.feed_forward.swiglu.SwiGLU", "_partial_": True, "hidden": 16},
    "initial_std": 0.3,  # so that losses differ from position to position
}


class Texts:
    """Documents that end within a row, that go through its border, and that are longer than two rows."""

    lengths = np.array([17, 16, 5, 30, 110, 2, 11])

    def __getitem__(self, document: int) -> np.ndarray:
        return np.random.default_rng(document).integers(0, VOCABULARY, self.lengths[document])


def model() -> Any:
    made: Any = build(MODEL).double()
    made.initialise(0)
    return made


def stream() -> TokenStream:
    return TokenStream(Texts(), np.arange(len(Texts.lengths)), length=LENGTH)


def measured(rank: int, world: int, sequence: int, layout: Layout, positions: bool = True) -> Loss:
    module = model()
    engine: Any = SimpleNamespace(module=module, mesh=Mesh.create(sequence), device=torch.device("cpu"))
    called: Any = type("Engine", (), {"__call__": lambda _, *given: module(*given), **vars(engine)})()
    return evaluate(called, stream(), layout, Strategy(), ROWS, 1, positions)


@pytest.fixture(scope="module")
def one_rank() -> Loss:
    return run_threads(1, measured, 1, Layout(LENGTH))[0]


def test_buckets_hold_the_losses_that_logits_give_document_by_document(one_rank: Loss) -> None:
    module, rows = model(), stream()
    expected: dict[tuple[int, int], list[float]] = {(0, 15): [], (16, 31): [], (32, 63): []}
    for number in range(ROWS):
        row, start = rows.row(number), 0
        for length in row.lengths:
            tokens, targets = (torch.from_numpy(x[start : start + length]) for x in (row.tokens, row.targets))
            start += length
            with torch.no_grad():
                logits = module(tokens[None], Sequence.single(Documents.whole(1, len(tokens))))[0]
            for position in range(length):
                if targets[position] >= 0:
                    loss = F.cross_entropy(logits[position], targets[position]).item()
                    next(each for (a, b), each in expected.items() if a <= position <= b).append(loss)
    assert all(expected.values())
    record = {}
    for (first, last), losses in expected.items():
        record[f"validation_loss_at_{first}_to_{last}"] = sum(losses) / len(losses)
        record[f"validation_targets_at_{first}_to_{last}"] = len(losses)
    assert one_rank.by_position == pytest.approx(record, rel=1e-9)
    means = [sum(losses) / len(losses) for losses in expected.values()]
    assert max(means) - min(means) > 1e-3  # or buckets that were exchanged would pass


def test_buckets_add_up_to_the_loss_which_is_the_one_without_them(one_rank: Loss) -> None:
    totals, targets = zip(*one_rank.buckets, strict=True)
    assert sum(totals) == pytest.approx(one_rank.total, rel=1e-12)
    assert sum(targets) == one_rank.targets
    assert run_threads(1, measured, 1, Layout(LENGTH), False) == [one_rank._replace(buckets=())]


@pytest.mark.parametrize(
    ("world", "layout"),
    [(2, Layout(LENGTH)), (2, Layout(LENGTH, 2)), (3, Layout(LENGTH, 3, 2)), (4, Layout(LENGTH, 2, 4))],
    ids=["rows shared out", "contiguous", "zigzag", "both"],
)
def test_what_ranks_add_is_what_one_rank_has(
    one_rank: Loss, world: int, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Threads have no group of all ranks, so that each returns what it would give to the others.
    monkeypatch.setattr(
        evaluation, "gather_numbers", lambda numbers, mesh: torch.tensor([numbers], dtype=torch.float64)
    )
    parts = run_threads(world, measured, layout.ranks, layout)
    assert all(0 < part.targets < one_rank.targets for part in parts)
    found = Loss.of_all(parts)
    assert (found.targets, found.correct) == (one_rank.targets, one_rank.correct)
    assert found.total == pytest.approx(one_rank.total, rel=1e-9)
    assert found.by_position == pytest.approx(one_rank.by_position, rel=1e-9)


def test_buckets_go_up_to_the_length_of_a_row_and_empty_ones_are_left_out() -> None:
    buckets = ((1.0, 2), (0.0, 0), (3.0, 4))
    assert Loss(4.0, 6, 0, buckets).by_position == {
        "validation_loss_at_0_to_15": 0.5,
        "validation_targets_at_0_to_15": 2,
        "validation_loss_at_32_to_63": 0.75,
        "validation_targets_at_32_to_63": 4,
    }
    both = Loss.of_all([Loss(4.0, 6, 1, buckets), Loss(1.0, 1, 1, ((0.0, 0), (1.0, 1), (0.0, 0)))])
    assert both == Loss(5.0, 7, 2, ((1.0, 2), (1.0, 1), (3.0, 4)))
    assert Loss(math.nan, 0, 0).by_position == {}


def test_positions_without_validation_are_refused() -> None:
    EvaluationSettings(every=0, at_start=True, positions=True).check("text")
    with pytest.raises(ValueError, match=r"evaluation\.positions must be false with evaluation\.every=0"):
        EvaluationSettings(every=0, positions=True).check("text")
