"""Writing the audit: after each step the first rank notes what its rows held."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ...callback import Callback
from ...ranks.exchange import together
from ...run.failure import remedy
from ..corpus import Corpus
from ..packing import TokenStream
from ..streams.mixture import MixtureStream
from .file import COLUMNS, NAME, AuditFile, AuditRows, AuditSource, packed

if TYPE_CHECKING:
    from ...trainer import Trainer


class Auditing(Callback):
    """Keeps run.dir/audit.bin, of the steps up to the one that the run is at: a run that goes back rewrites it.

    Lines that the disk has no room for are kept and written later. Each step's pieces are compared with the tokens that
    all ranks have counted in what they read.
    """

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}  # of sources in the file, by fingerprint
        self._unwritten, self._failing = b"", False
        self._step, self._row, self._tokens = 0, 0, 0

    def start(self, trainer: Trainer) -> None:
        self._file = AuditFile(trainer.directory.path / NAME)
        together(trainer.mesh, lambda: self._resume(trainer.step) if trainer.mesh.rank == 0 else None)

    def before_step(self, trainer: Trainer) -> None:
        self._row, self._tokens = trainer.row, trainer.tokens

    def after_step(self, trainer: Trainer) -> None:
        if trainer.mesh.rank:
            return
        if trainer.step <= self._step:  # the run has gone back to a checkpoint
            self._write(trainer)
            self._resume(trainer.step - 1)
        rows = trainer.settings.data.rows_per_step
        first = trainer.row - rows
        if over := [row for row in range(self._row, first) if _passed(trainer, row)]:
            skipped = self._record(trainer, over[0], len(over))
            self._unwritten += packed(skipped._replace(passed=True))
        record = self._record(trainer, first, rows)
        counted = int(record.pieces[:, 3].sum())
        if counted != trainer.tokens - self._tokens:
            raise RuntimeError(
                f"the audit of step {trainer.step} must hold what the ranks have read; got {counted} tokens, and they "
                f"have counted {trainer.tokens - self._tokens}"
            )
        self._unwritten += packed(record)
        self._step = trainer.step
        self._write(trainer)

    def end(self, trainer: Trainer) -> None:
        if trainer.mesh.rank == 0:
            self._write(trainer)

    def _resume(self, step: int) -> None:
        self._numbers, self._step = {}, 0
        for record in self._file.resume_at(step):
            if isinstance(record, AuditSource):
                self._numbers[record.fingerprint] = len(self._numbers)
            else:
                self._step = record.step
        if self._step != step:
            raise ValueError(
                f"data.audit must be on from a run's first step, to prove anything; got {self._file.path} with the "
                f"steps up to {self._step}, where {step} are taken. Leave it out"
            )

    def _record(self, trainer: Trainer, first: int, rows: int) -> AuditRows:
        corpus = trainer.corpus
        assert isinstance(corpus, Corpus)
        stream = corpus.train
        of_row = stream.sources if isinstance(stream, MixtureStream) else [stream]
        pieces = [
            (self._number(of_row[stream.source(number)]), *piece)
            for number in range(first, first + rows)
            for piece in stream.pieces(number)
        ]
        return AuditRows(trainer.step, first, rows, np.array(pieces, np.int64).reshape(-1, COLUMNS))

    def _number(self, stream: TokenStream) -> int:
        """The number of a source in the file, into which it comes when its first row is read."""
        if stream.fingerprint not in self._numbers:
            lengths = stream.documents.lengths[stream.members]
            order = np.argsort(stream.members)
            source = AuditSource(stream.name, stream.fingerprint, stream.members[order], lengths[order])
            self._unwritten += packed(source)
            self._numbers[stream.fingerprint] = len(self._numbers)
        return self._numbers[stream.fingerprint]

    def _write(self, trainer: Trainer) -> None:
        if not self._unwritten:
            return
        # A checkpoint survives a loss of power, and nothing goes on from it without the steps before it.
        every = trainer.settings.checkpoint.every
        saves = trainer.step == trainer.stage.stop or bool(every and trainer.step % every == 0)
        try:
            self._file.append(self._unwritten, sync=saves)
            self._unwritten, self._failing = b"", False
        except OSError as error:
            if not self._failing:
                trainer.outputs.say(f"{NAME} cannot be written: {error}. The run goes on; {remedy(error)}")
            self._failing = True


def _passed(trainer: Trainer, row: int) -> bool:
    """Whether the run passed that row over on purpose; any other that no step has read is a gap."""
    return any(each.first <= row < each.stop for each in trainer.recovery.passed)
