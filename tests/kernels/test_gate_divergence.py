"""The divergence of a gate over blocks from pooled attention and its gradients: against dense code, also over lists."""

import pytest
import torch

from longreach.kernels import dispatch
from longreach.kernels.blocks import BlockLayout
from longreach.kernels.documents import Documents
from longreach.kernels.gate_divergence import chunked, gate_divergence
from longreach.kernels.windows import WindowLayout

HEADS, GROUPS, KEY, DIM, LENGTH, SIZE = 6, 2, 5, 3, 53, 4
PACKED = Documents.from_lengths([[19, 1, 24], [LENGTH]], LENGTH)  # the first row ends in padding


def drawn():
    torch.manual_seed(0)
    shapes = [(LENGTH, HEADS, KEY), (LENGTH, GROUPS, KEY), (LENGTH, GROUPS, DIM), (LENGTH // SIZE, GROUPS, DIM)]
    return [2 * torch.randn(2, *shape, dtype=torch.float64) for shape in shapes]


def lists(number=3):
    """For every query and group its own block and others before it in its document, and −1."""
    torch.manual_seed(1)
    layout = BlockLayout(PACKED, SIZE)
    ids, found = layout.ids(PACKED), torch.full((2, LENGTH, GROUPS, number), -1, dtype=torch.int32)
    for row, runs in enumerate(PACKED.runs):
        for run in (run for run in runs if not run.is_padding):
            for t in range(run.start, run.stop):
                first = layout.first[row][run.document]
                for group in range(GROUPS):
                    some = torch.randperm(int(ids[row, t]) - first + 1)[:number] + first
                    found[row, t, group, : len(some)] = some.int()
    found[0, 7] = -1  # a query that lists nothing
    return found


def defined(q, k, gate_q, gate_k, blocks=None):
    """Document by document, query by query, block by block."""
    out = torch.zeros(2, LENGTH, GROUPS, dtype=torch.float64)
    layout, windows = BlockLayout(PACKED, SIZE), WindowLayout(PACKED, SIZE, SIZE)
    for row, runs in enumerate(PACKED.runs):
        for run in (run for run in runs if not run.is_padding):
            first, first_window = layout.first[row][run.document], windows.first[row][run.document]
            for t in range(run.length):
                for group in range(GROUPS):
                    listed = range(t // SIZE + 1)
                    if blocks is not None:
                        listed = sorted(int(b) - first for b in blocks[row, run.start + t, group] if b >= 0)
                    keys = [s for b in listed for s in range(b * SIZE, min((b + 1) * SIZE, t + 1))]
                    whole = [b for b in listed if (b + 1) * SIZE <= t + 1]
                    if not whole:
                        continue
                    at = run.start + torch.tensor(keys)
                    heads = slice(group * HEADS // GROUPS, (group + 1) * HEADS // GROUPS)
                    weights = (q[row, run.start + t, heads] @ k[row, at, group].T * KEY**-0.5).softmax(-1)
                    of_block = torch.tensor(keys) // SIZE
                    m = torch.stack([weights[:, of_block == b].max() for b in whole])
                    p = (m / m.sum()).detach()
                    logits = gate_k[row, first_window + torch.tensor(whole), group] @ gate_q[row, run.start + t, group]
                    logs = (logits * DIM**-0.5).log_softmax(-1)
                    out[row, run.start + t, group] = (p * (p.log() - logs)).sum()
    return out


def with_gradients(function, tensors):
    leaves = [x.clone().requires_grad_() for x in tensors]
    out = function(*leaves)
    torch.manual_seed(2)
    gradients = torch.autograd.grad(
        (out * torch.randn(out.shape, dtype=torch.float64)).sum(), leaves, allow_unused=True
    )
    return out.detach(), [torch.zeros_like(x) if g is None else g for x, g in zip(tensors, gradients, strict=True)]


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_is_its_definition(monkeypatch, backend, listed):
    monkeypatch.setattr(chunked, "SCORES", 300)
    monkeypatch.setattr(chunked, "KEYS", 9)
    blocks = lists() if listed else None
    out, gradients = with_gradients(
        lambda *x: gate_divergence(*x, blocks, block_size=SIZE, documents=PACKED, backend=backend), drawn()
    )
    expected, wanted = with_gradients(lambda *x: defined(*x, blocks), drawn())
    torch.testing.assert_close(out, expected, atol=1e-11, rtol=1e-9)
    assert out.max() > 0.1
    for got, want in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(got, want, atol=1e-11, rtol=1e-9)
    assert not gradients[0].any()
    assert not gradients[1].any()


def test_a_reference_that_is_chosen_for_the_process_computes_all_in_one_part(monkeypatch, request):
    """Forward and backward alike."""
    parts, made = [], chunked.dense
    monkeypatch.setattr(chunked, "dense", lambda *args, whole: parts.append(whole) or made(*args, whole=whole))
    request.addfinalizer(lambda: dispatch.choose({}, "cpu"))
    dispatch.choose({"gate_divergence": "reference"}, "cpu")
    with_gradients(lambda *x: gate_divergence(*x, block_size=SIZE, documents=PACKED), drawn())
    assert parts == [True, True]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({1: slice(None, 4)}, "k must be"),
        ({2: slice(None, 2)}, "gate_k must be"),
    ],
)
def test_wrong_shapes_are_named(change, message):
    tensors = drawn()
    for place, part in change.items():
        tensors[place] = tensors[place][..., part]
    with pytest.raises(ValueError, match=message):
        gate_divergence(*tensors, block_size=SIZE)
