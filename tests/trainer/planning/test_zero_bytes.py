"""What the planner says that ZeRO sends is what DeepSpeed's collectives are called with, of sizes that ranks do not
divide."""

import importlib
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from small_model import ADAM, SmallModel, make_engine, train_step

from longreach.benchmarks.planner.recorded import Recorded
from longreach.trainer.engine_config import EngineSettings
from longreach.trainer.planning.zero import SMALLEST_SPLIT, zero_sends
from longreach.trainer.settings import Settings

CASES = [(0, 1), (1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (3, 2)]  # stage, micro-batches
RANKS = 3


def make_model():
    return SmallModel(width=101, vocabulary=1001)


def counted(rank, world, cases):
    """Bytes that this rank sends in the last of four steps, by case: ZeRO-3 compares modules of ranks in the first."""
    with Recorded() as recorded:
        found = []
        for stage, micro_batches in cases:
            engine = make_engine(stage, model=make_model)
            backend = importlib.import_module("deepspeed.comm.comm").cdb
            before = backend.all_gather_function, backend.reduce_scatter_function  # of when DeepSpeed started
            backend.all_gather_function = dist.all_gather_into_tensor
            backend.reduce_scatter_function = dist.reduce_scatter_tensor
            for step in range(4):
                recorded.bytes.clear()
                train_step(engine, step, rank, world, micro_batches)
            found.append(dict(recorded.bytes))
            backend.all_gather_function, backend.reduce_scatter_function = before
            engine.close()
    return found


@pytest.mark.slow
def test_zero_sends_what_is_predicted():
    with torch.device("meta"):
        model = make_model()
    sizes = [parameter.numel() for parameter in model.parameters()]
    assert any(size > SMALLEST_SPLIT and size % RANKS for size in sizes)
    assert any(size < SMALLEST_SPLIT and size % RANKS for size in sizes)
    assert sum(sizes) % RANKS
    for (stage, micro_batches), found in zip(CASES, run_ranks(RANKS, counted, CASES)[0], strict=True):
        settings = Settings(engine=replace(EngineSettings(), zero_stage=stage), optimizer=ADAM)
        predicted = sum(each.bytes for each in zero_sends(model, settings, RANKS, micro_batches))
        assert sum(found.values()) == predicted, (stage, micro_batches, found)
