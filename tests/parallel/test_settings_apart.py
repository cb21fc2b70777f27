"""Two ops of a kind with different settings on one sequence: nothing that one keeps there is taken by the other."""

import pytest
import torch
from distributed import run_ranks

from longreach.kernels.documents import Documents
from longreach.kernels.masks import Mask
from longreach.kernels.select_blocks import Rule
from longreach.parallel import ops
from longreach.parallel.layout import Layout
from longreach.parallel.mesh import Mesh
from longreach.parallel.sequence import Sequence
from longreach.parallel.strategy import Strategy

LENGTH = 96
LENGTHS = [[7, 41, 1, 30, 5], [LENGTH]]
COARSE, FINE = Rule(8, 2, initial=1, local=1), Rule(4, 3, initial=1, local=1)


def sparse(x, seq, slot, rule, dense_length, mask):
    means = ops.window_means(x, size=rule.block_size, stride=rule.block_size, seq=seq, slot=f"{slot} means")
    blocks = ops.select_blocks(x, means, rule=rule, seq=seq, slot=f"{slot} choice")
    return ops.block_sparse_attention(
        x, x, x, blocks, block_size=rule.block_size, dense_length=dense_length, mask=mask, seq=seq, slot=slot
    )


def windows(x, seq, slot, size, stride):
    local = ops.local_windows(x, size=size, stride=stride, seq=seq, slot=f"{slot} windows")
    keys = ops.gather_windows(local.mean(2), size=size, stride=stride, seq=seq, slot=f"{slot} keys")
    return ops.compressed_attention(x, keys, keys, size=size, stride=stride, seq=seq, slot=slot)[0]


def attention(x, seq, slot, mask):
    return ops.softmax_attention(x, x, x, mask=mask, seq=seq, slot=slot)


def convolution(x, seq, slot, taps):
    weight = torch.linspace(0.1, 1.0, x.shape[2] * x.shape[3] * taps, dtype=x.dtype).view(-1, taps)
    return ops.short_conv(x.flatten(2), weight, seq=seq, slot=slot).view_as(x)


def gated(x, seq, slot, read, decay):
    bonus = torch.full(x.shape[2:], 0.3, dtype=x.dtype) if read == "exclusive" else None
    return ops.gated_linear_attention(
        x, x, x, torch.full(x.shape[2:3], decay, dtype=x.dtype), read=read, bonus=bonus, seq=seq, slot=slot
    )


# Each pair is one op twice; the second call differs in one setting or in several.
PAIRS = {
    "masks": (attention, (Mask(window=20),), (Mask(window=50, sink_tokens=2),)),
    "causality": (attention, (Mask(),), (Mask(causal=False),)),
    "blocks": (sparse, (COARSE, 0, None), (FINE, 0, None)),
    "dense lengths": (sparse, (COARSE, 8, None), (COARSE, 24, None)),
    "masks of blocks": (sparse, (COARSE, 0, Mask()), (COARSE, 0, Mask(window=9))),
    "windows": (windows, (8, 4), (6, 3)),
    "taps": (convolution, (2,), (4,)),
    "reads": (gated, ("inclusive", -0.1), ("exclusive", -0.3)),
}


def draw(seed=0):
    return torch.randn(2, LENGTH, 2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def once(name, number, seq, x):
    op, *settings = PAIRS[name]
    return op(x, seq, f"call {number}", *settings[number])


def results(function, seq):
    x = seq.shard(draw()).clone().requires_grad_()
    outs = function(x)
    gradients = [torch.autograd.grad((out * seq.shard(draw(1))).sum(), x, retain_graph=True)[0] for out in outs]
    return [out.detach() for out in outs], gradients


def check(name, sequence, compiled):
    """Both on one sequence, in either order, against each on a sequence of its own."""
    expected = []
    for number in (0, 1):
        alone = sequence()
        expected.append(results(lambda x, alone=alone, number=number: [once(name, number, alone, x)], alone))
    for order in ((0, 1), (1, 0)):
        seq = sequence()

        def both(x, seq=seq, order=order):
            return [once(name, number, seq, x) for number in order]

        if compiled:
            torch._dynamo.reset()
            both = torch.compile(both, backend="aot_eager", fullgraph=True)
        found = results(both, seq)
        for place, number in enumerate(order):
            for kind in (0, 1):
                torch.testing.assert_close(found[kind][place], expected[number][kind][0], atol=1e-9, rtol=1e-9)


def on_a_rank(rank, world, names, compiled=False):
    documents, layout, mesh = Documents.from_lengths(LENGTHS, LENGTH), Layout(LENGTH, world, 2), Mesh.create(world)
    for name in names:
        check(name, lambda: Sequence.shared(documents, layout, mesh, Strategy()), compiled)


@pytest.mark.parametrize("name", PAIRS)
def test_on_one_rank(name):
    check(name, lambda: Sequence.single(Documents.from_lengths(LENGTHS, LENGTH)), compiled=False)


@pytest.mark.slow
def test_on_two_ranks():
    run_ranks(2, on_a_rank, list(PAIRS))


@pytest.mark.slow
def test_compiled():
    for name in PAIRS:
        check(name, lambda: Sequence.single(Documents.from_lengths(LENGTHS, LENGTH)), compiled=True)
    run_ranks(2, on_a_rank, ["masks", "blocks", "reads"], True, timeout=300)
