"""Reading: this rank's part of a step, from the rows' numbers to tensors that are ready to go to the device."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from ...kernels.derived import Recipes
from ...models.language_model import LanguageModel
from ...parallel.layout import Layout
from ...parallel.mesh import Mesh
from ...parallel.sequence import Sequence
from ...parallel.strategy import Strategy
from ..faults.ledger import Passage, beyond
from ..run.metrics import Work, work_of
from .packing import NO_TARGET, Batch, RowStream, batch
from .settings import DataSettings


class MicroBatch(NamedTuple):
    """This rank's part of rows that are computed at once: int64 `tokens` and `targets` `[R, T]` on the host.

    They are in pinned memory where the device is a GPU. source: of a mixture, the one that all the rows are of; None
    where they are of several, and without a mixture.
    """

    seq: Sequence
    tokens: Tensor
    targets: Tensor
    source: int | None = None

    @property
    def sequences(self) -> list[Sequence]:
        return [self.seq]

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Tokens and targets on the device; the host does not wait for the copies."""
        return self.tokens.to(device, non_blocking=True), self.targets.to(device, non_blocking=True)


class StepPart(NamedTuple):
    """This rank's part of one step.

    work, loss_counts: what the step's rows cost, and what the auxiliary losses are divided by (see
    `LanguageModel.loss_counts`); zeros on all but the first of the ranks that share rows, so that sums over ranks count
    every row once. row: the first of the step's. source_targets: of each source of a mixture, the targets in
    micro-batches of it alone; zeros likewise.
    """

    micro_batches: list[MicroBatch]
    work: Work
    loss_counts: list[float]
    row: int
    source_targets: list[float]

    @property
    def sequences(self) -> list[Sequence]:
        return [micro_batch.seq for micro_batch in self.micro_batches]


@dataclass(frozen=True)
class Reader:
    """Reads this rank's parts of the steps: its data rank's share of each step's rows, in the order of the rows.

    model: a copy without values, which counts the work; nobody else may use it while `steps` runs.
    """

    stream: RowStream
    settings: DataSettings
    layout: Layout
    strategy: Strategy
    mesh: Mesh
    device: torch.device
    model: LanguageModel

    def steps(self, numbers: Iterable[int], row: int, passages: Collection[Passage] = ()) -> Iterator[StepPart]:
        """The parts of the steps of these numbers, counted from 0; the first of them begins with row `row`.

        passages: rows that are passed over.

        Each is a function of the rows' numbers alone, whatever was read before.
        """
        for step in numbers:
            row = beyond(row, self.settings.rows_per_step, passages)
            yield self.part(step, row)
            row += self.settings.rows_per_step

    def part(self, step: int, row: int) -> StepPart:
        """This rank's part of the step that begins with that row."""
        self.model.at_step(step)
        work, counts = Work(), [0.0] * len(self.model.losses)
        source_targets = [0.0] * len(self.stream.names)
        micro_batches = []
        for numbers, rows in zip(self._numbers(row), self.rows(row), strict=True):
            source = self._source(numbers)
            made = shard(rows, self.layout, self.strategy, self.mesh, self.device)._replace(source=source)
            micro_batches.append(made)
            if self.mesh.sequence_rank == 0:
                targets = int((rows.targets != NO_TARGET).sum())
                if source is not None:
                    source_targets[source] += targets
                flops = self.model.flops(rows.documents)
                work += work_of(rows.documents, targets, made.seq.attention_layout, flops)
                if counts:
                    of_rows = self.model.loss_counts(rows.documents, rows.targets)
                    counts = [a + b for a, b in zip(counts, of_rows, strict=True)]
        return StepPart(micro_batches, work, counts, row, source_targets)

    def rows(self, row: int) -> Iterator[Batch]:
        """The whole rows of this rank's micro-batches, in the step that begins with that row."""
        for numbers in self._numbers(row):
            yield batch(self.stream, numbers)

    def _source(self, numbers: range) -> int | None:
        sources = {self.stream.source(number) for number in numbers}
        return sources.pop() if len(sources) == 1 and self.stream.names else None

    def _numbers(self, row: int) -> Iterator[range]:
        data, mesh = self.settings, self.mesh
        first = row + mesh.data_rank * (data.rows_per_step // mesh.data_ranks)
        for index in range(data.micro_batches(mesh.data_ranks)):
            start = first + index * data.rows_per_micro_batch
            yield range(start, start + data.rows_per_micro_batch)


class WithSequences(Protocol):
    """Rows that are computed, and the sequences that they are computed with."""

    @property
    def sequences(self) -> list[Sequence]: ...


Rows = TypeVar("Rows", bound=WithSequences)


def prepared(parts: Iterable[Rows]) -> Iterator[Rows]:
    """The parts, for which all is derived ahead, and on its device, that earlier ones derived from their documents.

    For the thread of `Ahead`: when a part is asked for, nobody works any more with the one before the last.
    """
    recipes, given = Recipes(), deque[Rows]()
    for part in parts:
        if len(given) == 2:
            for seq in given.popleft().sequences:
                recipes.learn(seq)
        for seq in part.sequences:
            recipes.prepare(seq)
        given.append(part)
        yield part


def shard(rows: Batch, layout: Layout, strategy: Strategy, mesh: Mesh, device: torch.device) -> MicroBatch:
    """This rank's part of whole rows that the sequence ranks of the mesh share."""
    return _part(rows, Sequence.shared(rows.documents, layout, mesh, strategy), device)


def alone(rows: Batch, device: torch.device) -> MicroBatch:
    """Whole rows that this rank computes by itself."""
    return _part(rows, Sequence.single(rows.documents), device)


def _part(rows: Batch, seq: Sequence, device: torch.device) -> MicroBatch:
    tokens, targets = seq.shard(rows.tokens), seq.shard(rows.targets)
    if device.type == "cuda":
        tokens, targets = tokens.pin_memory(), targets.pin_memory()
    return MicroBatch(seq, tokens, targets)
