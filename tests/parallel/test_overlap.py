"""Messages are under way while ranks compute: by the order of events, not by time."""

from itertools import count

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from parallel_cases import CASES, local, shared

from longreach.kernels.block_sparse import BlockSparseAttend
from longreach.kernels.documents import Documents
from longreach.kernels.masks import Mask
from longreach.kernels.softmax import SoftmaxAttend
from longreach.parallel import ops

WORLD, LENGTH = 3, 48


class Watched:
    """A message under way, whose end is noted."""

    def __init__(self, work, number, events):
        self.work, self.number, self.events = work, number, events

    def wait(self):
        self.events.append(("wait", self.number))
        return self.work.wait()


def noted(monkeypatch, op, names):
    """The events of this rank from now on: messages started and waited for, and calls of the op's methods."""
    events, numbers, exchange = [], count(), dist.batch_isend_irecv

    def started(messages):
        number = next(numbers)
        events.append(("start", number))
        return [Watched(work, number, events) for work in exchange(messages)]

    def computing(kernel):
        def call(*args, **settings):
            events.append(("compute", None))
            return kernel(*args, **settings)

        return call

    monkeypatch.setattr(dist, "batch_isend_irecv", started)
    for name in names:
        monkeypatch.setattr(op, name, computing(getattr(op, name)))
    return events


def hidden(events):
    """How many messages travelled during a computation; every one that could have must have."""
    found = 0
    for at, (kind, number) in enumerate(events):
        if kind == "start" and ("compute", None) in events[at:]:
            end = events.index(("wait", number))
            assert ("compute", None) in events[at:end], f"message {number} is waited for at once: {events}"
            found += 1
    return found


def overlapped(rank, world):
    seq = shared(world, 1, Documents.whole(2, LENGTH))
    inputs, _ = CASES["blocks of NSA"].draw(2, LENGTH, torch.Generator().manual_seed(0))
    q, k, v = local(inputs[:3], seq)
    lists = torch.arange(LENGTH // 8, dtype=torch.int32).expand(*q.shape[:2], k.shape[2], -1).contiguous()
    calls = {
        ("ring", SoftmaxAttend): lambda: ops.softmax_attention(q, k, v, seq=seq, mask=Mask(causal=False)),
        ("listed_blocks", BlockSparseAttend): lambda: ops.block_sparse_attention(
            q, k, v, lists, seq=seq, block_size=8, mask=Mask(causal=False)
        ),
    }
    found = {}
    for (strategy, op), call in calls.items():
        with pytest.MonkeyPatch.context() as monkeypatch:
            events = noted(monkeypatch, op, ("attend", "attend_backward"))
            out = call()
            forward = hidden(events)
            events.clear()
            out.sum().backward()
            found[strategy] = forward, hidden(events)
    return found


@pytest.mark.slow
def test_what_travels_does_so_during_a_computation() -> None:
    # A ring of three: two blocks each way, and the gradient of the first that comes by; listed blocks: one exchange.
    assert run_ranks(WORLD, overlapped, timeout=60) == [{"ring": (2, 3), "listed_blocks": (1, 1)}] * WORLD
