"""Trainer: the loop. Rows in; loss and gradient of the whole global batch, metrics, evaluation and checkpoints out."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import replace
from types import MappingProxyType
from typing import cast

import torch

from ..models.language_model import LanguageModel
from ..parallel.collectives import waits
from ..parallel.mesh import Mesh
from .assembly import Assembly
from .callback import Callback
from .checkpoint.stored import step_of
from .data.ahead import Ahead
from .data.reading import StepPart, prepared
from .optimizers.qk_clip import LOGIT
from .preparation import Build
from .ranks.exchange import from_first_rank, gather, gather_numbers
from .reported import Reported
from .run import failure, report
from .run.metrics import Work, peak_memory_bytes
from .run.records import TakenStep
from .settings import Settings


class Trainer(Assembly):
    """Trains the model of `settings` on this rank's part of the mesh, one stage after another.

    mesh: the ranks as the first stage arranges them. build: makes a model of its configuration. command: the command
    line, for the advice on how to go on. callbacks: the user's own, by the name that errors give them; they come after
    the built-in ones.
    Every rank makes one and calls `run`. What can be checked is checked in the constructor, before weights are
    allocated, and all ranks raise the same ValueError.
    """

    def __init__(
        self,
        settings: Settings,
        build: Build,
        mesh: Mesh,
        device: torch.device,
        command: list[str],
        callbacks: Mapping[str, Callback] = MappingProxyType({}),
    ) -> None:
        super().__init__(settings, build, mesh, device, command, callbacks)
        if mesh.rank == 0:
            for line in report.introduction(self, self.start, self.notes):
                self.outputs.say(line)

    def run(self) -> None:
        """Trains to the last step, or to where a signal asks for the end: then `interrupted` says so afterwards.

        On an error one rank says why, and it is raised on.
        """
        failed, self._where = True, f"before step {self.step + 1}"
        with ExitStack() as ending:
            ending.callback(self.directory.release)
            ending.callback(lambda: self.outputs.close(failed=failed))
            for name, callback in self.callbacks.items():
                ending.callback(_call, name, callback, "close")
            try:
                self._call("start")
                with failure.stepping():
                    self._run_stage()
                    while not (self.done or self._asked_at_border()):
                        self._next_stage()
                        self._run_stage()
                self._where = f"in step {self.step + 1}"
                self._end()
                failed = False
            except BaseException as error:
                if self.mesh.world_size == 1 or self.device.type == "cpu":  # a GPU may wait for a rank that is lost
                    with suppress(Exception):
                        self._read_records()
                self.saving.settle(patient=isinstance(error, Exception) and not failure.is_consequence(error))
                self._explain(error, self._where)
                raise

    def _run_stage(self) -> None:
        """Takes the steps of a stage, or those until a signal asks for the run's end."""
        with ExitStack() as reading:
            parts = reading.enter_context(self._ahead())
            while self.step < self.stage.stop:
                self._where = f"in step {self.step + 1}"
                self.recovery.begin()
                part = self._meet(parts)
                if self.asked and self.step > self.first:  # before its first step a run has nothing to keep
                    return
                self._call("before_step")
                self._train_step(part)
                self._where = f"after step {self.step}"
                if self.recovery.target is not None:
                    parts.close()  # before its rows change
                    self.recovery.roll_back()
                    parts = reading.enter_context(self._ahead())
                    continue
                self._call("after_step")

    def _ahead(self) -> Ahead[StepPart]:
        """The parts of the stage's steps from here on."""
        steps = range(self.step, self.stage.stop)
        return Ahead(prepared(self.reader.steps(steps, self.row, self.recovery.passages)), self.device)

    def _asked_at_border(self) -> bool:
        """Whether a signal asks any rank for the run's end, where a stage has ended and another would begin."""
        if not self.asked:
            self.asked = int(gather_numbers([float(failure.asked())], self.mesh).max())
        return self.asked > 0

    def _next_stage(self) -> None:
        """Goes on to the stage after this one, in these processes, from the checkpoint of its last step.

        Weights and states take the way through the checkpoint as in a run that is started again, on whatever ranks.
        """
        stage, saved = self.plan.at(self.step), self.saving.saved
        self._where = f"before step {self.step + 1}"
        if saved is None or step_of(saved) != self.step:
            raise failure.RunFailed(f"{stage.setting} must begin from a checkpoint; {self.saving.unsaved}")
        self._read_records()
        self.saving.leave()
        self.engine.close()
        del self.reader, self.records, self.recovery
        self._enter(stage, saved, examined=False)
        self.saving.origin = self.saving.origin.of_rows(self.settings.data.sequence_length)
        self.outputs.stage = stage.name
        self.outputs.say(report.next_stage(self))
        self._call("next_stage")

    @property
    def interrupted(self) -> bool:
        """Whether a signal ends the run before its last step."""
        return bool(self.asked) and not self.done

    def due(self, every: int) -> bool:
        """Whether what is done every so many steps, and after a stage's last one, is done after this step; 0 is never.

        Where it is, `record` is up to date and the loss of every step until now is finite.
        """
        is_due = every > 0 and (self.step % every == 0 or self.step >= self.stage.stop)
        if is_due:
            self._read_records()
        return is_due

    def _call(self, hook: str) -> None:
        for name, callback in self.callbacks.items():
            _call(name, callback, hook, self)

    def _explain(self, error: BaseException, where: str) -> None:
        """Has one rank say why the run ends, and how to go on."""
        hints = [] if isinstance(error, failure.RunFailed) else [f"this was {where}"]
        if getattr(error, "resumable", True):
            saved = self.saving.saved
            again = report.resume_command(self.command, self.directory, saved)
            hints += [f"to resume from {saved.name}: {again}" if saved else "no checkpoint was saved yet"]
        failure.report(error, started=True, hint="; ".join(hints), keep=self.recovery.died)

    def _meet(self, parts: Iterator[StepPart]) -> StepPart:
        """This rank's part of the next step, with work and loss counts of the whole global batch.

        The hosts' one exchange in a step: it also tells all ranks alike whether a signal asks the run to end, which
        they may have heard at different times, and raises RunLost where the folder is no longer this run's.
        """
        with self.records.timing():
            part = next(parts)
            own = [failure.asked(), self.directory.lost() is not None, *part.work.numbers]
            numbers = gather_numbers([*own, *part.loss_counts, *part.source_targets], self.mesh)
        self.asked = int(numbers[:, 0].max())
        if numbers[0, 1]:
            self.check_directory()
        sums = numbers[:, 2:].sum(dim=0).tolist()
        of_work, of_losses = len(part.work.numbers), len(part.loss_counts)
        work = Work(*sums[:of_work])
        counts, source_targets = sums[of_work : of_work + of_losses], sums[of_work + of_losses :]
        if work.targets == 0:
            raise ValueError(f"data must hold documents of two tokens or more; step {self.step + 1} has no target")
        return part._replace(work=work, loss_counts=counts, source_targets=source_targets)

    def _train_step(self, part: StepPart) -> None:
        """Takes a step; nothing but the optimizer waits for the device, unless it is time to read the numbers."""
        model, work = cast(LanguageModel, self.engine.module), part.work
        self.recovery.meet(part)
        with self.records.timing(), waits().counting():
            model.at_step(self.step)
            totals = torch.zeros(1 + len(part.source_targets), dtype=torch.float64, device=self.device)
            reported = Reported(model.losses, part.loss_counts, self.mesh)
            for micro_batch in part.micro_batches:
                tokens, targets = micro_batch.on(self.device)
                loss, _, reports = self.engine(tokens, micro_batch.seq, targets, False, True)
                totals[0] += loss.detach()
                if micro_batch.source is not None:
                    totals[1 + micro_batch.source] += loss.detach()
                of_step = totals[0] if micro_batch is part.micro_batches[-1] else None
                checked = self.recovery.guard.checked(loss, reported.add(reports), of_step, work.targets)
                self.engine.backward(checked[0], work.targets, checked[1])
            rate = self.schedule(self.step)
            factors, largest = ({}, None) if self.qk_clip is None else self.qk_clip.factors()
            norm = self.engine.step(rate, factors)
            own = [totals.new_full((1,), x) for x in (waits().take(), peak_memory_bytes(self.device))]
            losses = gather(torch.cat([totals, *own]), self.mesh)
            reported.exchange()
            sums = reported.sums()
            statistics = model.statistics(sums) | ({} if largest is None else {LOGIT: largest})
            if self.engine.stepped:  # a step that is skipped changes nothing
                model.update(sums)
        self.step += 1
        self.row += self.settings.data.rows_per_step
        self.tokens += int(work.tokens)
        auxiliary = reported.losses()
        sources = self.reader.stream.parts(self.row) if part.source_targets else []
        taken = TakenStep(self.step, self.tokens, rate, losses, norm, auxiliary, work, statistics)
        self.records.add(replace(taken, sources=sources, source_targets=part.source_targets))
        self.recovery.look(part.row)
        # The first step's time says little of the others'.
        if self.step == self.first + 1 or self.due(self.every):
            self._read_records()

    def check_directory(self) -> None:
        """Raises RunLost on every rank where the folder is no longer this run's; every rank calls it."""
        lost = from_first_rank(self.directory.lost(), self.mesh)
        if lost is not None:
            raise failure.RunLost(f"run.dir must stay this run's until it ends; {lost}")

    def _end(self) -> None:
        """Ends the run after its last step, or earlier where a signal asks for it.

        Raises RunFailed on every rank where its end could not be kept.
        """
        early = self.asked if not self.done else 0
        if early:
            failure.take_time()
        self._read_records()
        self._call("end")
        gather_numbers([0.0], self.mesh)  # no rank reports a good end before all have come to it
        problems = self._problems()
        if early:
            why = f"ended after step {self.step}, as {signal.Signals(early).name} asks"
            where = f"{self.saving.saved.name} is saved" if self.saving.saved else "no checkpoint was saved"
            again = report.resume_command(self.command, self.directory, self.saving.saved)
            self.outputs.say(f"{why}; {where}\n{'to resume    ' if self.saving.saved else 'to begin anew'} {again}")
        else:
            why = "the run has trained to its end"
            if self.mesh.rank == 0:
                self.outputs.progress.close()
                self.outputs.say(report.summary(self, problems))
        if problems:
            raise failure.RunFailed(f"{why}, but not all of it is kept: {'; '.join(problems)}")

    def _problems(self) -> list[str]:
        """What could not be kept at the end, on every rank alike. Raises RunLost where all has gone."""
        self.check_directory()
        self.outputs.plot()
        unsaved = [self.saving.unsaved] if self.saving.unsaved else []
        return from_first_rank([*unsaved, *self.outputs.unkept()], self.mesh)


def _call(name: str, callback: Callback, hook: str, *arguments: Trainer) -> None:
    """Calls a hook; its errors get a note with the callback's name."""
    try:
        getattr(callback, hook)(*arguments)
    except Exception as error:
        error.add_note(f"{name}.{hook}")
        raise
