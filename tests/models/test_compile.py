"""torch.compile traces every mixer whole, on one rank and on two, and compiles once for all batches.

Gradients are traced too, and ranks share rows, for some mixers that use all ops, and for all with `-m many`.
"""

from contextlib import ExitStack

import pytest
import torch
from distributed import run_ranks
from model_presets import MIXERS, WIDTH, build_mixer, few_mixers, few_or_many
from torch._dynamo.testing import CompileCounterWithBackend

from longreach.kernels.documents import Documents
from longreach.models.uncompiled import uncompiled
from longreach.parallel import sequence
from longreach.parallel.layout import Layout
from longreach.parallel.mesh import Mesh
from longreach.parallel.sequence import Sequence
from longreach.parallel.strategy import Strategy

LENGTH = 48
BATCHES = ([[9, 22, 1, 16], [LENGTH]], [[30, 18], [47, 1]], [[LENGTH], [5, 20]])


def draw(seed):
    return torch.randn(2, LENGTH, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def results(call, mixer, seq, seed):
    x = seq.shard(draw(seed)).clone().requires_grad_()
    mixer.zero_grad()
    out = call(x, seq)
    out, *more = out if mixer.gives else (out,)
    losses = more[len(mixer.publishes) :][: len(mixer.losses)]
    sum(losses, (out * seq.shard(draw(seed + 1))).sum()).backward()
    return [out.detach(), x.grad, *(parameter.grad for parameter in mixer.parameters())]


def compare(name, sequences, backend="aot_eager"):
    """Compiled against eager on every sequence: how many graphs were compiled."""
    torch._dynamo.reset()
    mixer, counter = build_mixer(name), CompileCounterWithBackend(backend)
    mixer._forward_hooks.clear()  # the hook that drops what a mixer publishes would be a graph of its own
    compiled = torch.compile(mixer, fullgraph=True, backend=counter)
    for seed, seq in enumerate(sequences):
        expected = results(mixer, mixer, seq, seed)
        torch.testing.assert_close(results(compiled, mixer, seq, seed), expected, atol=1e-9, rtol=1e-9)
    return counter.frame_count


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "backend"),
    [
        pytest.param(name, backend, marks=pytest.mark.many if backend != often else ())
        for name in MIXERS
        for often in ["aot_eager" if name in few_mixers() else "eager"]
        for backend in ("aot_eager", "eager")
    ],
)
def test_one_graph_serves_every_batch(name, backend):
    sequences = [Sequence.single(Documents.from_lengths(lengths, LENGTH)) for lengths in BATCHES]
    assert compare(name, sequences, backend) == 1


def on_a_rank(rank, world, name, strategy):
    mesh, layout = Mesh.create(world, world), Layout(LENGTH, world, 2)
    documents = [Documents.from_lengths(lengths, LENGTH) for lengths in BATCHES]
    return compare(name, [Sequence.shared(each, layout, mesh, strategy) for each in documents])


@pytest.mark.slow
@pytest.mark.parametrize("name", few_or_many())
def test_two_ranks_have_one_graph_each(name):
    assert run_ranks(2, on_a_rank, name, Strategy(), timeout=300) == [1, 1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["softmax_attention", "mamba2", "gated_deltanet"])
@pytest.mark.parametrize("strategy", [Strategy("gather"), Strategy("ulysses", "ulysses")], ids=["gather", "ulysses"])
def test_other_strategies_have_one_graph_too(name, strategy):
    assert run_ranks(2, on_a_rank, name, strategy, timeout=300) == [1, 1]


def test_a_sequence_is_kept_by_its_handle_and_no_longer():
    seq = Sequence.single(Documents.whole(1, 8)).at(3)
    handle = seq.handle
    del seq
    assert Sequence.of(handle).documents.length == 8
    number = int(handle)
    del handle
    assert number not in sequence._live


def test_ranks_that_are_threads_leave_where_nothing_is_compiled_in_any_order():
    counter = CompileCounterWithBackend("eager")
    call = torch.compile(lambda x: x + 1, backend=counter)
    first, second = ExitStack(), ExitStack()
    first.enter_context(uncompiled())
    second.enter_context(uncompiled())
    first.close()
    call(torch.ones(3))
    assert counter.frame_count == 0
    second.close()
    call(torch.ones(3))
    assert counter.frame_count == 1
