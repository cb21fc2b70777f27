"""Short convolutions and token shift against their definition and torch's own convolution."""

import itertools
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from longreach.kernels.documents import Documents
from longreach.kernels.short_conv import bytes_sent, chunked, flops, short_conv, state_bytes, token_shift

WIDTH = 5
PACKED = Documents.from_lengths([[3, 1, 1, 290, 5, 50], [350]], 400)
PACKINGS = {
    "1 token": Documents.whole(2, 1),
    "1000 tokens": Documents.whole(1, 1000),
    "second token": Documents.whole(2, 1, position=1),
    "continued": Documents.whole(2, 300, position=7),
    "packed": PACKED,
    "cut within documents": PACKED.slice(100, 400),
    "cut near a start": PACKED.slice(2, 300),
    "all padding": PACKED.slice(352, 400),
    "one-token documents": Documents.from_lengths([[1] * 20, [2] * 10], 20),
}


def draw(documents, taps):
    """x, weight, bias, history and the gradient of the output, in float64."""
    torch.manual_seed(0)
    batch, length = documents.batch, documents.length
    shapes = ((batch, length, WIDTH), (WIDTH, taps), (WIDTH,), (batch, taps - 1, WIDTH), (batch, length, WIDTH))
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def run(op, inputs, dout):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = op(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype), allow_unused=True)


def assert_near(found, expected, tolerance=1e-9):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance)


def convolve(documents, activation, backend="auto"):
    return lambda x, weight, bias, history: short_conv(
        x, weight, bias=bias, history=history, documents=documents, activation=activation, backend=backend
    )


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("taps", [1, 2, 4, 9])
@pytest.mark.parametrize("documents", PACKINGS.values(), ids=PACKINGS)
def test_outputs_and_gradients_are_those_of_the_definition(documents, taps, activation):
    *inputs, dout = draw(documents, taps)
    expected = run(convolve(documents, activation, "reference"), inputs, dout)
    assert_near(run(convolve(documents, activation), inputs, dout), expected)
    single = run(convolve(documents, activation), [x.float() for x in inputs], dout)
    assert_near(single, expected, 1e-4)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("taps", [1, 4])
def test_slabs_and_rows_without_history(taps, activation, monkeypatch):
    monkeypatch.setattr(chunked, "SLAB", 2 * WIDTH * 7)
    documents = Documents.whole(2, 30)
    x, weight, bias, _, dout = draw(documents, taps)
    for history in (None, torch.ones(2, taps - 1, WIDTH, dtype=torch.float64)):

        def op(x, weight, bias, history=history, backend="auto"):
            return convolve(documents, activation, backend)(x, weight, bias, history)

        expected = run(partial(op, backend="reference"), [x, weight, bias], dout)
        assert_near(run(op, [x, weight, bias], dout), expected)
        assert_near(run(op, [x.float(), weight.float(), bias.float()], dout), expected, 1e-4)


@pytest.mark.parametrize("documents", PACKINGS.values(), ids=PACKINGS)
def test_token_shift_is_the_token_before(documents):
    x, _, _, history, dout = draw(documents, 2)
    shift = {
        backend: run(
            lambda x, h, b=backend: token_shift(x, history=h, documents=documents, backend=b), [x, history], dout
        )
        for backend in ("chunked", "reference")
    }
    assert_near(shift["chunked"], shift["reference"])
    taps = torch.tensor([1.0, 0.0], dtype=torch.float64).expand(WIDTH, 2)
    assert_near(shift["chunked"][:1], [short_conv(x, taps, history=history, documents=documents)])


def test_one_document_is_torchs_convolution():
    x, weight, bias, history, dout = draw(Documents.whole(2, 300), 4)

    def theirs(x, weight, bias, history):
        rows = torch.cat([history, x], dim=1).transpose(1, 2)
        return F.silu(F.conv1d(rows, weight[:, None], bias, groups=WIDTH)).transpose(1, 2)

    inputs = [x, weight, bias, history]
    assert_near(run(convolve(None, "silu"), inputs, dout), run(theirs, inputs, dout))


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.slow
def test_gradcheck(backend):
    documents = Documents.from_lengths([[1, 3, 4]]).slice(2, 8)
    *inputs, _ = draw(documents, 3)
    assert torch.autograd.gradcheck(convolve(documents, "silu", backend), [x.requires_grad_() for x in inputs])


def test_pieces_with_the_rows_before_them_are_the_whole():
    x, weight, bias, *_ = draw(PACKED, 4)
    whole = short_conv(x, weight, bias=bias, documents=PACKED, activation="silu")
    shifted = token_shift(x, documents=PACKED)
    bounds = [0, 2, 3, 200, 296, 301, 400]
    padded = F.pad(x, (0, 0, 3, 0))
    for start, stop in itertools.pairwise(bounds):
        piece, held = x[:, start:stop], PACKED.slice(start, stop)
        before = padded[:, start : start + 3]
        out = short_conv(piece, weight, bias=bias, documents=held, history=before, activation="silu")
        assert_near([out], [whole[:, start:stop]])
        assert_near([token_shift(piece, documents=held, history=before[:, 2:])], [shifted[:, start:stop]])


def test_no_document_moves_another():
    x, weight, _, history, dout = draw(PACKED, 4)
    op = lambda x, weight, history: short_conv(x, weight, history=history, documents=PACKED)  # noqa: E731
    moved = x.clone()
    moved[0, 5:295] += 100.0
    before, after = run(op, [x, weight, history], dout), run(op, [moved, weight, history], dout)
    outside = torch.ones(400, dtype=torch.bool)
    outside[5:295] = False
    assert torch.equal(before[0][0, outside], after[0][0, outside])
    assert torch.equal(before[1][0, outside], after[1][0, outside])
    # No row continues a document: what was before it is not seen and gets no gradient.
    assert not before[3].any()


def test_bfloat16_is_summed_in_float32():
    x, weight, bias, history, dout = (t.bfloat16() for t in draw(PACKED, 4))
    inputs = [x, weight, bias, history]
    found = run(convolve(PACKED, "silu"), inputs, dout)
    expected = run(convolve(PACKED, "silu", "reference"), [t.double() for t in inputs], dout)
    assert found[0].dtype == torch.bfloat16
    for a, b in zip(found, expected, strict=True):
        assert (a.double() - b).norm() <= 1e-2 * b.norm()


WRONG = {
    "weight must": lambda x, w: short_conv(x, w[:3]),
    "bias must": lambda x, w: short_conv(x, w, bias=w),
    "activation must": lambda x, w: short_conv(x, w, activation="relu"),
    "history must": lambda x, w: short_conv(x, w, history=x),
    "documents must describe": lambda x, w: short_conv(x, w, documents=Documents.whole(2, 5)),
    "documents must start at position 0": lambda x, w: token_shift(
        x, documents=Documents.concatenate([Documents.whole(2, 10), Documents.whole(2, 10, position=50)])
    ),
    "at least one token": lambda x, w: token_shift(x[:, :0]),
    "x must": lambda x, w: token_shift(x[0]),
    "backend must": lambda x, w: short_conv(x, w, backend="fast"),
}


@pytest.mark.parametrize("message", WRONG)
def test_bad_input_is_named(message):
    x, weight, *_ = draw(Documents.whole(2, 20), 4)
    with pytest.raises(ValueError, match=message):
        WRONG[message](x, weight)


def test_costs():
    assert flops(100, channels=8, taps=4) == 2 * 100 * 8 * 4
    assert state_bytes(batch=2, channels=8, taps=4) == 2 * 8 * 3 * 2
    assert bytes_sent(batch=2, channels=8, taps=4, ranks=3, spans=2) == 3 * 2 * 2 * state_bytes(
        batch=2, channels=8, taps=4
    )
    assert bytes_sent(batch=2, channels=8, taps=1, ranks=3) == bytes_sent(batch=2, channels=8, taps=4, ranks=1) == 0
