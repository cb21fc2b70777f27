"""The account of states: what an engine holds after backward, and what its step takes besides, under each optimizer."""

import math
from dataclasses import replace

import pytest
import torch
from distributed import run_ranks
from small_model import ADAM, SmallModel, batch

from longreach.models.part import cast_parameters
from longreach.parallel.mesh import Mesh
from longreach.trainer.checkpoint.checkpoint import Share
from longreach.trainer.engine import Engine
from longreach.trainer.engine_config import EngineSettings
from longreach.trainer.memory.allocations import Allocations
from longreach.trainer.memory.states import SAVING, states_of, stepping
from longreach.trainer.settings import Settings

CPU = torch.device("cpu")
BUCKETS = {"zero_optimization": {"reduce_bucket_size": 50_000}}


def chosen(kind, dtype, stage, offload):
    engine = EngineSettings(zero_stage=stage, offload=offload, config=BUCKETS if stage else {})
    made = Settings(engine=engine, optimizer=replace(ADAM, kind=kind))
    made.trainer.dtype = dtype
    return made


def make_model():
    return SmallModel(width=96, vocabulary=600)


def measured(rank, world, cases):
    """Of each case: bytes after the last backward pass of its second step, and in that step at most beside what is
    there after it; numbers that its checkpoint's copy holds here."""
    return [_measured(rank, world, case) for case in cases]


def _measured(rank, world, case):
    settings, allocations = chosen(*case), Allocations("cpu")
    with allocations:
        engine = Engine(
            make_model, settings=settings.engine, optimizer=settings.optimizer, dtype=settings.trainer.dtype, clip=1.0,
            mesh=Mesh.create() if world > 1 else Mesh(), device=CPU,
        )  # fmt: skip
        for step in range(2):
            for _ in range(2):
                tokens, targets = batch(step)
                loss = engine(tokens, targets)
                engine.backward(loss, 100.0)
                del loss
            held = allocations.peak = allocations.live
            engine.step(0.01)
            most = allocations.peak
    copied = sum(math.prod(shape) for shapes in Share(engine).files.values() for shape in shapes.values())
    engine.close()
    return held, most - held, most - allocations.live, copied


if __name__ == "__main__":
    for world in (1, 2):
        cases = [
            (k, d, s, o)
            for k in ("adamw", "muon", "lion")
            for d in ("float32", "bfloat16")
            for s in (0, 1, 2, 3)
            for o in ("none", "optimizer", "all")
            if not (s == 0 and (d == "bfloat16" or o != "none"))
            and not (o == "all" and s < 3)
            and not (k == "lion" and d == "bfloat16")
        ]
        got = run_ranks(world, measured, cases, timeout=280)[0]
        for case, (held, more, beside, copied) in zip(cases, got):
            with torch.device("meta"):
                model = make_model()
            P = sum(p.numel() for p in model.parameters())
            settings = chosen(*case)
            cast_parameters(model, getattr(torch, settings.trainer.dtype))
            shares = states_of(model, settings, world, CPU)
            exp = sum(s.fixed for s in shares if s.part != SAVING)
            cp = sum(s.fixed for s in shares if s.part == SAVING)
            st = stepping(model, settings, world, CPU).fixed
            print(
                world,
                case,
                "held",
                round(held / P, 2),
                "exp",
                round(exp / P, 2),
                "| step more",
                round(more / P, 2),
                "beside",
                round(beside / P, 2),
                "exp",
                round(st / P, 2),
                "| copy",
                round(4 * copied / P, 2),
                round(cp / P, 2),
                flush=True,
            )
