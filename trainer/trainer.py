"""Trainer: the loop. Rows in; loss and gradient of the whole global batch, metrics, evaluation and checkpoints out."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Mapping
from contextlib import ExitStack
from types import MappingProxyType
from typing import Any, cast

import torch

from ..models.language_model import LanguageModel
from ..parallel.mesh import Mesh
from ..parallel.sequence import Sequence
from .callback import Callback
from .checkpoint import checkpoint
from .checkpoint.choice import choose
from .checkpoint.origin import origin_of
from .checkpoint.saving import Saving
from .data.corpus import Corpus, open_corpus
from .data.packing import NO_TARGET, Batch, batch
from .evaluation.callbacks import Sampling, Validation
from .preparation import Build, check_model, check_same_model, configured_model, make_engine, model_settings, on_meta
from .ranks.exchange import from_first_rank, gather_numbers, prepare, together
from .ranks.settings import layout_of, strategy_of
from .reported import Reported
from .run import failure, report
from .run.directory import RunDirectory
from .run.metrics import Work, peak_flops, peak_memory_bytes, work_of
from .run.outputs import Outputs, show_log
from .run.profiler import Profiler
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
        together(mesh, lambda: check(settings, mesh.world_size))
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
        self.corpus = prepare(mesh, lambda: open_corpus(settings.data, seed=chosen.seed))
        settings.model = together(mesh, lambda: model_settings(settings, self.corpus))
        self.step, self.tokens, self.row = 0, 0, 0
        if start is not None:
            together(mesh, lambda: check_same_model(start, settings.model))
            self.row = together(mesh, lambda: self.corpus.train.resume(checkpoint.verify(start).state["data"]))
        begun = (start or settings.init_from) if mesh.rank == 0 else None  # the first rank alone writes it
        tokenizer = self.corpus.tokenizer if isinstance(self.corpus, Corpus) else None
        origin = together(mesh, lambda: origin_of(begun, tokenizer, settings.data.sequence_length))
        self.shape = together(mesh, lambda: on_meta(build, settings.model))
        torch.manual_seed(chosen.seed)
        self.engine = make_engine(settings, build, mesh, self.device, resuming=start is not None)
        if start is not None:
            state = checkpoint.load(self.engine, start, examined=True)
            self.step, self.tokens = state["step"], state["tokens"]
        self.outputs = together(mesh, lambda: Outputs(settings, self.directory, first=mesh.rank == 0, step=self.step))
        self.peak = peak_flops(self.device, chosen.dtype)
        self.record: dict[str, Any] = {}
        self.first, self.skipped = self.step, 0
        self.asked = 0  # the signal that ends the run after this step
        self.sampling, self.saving = Sampling(), Saving(start, origin)
        profiler = Profiler(chosen.profile_start, chosen.profile_steps, self.directory.profile, mesh.rank, self.device)
        built_in = {"profiler": profiler, "validation": Validation(), "sampling": self.sampling, "saving": self.saving}
        self.callbacks = built_in | {f"callbacks.{name}": callback for name, callback in callbacks.items()}
        if mesh.rank == 0:
            for line in report.introduction(self, start, notes):
                self.outputs.say(line)

    def run(self) -> None:
        """Trains to the last step. On an error one rank says why, and it is raised on."""
        failed, where = True, f"before step {self.step + 1}"
        with ExitStack() as ending:
            ending.callback(self.directory.release)
            ending.callback(lambda: self.outputs.close(failed=failed))
            for name, callback in self.callbacks.items():
                ending.callback(_call, name, callback, "close")
            try:
                self._call("start")
                with failure.stepping():
                    while not self.done and not self.asked:
                        where = f"in step {self.step + 1}"
                        self._call("before_step")
                        self._train_step()
                        where = f"after step {self.step}"
                        self._call("after_step")
                where = f"in step {self.step + 1}"
                self._end()
                failed = False
            except BaseException as error:
                self._explain(error, where)
                raise

    @property
    def done(self) -> bool:
        """Whether the last step has been taken."""
        return self.step >= self.settings.trainer.steps

    def due(self, every: int) -> bool:
        """Whether what is done every so many steps, and after the last one, is done after this step; 0 is never."""
        return every > 0 and (self.step % every == 0 or self.done)

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

    def _train_step(self) -> None:
        started = time.perf_counter()
        for model in (self.shape, cast(LanguageModel, self.engine.module)):
            model.at_step(self.step)
        parts = self._read_step()
        work = self._sum_of_work(parts)
        if work.targets == 0:
            raise ValueError(f"data must hold documents of two tokens or more; step {self.step + 1} has no target")
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        reported = Reported(self.shape, [part.documents for part, _ in parts], self.mesh)
        for part, seq in parts:
            tokens, targets = (seq.shard(x).to(self.device, non_blocking=True) for x in (part.tokens, part.targets))
            loss, _, reports = self.engine(tokens, seq, targets, False, True)
            self.engine.backward(loss, work.targets, reported.add(reports))
            total += loss.detach()
        gone = self.directory.lost() is not None
        losses = gather_numbers([float(total), peak_memory_bytes(self.device), failure.asked(), gone], self.mesh)
        self.asked = int(losses[:, 2].max())  # the same on all ranks, which may have heard at different times
        if losses[0, 3]:
            self.check_directory()
        loss = float(losses[:, 0].sum()) / work.targets
        if not math.isfinite(loss):
            raise failure.NotFinite(
                f"the loss must be finite; got {loss} at step {self.step + 1}. Lower optimizer.learning_rate, or set "
                "trainer.clip"
            )
        rate = self.schedule(self.step)
        norm = self.engine.step(rate)
        reported.exchange()
        if math.isfinite(norm):  # a step that is skipped changes nothing
            cast(LanguageModel, self.engine.module).update(reported.sums())
        self.step += 1
        self.row += self.settings.data.rows_per_step
        self.tokens += int(work.tokens)
        seconds = time.perf_counter() - started
        self.record = self._record(loss, norm, rate, seconds, work, int(losses[:, 1].max()))
        self.record |= {f"auxiliary_{name}": value for name, value in reported.losses().items()}
        self.outputs.training(self.record, seconds)
        self._check_gradient(norm)

    def _check_gradient(self, norm: float) -> None:
        """Reports a skipped step; too many in a row, or nothing but skipped steps to the end, fail the run."""
        if math.isfinite(norm):
            self.skipped = 0
            return
        self.skipped += 1
        chosen = self.settings.trainer
        all_of_them = self.done and self.skipped == self.step - self.first
        if self.skipped < chosen.max_skipped_steps and not all_of_them:
            self.outputs.say(f"step {self.step}: the gradient is not finite; the weights stay as they are")
            return
        first = self.step - self.skipped + 1
        raise failure.NotFinite(
            f"the gradient must be finite; got {self.skipped} step(s) in a row, {first} to {self.step}, where it was "
            "not, and the weights stay as they are. Lower optimizer.learning_rate, or set trainer.clip, and start in "
            f"another run.dir: anew, or from a checkpoint well before step {first} (checkpoint.resume=PATH)"
        )

    def check_directory(self) -> None:
        """Raises RunLost on every rank where the folder is no longer this run's; every rank calls it."""
        lost = from_first_rank(self.directory.lost(), self.mesh)
        if lost is not None:
            raise failure.RunLost(f"run.dir must stay this run's until it ends; {lost}")

    def _read_step(self) -> list[tuple[Batch, Sequence]]:
        """This rank's micro-batches: its data rank's share of the step's rows, in the order of the rows."""
        data, mesh = self.settings.data, self.mesh
        share = data.rows_per_step // mesh.data_ranks
        first = self.row + mesh.data_rank * share
        parts = []
        for index in range(data.micro_batches(mesh.data_ranks)):
            start = first + index * data.rows_per_micro_batch
            part = batch(self.corpus.train, range(start, start + data.rows_per_micro_batch))
            parts.append((part, self._sequence(part)))
        return parts

    def _sequence(self, part: Batch) -> Sequence:
        return Sequence.shared(part.documents, self.layout, self.mesh, strategy_of(self.settings.parallel))

    def _sum_of_work(self, parts: list[tuple[Batch, Sequence]]) -> Work:
        """Of the whole global batch; ranks that share rows count them once."""
        mine = Work()
        if self.mesh.sequence_rank == 0:
            for part, seq in parts:
                targets = int((part.targets != NO_TARGET).sum())
                mine += work_of(part.documents, targets, seq.attention_layout, self.shape.flops(part.documents))
        return Work(*gather_numbers(list(mine.numbers), self.mesh).sum(dim=0).tolist())

    def _record(self, loss: float, norm: float, rate: float, seconds: float, work: Work, memory: int) -> dict[str, Any]:
        flops = 3 * work.flops / seconds  # backward costs twice as much as forward; recomputation does not count
        return {
            "step": self.step,
            "tokens": self.tokens,
            "loss": loss,
            "grad_norm": norm,
            "learning_rate": rate,
            "tokens_per_second": work.tokens / seconds,
            "peak_memory_bytes": memory,
            "seconds": seconds,
            "flops_per_second": flops,
            "mfu": flops / self.mesh.world_size / self.peak if self.peak else None,
            "padding": work.padding,
            "attention_imbalance": work.imbalance,
        }

    def _end(self) -> None:
        """Ends the run after its last step, or earlier where a signal asks for it.

        Raises RunFailed on every rank where its end could not be kept, and Stopped for SIGTERM: it has failed then.
        """
        early = self.asked if not self.done else 0
        if early:
            failure.take_time()
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
