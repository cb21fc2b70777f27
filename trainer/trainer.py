"""Trainer: the loop. Rows in; loss and gradient of the whole global batch, metrics, evaluation and checkpoints out."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import replace
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
from .data.ahead import Ahead
from .data.audit.writing import Auditing
from .data.corpus import Corpus, open_corpus, tokenizer_of_run
from .data.packing import RowStream
from .data.reading import Reader, StepPart, prepared
from .evaluation.callbacks import Sampling, Validation
from .faults.recovery import Recovery
from .preparation import (
    Build,
    check_model,
    check_origin,
    check_same_model,
    configured_model,
    extension_of,
    make_engine,
    model_settings,
    on_meta,
)
from .ranks.exchange import from_first_rank, gather, gather_numbers, prepare, together
from .ranks.settings import layout_of, strategy_of
from .reported import Reported
from .run import failure, report
from .run.directory import RunDirectory
from .run.environment import describe
from .run.metrics import Work, peak_flops, peak_memory_bytes
from .run.outputs import Outputs, show_log
from .run.profiler import Profiler
from .run.records import Records, TakenStep
from .schedule import Schedule
from .settings import Settings, check, expand_paths


class Trainer:
    """Trains the model of `settings` on this rank's part of the mesh.

    build: makes a model of its configuration. command: the command line, for the advice on how to go on. callbacks: the
    user's own, by the name that errors give them; they come after the built-in ones.
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
        together(mesh, lambda: expand_paths(settings))
        together(mesh, lambda: check(settings, mesh.world_size, device))
        self.settings, self.mesh, self.device, self.command = settings, mesh, device, command
        self.layout = layout_of(settings.parallel, settings.data.sequence_length)
        self.schedule = Schedule(settings.schedule, settings.optimizer.learning_rate, settings.trainer.steps)
        show_log(first=mesh.rank == 0)
        self.directory = RunDirectory.claim(settings.run, mesh)
        settings.run.dir = str(self.directory.path)
        try:
            self._prepare(build, callbacks)
        except BaseException:
            self.directory.release(unused=True)
            raise

    def _prepare(self, build: Build, callbacks: Mapping[str, Callback]) -> None:
        settings, mesh, chosen = self.settings, self.mesh, self.settings.trainer
        together(mesh, lambda: check_model(build, configured_model(settings), settings))
        start, notes = choose(settings.checkpoint.resume, self.directory, mesh)
        together(mesh, lambda: check_origin(build, settings, resuming=start is not None))
        own = together(mesh, lambda: tokenizer_of_run(settings.data, start))
        self.corpus = prepare(mesh, lambda: open_corpus(settings.data, seed=chosen.seed, tokenizer=own))
        settings.model = together(mesh, lambda: model_settings(settings, self.corpus))
        self.step, self.tokens, self.row = 0, 0, 0
        if start is not None:
            together(mesh, lambda: check_same_model(start, settings.model))
            together(mesh, lambda: self._resumed(checkpoint.verify(start).state["data"]))
            settings.schedule = together(mesh, lambda: extension_of(settings, start))
            self.schedule = Schedule(settings.schedule, settings.optimizer.learning_rate, chosen.steps)
        begun = (start or settings.init_from) if mesh.rank == 0 else None  # the first rank alone writes it
        tokenizer = self.corpus.tokenizer if isinstance(self.corpus, Corpus) else None
        origin = together(mesh, lambda: origin_of(begun, tokenizer, settings.data.sequence_length))
        self.shape = together(mesh, lambda: on_meta(build, settings.model))
        torch.manual_seed(chosen.seed)
        self.engine = make_engine(settings, build, mesh, self.device, resuming=start is not None)
        state = {} if start is None else checkpoint.load(self.engine, start, examined=True)
        self._begin(self.corpus.train, peak_flops(self.device, chosen.dtype))
        self.begin_at(state)
        self.recovery.resume(state)
        self.sampling, self.saving = Sampling(), Saving(start, origin)
        profiler = Profiler(chosen.profile_start, chosen.profile_steps, self.directory.profile, mesh.rank, self.device)
        auditing = {"audit": Auditing()} if settings.data.audit else {}
        built_in = {
            "profiler": profiler,
            **auditing,
            "validation": Validation(),
            "sampling": self.sampling,
            "saving": self.saving,
        }
        self.callbacks = built_in | {f"callbacks.{name}": callback for name, callback in callbacks.items()}
        if mesh.rank == 0:
            for line in report.introduction(self, start, notes):
                self.outputs.say(line)

    def begin_at(self, state: dict[str, Any]) -> None:
        """Goes on from the state of a checkpoint, or begins where it is empty: counters, and metrics up to there."""
        if state:
            self.step, self.tokens = state["step"], state["tokens"]
            self.row = self._resumed(state["data"])
        self.first = self.step
        if hasattr(self, "outputs"):
            self.outputs.close()
        shown: dict[str, Any] = {"first": self.mesh.rank == 0, "step": self.step, "bring_up": self._read_records}
        shown["environment"] = describe(self.command, self.device) if shown["first"] else None
        self.outputs = together(self.mesh, lambda: Outputs(self.settings, self.directory, **shown))

    def _resumed(self, state: dict[str, Any]) -> int:
        """The next row of the training data, by a checkpoint's state of them."""
        return self.corpus.train.resume(state, restart=self.settings.data.restart)

    def _begin(self, stream: RowStream, peak: float | None) -> None:
        """Sets what the steps from here on work with."""
        settings = self.settings
        strategy = strategy_of(settings.parallel)
        self.reader = Reader(stream, settings.data, self.layout, strategy, self.mesh, self.device, self.shape)
        self.records, self._record = Records(peak), {}
        self.every = settings.logger.interval(self.device.type)
        self.first, self.recovery = self.step, Recovery(self)
        self.asked = 0  # the signal that ends the run after this step

    def run(self) -> None:
        """Trains to the last step, or to where a signal asks for the end: then `interrupted` says so afterwards.

        On an error one rank says why, and it is raised on.
        """
        failed, where = True, f"before step {self.step + 1}"
        with ExitStack() as ending:
            ending.callback(self.directory.release)
            ending.callback(lambda: self.outputs.close(failed=failed))
            for name, callback in self.callbacks.items():
                ending.callback(_call, name, callback, "close")
            try:
                self._call("start")
                parts = ending.enter_context(self._ahead())
                with failure.stepping():
                    while not self.done:
                        where = f"in step {self.step + 1}"
                        self.recovery.begin()
                        part = self._meet(parts)
                        if self.asked and self.step > self.first:  # before its first step a run has nothing to keep
                            break
                        self._call("before_step")
                        self._train_step(part)
                        where = f"after step {self.step}"
                        if self.recovery.target is not None:
                            parts.close()  # before its rows change
                            self.recovery.roll_back()
                            parts = ending.enter_context(self._ahead())
                            continue
                        self._call("after_step")
                where = f"in step {self.step + 1}"
                self._end()
                failed = False
            except BaseException as error:
                if self.mesh.world_size == 1 or self.device.type == "cpu":  # a GPU may wait for a rank that is lost
                    with suppress(Exception):
                        self._read_records()
                self.saving.settle(patient=isinstance(error, Exception) and not failure.is_consequence(error))
                self._explain(error, where)
                raise

    def _ahead(self) -> Ahead[StepPart]:
        """The parts of the steps from here on."""
        steps = range(self.step, self.settings.trainer.steps)
        return Ahead(prepared(self.reader.steps(steps, self.row, self.recovery.passages)), self.device)

    @property
    def done(self) -> bool:
        """Whether the last step has been taken."""
        return self.step >= self.settings.trainer.steps

    @property
    def interrupted(self) -> bool:
        """Whether a signal ends the run before its last step."""
        return bool(self.asked) and not self.done

    def due(self, every: int) -> bool:
        """Whether what is done every so many steps, and after the last one, is done after this step; 0 is never.

        Where it is, `record` is up to date and the loss of every step until now is finite.
        """
        is_due = every > 0 and (self.step % every == 0 or self.done)
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
        with self.records.timing():
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
            norm = self.engine.step(rate)
            losses = gather(torch.cat([totals, totals.new_full((1,), peak_memory_bytes(self.device))]), self.mesh)
            reported.exchange()
            sums = reported.sums()
            statistics = model.statistics(sums)
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

    def _read_records(self) -> None:
        """Logs the steps whose numbers are still on the device. Raises NotFinite for a loss that is not finite, though
        the step was taken.

        Every rank has the numbers of all, so that a rank may call it alone.
        """
        for record in self.records.read():
            if not math.isfinite(record["loss"]) and math.isfinite(record["grad_norm"]):
                raise failure.NotFinite.loss(record["loss"], record["step"])
            self._record = record | self.recovery.figures
            self.outputs.training(self._record)

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
