"""Callbacks: what a run does around its steps. Validation, samples, checkpoints and the profiler are callbacks too."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .trainer import Trainer


class Callback:
    """Does something around the steps of a run. Override the hooks that you need; the others do nothing.

    A class of your own joins the built-in ones with `+callbacks.NAME._target_=package.module.Class`, its constructor's
    arguments beside it (`+callbacks.NAME.every=10`). Its hooks run after those of the built-in callbacks.

    Every hook runs on every rank, in the same order, so it may communicate as long as all ranks do. It gets the
    trainer, of which these are meant for callbacks:

        step, tokens        steps taken, and tokens read, since the run began
        record              the line of metrics of the last step: loss, grad_norm, learning_rate, …; looking at it waits
                            for the device, unless the step is one that is read anyway (`logger.every`)
        due(every), done    whether something done every so many steps, and at the end of a stage, is due; whether the
                            last step has been taken
        engine              the model under ZeRO: `engine.module`, `engine.gather(parameters)` to read them whole
        corpus, layout      the data, and how the ranks share a row
        mesh, device        this rank's place (`mesh.rank`) and device
        settings            everything that was configured, with the changes of the stage
        stage, plan         the stage that the next step belongs to, and all of them
        directory, outputs  the run's folder; `outputs.say(text)` prints on the first rank, `outputs.log({"step": …})`
                            adds a line to metrics.jsonl and W&B

    An exception in a hook, on any rank, ends the run on all of them; it is shown once, with the callback's name.
    """

    def start(self, trainer: Trainer) -> None:
        """Before the first step of this start of the run, when the weights are in place."""

    def before_step(self, trainer: Trainer) -> None:
        """Before a step; `trainer.step` is still the number of the last one."""

    def after_step(self, trainer: Trainer) -> None:
        """After a step, the last one included."""

    def next_stage(self, trainer: Trainer) -> None:
        """Before the first step of a stage that follows another one, when its model, data and ranks are in place."""

    def end(self, trainer: Trainer) -> None:
        """After the last step, or after the step in which a signal asked the run to end."""

    def close(self) -> None:
        """Whenever the run ends, after an error too: other ranks may be gone, so nothing here may communicate."""
