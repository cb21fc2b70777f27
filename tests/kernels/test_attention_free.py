"""AFT-full's operator against the sums as they are written, with every gradient."""

import pytest
import torch

from longreach.kernels import attention_free
from longreach.kernels.attend import OnOneDevice
from longreach.kernels.attention_free import AttentionFree, AttentionFreeInputs, flops
from longreach.kernels.documents import Documents
from longreach.kernels.operation import run

CHANNELS, RANK = 5, 3
PACKINGS = {
    "1 token": Documents.whole(2, 1),
    "130 tokens": Documents.whole(1, 130),
    "packed": Documents.from_lengths([[5, 1, 1, 64, 100, 29], [128, 64], [200]], 210),
    "one-token documents": Documents.from_lengths([[1] * 80, [64, 64]], 140),
}


def draw(documents, spread=1.0):
    torch.manual_seed(0)
    shape = documents.batch, documents.length
    q, k, v, dout = torch.randn(4, *shape, CHANNELS, 1, dtype=torch.float64)
    row, column = torch.randn(2, *shape, 1, RANK, dtype=torch.float64)
    return AttentionFreeInputs(q, spread * k, v, row, column), dout


def found(inputs, dout, documents):
    leaves = [x.clone().requires_grad_() for x in inputs]
    op = AttentionFree()
    out, lse = run(OnOneDevice(op), AttentionFreeInputs(*leaves), (op.tile(documents, documents), "auto"))
    return out.detach(), lse.detach(), *torch.autograd.grad([out, lse], leaves[1:], [dout, dout.squeeze(-1).cos()])


def plain(inputs, dout, documents):
    """All scores of all channels at once."""
    _, k, v, row, column = leaves = [x.clone().requires_grad_() for x in inputs]
    ids, positions = documents.ids(), documents.positions()
    seen = (ids[:, :, None] == ids[:, None]) & (ids >= 0)[:, None] & (positions[:, :, None] >= positions[:, None])
    scores = k.squeeze(-1)[:, None] + torch.einsum("btr,bsr->bts", row.squeeze(2), column.squeeze(2))[..., None]
    scores = scores.masked_fill(~seen[..., None], -torch.inf)
    real = (ids >= 0)[..., None]
    lse = torch.where(real, torch.where(real[:, :, None], scores, 0.0).logsumexp(2), -torch.inf)
    weights = torch.where(real[:, :, None], scores - lse.detach().clamp(min=-1e9)[:, :, None], -torch.inf).softmax(2)
    weights = torch.where(real[:, :, None], weights, 0.0)
    out = torch.einsum("btsd,bsd->btd", weights, v.squeeze(-1)).unsqueeze(-1)
    total = (out * dout).sum() + torch.where(real, lse, 0.0).mul(dout.squeeze(-1).cos()).sum()
    return out.detach(), lse.detach(), *torch.autograd.grad(total, leaves[1:])


@pytest.mark.parametrize("documents", PACKINGS.values(), ids=PACKINGS)
def test_outputs_and_gradients_are_those_of_the_sums(documents, monkeypatch):
    inputs, dout = draw(documents)
    expected = plain(inputs, dout, documents)
    for limit in (512, 16):
        monkeypatch.setattr(attention_free, "LIMIT", limit)
        for a, b in zip(found(inputs, dout, documents), expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


def test_keys_far_apart_hide_none_that_is_seen():
    """A key 300 above all others, which early queries do not see, takes nothing from what they do see."""
    documents = Documents.whole(1, 60)
    inputs, dout = draw(documents, spread=30.0)
    inputs.k[:, 50] += 300.0
    for a, b in zip(found(inputs, dout, documents), plain(inputs, dout, documents), strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("documents", [Documents.whole(2, 60), Documents.from_lengths([[30, 9, 21], [60]])])
def test_what_a_query_does_not_see_moves_no_digit(documents):
    inputs, dout = draw(documents)
    later = inputs._replace(k=inputs.k.clone(), v=inputs.v.clone())
    later.k[:, 40:] += 11.7
    later.v[:, 40:] -= 3.3
    before, after = (found(each, dout, documents) for each in (inputs, later))
    assert torch.equal(before[0][:, :39], after[0][:, :39])  # out
    assert torch.equal(before[1][:, :39], after[1][:, :39])  # lse
    assert not torch.equal(before[0][:, 40:], after[0][:, 40:])


def test_keys_however_large_give_finite_numbers():
    documents = Documents.whole(1, 60)
    inputs, dout = draw(documents, spread=1e4)
    assert all(bool(x.isfinite().all()) for x in found(inputs, dout, documents))


WRONG = {
    "q, k and v must be": lambda x: x._replace(k=x.k[..., :2, :]),
    "row and column must be": lambda x: x._replace(column=x.column[..., :1]),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_shapes_are_named(message):
    inputs, _ = draw(Documents.whole(2, 5))
    with pytest.raises(ValueError, match=message):
        AttentionFree().check(WRONG[message](inputs))


def test_costs():
    assert flops(10, channels=5, rank=3) == 10 * (20 + 6)
