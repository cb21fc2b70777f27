"""Evaluation: the loss on held-out documents, as trained and with the context cut short."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch

from ..kernels.documents import Documents
from ..parallel.layout import Layout
from ..parallel.mesh import Mesh
from ..parallel.sequence import Sequence
from ..parallel.strategy import Strategy
from .engine import Engine
from .exchange import gather_numbers
from .packing import NO_TARGET, Batch, TokenStream, batch


class Loss(NamedTuple):
    """Sum of the token losses in nats, and the number of targets, over all ranks."""

    total: float
    targets: int

    @property
    def mean(self) -> float:
        return self.total / self.targets if self.targets else math.nan

    def bits_per_byte(self, bytes_per_target: float) -> float:
        """Bits that the model needs for each byte of the text that the targets stand for."""
        return self.mean / math.log(2) / bytes_per_target


def evaluate(
    engine: Engine, stream: TokenStream, layout: Layout, strategy: Strategy, rows: int, micro_batch: int
) -> Loss:
    """The loss on the first `rows` rows, shared as in training; every rank calls it and runs equally many forwards."""
    mesh, total, targets = engine.mesh, 0.0, 0
    with _evaluating(engine):
        for start in range(0, rows, mesh.data_ranks * micro_batch):
            first = start + mesh.data_rank * micro_batch
            # Ranks past the last row take rows behind the stream's end, which are all padding.
            numbers = [n if n < rows else (stream.rows or 0) + n for n in range(first, first + micro_batch)]
            part = batch(stream, numbers)
            seq = Sequence.shared(part.documents, layout, mesh, strategy)
            loss, count = _forward(engine, part, seq)
            total, targets = total + loss, targets + count
    return _over_all_ranks(total, targets, mesh)


def evaluate_truncated(engine: Engine, stream: TokenStream, rows: int, context: int, places: int) -> Loss:
    """The loss of the very targets of `evaluate`, each predicted from its last `context` tokens and nothing else.

    Each run of a document in a row becomes overlapping pieces of `context` tokens, one token apart. Of its first piece
    all targets count (they have no more context in `evaluate` either), of every other piece the last one only. Pieces
    are rows of their own, at positions 0 .. context−1, about `places` tokens a forward and rank.
    """
    mesh, total, targets = engine.mesh, 0.0, 0
    at_once = max(1, places // context)
    with _evaluating(engine):
        for number in range(rows):
            pieces = list(_pieces(stream, number, context))
            mine = pieces[mesh.rank :: mesh.world_size]
            passes = math.ceil(math.ceil(len(pieces) / mesh.world_size) / at_once)
            for index in range(passes):
                part = _stacked(mine[index * at_once : (index + 1) * at_once], at_once, context)
                loss, count = _forward(engine, part, Sequence.single(part.documents))
                total, targets = total + loss, targets + count
    return _over_all_ranks(total, targets, mesh)


class Piece(NamedTuple):
    """Tokens of one document and their targets, −100 where another piece scores them."""

    tokens: np.ndarray
    targets: np.ndarray


def _pieces(stream: TokenStream, number: int, context: int) -> Iterator[Piece]:
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


@contextmanager
def _evaluating(engine: Engine) -> Iterator[None]:
    engine.module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        engine.module.train()


def _forward(engine: Engine, part: Batch, seq: Sequence) -> tuple[float, int]:
    targets = seq.shard(part.targets)
    loss, _ = engine(seq.shard(part.tokens).to(engine.device), seq, targets.to(engine.device))
    return float(loss), int((targets != NO_TARGET).sum())


def _over_all_ranks(total: float, targets: int, mesh: Mesh) -> Loss:
    sums = gather_numbers([total, targets], mesh).sum(dim=0)
    return Loss(float(sums[0]), int(sums[1]))
