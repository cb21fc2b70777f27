"""Rows of unequal length that are decoded together, read in pieces or by several ranks, give what each gives alone."""

import pytest
import torch
from distributed import run_threads
from model_presets import few_or_many, small_hybrid, tokens

from longreach.kernels.documents import Documents
from longreach.models.decoding import next_logits, prefill
from longreach.parallel.mesh import Mesh
from longreach.parallel.sequence import Sequence

LENGTHS = [23, 5, 37, 1, 23]  # of prompts
STEPS = 20  # tokens that follow: blocks and windows are completed at times that differ by row
ENDS = {1: 4, 2: 9}  # rows that end, and after how many of them


@torch.no_grad()
def alone(model, row):
    return model(row.unsqueeze(0), Sequence.single(Documents.whole(1, len(row))))[0]


def rows_of(lengths=LENGTHS):
    return [tokens(1, length + STEPS)[0] for length in lengths]


def together(model, rows, lengths=LENGTHS, ends=ENDS, **settings):
    """Logits `[B, Vocab]` after the prompts and after each token that follows; rows end after so many of these."""
    prompts = [row[:length].tolist() for row, length in zip(rows, lengths, strict=True)]
    logits, cache = prefill(model, prompts, room=STEPS, **settings)
    results = [logits]
    for step in range(STEPS):
        for row, last in ends.items():
            if step == last:
                cache.end(row)
        following = torch.stack([row[length + step] for row, length in zip(rows, lengths, strict=True)])
        results.append(next_logits(model, following.unsqueeze(1), cache))
    return torch.stack(results, dim=1), cache


def compare(model, found, rows, lengths=LENGTHS, ends=ENDS):
    for number, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        count = ends.get(number, STEPS) + 1
        expected = alone(model, row)[length - 1 : length - 1 + count]
        torch.testing.assert_close(
            found[number, :count], expected, atol=1e-9, rtol=1e-9, msg=lambda text: f"row {number}: {text}"
        )


@pytest.mark.parametrize("name", few_or_many())
@pytest.mark.parametrize("prefill_tokens", [None, 7])
def test_rows_of_unequal_length_give_what_each_gives_alone(name, prefill_tokens):
    model, rows = small_hybrid(name), rows_of()
    compare(model, together(model, rows, prefill_tokens=prefill_tokens)[0], rows)


def by_ranks(rank, world, name, spans):
    rows = rows_of()
    return together(small_hybrid(name), rows, mesh=Mesh.create(world), spans=spans)[0]


@pytest.mark.parametrize("name", few_or_many())
@pytest.mark.parametrize(("world", "spans"), [(2, 2), (3, 1)])
def test_ranks_that_share_prompts_give_what_one_gives(name, world, spans):
    parts = run_threads(world, by_ranks, name, spans)
    for part in parts:
        compare(small_hybrid(name), part, rows_of())
        assert torch.equal(part, parts[0])
