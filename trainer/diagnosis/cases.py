"""Cases: packed rows, layouts and targets for the model, chosen so that an error at a border shows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...kernels.documents import Documents
from ...parallel import ops
from ...parallel.layout import Layout
from ...parallel.sequence import Sequence

NO_TARGET = -100
FAR = 100_000  # bfloat16 counts to 256, float32 angles are off by a hundredth here
MERGES = 16  # spans over which rounded sums would show


@dataclass(frozen=True)
class Case:
    """Rows `[B, N]` of tokens and targets, packed as `documents`, under a layout."""

    name: str
    layout: Layout
    lengths: list[list[int]]
    tokens: Tensor
    targets: Tensor
    far: bool = False  # whether mixers are told positions from `FAR` on

    @property
    def documents(self) -> Documents:
        return Documents.from_lengths(self.lengths, self.layout.length)

    @property
    def inside(self) -> Tensor:
        """bool `[B, N]`: tokens that are not padding."""
        length = self.layout.length
        return torch.stack([torch.arange(length) < sum(row) for row in self.lengths])


def make_cases(ranks: int, spans: int, vocabulary: int) -> list[Case]:
    """Every packing: under the user's spans first, then contiguous, as a zigzag, and in very short spans."""
    length = 7 if ranks * spans <= 32 else 3
    cuts = [(spans, length), *((count, 5) for count in (1, 2) if count != spans)]
    # The inputs of a convolution of four taps come from several such short spans.
    cuts += sorted({(spans, 2), (2, 2), (max(2, spans), 1)})
    shapes = [Layout(ranks * count * n, ranks, count) for count, n in cuts]
    return [case for layout in shapes for case in _packings(layout, vocabulary)]


def case_of_many(ranks: int, vocabulary: int) -> Case:
    """One long document, and two with padding, over spans enough for sixteen states or keys to be put together."""
    spans = max(2, -(-MERGES // ranks))
    layout = Layout(ranks * spans * 5, ranks, spans)
    n = layout.length
    return _case(f"{ranks * spans} spans of 5", layout, [[n], [n - n // 4 - 9, n // 4]], vocabulary)


def _packings(layout: Layout, vocabulary: int) -> list[Case]:
    n, edge = layout.length, layout.span_length
    where = f"{layout.spans} span(s) of {edge}"
    borders = sorted({place for k in range(1, layout.ranks * layout.spans) for place in _near(k, edge)} - {0, n})
    cases = [
        ("one long document, and borders at the edges of spans", [[n], _between(borders, n)]),
        ("documents of 1 or 2 tokens, and ranks of padding", [_tiny(n), _between([max(1, n // 5)], max(2, n // 3))]),
        ("a few documents, and borders inside spans", [_between([n // 3, n // 2 + 1], n), _inside(n, edge)]),
    ]
    return [_case(f"{name}; {where}", layout, lengths, vocabulary) for name, lengths in cases]


def _near(span: int, edge: int) -> tuple[int, ...]:
    """At the edge, one before it and one behind it, in turn: all three at every edge leaves no document over it."""
    return ((span * edge,), (span * edge - 1,), (span * edge + 1,))[span % 3]


def _inside(n: int, edge: int) -> list[int]:
    return _between(sorted({min(n - 1, k * edge + edge // 2) for k in range(0, n // edge, 2)} - {0}), n - n // 7)


def _between(borders: list[int], end: int) -> list[int]:
    places = [0, *(b for b in borders if 0 < b < end), end]
    return [b - a for a, b in pairwise(places)]


def _tiny(n: int) -> list[int]:
    """1 and 2 in an order without a short period."""
    lengths: list[int] = []
    while (left := n - sum(lengths)) > 0:
        lengths.append(min(left, 1 + (len(lengths) * 7 % 5 > 2)))
    return lengths


def _case(name: str, layout: Layout, lengths: list[list[int]], vocabulary: int) -> Case:
    generator = torch.Generator("cpu").manual_seed(len(name) + layout.length)
    shape = len(lengths), layout.length
    tokens = torch.randint(vocabulary, shape, generator=generator)
    targets = torch.randint(vocabulary, shape, generator=generator)
    targets[torch.rand(shape, generator=generator) < 0.4] = NO_TARGET
    for row, documents in enumerate(lengths):
        targets[row, sum(documents) :] = NO_TARGET
    targets[0, : layout.length // (2 * layout.ranks)] = NO_TARGET  # fewer on the first rank than on the others
    return Case(name, layout, lengths, tokens, targets)


class Change(NamedTuple):
    """One token of each row is another: (row, place, end of its document) each, and the tokens `[B, N]`."""

    places: list[tuple[int, int, int]]
    tokens: Tensor


def changes(case: Case) -> list[Change]:
    """Changes at the start and in the middle of documents, and at the first edge of a span that lies in one."""
    by_row = [_places(lengths, case.layout.span_length) for lengths in case.lengths]
    result = []
    for index in range(max(len(places) for places in by_row)):
        chosen = [(row, *places[index % len(places)]) for row, places in enumerate(by_row)]
        tokens = case.tokens.clone()
        for row, place, _ in chosen:
            tokens[row, place] = (tokens[row, place] + 1) % (int(case.tokens.max()) + 1)
        result.append(Change(chosen, tokens))
    return result


def _places(lengths: list[int], edge: int) -> list[tuple[int, int]]:
    starts = [0, *accumulate(lengths)]
    places_and_ends = []
    for index in sorted({0, len(lengths) // 2, len(lengths) - 1}):
        start, stop = starts[index], starts[index + 1]
        places = {start, start + (stop - start) // 2, min(stop - 1, (start // edge + 1) * edge)}
        places_and_ends += [(place, stop) for place in sorted(places)]
    return places_and_ends


class FarSequence(Sequence):
    """A sequence that tells mixers positions from `FAR` on."""

    def positions(self, device: torch.device | str = "cpu") -> Tensor:
        return super().positions(device) + FAR

    def positions_within(self, most: int, device: torch.device | str = "cpu", setting: str = "max_length") -> Tensor:
        """As far as there is room."""
        near = super().positions(device)
        super().positions_within(most, device, setting)
        return near + min(FAR, most - int(self.documents.columns.end_position.max()))

    @classmethod
    def of_near(cls, seq: Sequence) -> FarSequence:
        return cls(**{field.name: getattr(seq, field.name) for field in fields(seq)})


@contextmanager
def far_positions(seq: Sequence) -> Iterator[Sequence]:
    """A sequence that tells mixers far positions; inside, ops get the true ones."""

    def near(op: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, seq: Sequence, **kwargs: Any) -> Any:
            return op(*args, seq=Sequence(**{field.name: getattr(seq, field.name) for field in fields(seq)}), **kwargs)

        return call

    with ExitStack() as restored:
        for name in ops.__all__:
            original = getattr(ops, name)
            restored.callback(setattr, ops, name, original)
            setattr(ops, name, near(original))
        yield FarSequence.of_near(seq)
