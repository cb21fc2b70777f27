"""When a run saves, and what it does if it cannot."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from ..callback import Callback
from ..data.corpus import Corpus
from . import checkpoint
from .origin import Origin

if TYPE_CHECKING:
    from ..trainer import Trainer


class Saving(Callback):
    """Saves a checkpoint every `checkpoint.every` steps, after a stage's last one, and where a signal ends the run.

    One that cannot be written is reported, and the next is tried. saved: the newest checkpoint, which may be the one
    that the run began with. unsaved: why that of the run's or a stage's end could not be written, or "".
    kept: steps whose checkpoints stay for ever, such as the borders of stages.
    """

    def __init__(self, saved: Path | None, origin: Origin) -> None:
        self.saved, self.unsaved, self.origin = saved, "", origin
        self.kept: set[int] = set()

    def after_step(self, trainer: Trainer) -> None:
        if trainer.due(trainer.settings.checkpoint.every):
            self._save(trainer, last=trainer.step == trainer.stage.stop)

    def end(self, trainer: Trainer) -> None:
        present = self.saved is not None and self.saved.name == f"step-{trainer.step:08d}"
        if trainer.settings.checkpoint.every and not trainer.done and not present:
            self._save(trainer, last=True)

    def _save(self, trainer: Trainer, last: bool) -> None:
        state = {
            "step": trainer.step,
            "stage": trainer.stage.identity,
            "tokens": trainer.tokens,
            "data": trainer.corpus.train.state(trainer.row),
            "model": trainer.settings.model,
        }
        chosen = trainer.settings.checkpoint
        try:
            self.saved = checkpoint.save(
                trainer.engine,
                trainer.directory.checkpoints,
                state,
                chosen.keep,
                beside=lambda folder: self._write_beside(trainer, folder),
                spare=trainer.schedule.extendable,
                milestones=self.kept,
            )
        except checkpoint.CheckpointError as error:
            trainer.check_directory()
            if last:
                self.unsaved = str(error)
            else:
                step = trainer.step
                again = min(step - step % chosen.every + chosen.every, trainer.settings.trainer.steps)
                trainer.outputs.say(f"{error}. The run goes on and saves again after step {again}")

    def _write_beside(self, trainer: Trainer, folder: Path) -> None:
        """What generation and export need besides the weights."""
        if isinstance(trainer.corpus, Corpus):
            trainer.corpus.tokenizer.save(folder / "tokenizer")
        self.origin.save(folder)
        text = yaml.safe_dump(asdict(trainer.settings), sort_keys=False, allow_unicode=True)
        (folder / "config.yaml").write_text(text, encoding="utf-8")
