"""The plan of a sparse layer: made on the device, of which the host reads the counts alone, and kept for backward."""

from contextlib import ExitStack

import pytest
import torch
from block_cases import GROUPS, LENGTH, PACKINGS, differentiated, drawn, sequence
from distributed import run_ranks
from parallel_cases import sparse_layer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from triton.runtime.interpreter import InterpretedFunction

from longreach.kernels import block_sparse as kernel
from longreach.kernels.compressed import CompressedAttend
from longreach.kernels.documents import Documents
from longreach.kernels.operation import Kept
from longreach.parallel import collectives, ops
from longreach.parallel.ops import sparse
from longreach.parallel.reading import Reading

READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_consecutive", "bincount"}


class Reads(TorchDispatchMode):
    """What the host learns of tensors while it is entered: operations that give it values or shapes, and lists."""

    def __init__(self):
        super().__init__()
        self.found, self.patched = [], ExitStack()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masks = name in ("index", "index_put", "index_put_") and any(
            x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]
        )
        if name in READS or masks:
            self.found.append(name)
        return func(*args, **(kwargs or {}))

    def __enter__(self):
        patch = self.patched.enter_context(pytest.MonkeyPatch.context())
        for name in ("tolist", "numpy", "cpu"):
            patch.setattr(Tensor, name, self._noted(name, getattr(Tensor, name)))
        return super().__enter__()

    def _noted(self, name, function):
        def call(x, *args, **settings):
            self.found.append(f"{name} of {len(x)}")
            return function(x, *args, **settings)

        return call

    def __exit__(self, *error):
        self.patched.close()
        return super().__exit__(*error)


def unwatched(reads, function):
    """Attention and selection themselves, of which the CPU's forms read lists, are not watched."""

    def call(*args, **settings):
        before = list(reads.found)
        result = function(*args, **settings)
        reads.found[:] = before
        return result

    return call


def watch_plans(monkeypatch, reads):
    for op in (kernel.BlockSparseAttend, CompressedAttend):
        for name in ("attend", "attend_backward"):
            monkeypatch.setattr(op, name, unwatched(reads, getattr(op, name)))
    monkeypatch.setattr(sparse, "choose", unwatched(reads, sparse.choose))
    monkeypatch.setattr(kernel.BlockSparseAttend, "check_lists", lambda *args: None)  # reads lists on the host alone


def watch_launchers(monkeypatch):
    """Triton's kernels are not run: lists are what they would be, and the rest is whatever the memory held."""

    def chosen(q, summaries, *, rule, **settings):
        lists = choose(q, summaries, rule=rule, **settings)
        return torch.arange(rule.count, dtype=torch.int32).expand(lists.shape).contiguous()

    choose = sparse.choose
    monkeypatch.setattr(InterpretedFunction, "run", lambda *_, **__: None)
    monkeypatch.setattr(sparse, "choose", chosen)
    monkeypatch.setattr(kernel.BlockSparseAttend, "check_lists", lambda *args: None)


def watched(rank, world, spans, backend):
    """A layer of all sparse ops, twice: the first time, what documents say is derived."""
    documents = PACKINGS["borders inside blocks"]
    dtype = torch.float32 if backend == "triton" else torch.float64
    seq = sequence(documents, rank, world, spans, backend=backend)
    inputs, w = [seq.shard(x).to(dtype) for x in drawn()], torch.linspace(0.5, 1.5, 4, dtype=dtype)
    reads = Reads()
    with pytest.MonkeyPatch.context() as monkeypatch:
        if backend == "triton":
            watch_launchers(monkeypatch)
        else:
            watch_plans(monkeypatch, reads)
        for _ in range(2):
            local = [x.clone().requires_grad_() for x in (*inputs, w)]
            reads.found.clear()
            with reads:
                out = sparse_layer(*local, seq=seq)
            forward = list(reads.found)
            reads.found.clear()
            with reads:
                out.backward(torch.ones_like(out))
            backward = list(reads.found)
    return forward, backward


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["chunked", "triton"])
@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_layer_reads_its_counts_and_nothing_else(world, backend):
    counts = [f"tolist of {2 * world + 2}"]  # in backward they are on the host
    assert run_ranks(world, watched, 2, backend, timeout=120) == [(counts, counts)] * world


@pytest.mark.parametrize(
    "read",
    [
        Tensor.nonzero,
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x[x > 0],
        lambda x: float(x.sum()),
        lambda x: x.sum().item(),
    ],
)
def test_what_reads_is_seen(read):
    with Reads() as reads:
        read(torch.ones(3))
    assert len(reads.found) == 1


def attended_late(rank, world):
    """Where the counts take their time, this rank's own blocks are attended to first."""
    documents, events = PACKINGS["borders inside blocks"], []
    seq, inputs = sequence(documents, rank, world, 2), drawn()
    lists = torch.arange(4, dtype=torch.int32).expand(2, LENGTH // world, GROUPS, 4).contiguous()
    local, weights = [seq.shard(x) for x in inputs], torch.linspace(-1, 1, 7, dtype=torch.float64)

    def call(*x):
        return ops.block_sparse_attention(*x, lists, seq=seq, block_size=8)

    expected = differentiated(call, local, lambda out: weights.expand_as(out))
    with pytest.MonkeyPatch.context() as patch:
        attend, wait = kernel.BlockSparseAttend.attend, Reading.wait
        patch.setattr(Reading, "ready", False)
        patch.setattr(Reading, "wait", lambda x: events.append("read") or wait(x))
        patch.setattr(kernel.BlockSparseAttend, "attend", lambda *x: events.append("attend") or attend(*x))
        got = differentiated(call, local, lambda out: weights.expand_as(out))
        first = events[:3]
        wrong = torch.zeros_like(lists)
        for at in range(world):
            with pytest.raises(ValueError, match=f"at most once.*on sequence rank {at}"):
                ops.block_sparse_attention(*local, wrong if rank == at else lists, seq=seq, block_size=8)
    for a, b in zip((got[0], *got[1]), (expected[0], *expected[1]), strict=True):
        assert torch.equal(a, b)
    return first


def test_counts_are_read_after_own_blocks_are_attended_to():
    assert run_ranks(2, attended_late, timeout=60) == [["attend", "read", "attend"]] * 2


def kept(rank, world):
    """Backward gathers no lists: it has the plan; a recomputed forward has it too."""
    documents = PACKINGS["borders inside blocks"]
    lists = torch.arange(4, dtype=torch.int32).expand(2, LENGTH // world, GROUPS, 4).contiguous()
    seq = sequence(documents, rank, world, 2, kept=Kept())
    local = [seq.shard(x).requires_grad_() for x in drawn()]
    out = checkpoint(
        lambda *x: ops.block_sparse_attention(*x, lists, seq=seq, block_size=8), *local, use_reentrant=False
    )
    with collectives.counting() as sent:
        out.sum().backward()
    return set(sent)


def test_backward_gathers_nothing():
    assert run_ranks(2, kept, timeout=60) == [{"exchange"}] * 2


def of_padding(rank, world):
    seq = sequence(Documents.from_lengths([[], []], LENGTH), rank, world, 2)
    local = [seq.shard(x).requires_grad_() for x in drawn()]
    lists = torch.full((2, LENGTH // world, GROUPS, 2), -1, dtype=torch.int32)
    out = ops.block_sparse_attention(*local, lists, seq=seq, block_size=8)
    out.sum().backward()
    return bool(out.any()) or any(bool(x.grad.any()) for x in local)


def test_rows_of_padding_alone():
    assert run_ranks(2, of_padding, timeout=60) == [False, False]
