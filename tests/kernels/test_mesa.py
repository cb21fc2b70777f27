"""Mesa: conjugate gradients in chunks against exact solutions token by token, and both against published code."""

import pytest
import torch
from recurrence_parts import THREE_ROWS
from torch import Tensor
from torch.nn import functional as F

from longreach.kernels.documents import Documents
from longreach.kernels.mesa import MesaInputs, MesaRecurrence, flops, mesa

BATCH, HEADS, KEY, VALUE = 3, 2, 4, 3


def drawn(length: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """The inputs, and an initial state, whose first part is a covariance."""
    generator = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    q, k = (F.normalize(normal(BATCH, length, HEADS, KEY), dim=-1) for _ in range(2))
    v, gate, beta = (normal(BATCH, length, HEADS, size) for size in (VALUE, 1, 1))
    keys = normal(BATCH, HEADS, KEY, KEY)
    state = torch.cat([keys @ keys.mT, normal(BATCH, HEADS, KEY, VALUE)], dim=-1)
    inputs = q, k, v, F.logsigmoid(gate + 2)[..., 0], beta.sigmoid()[..., 0], 0.25 + normal(HEADS, KEY).exp(), state
    return [x.to(dtype) for x in inputs]


def results(backend: str, inputs: list[Tensor], documents: Documents | None = None) -> list[Tensor]:
    """Output, final state and the gradient of each input."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    out, final = mesa(*leaves[:-1], initial_state=leaves[-1], documents=documents, backend=backend)
    generator = torch.Generator().manual_seed(7)
    douts = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in (out, final)]
    return [out, final, *torch.autograd.grad([out, final], leaves, douts)]


@pytest.mark.parametrize("length", [1, 63, 64, 200, 700])
def test_conjugate_gradients_reach_the_solution(length):
    inputs = drawn(length)
    for fast, plain in zip(results("chunked", inputs), results("reference", inputs), strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("documents", THREE_ROWS)
def test_documents_are_apart(documents):
    inputs = drawn(documents.length)
    fast, plain = (results(backend, inputs, documents) for backend in ("chunked", "reference"))
    torch.testing.assert_close(fast, plain, rtol=1e-9, atol=1e-9)


def test_parts_of_a_row_continue_from_the_state():
    *inputs, constant, _ = drawn(150)
    whole, end = mesa(*inputs, constant)
    first, state = mesa(*(x[:, :70] for x in inputs), constant)
    second, final = mesa(*(x[:, 70:] for x in inputs), constant, initial_state=state)
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole)
    torch.testing.assert_close(final, end)


@pytest.mark.slow
def test_reference_is_differentiable():
    *inputs, state = drawn(3)
    assert torch.autograd.gradcheck(
        lambda *x: mesa(*x, initial_state=state, backend="reference"), [x.requires_grad_() for x in inputs]
    )


@pytest.mark.slow  # flash-linear-attention takes seconds to import
@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_it_is_flash_linear_attention(backend):
    naive = pytest.importorskip("fla.ops.mesa_net.naive", reason="needs flash-linear-attention")
    q, k, v, log_decay, beta, regulariser, state = drawn(70, torch.float32)
    out, final = mesa(q, k, v, log_decay, beta, regulariser, initial_state=state, backend=backend)
    # Its memories are square.
    wide = F.pad(v, (0, KEY - VALUE))
    memories = state[..., :KEY], F.pad(state[..., KEY:], (0, KEY - VALUE))
    expected, covariance, memory = naive.naive_mesa_net_exact(q, k, wide, log_decay, regulariser, beta, *memories)
    torch.testing.assert_close(out, expected[..., :VALUE], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(final, torch.cat([covariance, memory[..., :VALUE]], dim=-1), rtol=1e-4, atol=1e-4)


def test_strong_decays_zero_keys_and_short_documents_stay_finite():
    q, k, v, _, beta, regulariser, _ = drawn(130, torch.float32)
    k[:, 10:80] = 0.0
    decay = torch.full_like(beta, -20.0)
    documents = Documents.from_lengths([[1] * 130, [64, 66], [130]], 130)
    leaves = [x.requires_grad_() for x in (q, k, v, decay, beta, regulariser)]
    out, _ = mesa(*leaves, documents=documents)
    exact = mesa(*(x.detach().double() for x in leaves), documents=documents, backend="reference")[0]
    torch.testing.assert_close(out.double(), exact, rtol=1e-4, atol=1e-5)
    assert all(x.isfinite().all() for x in torch.autograd.grad(out.sum(), leaves))


def test_what_it_costs():
    *inputs, _ = drawn(5, torch.float32)
    state = BATCH * HEADS * KEY * (KEY + VALUE) * 4
    assert MesaRecurrence().state_bytes(MesaInputs(*inputs)) == state
    assert MesaRecurrence().bytes_sent(tuple(inputs), ranks=3) == 2 * (2 * state + BATCH * HEADS * 4)
    more, less = (flops(10, heads=2, key_dim=4, value_dim=3, iterations=n) for n in (30, 29))
    assert more - less == 10 * 2 * (2 * 4 * 4 + 2 * 64 * 8)


def test_wrong_inputs_are_named():
    *inputs, _ = drawn(5)
    with pytest.raises(ValueError, match="iterations must be at least 1; got 0"):
        mesa(*inputs, iterations=0)
    with pytest.raises(ValueError, match=r"regulariser must be \[H, K\] = \[2, 4\]"):
        mesa(*inputs[:-1], inputs[-1][:, :-1])
    with pytest.raises(ValueError, match=r"initial_state must be \[B, H, K, K \+ V\] = \[3, 2, 4, 7\]"):
        mesa(*inputs, initial_state=torch.zeros(3, 2, 4, 4))
