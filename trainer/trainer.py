"""Trainer: the loop. Rows in; loss and gradient of the whole global batch, metrics, evaluation and checkpoints out."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import torch

from ..models.language_model import LanguageModel
from ..parallel.mesh import Mesh
from .callback import Callback
from .checkpoint import checkpoint
from .checkpoint.choice import choose
from .checkpoint.origin import origin_of
from .checkpoint.saving import Saving
from .checkpoint.stored import step_of
from .data.ahead import Ahead
from .data.corpus import Corpus
from .data.packing import RowStream
from .data.reading import Reader, StepPart, prepared
from .evaluation.callbacks import Sampling, Validation
from .preparation import Build, check_origin, make_engine, on_meta
from .ranks.exchange import from_first_rank, gather, gather_numbers, together
from .ranks.settings import layout_of, strategy_of
from .reported import Reported
from .run import failure, report
from .run.directory import RunDirectory
from .run.metrics import Work, peak_flops, peak_memory_bytes
from .run.outputs import Outputs, show_log
from .run.profiler import Profiler
from .run.records import Records, TakenStep
from .settings import Settings
from .stages.opening import Opening, check_models
from .stages.plan import Stage, plan_of


class Trainer:
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
        self.plan = together(mesh, lambda: plan_of(settings))
        together(mesh, lambda: self.plan.check(mesh.world_size))
        self.mesh, self.device, self.command, self._build = mesh, device, command, build
        show_log(first=mesh.rank == 0)
        self.directory = RunDirectory.claim(settings.run, mesh)
        settings.run.dir = str(self.directory.path)  # all stages share the group
        try:
            self._prepare(callbacks)
        except BaseException:
            self.directory.release(unused=True)
            raise

    def _prepare(self, callbacks: Mapping[str, Callback]) -> None:
        settings, mesh, build = self.plan.settings, self.mesh, self._build
        together(mesh, lambda: check_models(build, self.plan))
        start, notes = choose(settings.checkpoint.resume, self.directory, mesh)
        begins = self.plan.stages[0].settings
        together(mesh, lambda: check_origin(build, begins, resuming=start is not None))
        self._opening = Opening(self.plan, mesh)
        self.step = self.tokens = 0
        if start is not None:
            self.step = int(checkpoint.verify(start).state["step"])
        stage = self.plan.at(self.step)
        begun = (start or settings.init_from) if mesh.rank == 0 else None  # the first rank alone writes it
        self._enter(stage, start)
        tokenizer = self.corpus.tokenizer if isinstance(self.corpus, Corpus) else None
        origin = together(mesh, lambda: origin_of(begun, tokenizer, stage.settings.data.sequence_length))
        shown: dict[str, Any] = {"first": mesh.rank == 0, "step": self.step, "bring_up": self._read_records}
        shown |= {"stage": stage.name, "beginning": self.step == stage.first}
        self.outputs = together(mesh, lambda: Outputs(settings, self.directory, **shown))
        self.sampling, self.saving = Sampling(), Saving(start, origin)
        self.saving.kept.update(self.plan.borders)
        chosen = settings.trainer
        profiler = Profiler(chosen.profile_start, chosen.profile_steps, self.directory.profile, mesh.rank, self.device)
        built_in = {"profiler": profiler, "validation": Validation(), "sampling": self.sampling, "saving": self.saving}
        self.callbacks = built_in | {f"callbacks.{name}": callback for name, callback in callbacks.items()}
        if mesh.rank == 0:
            for line in report.introduction(self, start, notes):
                self.outputs.say(line)

    def _enter(self, stage: Stage, start: Path | None, *, examined: bool = True) -> None:
        """Makes what the steps of a stage work with; weights and states are those of the checkpoint, if there is one.

        examined: its bytes have been looked at.
        """
        self.stage, self.settings, self.schedule = stage, stage.settings, stage.schedule
        settings = stage.settings
        self.mesh = self._opening.mesh(stage)
        self.layout = layout_of(settings.parallel, settings.data.sequence_length)
        self.corpus, self.row = self._opening.data(stage, start)
        self.shape = together(self.mesh, lambda: on_meta(self._build, settings.model))
        torch.manual_seed(settings.trainer.seed)
        self.engine = make_engine(settings, self._build, self.mesh, self.device, resuming=start is not None)
        if start is not None:
            state = checkpoint.load(self.engine, start, examined=examined)
            self.step, self.tokens = state["step"], state["tokens"]
        self._begin(self.corpus.train, peak_flops(self.device, settings.trainer.dtype))

    def _begin(self, stream: RowStream, peak: float | None) -> None:
        """Sets what the steps from here on work with."""
        settings = self.settings
        strategy = strategy_of(settings.parallel)
        self.reader = Reader(stream, settings.data, self.layout, strategy, self.mesh, self.device, self.shape)
        self.records, self._record = Records(peak), {}
        self.every = settings.logger.interval(self.device.type)
        self.first, self.skipped = self.step, 0
        self.asked = 0  # the signal that ends the run after this step

    def run(self) -> None:
        """Trains to the last step. On an error one rank says why, and it is raised on."""
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
                self._explain(error, self._where)
                raise

    def _run_stage(self) -> None:
        """Takes the steps of a stage, or those until a signal asks for the run's end."""
        steps = self.reader.steps(range(self.step, self.stage.stop), self.row)
        with Ahead(prepared(steps), self.device) as parts:
            while self.step < self.stage.stop:
                self._where = f"in step {self.step + 1}"
                part = self._meet(parts)
                if self.asked and self.step > self.first:  # before its first step a run has nothing to keep
                    return
                self._call("before_step")
                self._train_step(part)
                self._where = f"after step {self.step}"
                self._call("after_step")

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
        self.engine.close()
        del self.reader, self.records
        self._enter(stage, saved, examined=False)
        longest = max(self.saving.origin.longest_row, self.settings.data.sequence_length)
        self.saving.origin = replace(self.saving.origin, longest_row=longest)
        self.outputs.stage = stage.name
        self.outputs.say(report.next_stage(self))
        self._call("next_stage")

    @property
    def done(self) -> bool:
        """Whether the last step has been taken."""
        return self.step >= self.settings.trainer.steps

    def due(self, every: int) -> bool:
        """Whether what is done every so many steps, and after a stage's last one, is done after this step; 0 is never.

        Where it is, `record` is up to date and the loss of every step until now is finite.
        """
        is_due = every > 0 and (self.step % every == 0 or self.step >= self.stage.stop)
        if is_due:
            self._read_records()
        return is_due

    @property
    def record(self) -> dict[str, Any]:
        """The line of metrics of the last step; the device is read for it, where that has not happened yet."""
        self._read_records()
        return self._record

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
        failure.report(error, started=True, hint="; ".join(hints))

    def _meet(self, parts: Iterator[StepPart]) -> StepPart:
        """This rank's part of the next step, with work and loss counts of the whole global batch.

        The hosts' one exchange in a step: it also tells all ranks alike whether a signal asks the run to end, which
        they may have heard at different times, and raises RunLost where the folder is no longer this run's.
        """
        with self.records.timing():
            part = next(parts)
            own = [failure.asked(), self.directory.lost() is not None, *part.work.numbers]
            numbers = gather_numbers([*own, *part.loss_counts], self.mesh)
        self.asked = int(numbers[:, 0].max())
        if numbers[0, 1]:
            self.check_directory()
        sums = numbers[:, 2:].sum(dim=0).tolist()
        work = Work(*sums[: len(part.work.numbers)])
        if work.targets == 0:
            raise ValueError(f"data must hold documents of two tokens or more; step {self.step + 1} has no target")
        return part._replace(work=work, loss_counts=sums[len(part.work.numbers) :])

    def _train_step(self, part: StepPart) -> None:
        """Takes a step; nothing but the optimizer waits for the device, unless it is time to read the numbers."""
        model, work = cast(LanguageModel, self.engine.module), part.work
        with self.records.timing():
            model.at_step(self.step)
            total = torch.zeros((), dtype=torch.float64, device=self.device)
            reported = Reported(model.losses, part.loss_counts, self.mesh)
            for micro_batch in part.micro_batches:
                tokens, targets = micro_batch.on(self.device)
                loss, _, reports = self.engine(tokens, micro_batch.seq, targets, False, True)
                self.engine.backward(loss, work.targets, reported.add(reports))
                total += loss.detach()
            rate = self.schedule(self.step)
            norm = self.engine.step(rate)
            losses = gather(torch.stack([total, total.new_full((), peak_memory_bytes(self.device))]), self.mesh)
            reported.exchange()
            sums = reported.sums()
            statistics = model.statistics(sums)
            if self.engine.stepped:  # a step that is skipped changes nothing
                model.update(sums)
        self.step += 1
        self.row += self.settings.data.rows_per_step
        self.tokens += int(work.tokens)
        auxiliary = reported.losses()
        self.records.add(TakenStep(self.step, self.tokens, rate, losses, norm, auxiliary, work, statistics))
        # The first step's time says little of the others'.
        if self.step == self.first + 1 or self.due(self.every) or not self.engine.stepped:
            self._read_records()
        self._check_gradient()

    def _read_records(self) -> None:
        """Logs the steps whose numbers are still on the device. Raises NotFinite for a loss that is not finite.

        Every rank has the numbers of all, so that a rank may call it alone.
        """
        for record in self.records.read():
            if not math.isfinite(record["loss"]):
                raise failure.NotFinite.loss(record["loss"], record["step"])
            self._record = record
            self.outputs.training(record)

    def _check_gradient(self) -> None:
        """Reports a skipped step; too many in a row, or nothing but skipped steps to the end, fail the run."""
        if self.engine.stepped:
            self.skipped = 0
            return
        self.skipped += 1
        chosen = self.settings.trainer
        all_of_them = self.done and self.skipped == self.step - self.first
        if self.skipped < chosen.max_skipped_steps and not all_of_them:
            self.outputs.say(f"step {self.step}: the gradient is not finite; the weights stay as they are")
            return
        raise failure.NotFinite.gradient(self.step - self.skipped + 1, self.step)

    def check_directory(self) -> None:
        """Raises RunLost on every rank where the folder is no longer this run's; every rank calls it."""
        lost = from_first_rank(self.directory.lost(), self.mesh)
        if lost is not None:
            raise failure.RunLost(f"run.dir must stay this run's until it ends; {lost}")

    def _end(self) -> None:
        """Ends the run after its last step, or earlier where a signal asks for it.

        Raises RunFailed on every rank where its end could not be kept, and Stopped for SIGTERM: it has failed then.
        """
        early = self.asked if not self.done else 0
        if early:
            failure.take_time()
        self._read_records()
        self._call("end")
        gather_numbers([0.0], self.mesh)  # no rank reports a good end before all have come to it
        if early == signal.SIGTERM:
            if self.saving.unsaved:
                self.outputs.say(self.saving.unsaved)
            raise failure.Stopped
        problems = self._problems()
        if early:
            why = f"ended after step {self.step}, as {signal.Signals(early).name} asks"
            where = f"{self.saving.saved.name} is saved" if self.saving.saved else "no checkpoint was saved"
            again = report.resume_command(self.command, self.directory, self.saving.saved)
            self.outputs.say(f"{why}; {where}\nto resume     {again}")
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
