"""Softmax attention against the dense float64 softmax and its autograd: op, parts, routines, tiles of a ring."""

import math

import pytest
import torch
from largest_tensor import LargestTensor

from longreach.kernels.attend import Gradient, merge, rest, restored
from longreach.kernels.documents import Documents
from longreach.kernels.masks import Band, Bands, BlockLocal, Dilated, Mask
from longreach.kernels.softmax import (
    apply_sink,
    attend,
    attend_backward,
    bytes_sent,
    chunked,
    flops,
    sink_backward,
    softmax_attention,
    state_bytes,
)
from longreach.kernels.softmax.rectangle import FlashRectangles, PlainRectangles
from longreach.parallel.layout import Layout

MASKS = {
    "causal": Mask(),
    "full": Mask(causal=False),
    "window 1": Mask(window=1),
    "blocks of 50": BlockLocal(50),
    "every 3rd of a block": Bands((Band(ahead=0, stride=3, block=40), Band(first=3, back=99, ahead=-40, block=70))),
    "every 3rd": Dilated(3),
    "every 4th of 70": Dilated(4, window=70),
    "20 and every 5th behind": Bands((Band(back=19, ahead=0), Band(ahead=-20, stride=5))),
    "window 5": Mask(window=5),
    "window 70, 3 sinks": Mask(window=70, sink_tokens=3),
    "window 300, 1 sink": Mask(window=300, sink_tokens=1),
}
PACKINGS = {
    "1 token": Documents.whole(1, 1),
    "63 tokens": Documents.whole(2, 63),
    "continued": Documents.whole(1, 63, position=5),
    "packed": Documents.from_lengths([[3, 170, 1, 90], [3, 170, 1, 90], [100, 80]], 270),
    "all padding": Documents.from_lengths([[7], []], 7),
}


class SmallPlain(PlainRectangles):
    limit = 50


ROUTINES = [FlashRectangles, SmallPlain]


def dense(q, k, v, visible, scale, sink_logits=None):
    """The definition, for autograd: exp without a maximum is fine for the small scores of these tests."""
    repeats = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(repeats, 2), v.repeat_interleave(repeats, 2)
    weights = (scale * torch.einsum("bthk,bshk->bhts", q, k)).exp() * visible[:, None]
    total = weights.sum(-1)
    if sink_logits is not None:
        total = total + sink_logits.exp()[:, None]
    some = total > 0
    out = torch.einsum("bhts,bshv->bthv", weights / torch.where(some, total, 1.0)[..., None], v)
    lse = torch.where(some, torch.where(some, total, 1.0).log(), -math.inf)
    return out, lse.transpose(1, 2)


def inputs(queries, keys=None, *, heads=4, groups=2, key_dim=8, value_dim=8, dtype=torch.float64, seed=0):
    keys = queries if keys is None else keys
    generator = torch.Generator().manual_seed(seed)

    def draw(documents, *shape):
        full = (documents.batch, documents.length, *shape)
        return torch.randn(full, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    return draw(queries, heads, key_dim), draw(keys, groups, key_dim), draw(keys, groups, value_dim)


def gradients(out, lse, tensors, seed=1):
    """Of a random functional of out and of the finite lse."""
    generator = torch.Generator().manual_seed(seed)
    loss = (out.double() * torch.randn(out.shape, generator=generator, dtype=torch.float64)).sum()
    weight = torch.randn(lse.shape, generator=generator, dtype=torch.float64)
    loss = loss + (torch.where(lse.isfinite(), lse.double(), 0.0) * weight).sum()
    return torch.autograd.grad(loss, tensors)


def assert_all_close(got, want, tolerance):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b.double(), atol=tolerance, rtol=tolerance)


def check_op(mask, documents, *, sinks=False, backend="auto", **sizes):
    q, k, v = inputs(documents, value_dim=12, **sizes)
    sink_logits = torch.linspace(-1.0, 2.0, q.shape[2], dtype=torch.float64, requires_grad=True) if sinks else None
    tensors = [x for x in (q, k, v, sink_logits) if x is not None]
    got = softmax_attention(
        q, k, v, mask=mask, documents=documents, sink_logits=sink_logits, return_lse=True, backend=backend
    )
    want = dense(q, k, v, mask.dense(documents, documents), 8**-0.5, sink_logits)
    assert_all_close(got, want, 1e-9)
    assert_all_close(gradients(*got, tensors), gradients(*want, tensors), 1e-9)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("mask", MASKS)
def test_op_and_gradients(mask, packing, backend):
    check_op(MASKS[mask], PACKINGS[packing], backend=backend)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("mask", ["causal", "window 70, 3 sinks"])
def test_op_and_gradients_with_sink_logits(mask, backend):
    check_op(MASKS[mask], PACKINGS["packed"], sinks=True, backend=backend)


@pytest.mark.parametrize("mask", [Mask(), Mask(window=5), Mask(window=300, sink_tokens=1), Mask(window=600)])
def test_op_and_gradients_over_1000_tokens(mask):
    check_op(mask, Documents.whole(1, 1000), heads=2, groups=1)


@pytest.mark.parametrize("routine", ROUTINES)
@pytest.mark.parametrize("sizes", [(6, 6, 5, 16), (4, 1, 16, 16), (4, 2, 4, 24)])
@pytest.mark.parametrize("mask", [name for name, mask in MASKS.items() if all(band.is_plain for band in mask.bands)])
def test_routines_on_grouped_heads_and_unequal_dims(mask, sizes, routine):
    documents = PACKINGS["packed"]
    heads, groups, key_dim, value_dim = sizes
    q, k, v = inputs(documents, heads=heads, groups=groups, key_dim=key_dim, value_dim=value_dim)
    tile = MASKS[mask].tile(documents, documents)
    want = dense(q, k, v, MASKS[mask].dense(documents, documents), 0.3)
    with torch.no_grad():
        got = chunked.attend(q, k, v, tile=tile, scale=0.3, routine=routine)
        assert_all_close(got, want, 1e-9)
        dout, dlse = torch.randn_like(got[0]), torch.randn_like(got[1])
        given = {"tile": tile, "scale": 0.3, "routine": routine}
        assert_all_close(
            chunked.attend_backward(Gradient(dout, *got), q, k, v, **given),
            torch.autograd.grad(want[0], (q, k, v), dout, retain_graph=True),
            1e-9,
        )
        finite = torch.where(want[1].isfinite(), dlse, 0.0)
        assert_all_close(
            chunked.attend_backward(Gradient(dout, *got, dlse), q, k, v, **given),
            torch.autograd.grad(want, (q, k, v), (dout, finite)),
            1e-9,
        )


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.slow
def test_gradcheck(backend):
    documents = Documents.from_lengths([[3, 2], [4]], 5)
    sinks = torch.tensor([0.3, -1.0], dtype=torch.float64, requires_grad=True)

    def op(*tensors):
        q, k, v, sink_logits = tensors
        return softmax_attention(
            q, k, v, mask=Mask(window=2, sink_tokens=1), documents=documents, sink_logits=sink_logits,
            return_lse=True, backend=backend,
        )  # fmt: skip

    q, k, v = inputs(documents, heads=2, groups=1, key_dim=3, value_dim=2)
    assert torch.autograd.gradcheck(op, (q, k, v, sinks))


@pytest.mark.parametrize("routine", ROUTINES)
@pytest.mark.parametrize("spans", [1, 2, 3])
@pytest.mark.parametrize("mask", ["causal", "full", "window 5", "window 70, 3 sinks"])
def test_tiles_of_a_ring_merge_to_the_whole(mask, spans, routine):
    documents = Documents.from_lengths([[50, 7, 101, 10], [180]], 180)
    layout, mask = Layout(180, ranks=3, spans=spans), MASKS[mask]
    q, k, v = inputs(documents, value_dim=6)
    whole = dense(q, k, v, mask.dense(documents, documents), 0.3)
    dout = torch.randn_like(whole[0])
    wanted = torch.autograd.grad(whole[0], (q, k, v), dout)
    held = [layout.documents(documents, rank) for rank in range(3)]
    parts = [[layout.shard(x.detach(), rank) for x in (q, k, v, dout)] for rank in range(3)]
    results, dq, dkv = [], [], [[0, 0] for _ in range(3)]
    for rank in range(3):
        queries, _, _, dout_here = parts[rank]
        tiles = [mask.tile(held[rank], held[other]) for other in range(3)]
        out, lse = queries.new_zeros(*queries.shape[:3], 6), queries.new_full(queries.shape[:3], -math.inf)
        for other, tile in enumerate(tiles):
            if tile is None:
                continue
            keys = parts[other][1:3]
            out, lse = merge(out, lse, *chunked.attend(queries, *keys, tile=tile, scale=0.3, routine=routine))
        results.append((out, lse))
        dq.append(torch.zeros_like(queries))
        for other, tile in enumerate(tiles):
            if tile is None:
                continue
            given = {"tile": tile, "scale": 0.3, "routine": routine}
            back = chunked.attend_backward(Gradient(dout_here, out, lse), queries, *parts[other][1:3], **given)
            dq[rank] += back[0]
            dkv[other] = [x + y for x, y in zip(dkv[other], back[1:], strict=True)]
    assert_all_close([layout.unshard(list(x)) for x in zip(*results, strict=True)], whole, 1e-9)
    assert_all_close([layout.unshard(x) for x in (dq, *map(list, zip(*dkv, strict=True)))], wanted, 1e-9)


def test_queries_and_keys_of_different_tokens():
    whole = Documents.from_lengths([[20, 30], [50]])
    queries, keys = whole.slice(30, 50), whole.slice(10, 45)
    q, k, v = inputs(queries, keys)
    got = softmax_attention(q, k, v, documents=queries, key_documents=keys, return_lse=True)
    want = dense(q, k, v, Mask().dense(queries, keys), 8**-0.5)
    assert_all_close(got, want, 1e-9)
    assert_all_close(gradients(*got, (q, k, v)), gradients(*want, (q, k, v)), 1e-9)


def test_decoding_one_token_at_a_time_is_the_full_forward():
    q, k, v = inputs(Documents.whole(2, 40))
    for mask in MASKS.values():
        if mask == MASKS["full"]:
            continue
        whole = softmax_attention(q, k, v, mask=mask)
        for t in (0, 1, 17, 39):
            one = softmax_attention(
                q[:, t : t + 1], k[:, : t + 1], v[:, : t + 1], mask=mask,
                documents=Documents.whole(2, 1, position=t), key_documents=Documents.whole(2, t + 1),
            )  # fmt: skip
            torch.testing.assert_close(one, whole[:, t : t + 1], atol=1e-9, rtol=1e-9)


def test_where_nothing_is_visible():
    early, late = Documents.whole(1, 4), Documents.whole(1, 4, position=4)
    q, k, v = inputs(early, late)
    sinks = torch.tensor([0.3, -1.0, 0.5, 2.0], dtype=torch.float64)
    for backend in ("chunked", "reference"):
        out, lse = softmax_attention(q, k, v, documents=early, key_documents=late, return_lse=True, backend=backend)
        assert not out.any()
        assert (lse == -math.inf).all()
        assert not any(g.any() for g in torch.autograd.grad(out.sum(), (q, k, v)))
        out, lse = apply_sink(out, lse, sinks)
        assert not out.any()
        assert torch.equal(lse, sinks.expand_as(lse))


def test_merge_is_safe_where_either_side_or_both_saw_nothing():
    out = torch.arange(4.0).view(1, 4, 1, 1)
    seen = torch.tensor([0.0, -math.inf, 1.0, -math.inf]).view(1, 4, 1)
    other = torch.tensor([0.0, 2.0, -math.inf, -math.inf]).view(1, 4, 1)
    merged, lse = merge(out, seen, out + 2.0, other)
    assert merged.flatten().tolist() == [1.0, 3.0, 2.0, 3.0]
    torch.testing.assert_close(lse.flatten(), torch.tensor([math.log(2), 2.0, 1.0, -math.inf]))


def test_sink_parts_agree_with_the_op():
    documents = Documents.whole(1, 20)
    q, k, v = inputs(documents)
    sinks = torch.tensor([0.3, -1.0, 0.5, 2.0], dtype=torch.float64, requires_grad=True)
    out = softmax_attention(q, k, v, sink_logits=sinks)
    dout = torch.randn_like(out)
    wanted = torch.autograd.grad(out, (q, k, v, sinks), dout)
    tile = Mask().tile(documents, documents)
    with torch.no_grad():
        final = apply_sink(*attend(q, k, v, tile=tile, scale=8**-0.5), sinks)
        got = attend_backward(Gradient(dout, *final), q, k, v, tile=tile, scale=8**-0.5)
        assert_all_close((*got, sink_backward(Gradient(dout, *final), sinks)), wanted, 1e-12)


@pytest.mark.parametrize("routine", ROUTINES)
def test_nan_in_padding_and_odd_strides_reach_nothing(routine):
    documents = Documents.from_lengths([[30, 20], [25]], 60)
    padding = documents.ids() < 0
    clean = [x.detach() for x in inputs(documents, key_dim=6)]
    tile = Mask(window=9).tile(documents, documents)
    dout = torch.randn(2, 60, 4, 8, dtype=torch.float64)
    want = chunked.attend(*clean, tile=tile, scale=0.3, routine=routine)
    wanted = chunked.attend_backward(Gradient(dout, *want), *clean, tile=tile, scale=0.3, routine=routine)
    dirty = [x.masked_fill(padding[..., None, None], math.nan) for x in (*clean, dout)]
    dirty = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in dirty]  # the last dim is far apart in memory
    got = chunked.attend(*dirty[:3], tile=tile, scale=0.3, routine=routine)
    back = chunked.attend_backward(Gradient(dirty[3], *got), *dirty[:3], tile=tile, scale=0.3, routine=routine)
    assert_all_close((*got, *back), (*want, *wanted), 1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.02)])
def test_lower_precision_by_relative_norm(dtype, tolerance):
    documents = PACKINGS["packed"]
    q, k, v = inputs(documents, dtype=dtype)
    out, lse = softmax_attention(q, k, v, documents=documents, return_lse=True)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    want = dense(*wide, Mask().dense(documents, documents), 8**-0.5)
    got = gradients(out, lse, (q, k, v))
    assert [g.dtype for g in got] == [dtype] * 3
    for a, b in zip((out, *got), (want[0], *gradients(*want, wide)), strict=True):
        assert (a.double() - b).norm() / b.norm() < tolerance
    torch.testing.assert_close(lse.double(), want[1], atol=1e-4, rtol=1e-4)


def test_partial_results_of_bfloat16_are_float32():
    documents = Documents.whole(1, 33)
    q, k, v = (x.detach() for x in inputs(documents, dtype=torch.bfloat16))
    tile = Mask().tile(documents, documents)
    for backend in ("chunked", "reference"):
        out, lse = attend(q, k, v, tile=tile, scale=0.3, backend=backend)
        back = attend_backward(Gradient(out, out, lse), q, k, v, tile=tile, scale=0.3, backend=backend)
        assert {x.dtype for x in (out, lse, *back)} == {torch.float32}
    assert not attend(q.requires_grad_(), k, v, tile=tile, scale=0.3)[0].requires_grad


@pytest.mark.parametrize("routine", ROUTINES)
@pytest.mark.parametrize("mask", [Mask(), Mask(window=256, sink_tokens=4), Mask(window=20)])
def test_no_matrix_of_all_scores_exists_and_runs_repeat_bitwise(mask, routine):
    documents = Documents.from_lengths([[600, 300, 124]])
    q, k, v = (x.detach() for x in inputs(documents, heads=2, groups=1, dtype=torch.float32))
    tile = mask.tile(documents, documents)

    def both():
        out, lse = chunked.attend(q, k, v, tile=tile, scale=0.3, routine=routine)
        return out, lse, *chunked.attend_backward(Gradient(q, out, lse), q, k, v, tile=tile, scale=0.3, routine=routine)

    with LargestTensor() as largest:
        first = both()
    assert largest.numel <= 2 * 1024 * 1024 // 32  # scores of all pairs, two heads
    assert all(torch.equal(a, b) for a, b in zip(first, both(), strict=True))


def test_costs():
    documents = Documents.from_lengths([[3, 5]])
    tile = Mask().tile(documents, documents)
    assert tile.pairs == 6 + 15
    sizes = {"key_dim": 4, "value_dim": 6}
    assert flops(tile, heads=2, **sizes) == flops(21, heads=2, **sizes) == 2 * 21 * 2 * (4 + 6)
    assert state_bytes(100, kv_heads=2, **sizes) == 100 * 2 * 10 * 2
    assert state_bytes(100, kv_heads=2, mask=Mask(window=9, sink_tokens=2), element_bytes=4, **sizes) == 10 * 2 * 10 * 4
    assert bytes_sent(100, kv_heads=2, ranks=4, **sizes) == 3 * state_bytes(100, kv_heads=2, **sizes)
    assert bytes_sent(100, kv_heads=2, ranks=1, **sizes) == 0


def test_bad_input():
    q, k, v = inputs(Documents.whole(1, 5))
    for bad, message in [
        ((q[0], k, v), "q must be floating point of shape"),
        ((q, k.float(), v), "one dtype"),
        ((q, k[..., :4], v), "k must be"),
        ((q, k[:, :4], v), "k must be"),
        ((q[:, :, :3], k, v), "must divide the query heads"),
    ]:
        with pytest.raises(ValueError, match=message):
            softmax_attention(*bad)
    with pytest.raises(ValueError, match="sink_logits must be one for each of 4 heads"):
        softmax_attention(q, k, v, sink_logits=torch.zeros(2))
    with pytest.raises(ValueError, match="key_documents must describe 1 rows of 3 tokens"):
        softmax_attention(q, k[:, :3], v[:, :3])
    with pytest.raises(ValueError, match="backend must be"):
        softmax_attention(q, k, v, backend="fast")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_byte_beside_the_rounded_output_tells_gradients_what_rounding_took(dtype):
    drawn = torch.randn(4000)
    drawn += 1e-3 * drawn.sign()  # numbers that float16 holds with all its digits
    exact = torch.cat([drawn, torch.tensor([0.0, -0.0, 1.0, -1.0, 255.99, -3.0039])]) * 8
    rounded = exact.to(dtype)
    kept = rest(exact, rounded)
    assert kept.dtype == torch.int8
    torch.testing.assert_close(restored(rounded, kept), exact, atol=0.0, rtol=2**-15)
    assert rest(exact, exact) is None
    assert restored(exact, None) is exact


def test_peaked_attention_in_bfloat16_has_the_gradients_of_float64():
    """Scores of about 50, and values with a mean, of which gradients see the differences alone."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(1, 256, heads, 32, generator=generator) for heads in (4, 2, 2, 4))
    inputs = [x.bfloat16() for x in (8 * q, 1 + k, 1 + v, 1 + dout)]
    gradients = []
    for dtype in (torch.bfloat16, torch.float64):
        *leaves, incoming = (x.to(dtype) for x in inputs)
        leaves = [x.requires_grad_() for x in leaves]
        gradients.append(torch.autograd.grad(softmax_attention(*leaves), leaves, incoming))
    for got, exact in zip(*gradients, strict=True):
        assert (got - exact).norm() < 1.05 * (exact.bfloat16() - exact).norm()
