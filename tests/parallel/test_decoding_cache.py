"""What decoding keeps: rows that are appended to in place, and given up where no later token sees them."""

from dataclasses import fields

import pytest
import torch
import torch.distributed as dist

from longreach.kernels.masks import Band, Bands, BlockLocal, Dilated, Mask
from longreach.parallel.decoding_cache import CachedRows, Columns, DecodingCache, Stretch
from longreach.parallel.mesh import Experts
from longreach.parallel.sequence import Sequence

MASKS = {
    "causal": Mask(),
    "window": Mask(window=7),
    "window and sinks": Mask(window=7, sink_tokens=3),
    "block-local": BlockLocal(8),
    "dilated": Dilated(3, window=9),
    "a far stretch and a window": Bands((Band(first=5, last=8, ahead=0), Band(first=8, back=4, ahead=0))),
}


def positions_of(rows, stretches):
    """What the rows hold, where they are kept."""
    return sorted(
        (part.column + i, float(rows[0, part.start + i]))
        for part in stretches
        if part.column >= 0
        for i in range(part.length)
    )


@pytest.mark.parametrize("steps", [[1], [13, 1, 1, 5], [40, 1]], ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_every_position_that_a_mask_can_still_show_is_there(mask, steps):
    mask, rows, length = MASKS[mask], CachedRows(), 0
    while length < 120:
        n = steps[min(length, len(steps) - 1)]
        before = [i for low, high in mask.kept(length) for i in range(low, high)]
        numbers = torch.arange(length, length + n, dtype=torch.float32).expand(2, n)
        (one, two), stretches = rows.append((numbers, -numbers.unsqueeze(-1)))
        length += n
        found = positions_of(one, stretches)
        assert [position for position, _ in found] == [*before, *range(length - n, length)]
        assert all(position == number for position, number in found)
        assert torch.equal(one, -two.squeeze(-1))
        assert one.shape[1] == sum(part.length for part in stretches)
        rows.keep(mask.kept(length))
        assert rows.kept == sum(high - low for low, high in mask.kept(length))


def test_a_window_s_memory_does_not_grow_and_a_growing_one_is_moved_seldom():
    window, everything, sizes, moves = CachedRows(), CachedRows(), set(), set()
    for length in range(1, 3001):
        window.append((torch.zeros(1, 1, 4),))
        window.keep(Mask(window=50).kept(length))
        everything.append((torch.zeros(1, 1, 4),))
        sizes.add(window.bytes)
        moves.add(everything.tensors[0].data_ptr())
    assert max(sizes) <= 1.6 * 50 * 4 * 4
    assert len(moves) < 25
    assert everything.bytes <= 1.6 * 3000 * 4 * 4


def most(mask, starts, columns):
    """The most columns that are kept at any time."""
    kept = (Columns(starts, None, 0, 1, None).kept(mask.kept, column) for column in range(1, columns + 1))
    return max(len({at for low, high in intervals for at in range(low, high)}) for intervals in kept)


@pytest.mark.parametrize("starts", [[0], [0, 5, 11]], ids=["one start", "three"])
@pytest.mark.parametrize("mask", MASKS)
def test_a_mask_says_how_many_columns_are_kept_at_most(mask, starts):
    for columns in (6, 13, 61):
        actual, bound = most(MASKS[mask], starts, columns), MASKS[mask].most_kept(columns, len(starts))
        assert actual == bound if len(starts) == 1 else actual <= bound <= columns


@pytest.mark.parametrize("piece", [1, 3, 29])
@pytest.mark.parametrize("mask", MASKS)
def test_memory_that_is_made_once_holds_every_position_that_a_mask_can_still_show(mask, piece):
    mask, rows, columns = MASKS[mask], CachedRows(), Columns(None, 100, 0, 1, None)
    memory = set()
    for start in range(0, 100, piece):
        length = min(start + piece, 100)
        before = [i for low, high in mask.kept(start) for i in range(low, high)]
        numbers = torch.arange(start, length, dtype=torch.float32).expand(2, -1)
        (one,), stretches = rows.append((numbers,), columns.room(mask.most_kept))
        found = positions_of(one, stretches)
        assert [position for position, _ in found] == [*before, *range(start, length)]
        assert all(position == number for position, number in found)
        rows.keep(mask.kept(length))
        memory.add((rows.tensors[0].data_ptr(), rows.bytes))
    assert memory == {(rows.tensors[0].data_ptr(), 2 * 4 * min(100, mask.most_kept(100) + 1))}


def test_columns_are_documents_after_their_padding():
    columns = Columns([2, 0, 7], None, 0, 1, None)
    columns.length = 5
    documents = columns.documents(3, (Stretch(0, 2, 3), Stretch(2, 1, -1), Stretch(3, 4, 0)))
    assert documents.ids().tolist() == [[0, 0, -1, -1, -1, 0, 0], [0, 0, -1, 0, 0, 0, 0], [-1] * 7]
    assert documents.positions().tolist() == [[1, 2, 0, 0, 0, 0, 1], [3, 4, 0, 0, 1, 2, 3], [0] * 7]
    assert columns.before(5) == [3, 5, 0]


def test_a_cache_has_no_room_for_more_than_it_was_told_of():
    cache = DecodingCache(most=7)
    Sequence.decoding(cache, 1, 7)
    cache.advance(5)
    with pytest.raises(ValueError, match="room for all tokens; got 3 after 5 with room for 7"):
        Sequence.decoding(cache, 1, 3)


def test_a_cache_counts_the_memory_of_its_parts():
    cache = DecodingCache()
    cache.states[0, "state"] = torch.zeros(3, dtype=torch.float64)
    cache.of("mixer").rows_of(1, "attention").append((torch.zeros(1, 2, 5),))
    assert cache.bytes == 3 * 8 + (2 + 1 + 1) * 5 * 4


def test_the_last_token_of_a_prompt_has_all_that_the_prompt_has_but_the_other_tokens():
    cache, ranks = DecodingCache(), Experts(2, 1, dist.ProcessGroup(1, 2))
    cache.advance(3)
    prompt = Sequence.decoding(cache, 2, 5, backend="reference", experts=ranks).at(4)
    last = prompt.last_token
    assert last.reach().tolist() == [[7], [7]]
    changed = {field.name for field in fields(Sequence) if field.compare}
    changed = {name for name in changed if getattr(last, name) is not getattr(prompt, name)}
    assert changed == {"documents", "layout"}
