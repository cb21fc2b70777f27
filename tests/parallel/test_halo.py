"""Halos without processes: the index plans of all ranks, on the tails that a gather would bring."""

from types import SimpleNamespace

import pytest
import torch

from longreach.parallel.layout import Layout
from longreach.parallel.strategies.halo import _folded, _halo_counts, _halo_rows, _rows

LENGTH, BATCH = 24, 2


@pytest.mark.parametrize(("ranks", "spans"), [(2, 1), (3, 2), (4, 3), (2, 4)])
@pytest.mark.parametrize("width", [1, 3, 7])
def test_a_halo_is_the_rows_before_its_span_and_its_gradient_goes_back_there(ranks, spans, width):
    layout = Layout(LENGTH, ranks, spans)
    row = torch.arange(1.0, LENGTH + 1).expand(BATCH, -1) * torch.tensor([[1.0], [100.0]])
    tail = min(width, layout.span_length)
    tails = []
    for rank in range(ranks):
        folded = torch.cat(layout.shard(row, rank).split(layout.span_length, dim=1))
        tails.append(_rows(folded[:, layout.span_length - tail :], spans))
    padded = torch.cat([torch.zeros(BATCH, width), row], dim=1)
    for rank in range(ranks):
        seq = SimpleNamespace(layout=layout, rank=rank)
        sources, targets = _halo_rows(seq, width, tail)
        halo = torch.zeros(spans * width, BATCH).index_copy_(0, targets, torch.cat(tails)[sources])
        starts = [span * layout.span_length for span in layout.spans_of(rank)]
        torch.testing.assert_close(_folded(halo, spans), torch.cat([padded[:, at : at + width] for at in starts]))
        assert len(targets.unique()) == len(targets)
        counts = _halo_counts(seq, width, tail)
        assert sum(counts) == len(sources)
        for of_one in sources.split(counts):  # the gradients of one span's halo go to different rows
            assert len(of_one.unique()) == len(of_one)
