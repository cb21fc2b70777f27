"""Ops with a state on a device whose values nobody can read: every read, and every tensor made elsewhere, raises."""

import contextlib

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from longreach.kernels.delta_rule import DeltaInputs, DeltaRecurrence
from longreach.kernels.diagonal_scan import DiagonalInputs, DiagonalRecurrence
from longreach.kernels.documents import Documents
from longreach.kernels.gated_linear import GatedLinearInputs, GatedLinearRecurrence
from longreach.kernels.problem import Problem
from longreach.kernels.selective_scan import SelectiveInputs, SelectiveRecurrence
from longreach.kernels.short_conv import short_conv, token_shift

META = torch.device("meta")
BATCH, LENGTH, HEADS, KEYS, VALUES = 2, 72, 2, 16, 16
# Both rows continue a document, the second ends in padding.
PACKED = Documents.from_lengths([[70, 52], [60, 40]], 122).slice(50, 122)


def tensor(*shape):
    return torch.empty(*shape, device=META)


def tokens(*shape):
    return tensor(BATCH, LENGTH, *shape)


def qkv():
    return tokens(HEADS, KEYS), tokens(HEADS, KEYS), tokens(HEADS, VALUES)


CALLS = {
    "undecayed": (GatedLinearRecurrence(), GatedLinearInputs(*qkv())),
    "decay by token": (GatedLinearRecurrence(), GatedLinearInputs(*qkv(), tokens(HEADS))),
    "decay by channel": (GatedLinearRecurrence(), GatedLinearInputs(*qkv(), tokens(HEADS, KEYS))),
    "constant decay": (GatedLinearRecurrence(), GatedLinearInputs(*qkv(), tensor(HEADS))),
    "decay of values": (GatedLinearRecurrence(), GatedLinearInputs(*qkv(), None, tokens(HEADS, VALUES))),
    "bonus": (
        GatedLinearRecurrence(read="exclusive"),
        GatedLinearInputs(*qkv(), tokens(HEADS, KEYS), bonus=tensor(HEADS, KEYS)),
    ),
    "input gate": (
        GatedLinearRecurrence(normaliser="at_least_one", stabilised=True),
        GatedLinearInputs(*qkv(), tokens(HEADS), log_input=tokens(HEADS)),
    ),
    "delta": (DeltaRecurrence(), DeltaInputs(*qkv(), tokens(HEADS), tokens(HEADS))),
    "delta by channel": (DeltaRecurrence(), DeltaInputs(*qkv(), tokens(HEADS), tokens(HEADS, KEYS))),
    "general delta": (
        DeltaRecurrence(),
        DeltaInputs(*qkv(), None, tokens(HEADS, KEYS), tokens(HEADS, KEYS), tokens(HEADS, KEYS)),
    ),
    "scan": (DiagonalRecurrence(), DiagonalInputs(tokens(8), tokens(8))),
    "constant scan": (DiagonalRecurrence(), DiagonalInputs(tokens(8), tensor(8))),
    "selective": (
        SelectiveRecurrence(),
        SelectiveInputs(tokens(8), tokens(8), tensor(8, 4), tokens(4), tokens(4)),
    ),
    "longhorn": (
        SelectiveRecurrence("longhorn"),
        SelectiveInputs(tokens(8), tokens(8), None, tokens(4), tokens(4)),
    ),
}


class NoCopies(TorchDispatchMode):
    """Raises where a tensor of the host goes to the device: what depends on documents is there already."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        host = [x for x in args if isinstance(x, torch.Tensor) and x.device.type == "cpu"]
        if isinstance(result, torch.Tensor) and result.device == META and any(x.dim() for x in host):
            raise AssertionError(f"{func} takes a tensor of the host to the device")
        return result


class NoLists(TorchFunctionMode):
    """Raises where numbers of the host become a tensor."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.tensor, torch.as_tensor):
            raise AssertionError("numbers of the host become a tensor")
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def nothing_copied():
    with NoCopies(), NoLists():
        yield


class NoKernel:
    """Stands for a kernel, and notes its launches."""

    def __init__(self, name, launches):
        self.name, self.launches = name, launches

    def __getitem__(self, grid):
        self.launches.append((self.name, grid))
        return lambda *arguments, **settings: None


@contextlib.contextmanager
def without_kernels(*modules):
    """The launchers of Triton modules, whose kernels are not there; yields the names and grids of the launches."""
    kept, launches = [], []
    for module in modules:
        for name, value in list(vars(module).items()):
            if type(value).__name__ in ("JITFunction", "InterpretedFunction"):
                kept.append((module, name, value))
                setattr(module, name, NoKernel(name, launches))
    try:
        yield launches
    finally:
        for module, name, value in kept:
            setattr(module, name, value)


def run(op, inputs, backend):
    """Every part of a run, forward and backward, on packed rows."""

    def problem():
        return Problem(op, inputs, PACKED, backend, True)

    forward = problem()
    out, summary, reads = op.begin(forward)
    summary = op.expand(summary, inputs)
    op.combine(summary, summary)
    state = op.advance(summary, op.zero_state(summary.state))
    op.correct(forward, out, state, reads)
    backward = problem()
    dstate = op.summarize_backward(backward, torch.empty_like(out), state, reads)
    op.retreat(summary._replace(state=dstate), dstate, dstate)
    op.backward(backward, torch.empty_like(out), dstate, state)
    whole = problem()
    whole.implementation.forward(whole, state)


def test_reads_lists_and_copies_are_noticed():
    x = tensor(3)
    with pytest.raises(RuntimeError):
        bool(x.any())
    with pytest.raises(RuntimeError), nothing_copied():
        x.tolist()
    for make in (lambda: torch.tensor([1.0, 2.0], device=META), lambda: torch.ones(3).to(META)):
        with pytest.raises(AssertionError), nothing_copied():
            make()


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["chunked", "triton"])
@pytest.mark.parametrize("name", CALLS)
def test_no_part_of_a_run_waits_for_its_device(name, backend):
    from longreach.kernels.chunks import triton as shared
    from longreach.kernels.delta_rule import triton as delta
    from longreach.kernels.diagonal_scan import triton as diagonal
    from longreach.kernels.gated_linear import triton as linear
    from longreach.kernels.selective_scan import triton as selective

    with without_kernels(shared, delta, diagonal, linear, selective):
        run(*CALLS[name], backend)  # what documents give is copied
        with nothing_copied():
            run(*CALLS[name], backend)


@pytest.mark.parametrize("backend", ["chunked", "triton"])
def test_a_convolution_does_not_either(backend):
    from longreach.kernels.short_conv import triton as kernels

    x, weight, history = tokens(8).requires_grad_(), tensor(8, 4).requires_grad_(), tensor(BATCH, 3, 8)

    def convolve():
        out = short_conv(x, weight, documents=PACKED, history=history, backend="chunked")
        shifted = token_shift(x, documents=PACKED, history=history[:, :1], backend="chunked")
        (out + shifted).sum().backward()

    def launch():
        out = kernels.short_conv(x, weight, None, PACKED, history, "silu")
        (out + kernels.token_shift(x, PACKED, history[:, :1])).sum().backward()

    call = convolve if backend == "chunked" else launch
    with without_kernels(kernels):
        call()
        with nothing_copied():
            call()


def test_no_kernel_goes_on_after_the_documents_that_rows_continue():
    from longreach.kernels.delta_rule import triton as delta
    from longreach.kernels.diagonal_scan import triton as diagonal

    rows = Documents.from_lengths([[100, 930], [1030]]).slice(30, 1030)
    first = rows.rows(0, 1)  # which goes on with 70 of its 1,000 tokens, two chunks of 64

    def inputs_of(rows, *shapes):
        return [tensor(rows.batch, 1000, *shape) for shape in shapes]

    for documents, reached in ((first, 2), (rows, 16)):
        q, k, v, beta = inputs_of(documents, (1, 16), (1, 16), (1, 16), (1,))
        problem = Problem(DeltaRecurrence(), DeltaInputs(q, k, v, beta), documents, "triton", True)
        with without_kernels(delta) as launches:
            DeltaRecurrence().begin(problem)
        assert [grid[1] for name, grid in launches if name == "_outputs"] == [16, reached]
    x, log_decay, state = *inputs_of(first, (8,), (8,)), tensor(1, 8)
    problem = Problem(DiagonalRecurrence(), DiagonalInputs(x, log_decay), first, "triton", True)
    with without_kernels(diagonal) as launches:
        DiagonalRecurrence().correct(problem, x, state, None)
        DiagonalRecurrence().summarize_backward(problem, x, state, None)
    assert [grid[0] for name, grid in launches if name in ("_forward", "_backward")] == [1, 1]
