"""What the planner says that ZeRO sends is what DeepSpeed's collectives are called with, of sizes that ranks do not
divide; and what stage 3 holds gathered is what its parameters say."""

import importlib
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from small_model import ADAM, SmallModel, make_engine, train_step

from longreach.benchmarks.planner.recorded import Recorded
from longreach.trainer.engine_config import EngineSettings
from longreach.trainer.planning.gathering import PERSISTENT, persistent
from longreach.trainer.planning.zero import gathered_at_once, zero_sends
from longreach.trainer.settings import Settings

TIGHT = {"param_persistence_threshold": 1000, "prefetch_bucket_size": 31_000, "max_live_parameters": 140_000}
CASES = [  # stage, micro-batches, limits of stage 3
    *((stage, micro_batches, {}) for stage in (1, 2, 3) for micro_batches in (1, 2)),
    (0, 1, {}),
    (3, 1, {**TIGHT, "max_reuse_distance": 80_000}),
    (3, 2, {**TIGHT, "max_reuse_distance": 1000, "prefetch_bucket_size": 0}),
]
RANKS = 3


def engine_settings(stage, limits):
    config = {"zero_optimization": {f"stage3_{name}": value for name, value in limits.items()}} if limits else {}
    return replace(EngineSettings(), zero_stage=stage, config=config)


def make_model():
    return SmallModel(width=101, vocabulary=1001)


def watched(engine, small):
    """The most bytes of larger parameters that are gathered, or on their way, while a module runs."""
    coordinator = engine._engine.optimizer.parameter_offload.get_param_coordinator()
    fetch, most = coordinator.fetch_sub_module, [0]

    def watching(*arguments, **settings):
        fetch(*arguments, **settings)
        held = (x for x in engine.module.parameters() if x.ds_status.name != "NOT_AVAILABLE" and x.ds_numel > small)
        most[0] = max(most[0], sum(x.ds_numel * x.element_size() for x in held))

    coordinator.fetch_sub_module = watching
    return most


def counted(rank, world, cases):
    """Bytes that this rank sends in the last of four steps, by case, and holds gathered at most: ZeRO-3 compares
    modules of ranks in the first, and gathers nothing ahead."""
    with Recorded() as recorded:
        found = []
        for stage, micro_batches, limits in cases:
            settings = engine_settings(stage, limits)
            engine = make_engine(stage, model=make_model, config=settings.config)
            most = watched(engine, persistent(Settings(engine=settings))) if stage == 3 else [0]
            backend = importlib.import_module("deepspeed.comm.comm").cdb
            before = backend.all_gather_function, backend.reduce_scatter_function  # of when DeepSpeed started
            backend.all_gather_function = dist.all_gather_into_tensor
            backend.reduce_scatter_function = dist.reduce_scatter_tensor
            for step in range(4):
                recorded.bytes.clear()
                most[0] = 0
                train_step(engine, step, rank, world, micro_batches)
            found.append((dict(recorded.bytes), most[0]))
            backend.all_gather_function, backend.reduce_scatter_function = before
            engine.close()
    return found


@pytest.mark.slow
def test_zero_sends_and_holds_what_is_predicted():
    with torch.device("meta"):
        model = make_model()
    sizes = [parameter.numel() for parameter in model.parameters()]
    assert any(size > PERSISTENT and size % RANKS for size in sizes)
    assert any(size < PERSISTENT and size % RANKS for size in sizes)
    assert sum(sizes) % RANKS
    for (stage, micro_batches, limits), (found, most) in zip(CASES, run_ranks(RANKS, counted, CASES)[0], strict=True):
        settings = Settings(engine=engine_settings(stage, limits), optimizer=ADAM)
        predicted = sum(each.bytes for each in zero_sends(model, settings, RANKS, micro_batches))
        assert sum(found.values()) == predicted, (stage, micro_batches, limits, found)
        assert most == gathered_at_once(model, settings), (stage, micro_batches, limits)
