"""Work: what the ranks of a diagnosis do. Each function runs on every rank and returns what this rank holds."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ...kernels.documents import Documents
from ...models.language_model import LanguageModel
from ...models.part import cast_parameters
from ...parallel.layout import Layout
from ...parallel.mesh import Mesh
from ...parallel.sequence import Sequence
from ..ranks.settings import ParallelSettings, strategy_of, ulysses_ranks
from .cases import Case, far_positions
from .model import Build, fill
from .truth import Call, Result, gradients_of, run, shared_op


@dataclass(frozen=True)
class Topology:
    """The model and how rows are shared; the same on every rank."""

    build: Build
    model: dict[str, Any]
    parallel: ParallelSettings
    cuda: bool = False


class Worker:
    """What a rank keeps between functions."""

    def __init__(self, topology: Topology) -> None:
        self.topology = topology
        parallel = topology.parallel
        # Data ranks compute different cases, and so have the experts of a case to themselves; they share a step's.
        sizes, minutes = (parallel.sequence, ulysses_ranks(parallel)), parallel.timeout_minutes
        self.mesh = Mesh.create(*sizes, timeout_minutes=minutes)
        self.training = self.mesh
        if parallel.experts > 1:
            self.training = Mesh.create(*sizes, parallel.experts, minutes)
        self.device = torch.device("cuda", self.mesh.rank) if topology.cuda else torch.device("cpu")
        self.models: dict[torch.dtype, LanguageModel] = {}

    def model(self, dtype: torch.dtype) -> LanguageModel:
        if dtype not in self.models:
            with self.device:
                self.models[dtype] = filled(self.topology, dtype)
        return self.models[dtype]

    def sequence(self, documents: Documents, layout: Layout) -> Sequence:
        return Sequence.shared(documents, layout, self.mesh, strategy_of(self.topology.parallel))

    def mine(self, jobs: list[Any]) -> list[tuple[int, Any]]:
        """The jobs of this data rank: those that share rows do the same ones, the others work meanwhile."""
        return [(n, job) for n, job in enumerate(jobs) if n % self.mesh.data_ranks == self.mesh.data_rank]


_workers: list[Worker] = []
_chosen: dict[str, str] = {}  # op to implementation, as the kernels report it


class _Listener(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        if isinstance(record.args, tuple) and len(record.args) == 4:
            op, device, chosen, _ = record.args
            _chosen[str(op)] = f"{chosen} ({device})"


def filled(topology: Topology, dtype: torch.dtype) -> LanguageModel:
    """The model with initial values that are the same in every process, in the types that the engine gives it."""
    model = topology.build(topology.model)
    fill(model)
    return typed(model, dtype)


def typed(model: LanguageModel, dtype: torch.dtype) -> LanguageModel:
    """The model in the types that the engine gives it."""
    model.to(torch.promote_types(dtype, torch.float32))  # buffers are not rounded
    cast_parameters(model, dtype)
    return model


def configure(topology: Topology) -> None:
    """Prepares this rank; comes first."""
    logger = logging.getLogger("longreach")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.addHandler(_Listener())
    _workers[:] = [Worker(topology)]


def this_worker() -> Worker:
    """What this rank keeps."""
    (worker,) = _workers
    return worker


def backends() -> dict[str, str]:
    """Which implementation each op has run with on this rank so far."""
    return dict(_chosen)


def run_cases(jobs: list[tuple[Case, str, torch.dtype, dict[str, Tensor] | None]]) -> dict[int, Result]:
    """Each case forward and backward, with a mode of recomputation and, if told, the experts that routers choose.

    In between the sequence serves other tokens.
    """
    (worker,) = _workers
    results = {}
    for number, (case, checkpointing, dtype, choices) in worker.mine(jobs):
        model = worker.model(dtype)
        model.activation_checkpointing = checkpointing
        seq = worker.sequence(case.documents, case.layout)
        tokens, targets = (seq.shard(x).to(worker.device) for x in (case.tokens, case.targets))
        with far_positions(seq) if case.far else nullcontext(seq) as told:
            run(model, told, tokens.flip(0), targets)  # a sequence serves more than one forward
            results[number] = on_host(run(model, told, tokens, targets, told=choices))
        model.activation_checkpointing = "none"
    return results


@torch.no_grad()
def probe(jobs: list[tuple[Case, list[Tensor]]]) -> dict[int, list[Tensor]]:
    """Hidden states of each case for each of several rows of tokens, in float64."""
    (worker,) = _workers
    results = {}
    for number, (case, variants) in worker.mine(jobs):
        model, seq = worker.model(torch.float64), worker.sequence(case.documents, case.layout)
        results[number] = [model.hidden(seq.shard(tokens), seq) for tokens in variants]
    return results


def replay(jobs: list[tuple[Case, list[tuple[Call, Tensor]]]]) -> dict[int, list[list[Tensor]]]:
    """Each op's output, and the gradients of its tensors from that of the output."""
    (worker,) = _workers
    results = {}
    for number, (case, calls) in worker.mine(jobs):
        seq = worker.sequence(case.documents, case.layout)
        results[number] = [_replayed(call, dout, seq, case) for call, dout in calls]
    return results


def _replayed(call: Call, dout: Tensor, seq: Sequence, case: Case) -> list[Tensor]:
    (worker,) = _workers
    here = seq.at(call.layer, call.mixer)
    mine = dout * _share(seq) if call.of_the_row else seq.shard(dout)
    try:
        return on_host(gradients_of(shared_op(call.op), local(call, seq), mine.to(worker.device), here))
    except Exception as error:
        place = f"op {call.op} of layer {call.layer} ({call.mixer}); {case.name}"
        raise RuntimeError(f"{place}: {type(error).__name__}: {error}") from error


def _share(seq: Sequence) -> float:
    """This rank's share of a gradient that is the sum of all ranks': a half, a quarter, …, without rounding."""
    return 0.5 ** min(seq.rank + 1, seq.layout.ranks - 1)


def local(call: Call, seq: Sequence) -> Call:
    """The call with the tokens that this rank holds of whole rows; constants stay whole."""
    (worker,) = _workers
    split = iter(call.per_token(seq.layout.length))
    return call.mapped(lambda x: (seq.shard(x) if next(split) else x).to(worker.device))


def on_host(result: Any) -> Any:
    """Tensors on the CPU, within lists, dicts and results."""
    if isinstance(result, Result):
        return Result(*(on_host(getattr(result, field.name)) for field in fields(Result)))
    return pytree.tree_map(lambda x: x.cpu() if isinstance(x, Tensor) else x, result)
