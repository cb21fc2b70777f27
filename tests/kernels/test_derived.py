"""Derived: what a description of tokens keeps, and how the same is derived of the next batch ahead of its step."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from longreach.kernels.derived import Deriving, Recipes, mapped
from longreach.kernels.documents import Documents, continuing
from longreach.kernels.masks import Mask
from longreach.kernels.masks.block_ranges import key_ranges
from longreach.parallel.layout import Layout
from longreach.parallel.sequence import Sequence

made: list[tuple[str, int]] = []


@dataclass(frozen=True)
class Tokens(Deriving):
    """Some tokens."""

    number: int


def doubled(tokens: Tokens, by: int = 2) -> Tensor:
    made.append(("doubled", tokens.number))
    return torch.full((by,), tokens.number)


def halves(tokens: Tokens) -> tuple[Tokens, ...]:
    made.append(("halves", tokens.number))
    return tuple(Tokens(tokens.number // 2) for _ in range(tokens.number % 3))


def test_what_is_derived_is_computed_once():
    made.clear()
    tokens = Tokens(4)
    assert tokens.derive(doubled, 3) is tokens.derive(doubled, 3)
    assert len(tokens.derive(doubled)) == 2
    assert made == [("doubled", 4)] * 2


def test_a_device_gets_one_copy_and_the_host_none():
    tokens = Tokens(4)
    assert tokens.on("cpu", doubled) is tokens.derive(doubled)
    assert tokens.on("meta", doubled) is tokens.on("meta", doubled)
    assert tokens.on("meta", doubled).device.type == "meta"


def test_the_next_batch_is_prepared_as_the_last_was_used():
    made.clear()
    recipes, first, second = Recipes(), Tokens(4), Tokens(8)
    first.derive(halves)[0].on("meta", doubled, 5)
    recipes.learn(first)
    recipes.prepare(second)
    of_second = second.derived[halves,]
    assert [part.number for part in of_second] == [4, 4]  # both are prepared, though the first batch had one half
    assert all(part.copies[torch.device("meta"), doubled, 5].shape == (5,) for part in of_second)
    before = len(made)
    for part in second.derive(halves):
        part.on("meta", doubled, 5)
    assert len(made) == before


def test_copies_of_many_types_go_together():
    values = (torch.arange(5, dtype=torch.int32), torch.tensor(True), (torch.randn(3, 2, dtype=torch.float64), None))
    moved: list[Tensor] = []

    def of(_: Deriving) -> object:
        return values

    tokens = Tokens(1)
    tokens.derived[of,] = values
    recipes = Recipes()
    other = Tokens(1)
    other.derived[of,] = values
    other.on("meta", of)
    recipes.learn(other)
    recipes.prepare(tokens)
    mapped(moved.append, tokens.copies[torch.device("meta"), of])
    assert [(x.dtype, tuple(x.shape)) for x in moved] == [
        (torch.int32, (5,)),
        (torch.bool, ()),
        (torch.float64, (3, 2)),
    ]


@pytest.mark.parametrize("spans", [1, 2])
def test_a_sequence_is_prepared_with_its_tiles(spans):
    def sequence(lengths: list[int]) -> Sequence:
        return Sequence(Documents.from_lengths([lengths]), Layout(64, 1, spans))

    def use(seq: Sequence) -> None:
        tile = seq.derive(tile_of_row, Mask(window=7))
        key_ranges(tile, 16, 16, "meta")
        seq.positions("meta")
        seq.spans.on("meta", continuing)

    recipes, used, fresh = Recipes(), sequence([64]), sequence([10, 30, 24])
    use(used)
    recipes.learn(used)
    recipes.prepare(fresh)

    def forbidden(*_: object) -> None:
        raise AssertionError("made in the step")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("longreach.kernels.derived._copied", forbidden)
        use(fresh)


def tile_of_row(seq: Sequence, mask: Mask) -> object:
    return mask.tile(seq.local, seq.documents)
