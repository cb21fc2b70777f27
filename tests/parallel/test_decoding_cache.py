"""What decoding keeps: rows that are appended to in place, and given up where no later token sees them."""

from dataclasses import fields

import pytest
import torch
import torch.distributed as dist

from longreach.kernels.masks import Band, Bands, BlockLocal, Dilated, Mask
from longreach.parallel.decoding_cache import CachedRows, DecodingCache
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
