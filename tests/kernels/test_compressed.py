"""Compressed attention against a dense softmax over windows, found token by token."""

import math

import pytest
import torch
from covering import pairwise

from longreach.kernels.compressed import compressed_attention, flops
from longreach.kernels.documents import Documents
from longreach.kernels.select_blocks import WindowLayout

PACKINGS = {
    "one document": Documents.whole(2, 75),
    "packed": Documents.from_lengths([[5, 1, 31, 32, 16, 8], [100], [7, 60]], 100),
    "cut from rows": Documents.from_lengths([[5, 1, 31, 33, 16, 8], [100], [30, 70]], 100).slice(17, 61),
    "too short to have a window": Documents.from_lengths([[3, 3], [5]], 6),
    "all padding": Documents.from_lengths([[], []], 9),
}
ROWS = {"cut from rows": Documents.from_lengths([[5, 1, 31, 33, 16, 8], [100], [30, 70]], 100)}
SIZES = {"overlapping": (8, 4), "apart": (4, 4), "every token": (3, 1), "with gaps": (2, 5)}


def seen(documents, windows):
    """bool `[B, T, N]`, by the positions of every token of every window."""
    ids, positions, table = documents.ids(), documents.positions(), windows.table()
    result = torch.zeros(documents.batch, documents.length, windows.count, dtype=torch.bool)
    for b in range(documents.batch):
        for t in range(documents.length):
            for n, (document, first, _) in enumerate(table[b].tolist()):
                held = range(first, first + windows.size)
                result[b, t, n] = ids[b, t] >= 0 and document == ids[b, t] and max(held) <= positions[b, t]
    return result


def dense(q, k, v, visible, scale):
    repeats = q.shape[2] // k.shape[2]
    k, v = (x[:, : visible.shape[2]].repeat_interleave(repeats, dim=2) for x in (k, v))
    scores = (scale * torch.einsum("bthk,bnhk->bhtn", q, k)).masked_fill(~visible.unsqueeze(1), float("-inf"))
    lse = scores.logsumexp(-1)
    weights = (scores - lse.masked_fill(lse.isinf(), 0.0).unsqueeze(-1)).exp()
    return torch.einsum("bhtn,bnhv->bthv", weights, v), lse.transpose(1, 2)


def draw(documents, windows, heads=4, groups=2, keys=6, values=10, more=0):
    torch.manual_seed(0)
    shapes = (
        (documents.batch, documents.length, heads, keys),
        (documents.batch, windows.count + more, groups, keys),
        (documents.batch, windows.count + more, groups, values),
    )
    q, k, v = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    return q, k, v, torch.randn(documents.batch, documents.length, heads, values, dtype=torch.float64)


@pytest.mark.parametrize(("packing", "sizes", "more"), pairwise(list(PACKINGS), SIZES, (0, 3)))
def test_outputs_and_gradients_are_those_of_a_dense_softmax(packing, sizes, more):
    documents = PACKINGS[packing]
    rows = ROWS.get(packing, documents)
    windows = WindowLayout(rows, *sizes)
    q, k, v, dout = draw(documents, windows, more=more)
    size, stride = sizes
    out, lse = compressed_attention(
        q, k, v, size=size, stride=stride, documents=documents, row_documents=rows, scale=0.3, return_lse=True
    )
    visible = seen(documents, windows)
    expected, expected_lse = dense(q, k, v, visible, 0.3)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=1e-12)
    found = torch.autograd.grad(out, (q, k, v), dout)
    for a, b in zip(found, torch.autograd.grad(expected, (q, k, v), dout), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)
    pairs = flops(documents, size=size, stride=stride, heads=1, key_dim=1, value_dim=0) // 2
    assert pairs == int(visible.sum())


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_bfloat16_is_rounded_once(groups):
    documents = Documents.from_lengths([[90, 30]])
    windows = WindowLayout(documents, 8, 4)
    exact = draw(documents, windows, groups=groups)[:3]
    low = [x.detach().bfloat16() for x in exact]
    out, lse = compressed_attention(*low, size=8, stride=4, documents=documents, return_lse=True)
    expected, _ = dense(*(x.double() for x in low), seen(documents, windows), 1 / math.sqrt(6))
    assert out.dtype == torch.bfloat16
    assert lse.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, rtol=2**-8, atol=1e-5)


@pytest.mark.slow
def test_the_kernels_of_triton_agree():
    documents = PACKINGS["packed"]
    windows = WindowLayout(documents, 8, 4)
    *inputs, dout = (x.detach().float() for x in draw(documents, windows))
    results = []
    for backend in ("chunked", "triton"):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = compressed_attention(*leaves, size=8, stride=4, documents=documents, backend=backend)
        results.append((out, *torch.autograd.grad(out, leaves, dout)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5)


def test_bad_input_is_named():
    q, k, v, _ = draw(Documents.whole(1, 40), WindowLayout(Documents.whole(1, 40), 8, 4))
    with pytest.raises(ValueError, match=r"one summary for each window .* 9 per row; got 8"):
        compressed_attention(q, k[:, 1:], v[:, 1:], size=8, stride=4)
    with pytest.raises(ValueError, match="documents must describe 1 rows of 40 queries"):
        compressed_attention(q, k, v, size=8, stride=4, documents=Documents.whole(1, 39))
