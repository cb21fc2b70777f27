"""Trainer: the loop. Rows in; loss and gradient of the whole global batch, metrics, evaluation and checkpoints out."""

from __future__ import annotations

import math
import signal
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import torch
import yaml

from ..models.language_model import LanguageModel
from ..parallel.mesh import Mesh
from ..parallel.sequence import Sequence
from .checkpoint import checkpoint
from .checkpoint.choice import choose
from .checkpoint.origin import Origin, read_origin
from .data.corpus import Corpus, open_corpus
from .data.packing import NO_TARGET, Batch, batch
from .evaluation.baselines import text_baselines
from .evaluation.evaluation import Loss, evaluate, evaluate_truncated
from .evaluation.sample import draw_sample
from .preparation import (
    Build,
    check_model,
    check_same_model,
    configured_model,
    make_engine,
    model_settings,
    on_meta,
)
from .ranks.exchange import from_first_rank, gather_numbers, prepare, together
from .ranks.settings import layout_of, strategy_of
from .run import failure, report
from .run.directory import RunDirectory
from .run.metrics import Work, peak_flops, peak_memory_bytes, work_of
from .run.outputs import Outputs, show_log
from .run.profiler import Profiler
from .run.progress import count
from .schedule import Schedule
from .settings import Settings, check, expand_paths


class Trainer:
    """Trains the model of `settings` on this rank's part of the mesh.

    build: makes a model of its configuration. command: the command line, for the advice on how to go on.
    Every rank makes one and calls `run`. What can be checked is checked in the constructor, before weights are
    allocated, and all ranks raise the same ValueError.
    """

    def __init__(self, settings: Settings, build: Build, mesh: Mesh, device: torch.device, command: list[str]) -> None:
        together(mesh, lambda: expand_paths(settings))
        together(mesh, lambda: check(settings, mesh.world_size))
        self.settings, self.mesh, self.device, self.command = settings, mesh, device, command
        self.layout = layout_of(settings.parallel, settings.data.sequence_length)
        self.schedule = Schedule(settings.schedule, settings.optimizer.learning_rate, settings.trainer.steps)
        show_log(first=mesh.rank == 0)
        self.directory = RunDirectory.claim(settings.run, mesh)
        settings.run.dir = str(self.directory.path)
        try:
            self._prepare(build)
        except BaseException:
            self.directory.release(unused=True)
            raise

    def _prepare(self, build: Build) -> None:
        settings, mesh = self.settings, self.mesh
        together(mesh, lambda: check_model(build, configured_model(settings), settings))
        found, notes = choose(settings.checkpoint.resume, self.directory, mesh)
        self.corpus = prepare(mesh, lambda: open_corpus(settings.data, seed=settings.trainer.seed))
        settings.model = together(mesh, lambda: model_settings(settings, self.corpus))
        self.step, self.tokens, self.row = 0, 0, 0
        if found is not None:
            together(mesh, lambda: check_same_model(found, settings.model))
            self.row = together(mesh, lambda: self.corpus.train.resume(checkpoint.verify(found).state["data"]))
        self.origin = together(mesh, lambda: self._origin(found))
        self.shape = together(mesh, lambda: on_meta(build, settings.model))
        torch.manual_seed(settings.trainer.seed)
        self.engine = make_engine(settings, build, mesh, self.device, resuming=found is not None)
        if found is not None:
            state = checkpoint.load(self.engine, found, examined=True)
            self.step, self.tokens = state["step"], state["tokens"]
        self.outputs = together(mesh, lambda: Outputs(settings, self.directory, first=mesh.rank == 0, step=self.step))
        self.peak = peak_flops(self.device, settings.trainer.dtype)
        self.saved, self.unsaved, self.text = found, "", ""
        self.first, self.skipped = self.step, 0
        self.asked = 0  # the signal that ends the run after this step
        self._introduce(found, notes)

    def run(self) -> None:
        """Trains to the last step. On an error one rank says why, and it is raised on."""
        chosen = self.settings.trainer
        profiler = Profiler(
            chosen.profile_start, chosen.profile_steps, self.directory.profile, self.mesh.rank, self.device
        )
        failed = True
        try:
            with failure.stepping():
                while self.step < chosen.steps and not self.asked:
                    profiler.before(self.step + 1)
                    self._train_step()
                    profiler.after(self.step)
                    self._after_step()
            if self.asked and self.step < chosen.steps:
                failure.take_time()
                self._stop_early()
            else:
                self._conclude()
            failed = False
        except BaseException as error:
            hints = [] if isinstance(error, failure.RunFailed) else [f"this was in step {self.step + 1}"]
            if getattr(error, "resumable", True):
                again = report.resume_command(self.command, self.directory, self.saved)
                hints += [f"to resume from {self.saved.name}: {again}" if self.saved else "no checkpoint was saved yet"]
            hint = "; ".join(hints)
            failure.report(error, started=True, hint=hint)
            raise
        finally:
            try:
                profiler.close()
                self.outputs.close(failed=failed)
            finally:
                self.directory.release()

    def _train_step(self) -> None:
        started = time.perf_counter()
        for model in (self.shape, cast(LanguageModel, self.engine.module)):
            model.at_step(self.step)
        parts = self._read_step()
        work = self._sum_of_work(parts)
        if work.targets == 0:
            raise ValueError(f"data must hold documents of two tokens or more; step {self.step + 1} has no target")
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for part, seq in parts:
            tokens, targets = (seq.shard(x).to(self.device, non_blocking=True) for x in (part.tokens, part.targets))
            loss, _ = self.engine(tokens, seq, targets)
            self.engine.backward(loss, work.targets)
            total += loss.detach()
        gone = self.directory.lost() is not None
        losses = gather_numbers([float(total), peak_memory_bytes(self.device), failure.asked(), gone], self.mesh)
        self.asked = int(losses[:, 2].max())  # the same on all ranks, which may have heard at different times
        if losses[0, 3]:
            self._check_directory()
        loss = float(losses[:, 0].sum()) / work.targets
        if not math.isfinite(loss):
            raise failure.NotFinite(
                f"the loss must be finite; got {loss} at step {self.step + 1}. Lower optimizer.learning_rate, or set "
                "trainer.clip"
            )
        rate = self.schedule(self.step)
        norm = self.engine.step(rate)
        self.step += 1
        self.row += self.settings.data.rows_per_step
        self.tokens += int(work.tokens)
        seconds = time.perf_counter() - started
        self.outputs.training(self._record(loss, norm, rate, seconds, work, int(losses[:, 1].max())), seconds)
        self._check_gradient(norm)

    def _check_gradient(self, norm: float) -> None:
        """Tells of a step that was skipped; many in a row, or all that there were to the end, fail the run."""
        if math.isfinite(norm):
            self.skipped = 0
            return
        self.skipped += 1
        chosen = self.settings.trainer
        all_of_them = self.step == chosen.steps and self.skipped == self.step - self.first
        if self.skipped < chosen.max_skipped_steps and not all_of_them:
            self.outputs.say(f"step {self.step}: the gradient is not finite; the weights stay as they are")
            return
        first = self.step - self.skipped + 1
        raise failure.NotFinite(
            f"the gradient must be finite; got {self.skipped} step(s) in a row, {first} to {self.step}, where it was "
            "not, and the weights stay as they are. Lower optimizer.learning_rate, or set trainer.clip, and start in "
            f"another run.dir: anew, or from a checkpoint well before step {first} (checkpoint.resume=PATH)"
        )

    def _check_directory(self) -> None:
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

    def _after_step(self) -> None:
        evaluation, every = self.settings.evaluation, self.settings.checkpoint.every
        last = self.step == self.settings.trainer.steps
        if evaluation.every and (self.step % evaluation.every == 0 or last):
            self._validate(last)
        if evaluation.sample_tokens and (last or (evaluation.every and self.step % evaluation.every == 0)):
            self._sample()
        if every and (self.step % every == 0 or last):
            self._save(last)

    def _validate(self, last: bool) -> None:
        """Writes a validation line; after the last step also the comparisons that the settings ask for."""
        chosen, data = self.settings.evaluation, self.settings.data
        stream = self.corpus.validation

        def whole(most: int | None) -> Loss:
            rows = min(stream.rows or 0, most or math.inf)
            strategy = strategy_of(self.settings.parallel)
            return evaluate(self.engine, stream, self.layout, strategy, int(rows), data.rows_per_micro_batch)

        loss = whole(chosen.rows)
        record = {"step": self.step, "validation_loss": loss.mean, **self._measures(loss)}
        if last and chosen.context is not None:
            rows = min(stream.rows or 0, chosen.context_rows)
            self.outputs.say(f"scoring {rows} held-out rows, each token from its last {chosen.context} tokens alone")
            places = self.layout.local_length * data.rows_per_micro_batch
            cut = evaluate_truncated(self.engine, stream, rows, chosen.context, places)
            record |= {"truncated_context": chosen.context, "truncated_rows": rows}
            record |= {f"truncated_{name}": value for name, value in self._measures(cut).items()}
            record |= {f"untruncated_{name}": value for name, value in self._measures(whole(rows)).items()}
        self.outputs.validation(record)
        if last and self.mesh.rank == 0 and (chosen.baselines or chosen.context is not None):
            if not isinstance(self.corpus, Corpus):
                lines = report.recall_comparison(record, self.corpus.chance if chosen.baselines else None)
            else:
                lines = report.comparison(record, text_baselines(self.corpus) if chosen.baselines else None)
            self.outputs.say("\n".join(["", *lines]))

    def _measures(self, loss: Loss) -> dict[str, float]:
        """What is told of a loss beside its mean."""
        if not isinstance(self.corpus, Corpus):
            return {"accuracy": loss.accuracy}
        scale = self.corpus.bytes_per_token("validation")
        return {"bits_per_byte": loss.bits_per_byte(scale), "accuracy": loss.accuracy}

    def _sample(self) -> None:
        if not isinstance(self.corpus, Corpus):
            return  # there is no text
        chosen = self.settings.evaluation
        self.text = draw_sample(
            self.engine,
            self.corpus,
            chosen.prompt,
            tokens=chosen.sample_tokens,
            temperature=chosen.temperature,
            seed=self.settings.trainer.seed,
        )
        self.outputs.sample(self.step, self.text)

    def _save(self, last: bool) -> None:
        """Saves a checkpoint. One that cannot be written is told, and the next is tried; the last one fails the run."""
        state = {
            "step": self.step,
            "tokens": self.tokens,
            "data": self.corpus.train.state(self.row),
            "model": self.settings.model,
        }
        chosen = self.settings.checkpoint
        try:
            self.saved = checkpoint.save(
                *(self.engine, self.directory.checkpoints, state, chosen.keep, self._write_beside),
                spare=self.schedule.extendable,
            )
        except checkpoint.CheckpointError as error:
            self._check_directory()
            if last:
                self.unsaved = str(error)
            else:
                again = min(self.step - self.step % chosen.every + chosen.every, self.settings.trainer.steps)
                self.outputs.say(f"{error}. The run goes on and saves again after step {again}")

    def _stop_early(self) -> None:
        """Saves and ends before the last step, as a signal has asked. Raises Stopped for SIGTERM: then the run has
        failed.
        """
        if self.settings.checkpoint.every and (self.saved is None or self.saved.name != f"step-{self.step:08d}"):
            self._save(last=True)
        if self.asked == signal.SIGTERM:
            if self.unsaved:
                self.outputs.say(self.unsaved)
            raise failure.Stopped
        problems = self._problems()
        resume = report.resume_command(self.command, self.directory, self.saved)
        where = f"{self.saved.name} is saved" if self.saved else "no checkpoint was saved"
        why = f"ended after step {self.step}, as {signal.Signals(self.asked).name} asks"
        self.outputs.say(f"{why}; {where}\nto resume     {resume}")
        if problems:
            raise failure.RunFailed(f"{why}, but not all of it is kept: {'; '.join(problems)}")

    def _write_beside(self, folder: Path) -> None:
        """What generation and export need besides the weights."""
        if isinstance(self.corpus, Corpus):
            self.corpus.tokenizer.save(folder / "tokenizer")
        self.origin.save(folder)
        text = yaml.safe_dump(asdict(self.settings), sort_keys=False, allow_unicode=True)
        (folder / "config.yaml").write_text(text, encoding="utf-8")

    def _origin(self, found: Path | None) -> Origin:
        """What the first rank writes of where the weights came from; the other ranks need nothing of it."""
        begun = found or self.settings.init_from
        tokenizer = self.corpus.tokenizer if isinstance(self.corpus, Corpus) else None
        before = read_origin(begun, tokenizer) if begun and self.mesh.rank == 0 else Origin()
        return replace(before, longest_row=max(before.longest_row, self.settings.data.sequence_length))

    def _introduce(self, found: Path | None, notes: list[str]) -> None:
        settings, mesh, say = self.settings, self.mesh, self.outputs.say
        parallel = f"{mesh.data_ranks} data x {mesh.sequence_ranks} sequence rank(s), {settings.parallel.layout}"
        say(f"run           {self.directory.path}")
        say(f"model         {count(self.shape.parameter_count())} parameters, {settings.trainer.dtype}")
        say(f"data          {settings.data.source}: {self.corpus.summary}, vocabulary {self.corpus.vocabulary_size}")
        say(
            f"a step        {settings.data.rows_per_step} rows of {settings.data.sequence_length} tokens on "
            f"{parallel}, ZeRO-{settings.engine.zero_stage}, {self.device.type}"
        )
        for note in notes:
            say(note)
        if found is not None:
            say(f"going on after step {self.step} from {found}")
            if mesh.rank == 0 and (announced := report.changed_schedule(self.schedule, found, self.step)):
                say(announced)
        if self.step >= settings.trainer.steps:
            say(f"nothing is left to do: trainer.steps={settings.trainer.steps}")

    def _conclude(self) -> None:
        """Shows what came of the run. Raises RunFailed on every rank where its end could not be kept."""
        problems = self._problems()
        if self.mesh.rank == 0:
            self._summarise(problems)
        if problems:
            raise failure.RunFailed(f"the run has trained to its end, but not all of it is kept: {'; '.join(problems)}")

    def _problems(self) -> list[str]:
        """What could not be kept at the end, on every rank alike. Raises RunLost where all has gone."""
        self._check_directory()
        self.outputs.plot()
        return from_first_rank([*([self.unsaved] if self.unsaved else []), *self.outputs.unkept()], self.mesh)

    def _summarise(self, problems: list[str]) -> None:
        tracker = self.outputs.tracker
        tracked = (tracker.mode, tracker.directory) if tracker else ("disabled", None)
        self.outputs.progress.close()
        lines = [""]
        if self.text:
            lines += ["sample", *(f"  {line}" for line in self.text.splitlines()), ""]
        lines += report.whereabouts(self.directory, self.saved, tracked, problems)
        prompt = (self.settings.evaluation.prompt or "Once") if isinstance(self.corpus, Corpus) else None
        lines += report.commands(self.command, self.directory, self.saved, self.settings, prompt)
        self.outputs.say("\n".join(lines))
