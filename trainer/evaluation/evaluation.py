"""Evaluation: the loss on held-out documents, as trained and with the context cut short."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from ...kernels.documents import Documents
from ...parallel.layout import Layout
from ...parallel.strategy import Strategy
from ..data.ahead import Ahead
from ..data.packing import NO_TARGET, Batch, RowStream, batch
from ..data.reading import MicroBatch, alone, prepared, shard
from ..engine import Engine
from ..ranks.exchange import gather_numbers


class Loss(NamedTuple):
    """Over all ranks: sum of the token losses in nats, number of targets, and of targets with the largest logit."""

    total: float
    targets: int
    correct: int

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


def evaluate(
    engine: Engine, stream: RowStream, layout: Layout, strategy: Strategy, rows: int, micro_batch: int
) -> Loss:
    """The loss on the first `rows` rows, shared as in training; every rank calls it and runs equally many forwards."""
    mesh = engine.mesh

    def batches() -> Iterator[MicroBatch]:
        for start in range(0, rows, mesh.data_ranks * micro_batch):
            first = start + mesh.data_rank * micro_batch
            # Ranks past the last row take rows behind the stream's end, which are all padding.
            numbers = [n if n < rows else (stream.rows or 0) + n for n in range(first, first + micro_batch)]
            yield shard(batch(stream, numbers), layout, strategy, mesh, engine.device)

    return _evaluated(engine, batches())


def evaluate_truncated(engine: Engine, stream: RowStream, rows: int, context: int, places: int) -> Loss:
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

    with torch.compiler.set_stance("force_eager"):  # graphs are of the shapes of training
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


def _evaluated(engine: Engine, batches: Iterator[MicroBatch]) -> Loss:
    """The loss on all ranks' batches, which another thread makes ahead; the device is read once, at the end."""
    sums = torch.zeros(3, dtype=torch.float64, device=engine.device)  # loss, targets and correct predictions
    engine.module.eval()
    try:
        with torch.no_grad(), Ahead(prepared(batches), engine.device) as parts:
            for part in parts:
                tokens, targets = part.on(engine.device)
                sums += torch.stack([x.double() for x in engine(tokens, part.seq, targets, True)])
    finally:
        engine.module.train()
    total, targeted, correct = gather_numbers(sums.tolist(), engine.mesh).sum(dim=0).tolist()
    return Loss(total, int(targeted), int(correct))
