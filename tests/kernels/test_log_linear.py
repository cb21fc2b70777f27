"""Log-linear attention: chunks against the recurrence token by token, and both against published code."""

import pytest
import torch
from recurrence_parts import THREE_ROWS
from torch import Tensor

from longreach.kernels.documents import Documents
from longreach.kernels.gated_linear import gated_linear_attention
from longreach.kernels.log_linear import LogLinearInputs, LogLinearRecurrence, flops, log_linear_attention
from longreach.kernels.log_linear.levels import level_between, merge_matrix

BATCH, HEADS, GROUPS, KEY, VALUE = 3, 4, 2, 3, 5


def drawn(length: int, levels: int = 6, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(BATCH, length, *shape, dtype=torch.float64, generator=generator)

    q, k, v = normal(GROUPS, KEY), normal(GROUPS, KEY), normal(HEADS, VALUE)
    inputs = q, k, v, -0.1 * normal(HEADS).abs(), normal(HEADS, levels).exp()
    return [x.to(dtype) for x in inputs]


def states(levels: int = 6) -> Tensor:
    """An initial state."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(BATCH, HEADS, levels, KEY, VALUE, dtype=torch.float64, generator=generator)


def filled(documents: Documents, levels: int) -> Tensor:
    """1 for the levels that hold tokens where rows begin, `[B, 1, L, 1, 1]`."""
    before = documents.positions()[:, :1].long() - 1
    held = level_between(torch.arange(1000).expand(BATCH, -1), before, levels)
    held = torch.where(torch.arange(1000) <= before, held, levels)
    return torch.nn.functional.one_hot(held, levels + 1).amax(1)[:, None, :levels, None, None].double()


def results(backend: str, inputs: list[Tensor], state: Tensor, documents: Documents) -> list[Tensor]:
    """Output, final state and the gradient of each input and of the levels of the initial state that hold tokens."""
    leaves, held = [x.clone().requires_grad_() for x in (*inputs, state)], filled(documents, state.shape[2])
    initial = held * leaves[-1]
    out, final = log_linear_attention(*leaves[:-1], initial_state=initial, documents=documents, backend=backend)
    generator = torch.Generator().manual_seed(7)
    douts = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in (out, final)]
    return [out, final, *torch.autograd.grad([out, final], leaves, douts)]


def test_levels_of_three_positions():
    """What lets levels merge: the one between the outer two is the greater one of the others."""
    r, s, t = (torch.arange(70).view(shape) for shape in ((-1, 1, 1), (-1, 1), (-1,)))
    ordered = (r <= s) & (s <= t)
    for levels in (1, 2, 5, 9):
        outer = level_between(r, t, levels)
        inner = torch.maximum(level_between(r, s, levels), level_between(s, t, levels))
        assert bool((outer == inner)[ordered].all())
        assert int(outer.max()) == min(levels - 1, 7)


def test_merges():
    expected = torch.tensor([[0.0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 0], [0, 0, 0, 1]])
    torch.testing.assert_close(merge_matrix(torch.tensor([2]), 4, torch.float32)[0], expected)


@pytest.mark.parametrize("levels", [1, 2, 5, 10])
@pytest.mark.parametrize(
    ("length", "position"),
    [
        (1, 0), (1, 3), (63, 0), (64, 37), pytest.param(150, 0, marks=pytest.mark.slow),
        pytest.param(300, 21, marks=pytest.mark.slow), pytest.param(600, 64, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_chunks_are_the_recurrence(length, position, levels):
    documents, inputs = Documents.whole(BATCH, length, position), drawn(length, levels)
    plain = results("reference", inputs, states(levels), documents)
    for fast, slow in zip(results("chunked", inputs, states(levels), documents), plain, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("documents", THREE_ROWS)
def test_documents_are_apart(documents):
    inputs = drawn(documents.length)
    fast, plain = (results(backend, inputs, states(), documents) for backend in ("chunked", "reference"))
    torch.testing.assert_close(fast, plain, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_parts_of_a_row_continue_from_the_state(backend):
    inputs = drawn(150)
    whole, end = log_linear_attention(*inputs, backend=backend)
    first, state = log_linear_attention(*(x[:, :70] for x in inputs), backend=backend)
    rest = Documents.whole(BATCH, 80, 70)
    second, final = log_linear_attention(
        *(x[:, 70:] for x in inputs), initial_state=state, documents=rest, backend=backend
    )
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole)
    torch.testing.assert_close(final, end)


@pytest.mark.slow  # flash-linear-attention takes seconds to import
@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_it_is_flash_linear_attention(backend):
    naive = pytest.importorskip("fla.ops.log_linear_attn.naive", reason="needs flash-linear-attention")
    inputs = [x.requires_grad_() for x in drawn(135, levels=9)]
    out, _ = log_linear_attention(*inputs, backend=backend)
    expected = naive.naive_log_linear_attn(*inputs, scale=None)
    torch.testing.assert_close(out, expected)
    dout = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    ours, theirs = (torch.autograd.grad(x, inputs, dout) for x in (out, expected))
    torch.testing.assert_close(ours, theirs)


def test_equal_weights_are_gated_linear_attention():
    q, k, v, log_decay, weights = drawn(150)
    out, final = log_linear_attention(q, k, v, log_decay, torch.ones_like(weights))
    expected, state = gated_linear_attention(q, k, v, log_decay)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(final.sum(2), state)


def test_strong_decays_and_short_documents_stay_finite():
    q, k, v, _, weights = drawn(130, dtype=torch.float32)
    decay = torch.full_like(weights[..., 0], -20.0)
    documents = Documents.from_lengths([[1] * 130, [64, 66], [130]], 130)
    leaves = [x.requires_grad_() for x in (q, k, v, decay, weights)]
    out, _ = log_linear_attention(*leaves, documents=documents)
    exact = log_linear_attention(*(x.detach().double() for x in leaves), documents=documents, backend="reference")[0]
    torch.testing.assert_close(out.double(), exact, rtol=1e-4, atol=1e-5)
    assert all(x.isfinite().all() for x in torch.autograd.grad(out.sum(), leaves))


def test_what_it_costs():
    inputs = drawn(5, dtype=torch.float32)
    state = BATCH * HEADS * 6 * KEY * VALUE * 4
    assert LogLinearRecurrence().state_bytes(LogLinearInputs(*inputs)) == state
    assert LogLinearRecurrence().bytes_sent(tuple(inputs), ranks=3) == 2 * (2 * state + BATCH * HEADS * 6 * 6 * 4)
    more, less = (flops(10, heads=2, key_dim=4, value_dim=3, levels=levels) for levels in (7, 6))
    assert more - less == 10 * 2 * 4 * 4 * 3


def test_wrong_inputs_are_named():
    inputs = drawn(5)
    with pytest.raises(ValueError, match="documents must come with an initial_state; got None"):
        log_linear_attention(*inputs, initial_state=states())
    with pytest.raises(ValueError, match=r"level_weights must be \[B, T, H, L\]"):
        log_linear_attention(*inputs[:-1], inputs[-1][:, :, :1])
    with pytest.raises(ValueError, match=r"initial_state must be \[B, H, L, K, V\] = \[3, 4, 6, 3, 5\]"):
        log_linear_attention(*inputs, initial_state=states(5), documents=Documents.whole(BATCH, 5, 1))
