"""Training: what the ranks of a diagnosis do in a step of the trainer itself, and the groups of larger worlds."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from ...models.language_model import LanguageModel, Write
from ...models.part import named_weights
from ...parallel import mesh as mesh_module
from ...parallel.mesh import Mesh
from ..data.packing import Batch, Row, TokenStream
from ..preparation import make_engine
from ..ranks.settings import layout_of
from ..reported import Reported
from ..settings import Settings
from ..stages.plan import plan_of
from ..trainer import Trainer
from ..zero.experts import cut_as_made
from . import work
from .model import Build, fill

KINDS = ("parameter", "exp_avg", "exp_avg_sq")
SEED = 5  # of the order of the documents


class Documents:
    """Documents of these lengths; every token's id is its number among all of them, modulo the vocabulary."""

    def __init__(self, lengths: list[int], vocabulary: int | None = None) -> None:
        self.lengths = np.array(lengths)
        self.starts = np.cumsum([0, *lengths[:-1]])
        self.vocabulary = vocabulary

    def __getitem__(self, document: int) -> np.ndarray:
        ids = np.arange(self.lengths[document]) + self.starts[document]
        return ids if self.vocabulary is None else ids % self.vocabulary


def stream_of(lengths: list[int], length: int, vocabulary: int | None = None) -> TokenStream:
    """Rows of these documents, as training packs them."""
    return TokenStream(Documents(lengths, vocabulary), np.arange(len(lengths)), length=length, seed=SEED)


@dataclass
class Step:
    """The result of a step of the trainer on one rank; fragments are (index of the first element, elements)."""

    loss: float
    norm: float
    rate: float
    rows: list[Row]
    next_rows: list[Row]
    state: dict[str, dict[str, tuple[int, Tensor]]]  # of KINDS, by parameter
    alone: dict[str, Tensor] = field(default_factory=dict)  # sum of its micro-batches' gradients without an engine
    unshared: dict[str, Tensor] = field(default_factory=dict)  # the same with all experts here, if ranks share them out


class _Silent:
    """Stands in for the outputs of a run: it has every method, and none does anything."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


class _Filled(NamedTuple):
    """Builds a model whose initial values are those of the diagnosis."""

    build: Build

    def __call__(self, model: dict[str, Any]) -> LanguageModel:
        made = self.build(model)

        def initialise(seed: int, write: Write, rank: int, ranks: int) -> None:
            with ExitStack() as whole:
                for _, parameter in named_weights(made):
                    whole.enter_context(write(parameter, 0))
                fill(made)

        made.initialise = initialise  # type: ignore[method-assign]
        return made


class _Examined(Trainer):
    """The trainer with rows of its own, which writes no files; its step is the one that trains."""

    def __init__(self, settings: Settings, build: Build, mesh: Mesh, device: torch.device, stream: TokenStream) -> None:
        self.settings, self.mesh, self.device, self.command = settings, mesh, device, []
        self.layout = layout_of(settings.parallel, settings.data.sequence_length)
        self.plan = plan_of(settings)
        self.stage, self.schedule = self.plan.stages[0], self.plan.stages[0].schedule
        with torch.device("meta"):
            self.shape = build(settings.model)
        self.engine = make_engine(settings, _Filled(build), mesh, device, resuming=False)
        self.outputs: Any = _Silent()
        self.directory: Any = _Silent()
        self.step = self.tokens = self.row = 0
        self._begin(stream, peak=None)

    def examine(self) -> Step:
        """A step, and the rows that the next would read."""
        read = list(self.reader.rows(self.row))
        self._train_step(self._meet(self.reader.steps([self.step], self.row)))
        record = self.record
        state = {
            name: {kind: self._fragment(parameter, kind) for kind in KINDS}
            for name, parameter in self.engine.named_parameters()
        }
        rows, later = ([row for part in parts for row in _rows(part)] for parts in (read, self.reader.rows(self.row)))
        return Step(record["loss"], record["grad_norm"], record["learning_rate"], rows, later, state)

    def _fragment(self, parameter: nn.Parameter, kind: str) -> tuple[int, Tensor]:
        part = self.engine.fragment(parameter, kind)
        return part.start, part.values.float().cpu().clone()

    def alone(self, model: LanguageModel, targets: int) -> dict[str, Tensor]:
        """The sum of the micro-batches' gradients in float32, computed as the step does but by the model itself.

        The model has this rank's experts, as the engine's does, or all of them. It gets the engine's parameters.
        """
        weights, parameters = dict(model.named_parameters()), dict(self.engine.named_parameters())
        total = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()}
        shared = any(hasattr(weight, "cut") for weight in weights.values())
        read = [parameters[name] for name, weight in weights.items() if not hasattr(weight, "cut")]
        with torch.no_grad(), self.engine.gather(read):
            for name, weight in weights.items():
                weight.copy_(parameters[name])
        part = self._meet(self.reader.steps([self.step], self.row))
        reported = Reported(model.losses, part.loss_counts, self.mesh)
        for micro_batch in part.micro_batches:
            tokens, wanted = micro_batch.on(self.device)
            model.zero_grad(set_to_none=True)
            seq = micro_batch.seq if shared else replace(micro_batch.seq, experts=None)
            loss, _, reports = model(tokens, seq, wanted, False, True)
            auxiliary = reported.add(reports)
            ((loss / targets + (0 if auxiliary is None else auxiliary)) * self.mesh.world_size).backward()
            for name, weight in weights.items():
                if weight.grad is not None:
                    total[name] += weight.grad.float()
        return {name: _of_all_experts(weight, total[name]).cpu() for name, weight in weights.items()}


def _of_all_experts(weight: Tensor, gradient: Tensor) -> Tensor:
    """The gradient of the whole weight: zero for experts that this rank does not hold."""
    cut = getattr(weight, "cut", None)
    if cut is None:
        return gradient
    whole = gradient.new_zeros(cut.shape)
    whole[cut.held.start : cut.held.stop] = gradient
    return whole


def _rows(part: Batch) -> list[Row]:
    lengths = [[run.length for run in runs if not run.is_padding] for runs in part.documents.runs]
    return [Row(*row) for row in zip(part.tokens.numpy(), part.targets.numpy(), lengths, strict=True)]


def train_step(settings: Settings, lengths: list[int], targets: int) -> Step:
    """One step of the trainer; in bfloat16 also the model's gradient alone. `targets` are those of the whole step."""
    worker = work.this_worker()
    topology = worker.topology
    stream = stream_of(lengths, settings.data.sequence_length, topology.model["vocabulary"])
    settings = replace(settings, model=topology.model)
    trainer = _Examined(settings, topology.build, worker.training, worker.device, stream)
    alone, unshared, experts = {}, {}, worker.training.experts
    if settings.trainer.dtype == "bfloat16":
        with cut_as_made(experts):
            model = work.typed(topology.build(topology.model), torch.bfloat16)
        alone = trainer.alone(model.to(worker.device), targets)
        if experts is not None:
            unshared = trainer.alone(work.filled(topology, torch.bfloat16).to(worker.device), targets)
    step = trainer.examine()
    return replace(step, alone=alone, unshared=unshared)


class Place(NamedTuple):
    """Where a rank stands in a mesh, and the ranks of its groups (None where there is no such group)."""

    data_rank: int
    sequence_rank: int
    row: tuple[int, ...] | None
    heads: tuple[int, ...] | None
    ring: tuple[int, ...] | None


def places(sequence: int, ulysses: int, world: int) -> list[Place]:
    """The mesh as each of `world` ranks would make it: groups are recorded but not formed."""
    all_places = []
    for rank in range(world):
        stand_in = SimpleNamespace(
            is_initialized=lambda: True,
            get_rank=lambda *_, rank=rank: rank,
            get_world_size=lambda *_: world,
            new_group=lambda ranks, **_: tuple(sorted(ranks)),
            get_backend_config=lambda *_: "gloo",
            all_reduce=lambda *_, **__: None,
            group=SimpleNamespace(WORLD=tuple(range(world))),
            ProcessGroup=tuple,
        )
        with mock.patch.object(mesh_module, "dist", stand_in):
            made: Any = Mesh.create(sequence, ulysses)
        heads, ring = (made.heads.group, made.heads.ring) if made.heads else (None, None)
        all_places.append(Place(made.data_rank, made.sequence_rank, made.sequence_group, heads, ring))
    return all_places
