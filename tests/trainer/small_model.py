"""A model with everything an engine can trip over, small: tied weights, two parameter groups, odd sizes, a buffer, and
parameters that stay in float32.

With it, the steps that the tests of engine and checkpoint take on ranks.
"""

import hashlib
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from longreach.models.part import shape_of
from longreach.parallel.mesh import Mesh
from longreach.trainer.engine import Engine, EngineSettings, OptimizerSettings

VOCABULARY, WIDTH, ROWS, LENGTH = 23, 10, 8, 7
SUM = {"reduction": "sum", "ignore_index": -100}


class Layer(nn.Module):
    in_float32 = ("gain",)

    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 3 * width + 1)
        self.down = nn.Linear(3 * width + 1, width, bias=False)
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, x):
        assert self.gain.dtype == torch.float32
        return x + (self.down(F.silu(self.up(self.norm(x)))) * self.gain).to(x.dtype)


class SmallModel(nn.Module):
    def __init__(self, width=WIDTH, vocabulary=VOCABULARY, recompute=False):
        super().__init__()
        self.recompute = recompute
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(2))
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("factor", torch.tensor(1 / 3))

    def forward(self, tokens, targets):
        x = self.embedding(tokens)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.recompute else layer(x)
        logits = self.head(x).float()
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), **SUM)
        return loss + 0 * logits.sum()

    @torch.no_grad()
    def initialise(self, seed, write=None, rank=0, ranks=1):
        for number, (name, parameter) in enumerate(self.named_parameters()):
            owner = number % ranks
            with write(parameter, owner) if write else nullcontext():
                if owner == rank:
                    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=4).digest()
                    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
                    parameter.copy_(torch.empty(parameter.shape).normal_(0, 0.3, generator=generator))


def batch(step, rows=ROWS):
    """Tokens and targets [rows, LENGTH] of a global batch; row 0 has no target, the others differ in how many."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, VOCABULARY, (rows, LENGTH), generator=generator)
    targets = torch.randint(0, VOCABULARY, (rows, LENGTH), generator=generator)
    for row in range(rows):
        targets[row, : LENGTH - row % LENGTH] = -100
    return tokens, targets


ADAM = OptimizerSettings(learning_rate=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.3)
# With the other's eps a gradient that is nothing but rounding moves its parameter as far as any other.
GENTLE_ADAM = replace(ADAM, eps=1e-6)


def rate(step):
    return 0.02 / (1 + step)


def make_engine(stage, *, model=SmallModel, dtype="float32", clip=0.0, config=None, seed=0, mesh=None, optimizer=ADAM):
    return Engine(
        model,
        settings=EngineSettings(stage, config or {}),
        optimizer=optimizer,
        dtype=dtype,
        clip=clip,
        mesh=Mesh.create() if mesh is None else mesh,
        device=torch.device("cpu"),
        seed=seed,
    )


def train_step(engine, step, rank, world, accumulation):
    tokens, targets = batch(step)
    normaliser = int((targets != -100).sum())
    rows = len(tokens) // (world * accumulation)
    for micro in range(accumulation):
        start = (rank * accumulation + micro) * rows
        loss = engine(tokens[start : start + rows], targets[start : start + rows])
        engine.backward(loss, normaliser)
    return engine.step(rate(step))


def full(engine, kind="parameter"):
    """Every rank's whole float32 state, by name."""
    engine.create_moments()
    result = {}
    for name, parameter in engine.named_parameters():
        start, values = engine.fragment(parameter, kind)
        shape = shape_of(parameter)
        whole = torch.zeros(shape.numel(), dtype=torch.int32)
        whole[start : start + len(values)] = values.view(torch.int32)
        if not engine.replicated(parameter):
            torch.distributed.all_reduce(whole)
        result[name] = whole.view(torch.float32).view(shape)
    return result
