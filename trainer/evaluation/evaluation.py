"""Evaluation: the loss on held-out documents, as trained, by position, and with the context cut short."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ...kernels.documents import Documents
from ...models.uncompiled import uncompiled
from ...parallel.layout import Layout
from ...parallel.mesh import Mesh
from ...parallel.strategy import Strategy
from ..data.ahead import Ahead
from ..data.packing import NO_TARGET, Batch, RowStream, batch
from ..data.reading import MicroBatch, alone, prepared, shard
from ..ranks.exchange import gather_numbers

FIRST_BUCKET = 16  # positions; each bucket behind it ends where the position has doubled


class Scored(Protocol):
    """A model on the ranks of a mesh: under an `Engine`, or `Whole` on each of them."""

    @property
    def mesh(self) -> Mesh: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def module(self) -> nn.Module: ...

    def __call__(self, *args: Any) -> Any: ...


@dataclass(frozen=True)
class Whole:
    """A model of which every rank has all weights; its forward may share rows all the same."""

    module: nn.Module
    mesh: Mesh
    device: torch.device

    def __call__(self, *args: Any) -> Any:
        return self.module(*args)


class Loss(NamedTuple):
    """Over all ranks: sum of the token losses in nats, number of targets, and of targets with the largest logit.

    buckets: (sum of the losses, number) of the targets in each bucket of positions, from the first; none where nobody
    asked. The position is that of the token that predicts the target, counted from 0 where its document begins in the
    row: so many tokens of the document the model has seen before it.
    """

    total: float
    targets: int
    correct: int
    buckets: tuple[tuple[float, int], ...] = ()

    @classmethod
    def of_all(cls, losses: Sequence[Loss]) -> Loss:
        """The loss on all the rows of several, which have one length."""
        buckets = zip(*(loss.buckets for loss in losses), strict=True)
        return cls(
            sum(loss.total for loss in losses),
            sum(loss.targets for loss in losses),
            sum(loss.correct for loss in losses),
            tuple((sum(total for total, _ in each), sum(number for _, number in each)) for each in buckets),
        )

    @property
    def mean(self) -> float:
        return self.total / self.targets if self.targets else math.nan

    @property
    def accuracy(self) -> float:
        """The share of targets whose logit is the largest of the vocabulary."""
        return self.correct / self.targets if self.targets else math.nan

    def bits_per_byte(self, bytes_per_target: float) -> float:
        """Bits that the model needs for each byte of the text that the targets stand for."""
        return self.mean / math.log(2) / bytes_per_target

    @property
    def by_position(self) -> dict[str, float]:
        """As they are logged: mean loss and number of the targets of each bucket that has some."""
        record: dict[str, float] = {}
        first, end = 0, FIRST_BUCKET
        for total, number in self.buckets:
            if number:
                record[f"validation_loss_at_{first}_to_{end - 1}"] = total / number
                record[f"validation_targets_at_{first}_to_{end - 1}"] = number
            first, end = end, 2 * end
        return record


def evaluate(
    engine: Scored,
    stream: RowStream,
    layout: Layout,
    strategy: Strategy,
    rows: int,
    micro_batch: int,
    positions: bool = False,
) -> Loss:
    """The loss on the first `rows` rows, shared as in training; every rank calls it and runs equally many forwards.

    With `positions`, also by position, in buckets up to the length of a row.
    """
    mesh = engine.mesh

    def batches() -> Iterator[MicroBatch]:
        for start in range(0, rows, mesh.data_ranks * micro_batch):
            first = start + mesh.data_rank * micro_batch
            # Ranks past the last row take rows behind the stream's end, which are all padding.
            numbers = [n if n < rows else (stream.rows or 0) + n for n in range(first, first + micro_batch)]
            yield shard(batch(stream, numbers), layout, strategy, mesh, engine.device)

    return _evaluated(engine, batches(), layout.length if positions else 0)


def evaluate_truncated(engine: Scored, stream: RowStream, rows: int, context: int, places: int) -> Loss:
    """The loss of the same targets as `evaluate`, each predicted from its last `context` tokens alone.

    Each run of a document in a row becomes overlapping pieces of `context` tokens, one token apart. Of its first piece
    all targets count (they have no more context in `evaluate` either), of every other piece the last one only. Pieces
    are rows of their own, at positions 0 .. context−1, about `places` tokens a forward and rank.
    """
    mesh, at_once = engine.mesh, max(1, places // context)

    def batches() -> Iterator[MicroBatch]:
        for number in range(rows):
            pieces = list(_pieces(stream, number, context))
            mine = pieces[mesh.rank :: mesh.world_size]
            passes = math.ceil(math.ceil(len(pieces) / mesh.world_size) / at_once)
            for index in range(passes):
                part = _stacked(mine[index * at_once : (index + 1) * at_once], at_once, context)
                yield alone(part, engine.device)

    with uncompiled():
        return _evaluated(engine, batches())


class Piece(NamedTuple):
    """Tokens of one document and their targets, −100 where another piece scores them."""

    tokens: np.ndarray
    targets: np.ndarray


def _pieces(stream: RowStream, number: int, context: int) -> Iterator[Piece]:
    row, start = stream.row(number), 0
    for length in row.lengths:
        tokens, targets = row.tokens[start : start + length], row.targets[start : start + length]
        start += length
        yield Piece(tokens[:context], targets[:context])
        for end in range(context + 1, length + 1):
            if targets[end - 1] != NO_TARGET:
                last = np.full(context, NO_TARGET, np.int64)
                last[-1] = targets[end - 1]
                yield Piece(tokens[end - context : end], last)


def _stacked(pieces: list[Piece], rows: int, context: int) -> Batch:
    tokens = np.zeros((rows, context), np.int64)
    targets = np.full((rows, context), NO_TARGET, np.int64)
    for index, piece in enumerate(pieces):
        tokens[index, : len(piece.tokens)] = piece.tokens
        targets[index, : len(piece.targets)] = piece.targets
    lengths = [[len(piece.tokens)] for piece in pieces] + [[] for _ in range(rows - len(pieces))]
    documents = Documents.from_lengths(lengths, context)
    return Batch(torch.from_numpy(tokens), torch.from_numpy(targets), documents)


def _evaluated(engine: Scored, batches: Iterator[MicroBatch], longest: int = 0) -> Loss:
    """The loss on all ranks' batches, which another thread makes ahead; the device is read once, at the end.

    longest: of the documents whose positions are told apart; 0: they are not.
    """
    sums = torch.zeros(3, dtype=torch.float64, device=engine.device)  # loss, targets and correct predictions
    ends = _ends(longest)
    buckets = torch.zeros(2, len(ends), dtype=torch.float64, device=engine.device)  # losses and targets
    borders = torch.tensor(ends, device=engine.device)
    engine.module.eval()
    try:
        with torch.no_grad(), Ahead(prepared(batches), engine.device) as parts:
            for part in parts:
                tokens, targets = part.on(engine.device)
                if not ends:
                    sums += torch.stack([x.double() for x in engine(tokens, part.seq, targets, True)])
                    continue
                losses, count, right = engine(tokens, part.seq, targets, True, False, True)
                losses = losses.double()  # of which the sums of all buckets make the whole one
                sums += torch.stack([losses.sum(), count.double(), right.sum().double()])
                _add(buckets, borders, part.seq.reach(engine.device), losses, targets)
    finally:
        engine.module.train()
    numbers = torch.cat([sums, buckets.flatten()]).tolist()
    total, targeted, correct, *rest = gather_numbers(numbers, engine.mesh).sum(dim=0).tolist()
    pairs = zip(rest[: len(ends)], map(int, rest[len(ends) :]), strict=True)
    return Loss(total, int(targeted), int(correct), tuple(pairs))


def _ends(longest: int) -> list[int]:
    """Where the buckets of positions end, of documents of at most so many tokens."""
    number = 1 + ((longest - 1) // FIRST_BUCKET).bit_length() if longest else 0
    return [FIRST_BUCKET << index for index in range(number)]


def _add(buckets: Tensor, ends: Tensor, positions: Tensor, losses: Tensor, targets: Tensor) -> None:
    """Adds the losses and the number of a batch's targets, each to the bucket of its position."""
    places = torch.bucketize(positions.flatten(), ends, right=True)
    there = (targets != NO_TARGET).flatten()
    buckets.index_add_(1, places, torch.stack([losses.flatten().double(), there.double()]))
