"""Scoring: whether greedy decoding would write a problem's answers, from one forward on ranks that share its tokens.

Greedy decoding writes an answer if and only if each of its tokens has the largest logit behind the ones before it. So
the forward of training, with the right answer in its place, tells it without a cache, at the length of training.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...kernels.documents import Documents
from ...models.uncompiled import uncompiled
from ...parallel.layout import Layout
from ...parallel.sequence import Sequence
from ...parallel.strategy import Strategy
from ..data.ahead import Ahead
from ..data.packing import NO_TARGET, Batch
from ..data.reading import MicroBatch, prepared, shard
from ..ranks.exchange import gather_numbers
from .evaluation import Scored
from .tasks.task import NO_ANSWER, Material, Problem, Task


class Scores(NamedTuple):
    """Of the problems of one task, length and depth.

    accuracy: the share of answers that greedy decoding writes, those before them given. exact: the share of problems
    with all answers so. loss: −log p of a token of the answers, in nats. choice: the share of problems whose right
    answer is likelier than each of the others; None without choices.
    """

    accuracy: float
    exact: float
    loss: float
    choice: float | None = None


class Cell(NamedTuple):
    """Problems to score, numbers 0 .. problems − 1."""

    task: Task
    length: int
    depth: float
    problems: int

    @property
    def choices(self) -> int:
        """Rows of a problem."""
        return max(1, self.task.choices)

    @property
    def rows(self) -> int:
        return self.problems * self.choices


class _Part(NamedTuple):
    """This rank's part of rows, and the slot of each of its targets: row * answers + answer; −1 without one."""

    micro_batch: MicroBatch
    slots: Tensor

    @property
    def sequences(self) -> list[Sequence]:
        return self.micro_batch.sequences


def score(model: Scored, cell: Cell, material: Material, layout: Layout, strategy: Strategy, places: int) -> Scores:
    """The scores of a cell's problems, whose rows ranks share as in training; every rank calls it.

    layout: of rows that hold a problem and perhaps padding behind it. places: about how many tokens a rank computes at
    once. All ranks run equally many forwards, as ZeRO-3 needs, and the device is read once, at the end.
    """
    slots, device = cell.rows * cell.task.answers, model.device
    sums = torch.zeros(3, slots + 1, dtype=torch.float64, device=device)  # right, tokens, loss; the last of no answer
    model.module.eval()
    try:
        parts = _parts(model, cell, material, layout, strategy, max(1, places // layout.local_length))
        with torch.no_grad(), uncompiled(), Ahead(prepared(parts), device) as ahead:
            for part in ahead:
                tokens, targets = part.micro_batch.on(device)
                losses, _, right = model(tokens, part.micro_batch.seq, targets, True, False, True)
                each = torch.stack([x.flatten().double() for x in (right, targets != NO_TARGET, losses)])
                where = part.slots.to(device, non_blocking=True).flatten()
                sums.index_add_(1, torch.where(where < 0, slots, where), each)
    finally:
        model.module.train()
    numbers = gather_numbers(sums[:, :slots].flatten().tolist(), model.mesh).sum(dim=0)
    return _scores(numbers.view(3, cell.problems, cell.choices, cell.task.answers).numpy())


def _scores(sums: np.ndarray) -> Scores:
    """Of right tokens, tokens and losses `[3, problems, choices, answers]`."""
    right, tokens, losses = sums
    written = (right == tokens)[:, 0]
    of_choices, choice = losses.sum(-1), None
    if of_choices.shape[1] > 1:
        choice = float((of_choices[:, :1] < of_choices[:, 1:]).all(axis=1).mean())
    loss = float(losses[:, 0].sum() / tokens[:, 0].sum())
    return Scores(float(written.mean()), float(written.all(axis=1).mean()), loss, choice)


def _parts(
    model: Scored, cell: Cell, material: Material, layout: Layout, strategy: Strategy, at_once: int
) -> Iterator[_Part]:
    mesh, answers = model.mesh, cell.task.answers
    at_once = min(at_once, math.ceil(cell.rows / mesh.data_ranks))
    for start in range(0, cell.rows, mesh.data_ranks * at_once):
        tokens = np.zeros((at_once, layout.length), np.int64)
        targets, slots = np.full_like(tokens, NO_TARGET), np.full_like(tokens, NO_ANSWER)
        first, held = start + mesh.data_rank * at_once, list[list[int]]()
        for place, row in enumerate(range(first, first + at_once)):
            held.append([cell.length] if row < cell.rows else [])  # ranks past the last row compute padding
            if row < cell.rows:
                number, choice = divmod(row, cell.choices)
                problem = _problem(cell, material, number)
                tokens[place, : cell.length], targets[place, : cell.length] = problem.choice(choice)
                there = problem.answers != NO_ANSWER
                slots[place, : cell.length][there] = row * answers + problem.answers[there]
        documents = Documents.from_lengths(held, layout.length)
        batch = Batch(torch.from_numpy(tokens), torch.from_numpy(targets), documents)
        micro_batch = shard(batch, layout, strategy, mesh, model.device)
        yield _Part(micro_batch, micro_batch.seq.shard(torch.from_numpy(slots)))


def _problem(cell: Cell, material: Material, number: int) -> Problem:
    return cell.task.problem(material, cell.length, number, cell.depth)
