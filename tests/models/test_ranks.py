"""A hybrid of all mixers over ranks that share its rows: the loss and every gradient are those of one rank.

Two ranks are processes over gloo; more are threads.
"""

import functools

import pytest
import torch
from distributed import run_ranks, run_threads
from model_presets import MIXERS, WIDTH, feed_forward, randomise, sources, tokens, total_loss

from longreach.kernels.documents import Documents
from longreach.models.language_model import LanguageModel
from longreach.parallel.collectives import counting
from longreach.parallel.layout import Layout
from longreach.parallel.mesh import Mesh
from longreach.parallel.sequence import Sequence
from longreach.parallel.strategy import Strategy

LENGTH = 48
PACKED = Documents.from_lengths([[5, 30], [LENGTH]], LENGTH)  # the first row ends in padding


def hybrid(checkpointing):
    model = LanguageModel(
        vocabulary=61,
        width=WIDTH,
        depth=len(MIXERS),
        pattern=[sources(name)[0] for name in MIXERS],
        mixers={each: partial for name in MIXERS for each, partial in sources(name)[1].items()},
        feed_forward=feed_forward(),
        activation_checkpointing=checkpointing,
    ).double()
    randomise(model)
    return model


def batch(first_target):
    targets = tokens(2, LENGTH).roll(-1, dims=1)
    targets[:, :first_target] = targets[0, 34:] = targets[0, 4] = targets[1, -1] = -100
    return tokens(2, LENGTH), targets


def loss_and_gradients(model, seq, first_target):
    inputs, targets = batch(first_target)
    loss, count = total_loss(model, seq.shard(inputs), seq, seq.shard(targets))
    loss.backward()
    return loss.detach(), count, [parameter.grad for parameter in model.parameters()]


def shared(world, spans):
    return Sequence.shared(PACKED, Layout(LENGTH, world, spans), Mesh.create(world), Strategy())


def on_one_of(rank, world, checkpointing, spans, first_target):
    loss, count, gradients = loss_and_gradients(hybrid(checkpointing), shared(world, spans), first_target)
    return loss, count, [gradient.numpy() for gradient in gradients]


@functools.cache
def on_one(first_target):
    return loss_and_gradients(hybrid("none"), Sequence.single(PACKED), first_target)


@pytest.mark.parametrize(
    ("checkpointing", "world", "spans", "first_target"),
    [
        ("mixing", 2, 2, 0),
        ("none", 2, 1, 30),
        ("full", 3, 1, 0),
        ("mixing", 4, 1, 30),
        ("none", 4, 2, 30),
    ],
)
@pytest.mark.slow
def test_ranks_that_share_rows_give_what_one_gives(checkpointing, world, spans, first_target):
    run = run_ranks if world == 2 else run_threads
    results = run(world, on_one_of, checkpointing, spans, first_target)
    loss, count, gradients = on_one(first_target)
    assert sum(int(local) for _, local, _ in results) == count
    assert (
        first_target == 0 or spans == 2 or results[0][1] == 0
    )  # a rank without a single target takes part all the same
    torch.testing.assert_close(sum(local for local, _, _ in results), loss, atol=1e-9, rtol=1e-9)
    for index, expected in enumerate(gradients):
        total = sum(torch.from_numpy(local[index]) for _, _, local in results)
        torch.testing.assert_close(total, expected, atol=1e-9, rtol=1e-9)


def messages_on_one_of(rank, world, checkpointing):
    with counting() as sent:
        loss_and_gradients(hybrid(checkpointing), shared(world, 1), 0)
    return sent


@pytest.mark.slow
def test_keeping_what_the_ops_computed_repeats_no_message():
    none, full, mixing = (run_threads(2, messages_on_one_of, setting) for setting in ("none", "full", "mixing"))
    assert mixing == none
    assert all(again.total() > once.total() > 0 for again, once in zip(full, none, strict=True))
