import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longreach.kernels.documents import Documents
from longreach.parallel.layout import Layout


@given(ranks=st.integers(1, 8), spans=st.integers(1, 5), span_length=st.integers(1, 4))
def test_every_token_is_held_once_and_comes_back_in_its_place(ranks: int, spans: int, span_length: int) -> None:
    layout = Layout(ranks * spans * span_length, ranks, spans)
    row = torch.arange(layout.length)[None]
    parts = [layout.shard(row, rank) for rank in range(ranks)]
    assert sorted(torch.cat(parts, 1)[0].tolist()) == row[0].tolist()
    assert torch.equal(layout.unshard(parts), row)
    for rank, part in enumerate(parts):
        assert list(layout.spans_of(rank)) == sorted(layout.spans_of(rank))
        assert part.shape[1] == layout.local_length


def test_two_spans_are_the_zigzag() -> None:
    assert [Layout(16, 4, 2).spans_of(rank) for rank in range(4)] == [(0, 7), (1, 6), (2, 5), (3, 4)]


def test_zigzag_balances_one_causal_document_exactly() -> None:
    from longreach.kernels.masks import Mask

    layout, row = Layout(64, 4, 2), Documents.whole(1, 64)
    work = [Mask().tile(layout.documents(row, rank), row).pairs for rank in range(4)]
    assert len(set(work)) == 1
    assert sum(work) == 64 * 65 // 2


def test_a_length_that_does_not_divide_is_refused_with_the_settings_to_change() -> None:
    with pytest.raises(ValueError, match=r"multiple of sequence ranks \* spans = 4 \* 2; got 20.*parallel.spans"):
        Layout(20, 4, 2)


@given(cuts=st.lists(st.integers(1, 9), min_size=1, max_size=8), spans=st.sampled_from([1, 2, 4]))
def test_documents_of_a_rank_are_those_of_its_tokens(cuts: list[int], spans: int) -> None:
    documents = Documents.from_lengths([cuts], 80)
    layout = Layout(80, 2, spans)
    for rank in range(2):
        held = layout.documents(documents, rank)
        assert torch.equal(held.ids(), layout.shard(documents.ids(), rank))
        assert torch.equal(held.positions(), layout.shard(documents.positions(), rank))
