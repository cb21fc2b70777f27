"""Recovery: what a run does about steps that change no weight, and about rows in which it died before."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint import checkpoint
from ..checkpoint.commit import leave_behind
from ..checkpoint.stored import step_of, steps
from ..data.packing import segment_of
from ..data.reading import StepPart
from ..ranks.exchange import from_first_rank
from ..run.failure import NotFinite
from .guard import Guard
from .ledger import Ledger, Passage, beyond, named_rows

if TYPE_CHECKING:
    from ..assembly import Assembly

NAMED = 8  # documents that a message names


class Recovery:
    """Counts and explains skipped steps, goes back to a checkpoint after too many in a row, and passes rows over.

    Every rank has one and comes to the same decisions.

    skipped: steps that were skipped since the run began.       in_a_row: of them, those since the last that was taken.
    passages: what the rows are read without.                   passed: what was read without, or met in vain, so far.
    target: the checkpoint to go back to now, or None.
    """

    def __init__(self, trainer: Assembly) -> None:
        chosen = trainer.settings.trainer
        self._trainer = trainer
        self.guard = Guard(chosen.spike_deviations, chosen.spike_window, trainer.mesh, trainer.device)
        self.skipped = self.in_a_row = self.rollbacks = 0
        self.passages: list[Passage] = []
        self.passed: list[Passage] = []
        self.target: Path | None = None
        self._from = 0  # the step after which the weights were loaded
        self._began = 0  # and that after which the rows of now were begun to be counted
        self._streak = 0  # the row with which the first of those in a row began
        self._at_stake: tuple[int, int] | None = None  # rows that may be why the run ends now

    def resume(self, state: dict[str, Any]) -> None:
        """Goes on from a checkpoint's state, or begins, where it is empty; every rank calls it."""
        self.skipped, self._from = int(state.get("skipped_steps", 0)), self._trainer.step
        if state and segment_of(state["data"]) == self._trainer.corpus.train.segment:
            self._began = int(state.get("segment_began", self._trainer.stage.first))
        else:  # the stage before, or the data before `data.restart`, had rows of their own
            state, self._began = {}, self._trainer.step
        self.passed = [Passage(int(first), int(stop), reason) for first, stop, reason in state.get("skipped_rows", ())]
        self.guard.resume(state.get("spikes", {}))
        mine = self._ledger.passages() if self._trainer.mesh.rank == 0 else []
        self.passages = [Passage(*each) for each in from_first_rank(mine, self._trainer.mesh)]

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: `skipped_rows` are the rows before the next one that no weight has learnt from."""
        spikes = self.guard.state()
        return {
            "segment_began": self._began,
            "skipped_steps": self.skipped,
            "skipped_rows": [list(each) for each in self.passed],
        } | ({"spikes": spikes} if spikes else {})

    @property
    def figures(self) -> dict[str, int]:
        """For the line of metrics."""
        return {"skipped_steps": self.skipped} if self.skipped else {}

    def begin(self) -> None:
        """A step begins: should the run end in it, its rows may be why."""
        row, count = self._trainer.row, self._trainer.settings.data.rows_per_step
        first = beyond(row, count, self.passages)
        self._at_stake = (first, first + count)

    def meet(self, part: StepPart) -> None:
        """Goes to the rows of a step, and says so where others were passed over for it."""
        trainer, row = self._trainer, self._trainer.row
        if part.row > row:
            over = [each for each in self.passages if each.first < part.row and each.stop > row]
            reason = "; ".join(dict.fromkeys(each.reason for each in over))
            self._pass(row, part.row, reason)
            self._write("passed over", (row, part.row), reason, step=trainer.step + 1)
            trainer.outputs.say(
                f"step {trainer.step + 1}: {named_rows(row, part.row)} passed over ({reason}); without "
                f"{self._ledger.path} they would be met again"
            )
            trainer.row = part.row

    def look(self, row: int) -> None:
        """After a step that began with that row: counts it, and chooses where to go back to after too many in vain.

        Raises NotFinite on every rank if there are too many and no checkpoint, or no rollback, is left.
        """
        trainer, self._at_stake = self._trainer, None
        if trainer.engine.stepped:
            self.guard.taken()
            self.in_a_row = 0
            return
        self._streak = row if not self.in_a_row else self._streak
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        loss, reason = trainer.record["loss"], "the gradient is not finite"
        if not math.isfinite(loss):
            reason = f"the loss is not finite ({loss})"
        elif (spike := self.guard.spike()) is not None:
            reason = f"the loss is a spike ({spike[0]:.4g}, above {spike[1]:.4g})"
        stream, rows = trainer.reader.stream, range(row, trainer.row)
        documents = [[piece.document for piece in stream.pieces(number)] for number in rows]
        sources = [stream.names[stream.source(number)] for number in rows] if len(stream.names) > 1 else []
        self._pass(row, trainer.row, reason)
        self._write("skipped", (row, trainer.row), reason, documents=documents, sources=sources)
        named = _named(row, documents, sources)
        said = f"step {trainer.step}: {reason}; the weights stay as they are ({named})"
        chosen, first = trainer.settings.trainer, trainer.step - self.in_a_row + 1
        all_of_them = trainer.done and self.in_a_row == trainer.step - trainer.first
        if self.in_a_row < chosen.max_skipped_steps and not all_of_them:
            trainer.outputs.say(said)
            return
        self.target = self._newest_before(first) if self.rollbacks < chosen.max_rollbacks else None
        if self.target is None:
            self._at_stake = (self._streak, trainer.row)
            raise NotFinite.after(reason, loss, first, trainer.step, self.rollbacks)
        trainer.outputs.say(said)

    def _newest_before(self, first: int) -> Path | None:
        """The newest good checkpoint from before step `first`; an older one where all were skipped since the last."""
        trainer, mesh = self._trainer, self._trainer.mesh
        trainer.saving.wait(trainer)  # for one that is being written beside training
        there = steps(trainer.directory.checkpoints) if mesh.rank == 0 else []
        # Not from before the stage or the data of now, which began from a checkpoint: engine and rows are of these.
        there = [path for path in from_first_rank(there, mesh) if self._began <= step_of(path) < first]
        if self.rollbacks and first == self._from + 1:
            there = [path for path in there if step_of(path) < self._from] or there
        return next((path for path in reversed(there) if checkpoint.examine(path, mesh) is None), None)

    def roll_back(self) -> None:
        """Sets the run back to the target, past the rows from there until now; every rank calls it."""
        trainer, path = self._trainer, self.target
        assert path is not None
        stop, step, reason = trainer.row, trainer.step, f"{self.in_a_row} steps in a row were skipped"
        skipped = self.skipped
        state = checkpoint.load(trainer.engine, path, examined=True)
        there = leave_behind(path) if trainer.mesh.rank == 0 else []
        trainer.begin_at(state)
        self._write("rollback", (trainer.row, stop), reason, step=step, to=trainer.step)
        passages = [*self.passages, Passage(trainer.row, stop, f"rolled back: {reason}")]
        self.resume(state)
        self.passages, self.skipped = sorted({*passages, *self.passages}), skipped
        self.rollbacks, self.in_a_row, self.target = self.rollbacks + 1, 0, None
        trainer.saving.saved = path
        trainer.outputs.say(
            f"back from step {step} to {path.name}, as {reason}; {named_rows(trainer.row, stop)} are passed over "
            f"(rollback {self.rollbacks} of {trainer.settings.trainer.max_rollbacks})"
        )
        if there:
            trainer.outputs.say(
                f"{', '.join(there)} could not be set aside, and would be gone on from if the run ended before another "
                "is written. Check run.dir"
            )

    def died(self, reason: str) -> None:
        """The run ends by an error; called on the rank that says why.

        Not of a run's very first step, where settings are the likelier cause.
        """
        if self._at_stake is not None and self._trainer.step and not self._trainer.asked:
            self._ledger.add("died", self._trainer.step + 1, self._at_stake, reason)

    @property
    def _ledger(self) -> Ledger:
        trainer = self._trainer
        return Ledger(trainer.directory.path, trainer.corpus.train.segment, trainer.stage.name)

    def _write(self, kind: str, rows: tuple[int, int], reason: str, step: int | None = None, **more: Any) -> None:
        if self._trainer.mesh.rank == 0:
            self._ledger.add(kind, self._trainer.step if step is None else step, rows, reason, **more)

    def _pass(self, first: int, stop: int, reason: str) -> None:
        """Adds rows to those passed, in one piece with the last where they join."""
        last = self.passed[-1] if self.passed else None
        if last is not None and last.stop == first and last.reason == reason:
            self.passed[-1] = last._replace(stop=stop)
        else:
            self.passed.append(Passage(first, stop, reason))


def _named(row: int, documents: list[list[int]], sources: list[str]) -> str:
    """The rows and documents of a step, for a message, with their sources where there are several."""
    of_rows = [f"{source} " for source in sources] or [""] * len(documents)
    every = (f"{source}{document}" for source, held in zip(of_rows, documents, strict=True) for document in held)
    distinct = list(dict.fromkeys(every))
    names = ", ".join(distinct[:NAMED]) + (f" and {len(distinct) - NAMED} more" if distinct[NAMED:] else "")
    return named_rows(row, row + len(documents)) + (f", document(s) {names}" if names else "")
