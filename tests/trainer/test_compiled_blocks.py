"""trainer.compile: whole blocks are graphs, which change no number and are made once for all that training runs."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from distributed import run_ranks
from routed import Routed
from small_model import ADAM, full, make_engine, rate
from torch._dynamo.testing import CompileCounterWithBackend

from longreach.kernels.documents import Documents
from longreach.models.decoding import next_logits
from longreach.models.feed_forward.swiglu import SwiGLU
from longreach.models.language_model import LanguageModel
from longreach.models.mixers.linear.lightning_attention import LightningAttention
from longreach.models.mixers.softmax.softmax_attention import SoftmaxAttention
from longreach.models.mixers.state_space.mamba import Mamba
from longreach.parallel.layout import Layout
from longreach.parallel.mesh import Mesh
from longreach.parallel.sequence import DecodingCache, Sequence
from longreach.trainer.compilation import compile_blocks
from longreach.trainer.reported import Reported

pytestmark = pytest.mark.slow  # engines on several ranks, and graphs

LENGTH, VOCABULARY = 24, 31
LENGTHS = [[[7, 17]], [[24]], [[1, 2, 20]]]
# One for each of two kinds of blocks, one more since lightning's decays differ by depth, and two for evaluation.
GRAPHS = 5
# Steps that follow gradients even where they are near 0, rather than their rounding: of one weight that moved ranks by
# 2e-4 from one device, compiled or not.
LINEAR = replace(ADAM, eps=1e-3)
PATTERN, WITHOUT_MAMBA = ("lightning", "softmax+mamba"), ("lightning", "softmax")


def make_model(checkpointing="none", routed=False, pattern=PATTERN, depth=6):
    return LanguageModel(
        vocabulary=VOCABULARY,
        width=16,
        depth=depth,
        pattern=list(pattern),
        mixers={
            name: mixer
            for name, mixer in {
                "lightning": partial(LightningAttention, heads=2),
                "softmax": partial(SoftmaxAttention, heads=2, qk_norm="head"),
                "mamba": partial(Mamba, state=4),
            }.items()
            if any(name in each for each in pattern)
        },
        feed_forward=partial(Routed, hidden=8) if routed else partial(SwiGLU, hidden=20),
        activation_checkpointing=checkpointing,
        initial_std=0.3,
    )


def tokens_of(step):
    return torch.randint(VOCABULARY, (1, LENGTH), generator=torch.Generator().manual_seed(step))


def train(rank, world, stage, checkpointing, routed, pattern, compiled):
    """Three steps with evaluation and decoding between; what was said, how many graphs were made, and the weights."""
    torch._dynamo.reset()
    # DeepSpeed's hooks of stage 3 break every layer's graphs anew, which takes long.
    depth = 2 if stage == 3 else 6
    engine = make_engine(stage, model=lambda: make_model(checkpointing, routed, pattern, depth), optimizer=LINEAR)
    mesh, layout, counter = Mesh.create(world), Layout(LENGTH, world, 2), CompileCounterWithBackend("aot_eager")
    note = compile_blocks(engine.module, stage, counter) if compiled else None
    losses = []
    for step, lengths in enumerate(LENGTHS):
        documents = Documents.from_lengths(lengths, LENGTH)
        seq = Sequence(documents, layout, mesh.sequence_rank, mesh.sequence_group)
        tokens, targets = seq.shard(tokens_of(step)), seq.shard(tokens_of(step + 9))
        model = make_model("none", routed, pattern, depth)
        reported = Reported(model.losses, model.loss_counts(documents), mesh)
        loss, _, reports = engine(tokens, seq, targets, False, True)
        engine.backward(loss, LENGTH, reported.add(reports))
        engine.step(rate(step))
        reported.exchange()
        engine.module.update(reported.sums())
        with torch.no_grad():
            evaluated, _, _ = engine(tokens, seq, targets, True)
            if stage < 3:
                cache = DecodingCache()
                for length in (5 + step, 1):
                    next_logits(engine.module, tokens_of(step)[:, :length], cache)
        losses += [loss.item(), evaluated.item()]
    return note, counter.frame_count, losses, full(engine)


def compare(world, stage, checkpointing="none", routed=False, pattern=PATTERN):
    eager, compiled = (
        run_ranks(world, train, stage, checkpointing, routed, pattern, each, timeout=300) for each in (False, True)
    )
    for (_, _, losses, weights), (_, _, again, same) in zip(eager, compiled, strict=True):
        torch.testing.assert_close(again, losses, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(same, weights, rtol=1e-4, atol=1e-4)
    return compiled[0][:2]


@pytest.mark.parametrize(
    ("world", "stage"),
    [(1, 0), (1, 2), (2, 0), pytest.param(2, 1, marks=pytest.mark.many), (2, 2)],  # (2, 1) is below, recomputed
)
def test_blocks_are_whole_graphs(world, stage):
    note, graphs = compare(world, stage)
    assert note is None
    assert graphs == GRAPHS


def test_recomputed_blocks_and_those_that_report_are_graphs_too():
    assert compare(2, 1, "full", routed=True) == (None, GRAPHS)


@pytest.mark.parametrize(
    ("stage", "checkpointing", "pattern", "why"),
    [
        (3, "full", WITHOUT_MAMBA, "engine.zero_stage=3"),
        pytest.param(3, "full", PATTERN, "engine.zero_stage=3", marks=pytest.mark.many),
        (1, "mixing", PATTERN, "=mixing"),
    ],
)
def test_where_blocks_cannot_be_graphs_it_is_said_and_the_rest_is_compiled(stage, checkpointing, pattern, why):
    note, graphs = compare(2, stage, checkpointing, pattern=pattern)
    assert why in note
    assert graphs > 0
