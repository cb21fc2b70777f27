"""This rank's part of a step: rows by their numbers alone, on any ranks; what documents imply is derived ahead."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from longreach.models.feed_forward.swiglu import SwiGLU
from longreach.models.language_model import LanguageModel
from longreach.models.mixers.softmax.softmax_attention import SoftmaxAttention
from longreach.parallel.layout import Layout
from longreach.parallel.mesh import Mesh
from longreach.parallel.strategy import Strategy
from longreach.trainer.data.ahead import Ahead
from longreach.trainer.data.packing import NO_TARGET, TokenStream
from longreach.trainer.data.reading import Reader, prepared
from longreach.trainer.data.settings import DataSettings

LENGTH, ROWS, CPU = 32, 4, torch.device("cpu")


class Documents:
    lengths = np.array([5, 40, 3, 17, 29, 8, 1, 60])

    def __getitem__(self, document: int) -> np.ndarray:
        return np.arange(self.lengths[document]) + 100 * document


def reader(ranks: int = 1, sequence: int = 1, rank: int = 0, micro: int = 1, device: torch.device = CPU) -> Reader:
    group: Any = None if sequence == 1 else SimpleNamespace()
    with torch.device("meta"):
        softmax, feed_forward = partial(SoftmaxAttention, heads=2), partial(SwiGLU, hidden=8)
        model = LanguageModel(
            vocabulary=9, width=8, depth=1, pattern=["s"], mixers={"s": softmax}, feed_forward=feed_forward
        )
    return Reader(
        TokenStream(Documents(), np.arange(8), length=LENGTH, seed=3),
        DataSettings(sequence_length=LENGTH, rows_per_step=ROWS, rows_per_micro_batch=micro),
        Layout(LENGTH, sequence, 2 if sequence > 1 else 1),
        Strategy(),
        Mesh(rank, ranks, sequence, group),
        device,
        model,
    )


def test_a_part_depends_on_its_row_alone() -> None:
    in_order = list(prepared(reader().steps(range(3, 8), 12)))
    for place in (4, 0, 2):
        alone = reader().part(3 + place, 12 + place * ROWS)
        for one, other in zip(alone.micro_batches, in_order[place].micro_batches, strict=True):
            assert torch.equal(one.tokens, other.tokens)
            assert torch.equal(one.targets, other.targets)
            assert one.seq.documents == other.seq.documents
        assert alone.work == in_order[place].work


@pytest.mark.parametrize(("ranks", "sequence", "micro"), [(2, 1, 2), (2, 2, 4), (4, 2, 1)])
def test_ranks_share_the_rows_of_a_step_and_count_its_work_once(ranks: int, sequence: int, micro: int) -> None:
    whole = reader().part(0, 8)
    rows = torch.cat([each.tokens for each in whole.micro_batches])
    parts = [reader(ranks, sequence, rank, micro).part(0, 8) for rank in range(ranks)]
    held = [torch.cat([each.tokens for each in part.micro_batches]) for part in parts]
    layout = Layout(LENGTH, sequence, 2 if sequence > 1 else 1)
    shared = [layout.unshard(held[first : first + sequence]) for first in range(0, ranks, sequence)]
    assert torch.equal(torch.cat(shared), rows)
    counted = ("targets", "tokens", "places", "flops")
    for name in counted:
        assert sum(getattr(part.work, name) for part in parts) == getattr(whole.work, name)
    assert whole.work.targets == sum(int((each.targets != NO_TARGET).sum()) for each in whole.micro_batches)


def length_of_the_longest(documents) -> int:
    return int(documents.table[:, 2].max())


def test_what_steps_derive_is_there_before_later_steps_ask() -> None:
    steps, there = prepared(reader().steps(range(4), 0)), []
    for part in steps:
        there.append([length_of_the_longest in [key[0] for key in seq.documents.derived] for seq in part.sequences])
        for seq in part.sequences:
            seq.documents.derive(length_of_the_longest)
    # The thread learns from a step when it is over: of the first that is while the third is made.
    assert there == [[False] * ROWS, [False] * ROWS, [True] * ROWS, [True] * ROWS]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gets_rows_from_pinned_memory_without_waiting() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    with Ahead(prepared(reader(device=device).steps(range(3), 0)), device) as parts:
        for part in parts:
            for each in part.micro_batches:
                assert each.tokens.is_pinned()
                assert each.targets.is_pinned()
                torch.cuda.set_sync_debug_mode("error")
                try:
                    tokens, targets = each.on(device)
                finally:
                    torch.cuda.set_sync_debug_mode("default")
                assert torch.equal(tokens.cpu(), each.tokens)
                assert torch.equal(targets.cpu(), each.targets)
