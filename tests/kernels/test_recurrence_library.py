"""Recurrences by flash-linear-attention: used once it agrees with the reference, refused with the reason otherwise.

Its kernels need a GPU. A stand-in, with its functions and arguments, computes each sequence by our own op.
"""

import sys
from importlib.machinery import ModuleSpec
from itertools import pairwise
from types import ModuleType

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from longreach.kernels import dispatch
from longreach.kernels.chunks import library
from longreach.kernels.delta_rule import delta_rule
from longreach.kernels.documents import Documents, Run
from longreach.kernels.gated_linear import gated_linear_attention

PACKED = Documents.of_runs(
    [[Run(0, 0, 9, 4), Run(1, 9, 20, 0), Run(2, 29, 1, 0)], [Run(0, 0, 17, 0), Run(-1, 17, 13, 0)]], 30
)  # the first row continues a document; the second ends in padding
H, G, K, V = 4, 2, 8, 6


def by_sequence(op, sequences, tensors, scale, initial_state):
    """The op on each sequence alone, and the states after them."""
    outputs, states = [], []
    for number, (first, stop) in enumerate(pairwise(sequences)):
        parts = [None if x is None else x[:, first:stop] for x in tensors]
        out, state = op(*parts, scale=scale, initial_state=initial_state[number : number + 1], backend="chunked")
        outputs.append(out)
        states.append(state)
    return torch.cat(outputs, 1), torch.cat(states)


class StandIn:
    """flash-linear-attention with outputs `factor` times what they are."""

    def __init__(self, factor=1.0):
        self.factor, self.called = factor, []

    def function(self, name, op):
        def run(*tensors, g=None, scale, initial_state, output_final_state, cu_seqlens, cu_seqlens_cpu):
            assert output_final_state
            assert initial_state.dtype == torch.float32
            assert torch.equal(cu_seqlens, cu_seqlens_cpu)
            assert {x.shape[2] for x in tensors} == {H}
            self.called.append(name)
            if name == "chunk_delta_rule":
                tensors = (*tensors, None)
            elif op is delta_rule:
                *rest, g, beta = tensors
                tensors = (*rest, beta, g)
            else:
                tensors = (*tensors, g)
            out, state = by_sequence(op, cu_seqlens.tolist(), tensors, scale, initial_state)
            return out * self.factor, state

        return run


FUNCTIONS = {
    "delta_rule": ("chunk_delta_rule", delta_rule),
    "gated_delta_rule": ("chunk_gated_delta_rule", delta_rule),
    "kda": ("chunk_kda", delta_rule),
    "simple_gla": ("chunk_simple_gla", gated_linear_attention),
    "gla": ("chunk_gla", gated_linear_attention),
}


@pytest.fixture
def install(monkeypatch):
    """Puts a stand-in in the library's place, or nothing, with no verdict on it yet."""

    def put(stand_in):
        monkeypatch.setattr(library, "_verdicts", {})
        modules = {name: ModuleType(name) for name in ("fla", "fla.ops", *(f"fla.ops.{each}" for each in FUNCTIONS))}
        modules["fla"].__spec__ = ModuleSpec("fla", None)
        for module, (name, op) in FUNCTIONS.items():
            if stand_in is not None:
                setattr(modules[f"fla.ops.{module}"], name, stand_in.function(name, op))
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, None if stand_in is None else module)

    yield put
    dispatch.choose({}, "cpu")


def drawn(decay):
    """(op, its tensors, by name) on packed documents, with a decay of these dims."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    q, k = (torch.nn.functional.normalize(draw(2, 30, G, K), dim=-1) for _ in range(2))
    shapes = {"none": None, "head": (2, 30, H), "channel": (2, 30, H, K), "constant": (H,), "constants": (H, K)}
    shape = shapes[decay]
    log_decay = None if shape is None else -torch.nn.functional.softplus(draw(*shape))
    return q, k, draw(2, 30, H, V), draw(2, 30, H).sigmoid(), log_decay, draw(2, H, K, V)


def results(op, decay, backend):
    q, k, v, beta, log_decay, state = drawn(decay)
    tensors = {"q": q, "k": k, "v": v, "log_decay": log_decay, "initial_state": state}
    if op is delta_rule:
        tensors["beta"] = beta
    leaves = {name: x.requires_grad_() for name, x in tensors.items() if x is not None}
    out, final = op(**leaves, documents=PACKED, backend=backend)
    gradients = torch.autograd.grad((out * out).sum() + (final * final).sum(), list(leaves.values()))
    return [out, final, *gradients]


KINDS = [
    (delta_rule, "none", "chunk_delta_rule"),
    (delta_rule, "head", "chunk_gated_delta_rule"),
    (delta_rule, "channel", "chunk_kda"),
    (gated_linear_attention, "none", "chunk_simple_gla"),
    (gated_linear_attention, "head", "chunk_simple_gla"),
    (gated_linear_attention, "constant", "chunk_simple_gla"),
    (gated_linear_attention, "channel", "chunk_gla"),
    (gated_linear_attention, "constants", "chunk_gla"),
]


@pytest.mark.parametrize(("op", "decay", "function"), KINDS)
def test_a_library_that_agrees_runs_with_its_gradients(op, decay, function, install):
    stand_in = StandIn()
    install(stand_in)
    for got, expected in zip(results(op, decay, "library"), results(op, decay, "reference"), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert {*stand_in.called} == {function}
    calls = len(stand_in.called)
    results(op, decay, "library")
    assert len(stand_in.called) == calls + 2  # forward, and again to differentiate: it is tried once


@pytest.mark.parametrize(("op", "decay", "function"), KINDS)
def test_a_library_that_is_wrong_or_missing_is_refused_with_the_reason(op, decay, function, install):
    install(StandIn(1.05))
    with pytest.raises(ValueError, match=r"got 'library' for \w+: the output of flash-linear-attention is off by 0.05"):
        results(op, decay, "library")
    install(None)
    with pytest.raises(ValueError, match=r"flash-linear-attention cannot be imported .* Use 'auto'"):
        results(op, decay, "library")
    results(op, decay, "auto")


def test_what_a_library_does_not_compute_is_refused(install):
    install(StandIn())
    q, k, v, beta, log_decay, _ = drawn("channel")
    with pytest.raises(ValueError, match="not called for `erase`"):
        delta_rule(q, k, v, None, log_decay, erase=(-k, k), backend="library")
    with pytest.raises(ValueError, match="called for the plain recurrence alone"):
        gated_linear_attention(q, k, v, log_decay, normaliser="sum", backend="library")
    with pytest.raises(ValueError, match="does not take float64"):
        delta_rule(q.double(), k.double(), v.double(), beta.double(), backend="library")


def test_auto_is_what_was_chosen_for_the_op(install):
    stand_in = StandIn()
    install(stand_in)
    results(delta_rule, "head", "auto")
    assert not stand_in.called
    dispatch.choose({"delta_rule": "library"}, "cpu")
    results(delta_rule, "head", "auto")
    assert stand_in.called
    stand_in.called.clear()
    results(delta_rule, "head", "chunked")
    results(gated_linear_attention, "head", "auto")
    assert not stand_in.called


def test_a_library_is_tried_within_what_is_recomputed(install):
    q, k, v, beta, log_decay, _ = drawn("head")
    install(StandIn())

    def layer(q):
        return delta_rule(q * 1.0, k, v, beta, log_decay, documents=PACKED, backend="library")[0]

    gradients = []
    for recomputed in (True, False):
        leaf = q.detach().requires_grad_()
        out = checkpoint(layer, leaf, use_reentrant=False) if recomputed else layer(leaf)
        gradients += torch.autograd.grad((out * out).sum(), leaf)
    torch.testing.assert_close(*gradients)
