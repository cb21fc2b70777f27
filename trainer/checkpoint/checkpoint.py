"""Checkpoints that any number of ranks at any ZeRO stage can load, bit by bit.

    step-00000100/
        index.json                              the run's state, and where each tensor is
        weights-00001-of-00002.safetensors      float32 parameters, by name
        moments-00001-of-00002.safetensors      exp_avg/NAME and exp_avg_sq/NAME, or what the optimizer keeps instead
        buffers.safetensors                     float32 buffers, by name, where the model has any

Each parameter has one writing rank, which gathers it from all by pieces: nobody needs more memory than two pieces.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...models.part import named_weights, shape_of
from ...parallel.collectives import agree
from ...parallel.mesh import Mesh
from ..engine import Engine, saved_buffers
from .commit import Retention, Target, commit, entries, unwritten
from .stored import BUFFERS, CheckpointError, check_bytes, differences
from .stored import Stored as Stored
from .stored import examine as examine
from .stored import is_one as is_one
from .stored import latest as latest
from .stored import verify as verify
from .tensor_files import TensorWriter

PIECE = 1 << 22  # elements: 16 MiB
Shapes = dict[str, tuple[int, ...]]
Gather = Callable[[list[nn.Parameter]], AbstractContextManager]


def save(
    engine: Engine,
    directory: str | Path,
    state: dict[str, Any],
    keep: int,
    beside: Callable[[Path], None] | None = None,
    spare: int | None = None,
    *,
    kept: bool = False,
) -> Path:
    """Writes `directory`/step-N, N = state["step"], and removes all but the newest `keep`; every rank calls it.

    state: what the run needs to go on, as JSON. beside: called on the first rank with the folder while it is being
    written, to put more files into it (tokenizer, configuration). spare: the newest one up to this step stays as well.
    kept: this one is never removed, by later saves of later runs either.
    Written aside, brought to the disk, then renamed. If any rank cannot write, all raise CheckpointError, nothing of
    the attempt stays, and earlier ones are untouched. `directory` is made, but not the folder that it lies in: one that
    has vanished does not come back half empty.
    """
    mesh = engine.mesh
    target = open_target(Path(directory), state["step"], mesh)
    engine.create_moments()
    files, error = _write_tensors(engine, target.temporary)
    gathered: list[Any] = [None] * mesh.world_size
    dist.all_gather_object(gathered, (files, error))
    if mesh.rank == 0:
        index = {"state": state, "adam_steps": engine.adam_steps}
        error = commit(target, index, gathered, Retention(keep, spare, kept), beside)
    agree_written(error, mesh, target.path)
    return target.path


def open_target(directory: Path, step: int, mesh: Mesh, error: str | None = None) -> Target:
    """Where the checkpoint after `step` is written, with a new folder for it; every rank calls it.

    error: why this rank cannot write. Raises CheckpointError on every rank if any has one.
    """
    target = Target.of(directory, step)
    if mesh.rank == 0 and error is None:
        error = target.make()
    agree_written(error, mesh, target.path)
    return target


def load(engine: Engine, path: str | Path, *, examined: bool = False) -> dict[str, Any]:
    """Sets parameters, moments and step count of the engine; returns the state that was saved. Every rank calls it.

    examined: the bytes have been looked at (see `examine`). Raises CheckpointError on every rank alike, before anything
    is set, if the checkpoint is incomplete, damaged or of another model.
    """
    parameters, buffers = dict(engine.named_parameters()), dict(engine.named_buffers())
    stored, error = None, None
    try:
        stored = verify(path).named_for(parameters)
        _check_model(stored, parameters, buffers, engine.kinds)
        if not examined:  # each byte is read by one rank
            check_bytes(stored, sorted(stored.tensors)[engine.mesh.rank :: engine.mesh.world_size])
    except CheckpointError as failure:
        error = str(failure)
    try:
        agree(error, engine.mesh.world_size)
    except ValueError as failure:
        raise CheckpointError(str(failure)) from None
    assert stored is not None
    engine.create_moments(stored.adam_steps)
    for name, parameter in parameters.items():
        for kind in engine.kinds(parameter):
            start, values = engine.fragment(parameter, kind)
            values.copy_(stored.map(_key(kind, name)).view(-1)[start : start + len(values)])
        engine.write(parameter, stored.map(name))
    _load_buffers(stored, buffers)
    return stored.state


def load_weights(
    path: str | Path, model: nn.Module, gather: Gather | None = None, seed: int | None = None
) -> dict[str, Any]:
    """Sets parameters and buffers of a model without an engine, one at a time; returns the state that was saved.

    gather: entered with each parameter that is set (see Engine). seed: given one, layers that a loss of their own
    trains (`detached` of `LanguageModel`) may be missing in the checkpoint, and get initial values: so an indexer joins
    a model of full attention. Raises CheckpointError before anything is set.
    """
    return prepare_weights(path, model, seed)(gather)


def prepare_weights(
    path: str | Path, model: nn.Module, seed: int | None = None, *, bytes_too: bool = True
) -> Callable[[Gather | None], dict[str, Any]]:
    """Makes the checks of `load_weights`; the call that is returned does the rest, which is collective.

    bytes_too: whether the weights are read and compared with their checksums, or file sizes and headers alone.
    """
    parameters, buffers = dict(named_weights(model)), saved_buffers(model)
    stored = verify(path).named_for(parameters)
    joining = () if seed is None else tuple(getattr(model, "detached", {}).values())
    fresh = {name for name in parameters if name not in stored.tensors and name.startswith(joining)}
    _check_model(stored, {name: p for name, p in parameters.items() if name not in fresh}, buffers)
    if bytes_too:
        check_bytes(stored, [*(name for name in parameters if name not in fresh), *buffers])

    @torch.no_grad()
    def fill(gather: Gather | None) -> dict[str, Any]:
        for name, parameter in parameters.items():
            with gather([parameter]) if gather else nullcontext():
                if name in fresh:
                    parameter.copy_(model.initial_value(name, shape_of(parameter), seed))  # type: ignore[operator]
                else:
                    parameter.copy_(stored.map(name))
        _load_buffers(stored, buffers)
        return stored.state

    return fill


@torch.no_grad()
def _load_buffers(stored: Stored, buffers: dict[str, Tensor]) -> None:
    for name, buffer in buffers.items():
        buffer.copy_(stored.map(name))


def _key(kind: str, name: str) -> str:
    return name if kind == "parameter" else f"{kind}/{name}"


class _Piece(NamedTuple):
    """Elements start..stop of one kind of one parameter."""

    name: str
    kind: str
    start: int
    stop: int


def assign(sizes: dict[str, int], ranks: int) -> list[list[str]]:
    """The names that each rank writes, balanced by size; the same on every rank."""
    loads, names = [0] * ranks, [[] for _ in range(ranks)]
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        rank = loads.index(min(loads))
        loads[rank] += sizes[name]
        names[rank].append(name)
    return names


class Share:
    """What this rank writes: `files`, the shapes of the tensors of each, in order; it gathers them by pieces."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.parameters = engine, dict(engine.named_parameters())
        shapes = {name: tuple(shape_of(parameter)) for name, parameter in self.parameters.items()}
        assigned = assign({name: math.prod(shape) for name, shape in shapes.items()}, engine.mesh.world_size)
        mine, count = assigned[engine.mesh.rank], sum(1 for names in assigned if names)
        kinds = {name: engine.kinds(parameter) for name, parameter in self.parameters.items()}
        self._turns = [list(_pieces(names, shapes, kinds)) for names in assigned]
        self.files: dict[str, Shapes] = {}
        self._file_of: dict[str, str] = {}
        if mine:
            number = f"{engine.mesh.rank + 1:05d}-of-{count:05d}.safetensors"
            self._file_of = {kind: f"moments-{number}" for name in mine for kind in kinds[name]}
            self._file_of["parameter"] = f"weights-{number}"
            self.files[f"weights-{number}"] = {name: shapes[name] for name in mine}
            states = {_key(kind, name): shapes[name] for name in mine for kind in kinds[name][1:]}
            self.files[f"moments-{number}"] = states
        if engine.mesh.rank == 0 and (buffers := dict(engine.named_buffers())):  # every rank has the same
            self.files[f"{BUFFERS}.safetensors"] = {name: tuple(buffer.shape) for name, buffer in buffers.items()}

    def __iter__(self) -> Iterator[tuple[str, str, Tensor]]:
        """(file, tensor, the next elements of it, float32 `[n]`), file by file in their order; every rank takes all.

        They may lie on the device, and change at the optimizer's next step.
        """
        if (file := f"{BUFFERS}.safetensors") in self.files:
            for name, buffer in self.engine.named_buffers():
                yield file, name, buffer.detach().reshape(-1)
        for piece, values in _gather_pieces(self.engine, self.parameters, self._turns):
            yield self._file_of[piece.kind], _key(piece.kind, piece.name), values


def _write_tensors(engine: Engine, folder: Path) -> tuple[dict[str, Any], str | None]:
    """This rank's files, with sizes and checksums, and what went wrong with them."""
    share = Share(engine)
    writers: dict[str, TensorWriter] = {}
    error = None
    try:
        folder.mkdir(exist_ok=True)  # where the file system is slow to show what the first rank made
        for file, shapes in share.files.items():
            writers[file] = TensorWriter(folder / file, shapes)
    except OSError as failure:
        error = str(failure)
    for file, key, values in share:
        if error is None:
            try:
                writers[file].write(key, values)
            except OSError as failure:  # and go on gathering, for the other ranks
                error = str(failure)
    try:
        for writer in writers.values():
            writer.close() if error is None else writer.abandon()
    except OSError as failure:
        error = str(failure)
    return entries(writers.values()), error


def _pieces(names: list[str], shapes: Shapes, kinds: dict[str, tuple[str, ...]]) -> Iterator[_Piece]:
    for name in names:
        size = math.prod(shapes[name])
        for kind in kinds[name]:
            for start in range(0, size, PIECE):
                yield _Piece(name, kind, start, min(start + PIECE, size))


def _gather_pieces(
    engine: Engine, parameters: dict[str, nn.Parameter], pieces: list[list[_Piece]]
) -> Iterator[tuple[_Piece, Tensor]]:
    """Brings the pieces to the ranks that write them; all ranks get their next one before any writes."""
    for turn in range(max(map(len, pieces))):
        arrived = None
        for rank, theirs in enumerate(pieces):
            if turn < len(theirs):
                values = _gather_piece(engine, parameters[theirs[turn].name], theirs[turn], rank)
                arrived = (theirs[turn], values) if rank == engine.mesh.rank else arrived
        if arrived is not None:
            yield arrived


def _gather_piece(engine: Engine, parameter: nn.Parameter, piece: _Piece, rank: int) -> Tensor:
    start, values = engine.fragment(parameter, piece.kind)
    low, high = max(start, piece.start), min(start + len(values), piece.stop)
    if engine.replicated(parameter):
        return values[low:high]
    # As integers: adding zeros to floats would turn -0.0 into 0.0.
    whole = torch.zeros(piece.stop - piece.start, dtype=torch.int32, device=engine.device)
    if low < high:
        whole[low - piece.start : high - piece.start] = values[low - start : high - start].view(torch.int32)
    dist.reduce(whole, rank)
    return whole.view(torch.float32)


def _check_model(
    stored: Stored,
    parameters: dict[str, nn.Parameter],
    buffers: dict[str, Tensor],
    kinds: Callable[[nn.Parameter], tuple[str, ...]] | None = None,
) -> None:
    """kinds: what is needed of each parameter; the weights alone where it is None."""
    expected = {name: shape_of(parameter) for name, parameter in parameters.items()}
    expected |= {name: buffer.shape for name, buffer in buffers.items()}
    if problems := differences(stored, expected):
        raise CheckpointError(
            f"checkpoint {stored.path} must be of this model; {problems}. Use the model that it was saved with, or "
            "another run.dir"
        )
    keys = [_key(kind, name) for name, parameter in parameters.items() for kind in (kinds(parameter) if kinds else ())]
    if missing := [key for key in keys if key not in stored.tensors]:
        raise CheckpointError(
            f"checkpoint {stored.path} must hold the optimizer's moments to be resumed; got it without {missing[0]}. "
            "Use the optimizer that it was saved with, or begin from its weights: init_from instead of "
            "checkpoint.resume"
        )


def agree_written(error: str | None, mesh: Mesh, path: Path) -> None:
    """Raises CheckpointError on every rank if any has an error in writing the checkpoint `path`."""
    try:
        agree(error, mesh.world_size)
    except ValueError as failure:
        raise unwritten(path, str(failure)) from None
