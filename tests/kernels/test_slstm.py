"""sLSTM: the fast form against the recurrence, and the recurrence against the paper's, without stabiliser."""

import pytest
import torch
from torch import Tensor

from longreach.kernels.documents import Documents
from longreach.kernels.slstm import SLSTMInputs, SLSTMRecurrence, flops, slstm

BATCH, HEADS, SIZE = 3, 2, 3
PACKED = [[5, 1, 13], [19], [2, 3]]  # the last row ends in padding


def drawn(length: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)
    gates = 2 * torch.randn(BATCH, length, HEADS, 4, SIZE, generator=generator, dtype=torch.float64)
    recurrent = torch.randn(HEADS, 4 * SIZE**2, generator=generator, dtype=torch.float64)
    state = torch.randn(BATCH, HEADS, 4, SIZE, generator=generator, dtype=torch.float64)
    state[:, :, 2] = 1 + state[:, :, 2].abs()
    return [x.to(dtype) for x in (gates, recurrent, state)]


def results(backend: str, inputs: list[Tensor], documents: Documents | None, enters: bool = True) -> list[Tensor]:
    """Output, final state and the gradient of each input."""
    gates, recurrent, state = (x.clone().requires_grad_() for x in inputs)
    initial = state if enters else None
    out, final = slstm(gates, recurrent, initial_state=initial, documents=documents, backend=backend)
    generator = torch.Generator().manual_seed(7)
    douts = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in (out, final)]
    leaves = [gates, recurrent, state] if enters else [gates, recurrent]
    return [out, final, *torch.autograd.grad([out, final], leaves, douts)]


@pytest.mark.parametrize("length", [1, 20, 300])
@pytest.mark.parametrize("enters", [True, False])
def test_fast_form_is_the_recurrence(length, enters):
    inputs = drawn(length)
    for fast, plain in zip(
        results("chunked", inputs, None, enters), results("reference", inputs, None, enters), strict=True
    ):
        torch.testing.assert_close(fast, plain, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("cut", [0, 3])
def test_fast_form_is_the_recurrence_of_each_document(cut):
    documents = Documents.from_lengths(PACKED, 23).slice(cut, 23)
    inputs = drawn(23 - cut)
    for fast, plain in zip(results("chunked", inputs, documents), results("reference", inputs, documents), strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-9, atol=1e-9)


def of_the_paper(gates: Tensor, recurrent: Tensor) -> Tensor:
    """Equations 8 to 14 of the paper, with exponentials as they stand there and a sigmoid forget gate."""
    matrices = recurrent.view(HEADS, SIZE, 4, SIZE)
    h = c = n = gates.new_zeros(BATCH, HEADS, SIZE)
    outputs = []
    for t in range(gates.shape[1]):
        i, f, z, o = (gates[:, t] + torch.einsum("bhk,hkgj->bhgj", h, matrices)).unbind(2)
        c = f.sigmoid() * c + i.exp() * z.tanh()
        n = f.sigmoid() * n + i.exp()
        h = o.sigmoid() * c / n
        outputs.append(h)
    return torch.stack(outputs, dim=1)


def test_recurrence_is_that_of_the_paper():
    gates, recurrent, _ = (x.requires_grad_() for x in drawn(17))
    ours, theirs = slstm(gates, recurrent)[0], of_the_paper(gates, recurrent)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    dout = drawn(17)[0][..., 0, :]
    gradients = [torch.autograd.grad(out, (gates, recurrent), dout) for out in (ours, theirs)]
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.slow
def test_output_and_cells_are_differentiable():
    gates, recurrent, state = drawn(4)

    def op(*tensors):
        return slstm(*tensors, initial_state=state)[0]

    assert torch.autograd.gradcheck(op, (gates.requires_grad_(), recurrent.requires_grad_()))


def test_gates_as_large_as_they_come_do_not_overflow():
    gates, recurrent, _ = drawn(64, torch.float32)
    gates = (100 * gates).requires_grad_()
    out, final = slstm(gates, recurrent)
    (gradient,) = torch.autograd.grad(out.sum(), gates)
    assert out.isfinite().all()
    assert final.isfinite().all()
    assert gradient.isfinite().all()
    assert out.abs().max() <= 1


def test_parts_of_a_row_continue_from_the_state():
    gates, recurrent, _ = drawn(20)
    whole, end = slstm(gates, recurrent)
    first, state = slstm(gates[:, :7], recurrent)
    second, final = slstm(gates[:, 7:], recurrent, initial_state=state)
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole)
    torch.testing.assert_close(final, end)


def test_half_precision_computes_in_float32():
    gates, recurrent, _ = drawn(33, torch.bfloat16)
    out, final = slstm(gates, recurrent)
    exact = slstm(gates.float(), recurrent.float())[0]
    assert out.dtype == torch.bfloat16
    assert final.dtype == torch.float32
    torch.testing.assert_close(out, exact.bfloat16(), rtol=0, atol=0)


def test_what_it_costs():
    gates, recurrent, _ = drawn(5, torch.float32)
    op, inputs = SLSTMRecurrence(), SLSTMInputs(gates, recurrent)
    state = BATCH * HEADS * 4 * SIZE * 4
    assert op.state_bytes(inputs) == state
    assert op.bytes_sent(inputs, ranks=1) == 0
    assert op.bytes_sent(inputs, ranks=4, spans=2) == 4 * state
    assert flops(10, heads=2, key_dim=3) == 10 * 2 * 3 * (8 * 3 + 20)


def test_wrong_inputs_are_named():
    gates, recurrent, _ = drawn(5)
    with pytest.raises(ValueError, match=r"recurrent must be \[H, K \* 4 \* K\] = \[2, 36\]; got \[2, 35\]"):
        slstm(gates, recurrent[:, :-1])
    with pytest.raises(ValueError, match=r"gates must be \[B, T, H, 4, K\]"):
        slstm(gates[:, :, :, :3], recurrent)
    with pytest.raises(ValueError, match="backend must be one that slstm has, chunked or reference; got 'library'"):
        slstm(gates, recurrent, backend="library")


def test_its_segments_have_no_summary():
    gates, recurrent, _ = drawn(5)
    op = SLSTMRecurrence()
    with pytest.raises(TypeError, match="slstm is serial"):
        op.begin(op.problem(SLSTMInputs(gates, recurrent), Documents.whole(BATCH, 5)))
