"""Slot attention: two passes of gated linear attention against the recurrence token by token."""

import pytest
import recurrence_checks
import torch
from recurrence_parts import THREE_ROWS, assert_near, run_op
from torch import Tensor

from longreach.kernels.documents import Documents
from longreach.kernels.slot_attention import SlotInputs, SlotRecurrence, flops, slot_attention

HEADS, KEY, VALUE, SLOTS = 2, 4, 3, 5


def draw(documents: Documents, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Inputs, an initial state, and gradients of the output and of the final state."""
    generator = torch.Generator().manual_seed(documents.length)
    batch, length = documents.batch, documents.length

    def normal(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, dtype=torch.float64, generator=generator)

    q, k, v, gate = (normal(length, HEADS, size) for size in (KEY, KEY, VALUE, SLOTS))
    log_decay = torch.nn.functional.logsigmoid(gate) / 8
    inputs = [q, k, v, -torch.expm1(log_decay), log_decay]
    state, dstate = (normal(HEADS, SLOTS, KEY + VALUE) for _ in range(2))
    return [x.to(dtype) for x in inputs], state, normal(length, HEADS, VALUE), dstate


@pytest.mark.parametrize("documents", [Documents.whole(1, 1, 3), Documents.whole(2, 150), *THREE_ROWS])
@pytest.mark.parametrize("enters", [True, False])
def test_passes_are_the_recurrence(documents, enters):
    inputs, state, *given = draw(documents)
    state = state if enters else None
    plain = run_op(slot_attention, inputs, state, documents, *given, backend="reference")
    assert_near(run_op(slot_attention, inputs, state, documents, *given, backend="chunked"), plain, 1e-9)


@pytest.mark.slow
def test_triton_kernels_are_the_recurrence():
    documents = Documents.whole(1, 4, 3)
    inputs, state, dout, dstate = draw(documents, torch.float32)
    inputs, state, dout, dstate = [x[:, :, :1] for x in inputs], state[:, :1], dout[:, :, :1], dstate[:, :1]
    plain = run_op(slot_attention, inputs, state, documents, dout, dstate, backend="reference")
    found = run_op(slot_attention, inputs, state, documents, dout, dstate, dtype=torch.float32, backend="triton")
    assert_near(found, plain, 1e-5)
    problem = SlotRecurrence().problem(tuple(inputs), Documents.whole(1, 4), backend="triton")
    final = slot_attention(*inputs, backend="reference")[1]
    torch.testing.assert_close(problem.implementation.final_state(problem), final, rtol=1e-5, atol=1e-5)


def test_bfloat16_is_computed_in_float32():
    documents = Documents.whole(2, 70, 3)
    inputs, state, *given = draw(documents)
    recurrence_checks.bfloat16(slot_attention, inputs, state, documents, *given)


def test_documents_are_apart():
    recurrence_checks.no_document_moves_another(slot_attention, draw, changed=(0, 1, 2), same=(0, 2, 3, 4, 5, 6))
    recurrence_checks.where_a_state_enters(slot_attention, draw)


def test_tokens_continue_from_the_state():
    recurrence_checks.token_by_token(slot_attention, draw(Documents.whole(2, 6))[0])


def test_reference_is_differentiable():
    inputs, state, *_ = draw(Documents.whole(1, 3))
    assert torch.autograd.gradcheck(
        lambda *x: slot_attention(*x[:-1], initial_state=x[-1], backend="reference"),
        [x.requires_grad_() for x in (*inputs, state)],
    )


def test_strong_decays_and_zero_keys_stay_finite():
    documents = Documents.from_lengths([[1] * 70, [64, 6]], 70)
    (q, k, v, entering, log_decay), *_ = draw(documents, torch.float32)
    k[:, 10:60] = 0.0
    leaves = [x.requires_grad_() for x in (q, k, v, entering, torch.full_like(log_decay, -20.0))]
    out, _ = slot_attention(*leaves, documents=documents)
    exact = slot_attention(*(x.detach().double() for x in leaves), documents=documents, backend="reference")[0]
    torch.testing.assert_close(out.double(), exact, rtol=1e-4, atol=1e-5)
    assert all(x.isfinite().all() for x in torch.autograd.grad(out.sum(), leaves))


def test_what_it_costs():
    inputs, *_ = draw(Documents.whole(3, 5), torch.float32)
    state, transition = (3 * HEADS * SLOTS * size * 4 for size in (KEY + VALUE, 1))
    assert SlotRecurrence().state_bytes(SlotInputs(*inputs)) == state
    assert SlotRecurrence().bytes_sent(tuple(inputs), ranks=3) == 2 * (2 * state + transition)
    assert flops(10, heads=2, key_dim=4, slots=5, value_dim=3) == 20 * (4 * 5 * 7 + 128 * (9 + 8))


def test_wrong_inputs_are_named():
    inputs, *_ = draw(Documents.whole(2, 5))
    with pytest.raises(ValueError, match="log_decay must not be positive"):
        slot_attention(*inputs[:-1], -inputs[-1])
    with pytest.raises(ValueError, match=r"initial_state must be \[B, H, M, K \+ V\] = \[2, 2, 5, 7\]"):
        slot_attention(*inputs, initial_state=torch.zeros(2, 2, 5, 4))
