"""What tests of ops with a state have in common: rows to run on, calls with gradients, parts of a run.

An op takes its inputs one by one; `initial_state`, `documents` and `backend` are keywords. An input that begins with
`[B, T]` is one of tokens, any other is a constant.
"""

import torch

from longreach.kernels.documents import Documents
from longreach.kernels.recurrence import Summary

PACKINGS = {
    "1 token": Documents.whole(2, 1),
    "63 tokens": Documents.whole(2, 63),
    "130 tokens": Documents.whole(1, 130),
    "continued": Documents.whole(2, 70, position=9),
    "packed": Documents.from_lengths([[5, 1, 1, 64, 100, 29], [128, 64], [200]], 210),
    "one-token documents": Documents.from_lengths([[1] * 80, [64, 64]], 140),
    "cut from rows": Documents.from_lengths([[5, 1, 1, 64, 100, 29], [300], [30, 270]], 300).slice(40, 230),
    "all padding": Documents.from_lengths([[7], []], 7),
}
OFTEN = ("1 token", "cut from rows", "all padding")  # which meet what the others do, but for chunks that documents fill
ROWS = Documents.from_lengths([[300], [100, 50, 150], [60, 1, 1, 120, 20], [150, 150]], 300)
CUTS = {"2": (150, 300), "3": (60, 181, 300), "5": (1, 100, 150, 182, 300), "on borders": (100, 150, 300)}
FEW_TOKENS = {
    "1 token": Documents.whole(2, 1),
    "one chunk": Documents.whole(1, 7, position=3),
    "packed": Documents.from_lengths([[3, 1, 1, 5, 1], [1, 9]], 13),
    "cut from rows": Documents.from_lengths([[5, 13, 1]], 19).slice(3, 19),
}
# Three rows that end in padding, from their start and from within the first documents.
PADDED = [
    Documents.from_lengths([[5, 1, 13], [19], [2, 3]], 22),
    Documents.from_lengths([[5, 1, 93, 60], [200], [70, 3]], 203),
]
THREE_ROWS = [rows.slice(cut, rows.length) for rows in PADDED for cut in (0, 3)]


class Parts:
    """A recurrence whose parts take what makes a problem; what is not here is the recurrence's own."""

    def __init__(self, op):
        self.op = op

    def __getattr__(self, name):
        return getattr(self.op, name)

    def forward(self, inputs, state, documents, backend="auto"):
        problem = self.op.problem(inputs, documents, backend=backend)
        return problem.implementation.forward(problem, state)

    def begin(self, inputs, documents, backend="auto"):
        return self.op.begin(self.op.problem(inputs, documents, backend=backend, exact=True))

    def summarize(self, inputs, final_state, documents, backend="auto"):
        return Summary(self.op.transition(self.op.problem(inputs, documents, backend=backend)), final_state)

    def expand(self, summary, inputs):
        return self.op.expand(summary, self.op.record(*inputs))

    def correct(self, out, inputs, state, documents, reads=None, backend="auto"):
        return self.op.correct(self.op.problem(inputs, documents, backend=backend), out, state, reads)

    def backward(self, dout, dfinal, inputs, state, documents, backend="auto"):
        return self.op.backward(self.op.problem(inputs, documents, backend=backend), dout, dfinal, state)

    def summarize_backward(self, dout, inputs, state, documents, reads=None, backend="auto"):
        return self.op.summarize_backward(self.op.problem(inputs, documents, backend=backend), dout, state, reads)


class nan_in_fresh_memory:
    """What is allocated without values holds NaN, so that reading it before writing it shows."""

    def __enter__(self):
        self.before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True, warn_only=True)

    def __exit__(self, *_):
        torch.use_deterministic_algorithms(self.before)


def assert_near(found, expected, tolerance):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=tolerance * max(1.0, b.abs().max().item()))


def run_op(op, inputs, state, documents, dout, dstate, *, dtype=torch.float64, **settings):
    """Output, final state and the gradients of all inputs and of the initial state."""
    leaves = [x if x is None else x.to(dtype).detach().clone().requires_grad_() for x in (*inputs, state)]
    out, final = op(*leaves[:-1], initial_state=leaves[-1], documents=documents, **settings)
    wanted = [x for x in leaves if x is not None]
    gradients = torch.autograd.grad([out, final], wanted, [dout.to(out.dtype), dstate.to(final.dtype)])
    return out.detach(), final.detach(), *gradients


def cut(inputs, start, stop):
    """The inputs of some tokens of each row; constants are those of all."""
    rows = inputs[0].shape[:2]
    return tuple(x if x is None or x.shape[:2] != rows else x[:, start:stop] for x in inputs)
