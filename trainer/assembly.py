"""Assembly: what the loop works with, made when a run starts and, in part, anew where a stage begins."""

from __future__ import annotations

import math
from collections.abc import Mapping
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
from .data.audit.writing import Auditing
from .data.corpus import Corpus, tokenizer_of_run
from .data.packing import RowStream
from .data.reading import Reader
from .evaluation.callbacks import Sampling, Validation
from .faults.recovery import Recovery
from .memory.account import Account, account_of_run
from .optimizers.qk_clip import QKClip
from .preparation import Build, check_origin, extension_of, make_engine, on_meta
from .ranks.exchange import together
from .ranks.settings import layout_of, strategy_of
from .run import failure
from .run.directory import RunDirectory
from .run.environment import describe
from .run.metrics import peak_flops
from .run.outputs import Outputs, show_log
from .run.profiler import Profiler
from .run.records import Records
from .settings import Settings
from .stages.opening import Opening, check_models
from .stages.plan import Stage, plan_of


class Assembly:
    """What a trainer has: data, model under its engine, outputs and callbacks; see `Trainer` for the arguments."""

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
        together(mesh, lambda: self.plan.check(mesh.world_size, device))
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
        self.start, self.notes = choose(settings.checkpoint.resume, self.directory, mesh)
        start, begins = self.start, self.plan.stages[0].settings
        together(mesh, lambda: check_origin(build, begins, resuming=start is not None))
        self.step = self.tokens = 0
        if start is not None:
            self.step = int(checkpoint.verify(start).state["step"])
            together(mesh, lambda: self._extend(start))
        own = together(mesh, lambda: tokenizer_of_run(begins.data, start))
        self._opening = Opening(self.plan, mesh, own)
        stage = self.plan.at(self.step)
        begun = (start or settings.init_from) if mesh.rank == 0 else None  # the first rank alone writes it
        self._enter(stage, start)
        tokenizer = self.corpus.tokenizer if isinstance(self.corpus, Corpus) else None
        origin = together(mesh, lambda: origin_of(begun, tokenizer, stage.settings.data.sequence_length))
        self.begin_at(self._state)
        self.sampling, self.saving = Sampling(), Saving(start, origin)
        self.saving.kept.update(self.plan.borders)
        chosen = settings.trainer
        profiler = Profiler(chosen.profile_start, chosen.profile_steps, self.directory.profile, mesh.rank, self.device)
        built_in: dict[str, Callback] = {"profiler": profiler}
        if settings.data.audit:
            built_in["audit"] = Auditing()
        built_in |= {"validation": Validation(), "sampling": self.sampling, "saving": self.saving}
        self.callbacks = built_in | {f"callbacks.{name}": callback for name, callback in callbacks.items()}

    def _extend(self, start: Path) -> None:
        """Gives a run without stages that goes on with more steps the schedule that `schedule.extension` asks for."""
        if not self.plan.staged:
            self.plan.settings.schedule = extension_of(self.plan.settings, start)
            self.plan = plan_of(self.plan.settings)

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
        self.memory = self._account()
        torch.manual_seed(settings.trainer.seed)
        self.engine = make_engine(settings, self._build, self.mesh, self.device, resuming=start is not None)
        self._state = {} if start is None else checkpoint.load(self.engine, start, examined=examined)
        self.step, self.tokens = int(self._state.get("step", 0)), int(self._state.get("tokens", 0))
        self._begin(self.corpus.train, peak_flops(self.device, settings.trainer.dtype))
        self.recovery.resume(self._state)
        if isinstance(self.memory, Account):
            self.records.once = {"memory": self.memory.figures()}

    def _account(self) -> Account | str | None:
        """What a step of the stage holds on the first rank, which alone asks; why it is not known; None unasked."""
        if not self.settings.logger.memory or self.mesh.rank:
            return None
        build = self._build
        return account_of_run(lambda: build(self.settings.model), self.settings, self.mesh.world_size, self.device)

    def begin_at(self, state: dict[str, Any]) -> None:
        """Goes on from the state of a checkpoint of this stage, or of the end of the one before, or begins where it is
        empty: counters, and metrics up to there.
        """
        again = hasattr(self, "outputs")
        if state:
            self.step, self.tokens = state["step"], state["tokens"]
            self.row = self._opening.row(self.stage, self.corpus, state)
        self.first = self.step
        if again:
            self.outputs.close()
        shown: dict[str, Any] = {"first": self.mesh.rank == 0, "step": self.step, "bring_up": self._read_records}
        shown["environment"] = describe(self.command, self.device) if shown["first"] else None
        shown |= {"stage": self.stage.name, "beginning": self.step == self.stage.first and not again}
        self.outputs = together(self.mesh, lambda: Outputs(self.plan.settings, self.directory, **shown))

    def _begin(self, stream: RowStream, peak: float | None) -> None:
        """Sets what the steps from here on work with."""
        settings = self.settings
        strategy = strategy_of(settings.parallel)
        self.reader = Reader(stream, settings.data, self.layout, strategy, self.mesh, self.device, self.shape)
        most, model = settings.optimizer.qk_clip, cast(LanguageModel, self.engine.module)
        self.qk_clip = None if most is None else QKClip(model, most, self.mesh, self.device)
        self.records, self._record = Records(peak), {}
        self.every = settings.logger.interval(self.device.type)
        self.first, self.recovery = self.step, Recovery(self)
        self.asked = 0  # the signal that ends the run after this step

    @property
    def done(self) -> bool:
        """Whether the last step has been taken."""
        return self.step >= self.settings.trainer.steps

    @property
    def record(self) -> dict[str, Any]:
        """The line of metrics of the last step; the device is read for it, where that has not happened yet."""
        self._read_records()
        return self._record

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
