"""Triton's selection of blocks against the definition: under the interpreter, and on a GPU."""

from dataclasses import replace

import pytest
import torch
import triton.language as tl

from longreach.kernels.documents import Documents
from longreach.kernels.select_blocks import Rule, WindowLayout, select_blocks
from longreach.kernels.select_blocks import triton as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PACKED = Documents.from_lengths([[3, 21, 1], [22]])
NSA = Rule(4, 3, window=4, stride=2, initial=1)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Tiles of few rows and blocks, and memory that is NaN until it is written."""
    monkeypatch.setattr(kernels, "ROWS", 16)
    monkeypatch.setattr(kernels, "UNROLLED", tl.constexpr(4))
    if DEVICE == "cpu":
        monkeypatch.setitem(kernels.CONFIGURATIONS, 64, (4, 4, 2))
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


def draw(documents, rule, heads, groups, key_dim=5, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    count = WindowLayout(documents, rule.span, rule.step).count
    sizes = ((documents.length, heads), (count, groups))
    drawn = [torch.randn(documents.batch, n, h, key_dim, generator=generator) for n, h in sizes]
    return [(x.round() if rule.score == "dot" else x).to(DEVICE, dtype) for x in drawn]


@pytest.mark.parametrize(
    ("rule", "heads"),
    [
        (NSA, 6),
        (replace(NSA, aggregate="max"), 2),
        (Rule(4, 5, window=8, stride=4), 4),
        (Rule(4, 2, score="dot", pooled=False), 4),
        (Rule(6, 2, window=1, stride=1, score="dot", aggregate="max", pooled=False), 2),
    ],
)
def test_chooses_as_the_definition_does(rule, heads):
    q, summaries = draw(PACKED, rule, heads, 2)
    got, want = (select_blocks(q, summaries, rule=rule, documents=PACKED, backend=x) for x in ("triton", "chunked"))
    assert torch.equal(got, want)


def test_with_a_normaliser_and_a_part_of_the_queries():
    q, summaries = draw(PACKED, NSA, 2, 1)
    lse = torch.randn(2, 11, 2, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    given = {"rule": NSA, "documents": PACKED.slice(9, 20), "row_documents": PACKED, "lse": lse}
    got, want = (select_blocks(q[:, 9:20], summaries, backend=x, **given) for x in ("triton", "chunked"))
    assert torch.equal(got, want)


@pytest.mark.usefixtures("repaired_bf16")
def test_bfloat16():
    q, summaries = draw(PACKED.rows(0, 1), NSA, 2, 1, dtype=torch.bfloat16)
    given = {"rule": NSA, "documents": PACKED.rows(0, 1)}
    got, want = (select_blocks(q, summaries, backend=x, **given) for x in ("triton", "chunked"))
    assert torch.equal(got, want)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
@pytest.mark.parametrize("aggregate", ["sum", "max"])
def test_at_real_sizes_in_bfloat16(monkeypatch, aggregate):
    monkeypatch.setattr(kernels, "ROWS", 64)
    rule = Rule(64, 16, window=32, stride=16, initial=1, local=2, aggregate=aggregate)
    documents = Documents.from_lengths([[5000, 1, 3191]])
    q, summaries = draw(documents, rule, 32, 2, key_dim=128, dtype=torch.bfloat16)
    got, want = (select_blocks(q, summaries, rule=rule, documents=documents, backend=x) for x in ("triton", "chunked"))
    assert float((got == want).all(-1).float().mean()) > 0.98  # rounding may swap what is all but equal
