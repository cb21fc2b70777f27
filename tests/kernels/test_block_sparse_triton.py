"""Triton's block-sparse attention against the definition in float64: under the interpreter, and on a GPU."""

import pytest
import torch
from block_lists import random_lists

from longreach.kernels.attend import Gradient
from longreach.kernels.block_sparse import attend, attend_backward
from longreach.kernels.block_sparse import triton as kernels
from longreach.kernels.blocks import BlockLayout, BlockTile
from longreach.kernels.documents import Documents
from longreach.kernels.masks import BlockLocal, Mask

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PACKED = Documents.from_lengths([[3, 9, 1], [12]], 13)
NAMES = ("out", "lse", "dq", "dk", "dv")


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Tiles of few rows, gradients shared among programs, and memory that is NaN until it is written."""
    monkeypatch.setattr(kernels, "ROWS", 16)
    monkeypatch.setattr(kernels, "LEAST_SEGMENT", 16)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


def check(
    *, heads, groups, list_heads, slots=2, block_size=4, query_block=1, mask=None, documents=PACKED, keys=None,
    dims=(5, 7), dtype=torch.float32, tolerance=1e-4, device=DEVICE,
):  # fmt: skip
    whole = documents if keys is None else keys
    held = whole if keys is None else keys.slice(2, 9)
    tile = BlockTile(BlockLayout(whole, block_size), documents, held, mask or Mask(), query_block)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype)

    batch, length = documents.batch, documents.length
    q, dout = draw(batch, length, heads, dims[0]), draw(batch, length, heads, dims[1])
    k, v = draw(batch, held.length, groups, dims[0]), draw(batch, held.length, groups, dims[1])
    dlse = torch.randn(batch, length, heads, generator=generator).to(device)
    lists = random_lists(tile, list_heads, slots).to(device)
    results = []
    for backend, cast in (("triton", lambda x: x), ("reference", torch.Tensor.double)):
        given = [cast(x) for x in (q, k, v)]
        out, lse = attend(*given, lists, tile=tile, scale=0.4, backend=backend)
        final = cast(out.to(dtype)), lse
        back = attend_backward(
            Gradient(cast(dout), *final, cast(dlse)), *given, lists, tile=tile, scale=0.4, backend=backend
        )
        results.append((out, lse.masked_fill(lse == float("-inf"), -7.0), *back))
    for name, a, b in zip(NAMES, *results, strict=True):
        assert a.dtype == torch.float32, name
        error = float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30))
        assert error < tolerance, (name, error)


@pytest.mark.parametrize("mask", [Mask(), Mask(causal=False), Mask(window=5, sink_tokens=2), BlockLocal(11)])
def test_lists_of_a_group_go_by_queries(mask):
    check(heads=8, groups=1, list_heads=1, mask=mask)


def test_a_list_of_more_rows_than_a_tile():
    check(heads=6, groups=1, list_heads=1, query_block=4)


@pytest.mark.parametrize("mask", [Mask(), Mask(causal=False)])
@pytest.mark.parametrize(("groups", "list_heads"), [(1, 3), (3, 3)])
def test_lists_of_heads_go_by_blocks(mask, groups, list_heads):
    check(heads=3, groups=groups, list_heads=list_heads, mask=mask)


def test_partial_results_in_portions(monkeypatch):
    monkeypatch.setattr(kernels, "PARTIAL_BYTES", 1024)
    check(heads=4, groups=2, list_heads=2, query_block=3)


def test_blocks_longer_than_a_tile_of_keys(monkeypatch):
    for table in (kernels.BY_QUERY, kernels.BY_QUERY_BACKWARD, kernels.BY_BLOCK, kernels.KEY_GRADIENTS):
        monkeypatch.setitem(table, 64, (16, 4, 2))
    documents = Documents.from_lengths([[21, 1]])
    check(heads=8, groups=1, list_heads=1, block_size=20, documents=documents)
    check(heads=2, groups=1, list_heads=2, block_size=20, documents=documents)


def test_gradients_of_wide_heads_in_two_passes(monkeypatch):
    monkeypatch.setattr(kernels, "_gradients_at_once", lambda *_: (
        {"GIVE_K": True, "GIVE_V": False}, {"GIVE_K": False, "GIVE_V": True},
    ))  # fmt: skip
    check(heads=16, groups=2, list_heads=2, documents=Documents.from_lengths([[5, 2]]))


@pytest.mark.parametrize("heads", [3, 8])
def test_keys_that_are_a_part_of_the_rows(heads):
    check(heads=heads, groups=1, list_heads=1, keys=PACKED, block_size=3)


def test_blocks_in_pieces():
    spans = Documents.concatenate([PACKED.slice(0, 4), PACKED.slice(6, 9)])
    tile = BlockTile(BlockLayout(PACKED, 8), PACKED, spans)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, n, h, 6, generator=generator).to(DEVICE)
        for n, h in (
            (
                13,
                8,
            ),
            (7, 1),
            (7, 1),
        )
    )
    lists = random_lists(tile, 1, 2).to(DEVICE)
    for heads in (8, 2):
        given = q[:, :, :heads].contiguous(), k, v
        got = attend(*given, lists, tile=tile, scale=0.4, backend="triton")
        want = attend(*(x.double() for x in given), lists, tile=tile, scale=0.4, backend="reference")
        torch.testing.assert_close(got[0].double(), want[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(got[1].double(), want[1], atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("repaired_bf16")
@pytest.mark.parametrize(("heads", "groups", "list_heads"), [(8, 1, 1), (3, 1, 3)])
def test_bfloat16(heads, groups, list_heads):
    check(heads=heads, groups=groups, list_heads=list_heads, dtype=torch.bfloat16, tolerance=2e-2)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (192, 128)])
@pytest.mark.parametrize(
    "sizes",
    [
        {"heads": 32, "groups": 2, "list_heads": 2, "slots": 16, "block_size": 64},
        {"heads": 4, "groups": 2, "list_heads": 4, "slots": 3, "block_size": 512},
        {"heads": 4, "groups": 2, "list_heads": 4, "slots": 16, "block_size": 64, "query_block": 64},
    ],
)
def test_at_real_sizes_in_bfloat16(monkeypatch, sizes, dims):
    monkeypatch.setattr(kernels, "ROWS", 64)
    monkeypatch.setattr(kernels, "LEAST_SEGMENT", 1024)
    documents = Documents.from_lengths([[1500, 1, 547]])
    check(**sizes, dims=dims, documents=documents, dtype=torch.bfloat16, tolerance=2e-2)
