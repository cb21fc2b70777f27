"""Serial recurrences on ranks: what is sent, what waits for nobody, and how a failing rank ends the others."""

import pytest
import torch
from distributed import run_threads
from parallel_cases import CASES, local, shared

from longreach.kernels.documents import Documents
from longreach.kernels.slstm import SLSTMInputs, SLSTMRecurrence
from longreach.parallel.collectives import counting

LENGTH, BATCH = 48, 2
INPUTS = CASES["slstm"].draw(BATCH, LENGTH, torch.Generator().manual_seed(0))[0]
STATE = SLSTMRecurrence().state_bytes(SLSTMInputs(*INPUTS))


def sent(rank: int, world: int, lengths: list[list[int]], spans: int) -> int:
    seq = shared(world, spans, Documents.from_lengths(lengths, LENGTH))
    here = local(INPUTS, seq)
    with counting() as counts:
        CASES["slstm"].call(*here, seq=seq).sum().backward()
    assert set(counts) <= {"exchange"}
    return counts["exchange"]


def test_a_state_goes_from_each_span_to_the_next_and_its_gradient_back():
    """Within a rank nothing is sent: of four spans on two ranks, the second and the third are neighbours on one."""
    whole = [[LENGTH]] * BATCH
    assert run_threads(3, sent, whole, 1) == [STATE, 2 * STATE, STATE]
    assert run_threads(2, sent, whole, 2) == [2 * STATE, 2 * STATE]
    assert run_threads(4, sent, whole, 2)[1] == SLSTMRecurrence().bytes_sent(tuple(INPUTS), ranks=4, spans=2)


def test_spans_that_begin_with_documents_of_their_own_wait_for_nobody():
    assert run_threads(2, sent, [[24, 24]] * BATCH, 1) == [0, 0]
    assert run_threads(3, sent, [[16, 32], [10, 6, 32]], 1) == [0, STATE, STATE]


def fails(rank: int, world: int) -> None:
    seq = shared(world, 1, Documents.whole(BATCH, LENGTH))
    here = local(INPUTS, seq)
    if rank == 1:
        raise OSError("the disk is gone")
    CASES["slstm"].call(*here, seq=seq).sum().backward()


def test_a_rank_that_fails_ends_those_that_wait_for_its_state():
    with pytest.raises(OSError, match="the disk is gone"):
        run_threads(3, fails)
