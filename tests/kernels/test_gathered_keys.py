"""Keys of listed blocks alone, moved together: attention to them is attention to all keys through the same lists."""

import pytest
import torch

from longreach.kernels import block_sparse as kernel
from longreach.kernels.attend import Gradient
from longreach.kernels.blocks import BlockLayout, BlockTile
from longreach.kernels.documents import Documents
from longreach.kernels.gathered import GatheredTile
from longreach.kernels.masks import Mask


@pytest.mark.parametrize(
    ("backend", "block_size"),
    [("chunked", 3), ("chunked", 8), ("reference", 3), ("reference", 8),
     *(pytest.param("triton", size, marks=pytest.mark.slow) for size in (3, 8))],
)  # fmt: skip
def test_gathered_keys_are_the_blocks_that_are_listed(backend, block_size):
    documents = Documents.from_lengths([[3, 9, 1], [12]], 13)
    layout, held = (
        BlockLayout(documents, block_size),
        Documents.concatenate([documents.slice(0, 5), documents.slice(7, 13)]),
    )
    tile = BlockTile(layout, documents, held, Mask(causal=False))
    generator = torch.Generator().manual_seed(0)
    q, dout = torch.randn(2, 2, 13, 8, 6, generator=generator)
    k, v = torch.randn(2, 2, 11, 1, 6, generator=generator)
    lists = torch.full((2, 13, 1, 2), -1, dtype=torch.int32)
    lists[0, :, :, 0], lists[0, ::2, :, 1], lists[1, :, :, 0] = 2, 0, layout.counts[1] - 1
    listed = torch.zeros(2, layout.count, dtype=torch.bool)
    listed[0, [0, 2]], listed[1, layout.counts[1] - 1] = True, True

    ids = layout.ids(held).long()
    kept = torch.nn.functional.pad(listed, (0, 1)).gather(1, torch.where(ids < 0, layout.count, ids))
    most = int(kept.sum(1).max())
    moved = [torch.full((2, most + 1, *x.shape[2:]), float("nan")) for x in (k, v)]
    for row in range(2):
        for to, x in zip(moved, (k, v), strict=True):
            to[row, : int(kept[row].sum())] = x[row, kept[row]]
    if backend != "triton":  # they multiply what they do not see
        moved = [x.nan_to_num() for x in moved]
    results = []
    for x, keys in ((tile, (k, v)), (GatheredTile(tile, listed), moved)):
        given = {"tile": x, "scale": 0.4, "backend": backend}
        out, lse = kernel.attend(q, *keys, lists, **given)
        dq, dk, dv = kernel.attend_backward(Gradient(dout, out, lse), q, *keys, lists, **given)
        if x is not tile:
            dk, dv = (_moved_back(each, kept) for each in (dk, dv))
        results.append((out, lse, dq, dk, dv))
    for name, one, other in zip(("out", "lse", "dq", "dk", "dv"), *results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def _moved_back(x, kept):
    back = torch.zeros(*kept.shape, *x.shape[2:])
    for row in range(len(kept)):
        back[row, kept[row]] = x[row, : int(kept[row].sum())]
    return back
