"""When a run saves, and what it does if it cannot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from ..callback import Callback
from ..data.corpus import Corpus
from . import checkpoint
from .background import Background
from .commit import Retention
from .origin import Origin

if TYPE_CHECKING:
    from ..assembly import Assembly
    from ..trainer import Trainer

SETTLE_SECONDS = 60.0  # what a checkpoint under way gets to be written where the run fails for a reason of its own


class Saving(Callback):
    """Saves a checkpoint every `checkpoint.every` steps, after a stage's last one, and where a signal ends the run.

    One that cannot be written is reported, and the next is tried. saved: the newest checkpoint, which may be the one
    that the run began with; while one is being written beside training, the one before, until a step after its end.
    unsaved: why that of the end of the run, or of a stage, could not be written, or "".
    kept: steps after which one is saved whatever `checkpoint.every` says, and stays for ever, such as the borders of
    stages; to be filled on every rank alike, before the step.
    """

    def __init__(self, saved: Path | None, origin: Origin) -> None:
        self.saved, self.unsaved, self.origin = saved, "", origin
        self.kept: set[int] = set()
        self._background: Background | None = None

    def after_step(self, trainer: Trainer) -> None:
        self._look(trainer)
        kept, ends = trainer.step in self.kept, trainer.step == trainer.stage.stop
        due = trainer.due(1 if kept else trainer.settings.checkpoint.every)
        # Amid skipped steps the weights may be bad, and the checkpoint to go back to must not make way for them.
        if due and (ends or kept or not trainer.recovery.in_a_row):
            self._save(trainer, last=ends)

    def end(self, trainer: Trainer) -> None:
        self.wait(trainer)
        present = self.saved is not None and self.saved.name == f"step-{trainer.step:08d}"
        if trainer.settings.checkpoint.every and not trainer.done and not present:
            self._save(trainer, last=True)

    def wait(self, trainer: Assembly) -> None:
        """Returns when nothing is being written any more: `saved` is the same on all ranks. Every rank calls it."""
        if self._background is not None:
            self._background.wait()
            self._look(trainer)

    def leave(self) -> None:
        """Lets go of the engine, which ends with its stage; nothing is being written then."""
        self._background = None

    def settle(self, *, patient: bool) -> None:
        """For a run that fails, on this rank: lets what is being written end, for a while if `patient`."""
        if self._background is not None:
            self._background.settle(SETTLE_SECONDS if patient else 0.0)
            if (news := self._background.news()) and news[1] is None:
                self.saved = news[0]

    def _look(self, trainer: Assembly) -> None:
        """Whether what was being written has ended, as far as this rank knows."""
        if self._background is None or (news := self._background.news()) is None:
            return
        path, error = news
        if error is None:
            self.saved = path
        elif trainer.directory.lost() is None:  # if it is, the next step says so
            self._say(trainer, error)

    def _say(self, trainer: Assembly, error: checkpoint.CheckpointError) -> None:
        every, last = trainer.settings.checkpoint.every, trainer.settings.trainer.steps
        coming = [step for step in self.kept if step > trainer.step]
        coming += [trainer.step - trainer.step % every + every] if every else []
        trainer.outputs.say(f"{error}. The run goes on and saves again after step {min([*coming, last])}")

    def _save(self, trainer: Trainer, last: bool) -> None:
        self.wait(trainer)
        chosen, step = trainer.settings.checkpoint, trainer.step
        state = {
            "step": step,
            "stage": trainer.stage.identity,
            "schedule": asdict(trainer.schedule),
            "tokens": trainer.tokens,
            "data": trainer.corpus.train.state(trainer.row),
            "model": trainer.settings.model,
            **trainer.recovery.state(),
        }
        kept = step in self.kept or (chosen.milestones > 0 and step % chosen.milestones == 0)
        retention = Retention(chosen.keep, trainer.schedule.extendable, kept)
        beside, folder = self._beside(trainer), trainer.directory.checkpoints
        try:
            if chosen.asynchronous and not last:
                self._background = self._background or Background(trainer.engine)
                self._background.begin(folder, state, retention, beside)
            else:
                self.saved = checkpoint.save(
                    trainer.engine, folder, state, retention.keep, beside, retention.spare, kept=kept
                )
        except checkpoint.CheckpointError as error:
            trainer.check_directory()
            if last:
                self.unsaved = str(error)
            else:
                self._say(trainer, error)

    def _beside(self, trainer: Trainer) -> Callable[[Path], None]:
        """Writes what generation and export need besides the weights, as it is now."""
        tokenizer = trainer.corpus.tokenizer if isinstance(trainer.corpus, Corpus) else None
        text = yaml.safe_dump(asdict(trainer.settings), sort_keys=False, allow_unicode=True)
        origin = self.origin

        def write(folder: Path) -> None:
            if tokenizer is not None:
                tokenizer.save(folder / "tokenizer")
            origin.save(folder)
            (folder / "config.yaml").write_text(text, encoding="utf-8")

        return write
