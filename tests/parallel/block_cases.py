"""Block-sparse ops as tests run them: packings, inputs, and how they are differentiated."""

import torch
from distributed import run_ranks, run_threads

from longreach.kernels.documents import Documents, Run
from longreach.parallel.layout import Layout
from longreach.parallel.mesh import Mesh
from longreach.parallel.sequence import Sequence

LENGTH, HEADS, GROUPS, KEY, VALUE = 96, 4, 2, 5, 7
PACKINGS = {
    "borders inside blocks": Documents.from_lengths([[7, 41, 1, 30, 5], [23, 50, 23]], LENGTH),
    "one long document": Documents.whole(2, LENGTH),
    "ranks of padding": Documents.from_lengths([[13, 2], []], LENGTH),
    "documents of one token": Documents.from_lengths([[1] * LENGTH, [1] * 20 + [60]], LENGTH),
    "padding before documents": Documents.of_runs(
        [[Run(-1, 0, 37, 0), Run(0, 37, 59, 0)], [Run(0, 0, 20, 0), Run(-1, 20, 9, 0), Run(1, 29, 67, 0)]], LENGTH
    ),
}


def run_where(world, spans, function, *args):
    """Two ranks with four spans are processes over gloo, others are threads."""
    (run_ranks if (world, spans) == (2, 4) else run_threads)(world, function, *args)


def agrees(actual, expected, what):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9, msg=lambda m: f"{what}: {m}")


def sequence(documents, rank, world, spans, **settings):
    """What this rank holds of the rows, or another one, whose bytes are only counted."""
    return Sequence(documents, Layout(LENGTH, world, spans), rank, Mesh.create(world).sequence_group, **settings)


def differentiated(op, inputs, dout):
    """op's output and the gradient of each of its inputs."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    out = op(*inputs)
    return out.detach(), list(torch.autograd.grad(out, inputs, dout(out), materialize_grads=True))


def drawn(seed=0):
    torch.manual_seed(seed)
    shapes = ((HEADS, KEY), (GROUPS, KEY), (GROUPS, VALUE))
    return [torch.randn(2, LENGTH, *shape, dtype=torch.float64) for shape in shapes]
