"""The divergence of an index from attention and its gradients: against dense code, in parts, over lists."""

import pytest
import torch
from largest_tensor import LargestTensor

from longreach.kernels.blocks import BlockLayout
from longreach.kernels.documents import Documents
from longreach.kernels.index_divergence import chunked, index_divergence

HEADS, GROUPS, KEY, DIM, LENGTH = 6, 2, 5, 3, 53
PACKED = Documents.from_lengths([[19, 1, 24], [LENGTH]], LENGTH)  # the first row ends in padding
KINDS = {"a list per group": (2, False), "one list, weighted": (3, True), "one list": (1, False)}


def drawn(kind, dtype=torch.float64):
    heads, weighted = KINDS[kind]
    torch.manual_seed(0)
    shapes = [(HEADS, KEY), (GROUPS, KEY), (heads, DIM), (1, DIM), *([(heads,)] if weighted else [])]
    return [2 * torch.randn(2, LENGTH, *shape, dtype=dtype) for shape in shapes]


def lists(documents, size, number, heads):
    """For every query some blocks of its document up to its own, in any order, and −1."""
    torch.manual_seed(1)
    ids, layout = BlockLayout(documents, size).ids(documents), BlockLayout(documents, size)
    found = torch.full((2, LENGTH, heads, number), -1, dtype=torch.int32)
    for row, runs in enumerate(documents.runs):
        for run in (run for run in runs if not run.is_padding):
            for t in range(run.start, run.stop):
                first = layout.first[row][run.document]
                some = torch.randperm(int(ids[row, t]) - first + 1)[:number] + first
                found[row, t, :, : len(some)] = some.int()
    found[0, 7] = -1  # a query that lists nothing
    return found


def defined(q, k, index_q, index_k, weights=None, blocks=None, *, documents=PACKED, size=None):
    """As the paper has it; the target is a constant."""
    ids, at = documents.ids(), documents.positions()
    seen = (ids[:, :, None] == ids[:, None]) & (ids >= 0)[:, :, None] & (at[:, None] <= at[:, :, None])
    seen = seen.unsqueeze(2)
    if blocks is not None:
        of_key = BlockLayout(documents, size).ids(documents)
        seen = seen & (blocks.unsqueeze(-1) == of_key[:, None, None, None]).any(3)
    scores = torch.einsum("bthk,bshk->bths", q, k.repeat_interleave(HEADS // GROUPS, dim=2)) * KEY**-0.5
    products = torch.einsum("btid,bsd->btis", index_q, index_k.squeeze(2)) * DIM**-0.5
    index = products if weights is None else (products.relu() * weights.unsqueeze(-1)).sum(2, keepdim=True)
    seen = seen.expand(index.shape)
    p = scores.masked_fill(~seen.repeat_interleave(HEADS // index.shape[2], dim=2), -torch.inf).softmax(-1).nan_to_num()
    p = p.unflatten(2, (index.shape[2], -1)).sum(3)
    p = (p / p.sum(-1, keepdim=True)).nan_to_num().detach()
    logs = index.masked_fill(~seen, -torch.inf).log_softmax(-1).masked_fill(~seen, 0.0)
    return (torch.xlogy(p, p) - p * logs).sum(-1)


def with_gradients(function, tensors):
    leaves = [x.clone().requires_grad_() for x in tensors]
    out = function(*leaves)
    torch.manual_seed(2)
    gradients = torch.autograd.grad(
        (out * torch.randn(out.shape, dtype=torch.float64)).sum(), leaves, allow_unused=True
    )
    return out, [torch.zeros_like(x) if g is None else g for x, g in zip(tensors, gradients, strict=True)]


@pytest.mark.parametrize("listed", [None, 1, 4])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["chunked", "gathered", "reference"])
def test_is_its_definition(monkeypatch, backend, kind, listed):
    if backend == "gathered":
        backend = "chunked"
        monkeypatch.setattr(chunked, "gather_from", lambda sharing: 0)
    monkeypatch.setattr(chunked, "QUERIES", 7)
    monkeypatch.setattr(chunked, "KEYS", 10)
    tensors, more = drawn(kind), {}
    padding = [] if KINDS[kind][1] else [None]
    if listed:
        more = {"block_size": listed}
        padding.append(lists(PACKED, listed, 3, 1 if KINDS[kind][1] else KINDS[kind][0]))
    out, gradients = with_gradients(
        lambda *x: index_divergence(*x, *padding, documents=PACKED, **more, backend=backend), tensors
    )
    expected, wanted = with_gradients(lambda *x: defined(*x, *padding, size=listed), tensors)
    torch.testing.assert_close(out, expected, atol=1e-11, rtol=1e-9)
    assert out.min() > -1e-12
    assert out.max() > 0.1
    for got, want in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(got, want, atol=1e-11, rtol=1e-9)
    assert not gradients[0].any()
    assert not gradients[1].any()


def test_keys_may_lie_in_memory_in_any_order(monkeypatch):
    monkeypatch.setattr(chunked, "gather_from", lambda sharing: 0)
    tensors, listed = drawn("a list per group"), lists(PACKED, 4, 3, 2)
    turned = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in tensors]
    found, expected = (
        with_gradients(lambda *x: index_divergence(*x, None, listed, documents=PACKED, block_size=4), each)
        for each in (turned, tensors)
    )
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)


def test_is_zero_where_index_and_attention_are_alike():
    q, k, *_ = drawn("one list")
    q, k = q[:, :, :1], k[:, :, :1]
    out = index_divergence(q, k, q, k, documents=PACKED)
    torch.testing.assert_close(out, torch.zeros_like(out), atol=1e-12, rtol=0)


def test_bfloat16_is_added_up_in_float32_and_large_scores_stay_finite():
    exact = [x.bfloat16().double() for x in drawn("one list, weighted")]
    out, gradients = with_gradients(lambda *x: index_divergence(*x, documents=PACKED), [x.bfloat16() for x in exact])
    expected, wanted = with_gradients(lambda *x: defined(*x), exact)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, atol=1e-4, rtol=1e-4)
    for got, want in zip(gradients[2:], wanted[2:], strict=True):
        assert got.dtype == torch.bfloat16
        assert (got.double() - want).norm() < 3e-3 * want.norm()
    out, gradients = with_gradients(
        lambda *x: index_divergence(*x, documents=PACKED), [300 * x.float() for x in drawn("a list per group")]
    )
    assert out.isfinite().all()
    assert all(x.isfinite().all() for x in gradients)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: {1: x[1][..., :4]}, "k must be"),
        (lambda x: {2: x[2][:, :9]}, "index_q must be"),
        (lambda x: {3: x[3].expand(-1, -1, 2, -1)}, "index_k must be"),
        (lambda x: {4: x[2][..., 0][:, :9]}, "weights must be"),
        (lambda x: {2: x[2].expand(-1, -1, 4, -1)[:, :, :3] if x[2].shape[2] == 1 else x[2]}, "lists must divide"),
        (lambda x: {5: torch.zeros(2, LENGTH, 1, 2, dtype=torch.int32)}, "blocks and block_size must come together"),
    ],
)
def test_wrong_shapes_are_named(change, message):
    tensors = dict(enumerate([*drawn("one list"), None, None]))
    tensors |= change(tensors)
    with pytest.raises(ValueError, match=message):
        index_divergence(*tensors.values())


@pytest.mark.parametrize("listed", [None, 16, 200, 300])
def test_nothing_of_the_size_of_all_pairs_is_held_away_from_a_cpu(monkeypatch, listed):
    """Where 32 times as many scores are computed at a time."""
    monkeypatch.setattr(chunked, "SCORES", 1 << 16)
    length, heads, shapes = 1024, 16, [(16, 24), (1, 24), (8, 8), (1, 8), (8,)]
    tensors = [torch.empty(1, length, *shape, device="meta", requires_grad=True) for shape in shapes]
    more = {}
    if listed is not None:
        blocks = torch.empty(1, length, 1, listed, dtype=torch.int32, device="meta")
        more = {"blocks": blocks, "block_size": 1}
    with LargestTensor() as largest:
        index_divergence(*tensors, **more, backend="chunked").sum().backward()
    assert largest.numel <= 32 * chunked.SCORES < length * length * heads / 4
