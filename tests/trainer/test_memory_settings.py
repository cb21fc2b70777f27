"""Settings that save memory train what one process trains without them: tiles, offload and hierarchical sharding."""

from functools import partial

import pytest
import torch
from distributed import run_ranks
from small_model import ADAM, full, rate

from longreach.kernels.documents import Documents
from longreach.models.feed_forward.experts import MixtureOfExperts
from longreach.models.feed_forward.swiglu import SwiGLU
from longreach.models.language_model import LanguageModel
from longreach.models.mixers.linear.lightning_attention import LightningAttention
from longreach.models.mixers.softmax.softmax_attention import SoftmaxAttention
from longreach.parallel.layout import Layout
from longreach.parallel.mesh import Mesh
from longreach.parallel.sequence import Sequence
from longreach.parallel.strategy import Strategy
from longreach.trainer.engine import Engine, EngineSettings
from longreach.trainer.optimizers.groups import parameter_groups

pytestmark = pytest.mark.slow  # engines on several ranks

LENGTH, VOCABULARY, ROWS, STEPS, CLIP = 24, 31, 4, 3, 0.1
LENGTHS = [[7, 17], [24], [1, 2, 21], [12, 12]]
FEED_FORWARD = {
    "swiglu": partial(SwiGLU, hidden=20),
    "experts": partial(MixtureOfExperts, hidden=6, experts=4, shared_hidden=6, bias=True),
}
# Else DeepSpeed splits no parameter as small as these.
SPLIT = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}


def make_model(kind, tile=None, checkpointing="none"):
    return LanguageModel(
        vocabulary=VOCABULARY,
        width=16,
        depth=2,
        pattern=["lightning", "softmax"],
        mixers={"lightning": partial(LightningAttention, heads=2), "softmax": partial(SoftmaxAttention, heads=2)},
        feed_forward=FEED_FORWARD[kind],
        tile_tokens=tile,
        activation_checkpointing=checkpointing,
        initial_std=0.3,
    )


def batch(step):
    generator = torch.Generator().manual_seed(step)
    return (torch.randint(VOCABULARY, (ROWS, LENGTH), generator=generator) for _ in range(2))


def train(rank, world, kind, engine, tile, checkpointing, sequence=1, experts=1):
    """Norms and parameters after some steps."""
    mesh = Mesh.create(sequence, 1, experts)
    made = Engine(
        lambda: make_model(kind, tile, checkpointing), settings=engine, optimizer=ADAM, clip=CLIP, mesh=mesh,
        device=torch.device("cpu"),
    )  # fmt: skip
    norms = []
    for step in range(STEPS):
        tokens, targets = batch(step)
        for row in range(mesh.data_rank, ROWS, mesh.data_ranks):
            documents = Documents.from_lengths(LENGTHS[row : row + 1], LENGTH)
            seq = Sequence.shared(documents, Layout(LENGTH, sequence), mesh, Strategy())
            loss, _ = made(seq.shard(tokens[row : row + 1]), seq, seq.shard(targets[row : row + 1]))
            made.backward(loss, targets.numel())
        norms.append(float(made.step(rate(step))))
    return norms, full(made)


def hierarchical(rank, world, *arguments):
    """As `train`; DeepSpeed makes the groups of ranks once per process, and this one serves more tests."""
    from deepspeed.utils import groups

    try:
        return train(rank, world, *arguments)
    finally:
        groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None


def check(kind, results):
    model = make_model(kind)
    model.initialise(0)
    optimizer = torch.optim.AdamW(parameter_groups(model, ADAM.weight_decay), betas=ADAM.betas, eps=ADAM.eps)
    norms = []
    for step in range(STEPS):
        tokens, targets = batch(step)
        loss = model(tokens, Sequence.single(Documents.from_lengths(LENGTHS, LENGTH)), targets)[0] / targets.numel()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        optimizer.step()
        optimizer.zero_grad()
    assert min(norms) > CLIP
    for got_norms, masters in results:
        torch.testing.assert_close(got_norms, norms, rtol=1e-4, atol=0)
        for name, value in model.named_parameters():
            torch.testing.assert_close(masters[name], value.detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kind", "stage"), [("swiglu", 3), ("experts", 1), ("experts", 2), ("experts", 3)])
def test_tiles_under_every_stage(kind, stage):
    engine = EngineSettings(stage, SPLIT if stage == 3 else {})
    check(kind, run_ranks(2, train, kind, engine, 5, "full" if stage == 3 else "none"))


@pytest.mark.parametrize("stage", [1, 3])
def test_tiles_of_experts_that_ranks_share_out(stage):
    check(
        "experts", run_ranks(2, train, "experts", EngineSettings(stage, SPLIT if stage == 3 else {}), 5, "full", 2, 2)
    )


@pytest.mark.parametrize(("stage", "offload"), [(1, "optimizer"), (2, "optimizer"), (3, "optimizer"), (3, "all")])
def test_offload(stage, offload):
    engine = EngineSettings(stage, SPLIT if stage == 3 else {}, offload=offload)
    check("swiglu", run_ranks(2, train, "swiglu", engine, None, "none"))


def test_hierarchical_sharding():
    engine = EngineSettings(3, SPLIT, hierarchical=2)
    check("swiglu", run_ranks(4, hierarchical, "swiglu", engine, 5, {"softmax": "full"}))
