"""Kernel attention over whole documents against its matrix of weights; parts of the keys merge to the whole."""

import pytest
import torch

from longreach.kernels.attend import merge
from longreach.kernels.documents import Documents
from longreach.kernels.gated_linear.whole import KernelAttend, KernelInputs, kernel_attention

PACKINGS = {
    "one token": Documents.whole(1, 1),
    "whole rows": Documents.whole(2, 23),
    "packed": Documents.from_lengths([[3, 17, 1, 20], [30, 5]], 43),
    "two spans of a document": Documents.concatenate(
        [Documents.whole(2, 30).slice(4, 9), Documents.whole(2, 30).slice(20, 30)]
    ),
    "all padding": Documents.from_lengths([[7], []], 7),
}


def inputs(documents, groups=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = (4, 6), (groups, 6), (groups, 5)
    q, k, v = (
        torch.randn(documents.batch, documents.length, *shape, dtype=torch.float64, generator=generator).to(dtype)
        for shape in shapes
    )
    return [x.requires_grad_() for x in (q.relu() + 0.01, k.relu(), v)]


def definition(q, k, v, documents):
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    ids = documents.ids()
    same = (ids[:, :, None] == ids[:, None]) & (ids[:, :, None] >= 0)
    weights = torch.einsum("bthk,bshk->bhts", q, k) * same[:, None]
    return torch.einsum("bhts,bshv->bthv", weights / weights.sum(-1, keepdim=True).clamp(min=1e-200), v)


def with_gradients(call, tensors):
    out = call(*tensors)
    dout = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return [out, *torch.autograd.grad(out, tensors, dout)]


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("packing", PACKINGS)
def test_is_its_matrix(packing, groups):
    documents = PACKINGS[packing]
    tensors = inputs(documents, groups)
    actual = with_gradients(lambda *x: kernel_attention(*x, documents=documents), tensors)
    expected = with_gradients(lambda *x: definition(*x, documents), tensors)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_sums_are_float32(dtype, tolerance):
    documents = Documents.from_lengths([[500, 200]])
    tensors = inputs(documents, dtype=dtype)
    actual = with_gradients(lambda *x: kernel_attention(*x, documents=documents), tensors)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    for ours, theirs in zip(actual, with_gradients(lambda *x: definition(*x, documents), exact), strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - theirs).norm() < tolerance * theirs.norm()


def test_parts_of_the_keys_merge():
    documents = PACKINGS["packed"]
    q, k, v = (x.detach() for x in inputs(documents))
    q[0, 5] = 0  # sees nothing
    whole, results = kernel_attention(q, k, v, documents=documents), []
    for start, stop in ((0, 10), (10, 25), (25, 43)):
        keys = documents.slice(start, stop)
        tile = KernelAttend().tile(documents, keys)
        received = k[:, start:stop], v[:, start:stop]
        results.append(KernelAttend().attend(KernelInputs(q, *received), received, tile, "auto"))
    merged = merge(*merge(*results[0], *results[1]), *results[2])
    torch.testing.assert_close(merged[0], whole)
    assert not whole[0, 5].any()
    assert (merged[1][0, 5] == -torch.inf).all()


def test_shapes_that_do_not_fit_are_refused():
    q, k, v = inputs(Documents.whole(1, 4))
    with pytest.raises(ValueError, match="k must be"):
        kernel_attention(q, k[..., :3], v)
    with pytest.raises(ValueError, match="documents must describe 1 rows of 4 tokens"):
        kernel_attention(q, k, v, documents=Documents.whole(1, 5))
