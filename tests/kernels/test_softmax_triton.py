"""Triton's softmax attention against the dense float64 softmax: under the interpreter, and on a GPU where there is one.

The interpreter takes some milliseconds a step of a loop, so that shapes and blocks are small there.
"""

import math

import pytest
import torch

from longreach.kernels.attend import Gradient, merge
from longreach.kernels.documents import Documents
from longreach.kernels.masks import Mask
from longreach.kernels.softmax import attend, attend_backward, reference, softmax_attention
from longreach.kernels.softmax import triton as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = kernels.Blockings(
    kernels.Blocks(32, 16, 4, 1), kernels.Blocks(32, 16, 4, 1), kernels.Blocks(16, 32, 4, 1)
)  # fmt: skip
PACKED = Documents.from_lengths([[3, 24, 1, 13], [30]], 43)
MASKS = {
    "causal": Mask(),
    "full": Mask(causal=False),
    "window": Mask(window=5),
    "window and sinks": Mask(window=9, sink_tokens=3),
}
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


@pytest.fixture
def small(monkeypatch):
    """Blocks of which a few cover the tokens of a test, and memory that is NaN until it is written."""
    monkeypatch.setattr(kernels, "blockings", lambda *_: SMALL)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


def draw(queries, keys=None, *, heads=2, groups=1, key_dim=24, value_dim=12, dtype=torch.float32, seed=0):
    """q, k, v and gradients of out and lse."""
    keys = queries if keys is None else keys
    generator = torch.Generator().manual_seed(seed)
    shapes = [
        (queries.batch, queries.length, heads, key_dim),
        (keys.batch, keys.length, groups, key_dim),
        (keys.batch, keys.length, groups, value_dim),
        (queries.batch, queries.length, heads, value_dim),
        (queries.batch, queries.length, heads),
    ]
    q, k, v, dout, dlse = (torch.randn(shape, generator=generator) for shape in shapes)
    return [x.to(DEVICE, dtype) for x in (q, k, v)], dout.to(DEVICE, dtype), dlse.to(DEVICE)


def wide(*tensors):
    return [x.double() for x in tensors]


def error(found, expected):
    """The largest error relative to the norm, over what is finite in what is expected."""
    errors = []
    for a, b in zip(found, expected, strict=True):
        a, b = a.detach(), b.detach()
        finite = b.isfinite()
        assert torch.equal(a.isfinite(), finite)
        errors.append(float((a.double() - b)[finite].norm() / b[finite].norm().clamp_min(1e-30)))
    return max(errors)


def check(mask, queries, keys=None, *, scale=0.3, **sizes):
    """Forward and backward, the latter with a merged (out, lse) and a gradient of lse."""
    inputs, dout, dlse = draw(queries, keys, **sizes)
    tile = mask.tile(queries, queries if keys is None else keys)
    dlse = torch.where(reference.attend(*inputs, tile=tile, scale=scale)[1].isfinite(), dlse, 0.0)
    found = attend(*inputs, tile=tile, scale=scale, backend="triton")
    expected = reference.attend(*wide(*inputs), tile=tile, scale=scale)
    merged = (expected[0] / 2, expected[1] + math.log(2))
    gradient = Gradient(dout, *(x.float() for x in merged), dlse)
    back = attend_backward(gradient, *inputs, tile=tile, scale=scale, backend="triton")
    exact = Gradient(dout.double(), *merged, dlse.double())
    wanted = reference.attend_backward(exact, *wide(*inputs), tile=tile, scale=scale)
    assert {x.dtype for x in (*found, *back)} == {torch.float32}
    assert error((*found, *back), (*expected, *wanted)) < TOLERANCES[inputs[0].dtype]


@pytest.mark.parametrize("mask", MASKS)
def test_packed_rows(mask, small):
    check(MASKS[mask], PACKED)


@pytest.mark.parametrize(
    "sizes",
    [
        {"heads": 4, "groups": 2, "key_dim": 40, "value_dim": 16},  # key dims in two parts
        {"heads": 3, "groups": 3, "key_dim": 16, "value_dim": 20},
    ],
)
def test_one_document_of_many_blocks(sizes, small):
    check(Mask(), Documents.whole(1, 65), **sizes)


@pytest.mark.parametrize("mask", ["causal", "window and sinks"])
def test_bfloat16(mask, small, repaired_bf16):
    check(MASKS[mask], PACKED, dtype=torch.bfloat16)
    check(MASKS[mask], Documents.whole(1, 50, position=3), dtype=torch.bfloat16, key_dim=40, value_dim=32)


@pytest.mark.parametrize("mask", ["causal", "window and sinks"])
def test_queries_and_keys_of_different_tokens(mask, small):
    whole = Documents.from_lengths([[20, 40], [60]])
    spans = Documents.concatenate([whole.slice(0, 12), whole.slice(48, 60)])  # a document twice in a row
    check(MASKS[mask], whole.slice(30, 50), whole.slice(5, 44))
    check(MASKS[mask], spans, spans, scale=-0.3)


def test_production_blocks_and_single_tokens():
    check(Mask(), Documents.whole(2, 1), heads=4, groups=2)
    check(Mask(window=70), Documents.whole(1, 140), heads=1, key_dim=16, value_dim=16)


def test_where_nothing_is_visible(small):
    early, late = Documents.whole(1, 4), Documents.whole(1, 4, position=4)
    inputs, dout, _ = draw(early, late)
    assert Mask().tile(early, late) is None
    leaves = [x.requires_grad_() for x in inputs]
    out, lse = softmax_attention(*leaves, documents=early, key_documents=late, return_lse=True, backend="triton")
    assert not out.any()
    assert (lse == -math.inf).all()
    out.backward(dout)
    assert not any(x.grad.any() for x in leaves)


def test_nan_in_padding_and_odd_strides_reach_nothing(small):
    inputs, dout, _ = draw(PACKED)
    tile = Mask().tile(PACKED, PACKED)
    padding = (PACKED.ids(DEVICE) < 0)[..., None, None]
    dirty = [x.masked_fill(padding, math.nan) for x in (*inputs, dout)]
    dirty = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in dirty]  # the last dim is far apart in memory
    results = []
    for *tensors, gradient in ((*inputs, dout), dirty):
        forward = attend(*tensors, tile=tile, scale=0.3, backend="triton")
        back = attend_backward(Gradient(gradient, *forward), *tensors, tile=tile, scale=0.3, backend="triton")
        results.append((*forward, *back))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_tiles_merge_to_the_whole(small):
    inputs, dout, _ = draw(PACKED)
    q, k, v = inputs
    halves = [slice(0, 20), slice(20, 43)]
    tiles = [Mask().tile(PACKED, PACKED.slice(part.start, part.stop)) for part in halves]
    parts = [
        attend(q, k[:, part], v[:, part], tile=tile, scale=0.3, backend="triton")
        for part, tile in zip(halves, tiles, strict=True)
    ]
    merged = merge(*parts[0], *parts[1])
    back = [
        attend_backward(Gradient(dout, *merged), q, k[:, part], v[:, part], tile=tile, scale=0.3, backend="triton")
        for part, tile in zip(halves, tiles, strict=True)
    ]
    found = (*merged, back[0][0] + back[1][0], *(torch.cat(x, dim=1) for x in list(zip(*back, strict=True))[1:]))
    tile = Mask().tile(PACKED, PACKED)
    expected = reference.attend(*wide(*inputs), tile=tile, scale=0.3)
    wanted = reference.attend_backward(Gradient(dout.double(), *expected), *wide(*inputs), tile=tile, scale=0.3)
    assert error(found, (*expected, *wanted)) < 1e-4


def test_the_op_with_sink_logits_and_a_gradient_of_lse(small):
    documents = Documents.from_lengths([[9, 21]], 32)
    inputs, dout, dlse = draw(documents, heads=2, groups=2)
    sinks = torch.tensor([0.3, -1.0], device=DEVICE)
    results = []
    for backend, tensors in (("triton", [*inputs, sinks]), ("reference", wide(*inputs, sinks))):
        leaves = [x.clone().requires_grad_() for x in tensors]
        out, lse = softmax_attention(
            *leaves[:3], sink_logits=leaves[3], documents=documents, return_lse=True, backend=backend
        )
        loss = (out * dout).sum() + (lse * dlse).sum()
        results.append((out, lse, *torch.autograd.grad(loss, leaves)))
    assert error(*results) < 1e-4


def test_what_the_kernels_do_not_take():
    documents = Documents.whole(1, 4)
    inputs, *_ = draw(documents, key_dim=600)
    tile = Mask().tile(documents, documents)
    with pytest.raises(ValueError, match="dims must be at most 512"):
        attend(*inputs, tile=tile, scale=1.0, backend="triton")
    with pytest.raises(ValueError, match="float64"):
        attend(*wide(*inputs), tile=tile, scale=1.0, backend="triton")


@pytest.mark.parametrize(
    ("dim", "parts"), [(1, (16, 0)), (16, (16, 0)), (40, (32, 16)), (80, (64, 16)), (96, (64, 32)), (192, (128, 64))]
)
def test_dims_are_covered_by_two_powers_of_two(dim, parts):
    assert kernels.split_dim(dim) == parts


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("sizes", [(64, 64), (128, 128), (192, 128), (80, 96)])
@pytest.mark.parametrize("mask", [Mask(), Mask(causal=False), Mask(window=300, sink_tokens=4)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_on_a_gpu(mask, sizes, dtype):
    sizes = {"heads": 8, "groups": 2, "key_dim": sizes[0], "value_dim": sizes[1], "dtype": dtype}
    check(mask, Documents.from_lengths([[1, 700, 1300, 46], [1999]], 2048), scale=sizes["key_dim"] ** -0.5, **sizes)
    check(mask, Documents.whole(1, 1000), scale=sizes["key_dim"] ** -0.5, **sizes)
