"""Checkpoints that any number of ranks at any ZeRO stage can load, bit by bit.

    step-00000100/
        index.json                              the run's state, and where each tensor is
        weights-00001-of-00002.safetensors      float32 parameters, by name
        moments-00001-of-00002.safetensors      exp_avg/NAME and exp_avg_sq/NAME
        buffers.safetensors                     float32 buffers, by name, where the model has any

Each parameter has one writing rank, which gathers it from all by pieces: nobody needs more memory than two pieces.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Collection, Iterator
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
from ..run.failure import remedy
from ..zero.masters import KINDS
from .stored import BUFFERS, FORMAT, INDEX, CheckpointError, check_bytes, differences, is_complete, step_of, steps
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
    milestones: Collection[int] = (),
) -> Path:
    """Writes `directory`/step-N, N = state["step"], and removes all but the newest `keep`; every rank calls it.

    state: what the run needs to go on, as JSON. beside: called on the first rank with the folder while it is being
    written, to put more files into it (tokenizer, configuration). spare: the newest one up to this step stays as well;
    so do those of the steps `milestones`.
    Written aside, brought to the disk, then renamed. If any rank cannot write, all raise CheckpointError, nothing of
    the attempt stays, and earlier ones are untouched. `directory` is made, but not the folder that it lies in: one that
    has vanished does not come back half empty.
    """
    directory, mesh = Path(directory), engine.mesh
    path = directory / f"step-{state['step']:08d}"
    temporary = directory / f".{path.name}.writing"
    error = None
    if mesh.rank == 0:
        try:
            directory.mkdir(exist_ok=True)
            for left_over in directory.glob(".step-*"):
                _remove(left_over)
            temporary.mkdir()
        except OSError as failure:
            error = f"{failure}"
    _agree(error, mesh, path)
    engine.create_moments()
    files, error = _write_tensors(engine, temporary)
    gathered: list[Any] = [None] * mesh.world_size
    dist.all_gather_object(gathered, (files, error))
    error = next((f"{text} (rank {rank})" for rank, (_, text) in enumerate(gathered) if text), None)
    if mesh.rank == 0:
        try:
            if error is None:
                if beside is not None:
                    beside(temporary)
                every = {file: entry for part, _ in gathered for file, entry in part.items()}
                _complete(temporary, path, {"state": state, "adam_steps": engine.adam_steps, "files": every})
                _prune(directory, path, keep, spare, milestones)
        except Exception as failure:  # of any kind: the tokenizers' library raises bare ones for a full disk
            error = f"{failure}"
        if error is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    _agree(error, mesh, path)
    return path


def load(engine: Engine, path: str | Path, *, examined: bool = False) -> dict[str, Any]:
    """Sets parameters, moments and step count of the engine; returns the state that was saved. Every rank calls it.

    examined: the bytes have been looked at (see `examine`). Raises CheckpointError on every rank alike, before anything
    is set, if the checkpoint is incomplete, damaged or of another model.
    """
    parameters, buffers = dict(engine.named_parameters()), dict(engine.named_buffers())
    stored, error = None, None
    try:
        stored = verify(path).named_for(parameters)
        _check_model(stored, parameters, buffers)
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
        for kind in KINDS:
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
    _check_model(stored, {name: p for name, p in parameters.items() if name not in fresh}, buffers, kinds=())
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


def _write_tensors(engine: Engine, folder: Path) -> tuple[dict[str, Any], str | None]:
    """This rank's files, with sizes and checksums, and what went wrong with them."""
    parameters = dict(engine.named_parameters())
    shapes = {name: tuple(shape_of(parameter)) for name, parameter in parameters.items()}
    assigned = assign({name: math.prod(shape) for name, shape in shapes.items()}, engine.mesh.world_size)
    mine, count = assigned[engine.mesh.rank], sum(1 for names in assigned if names)
    writers: dict[str, TensorWriter] = {}
    error = None
    try:
        folder.mkdir(exist_ok=True)  # where the file system is slow to show what the first rank made
        if mine:
            number = f"{engine.mesh.rank + 1:05d}-of-{count:05d}.safetensors"
            weights = TensorWriter(folder / f"weights-{number}", {name: shapes[name] for name in mine})
            writers["parameter"] = weights
            moments = {_key(kind, name): shapes[name] for name in mine for kind in KINDS[1:]}
            writers.update(dict.fromkeys(KINDS[1:], TensorWriter(folder / f"moments-{number}", moments)))
        if engine.mesh.rank == 0 and (buffers := dict(engine.named_buffers())):  # every rank has the same
            shapes_of_buffers = {name: tuple(buffer.shape) for name, buffer in buffers.items()}
            writers[BUFFERS] = TensorWriter(folder / f"{BUFFERS}.safetensors", shapes_of_buffers)
            for name, buffer in buffers.items():
                writers[BUFFERS].write(name, buffer)
    except OSError as failure:
        error = str(failure)
    for piece, values in _gather_pieces(engine, parameters, [list(_pieces(names, shapes)) for names in assigned]):
        if error is None:
            try:
                writers[piece.kind].write(_key(piece.kind, piece.name), values)
            except OSError as failure:  # and go on gathering, for the other ranks
                error = str(failure)
    try:
        for writer in set(writers.values()):
            writer.close() if error is None else writer.abandon()
    except OSError as failure:
        error = str(failure)
    return {w.path.name: {"bytes": w.size, "crc32": w.checksums} for w in writers.values()}, error


def _pieces(names: list[str], shapes: Shapes) -> Iterator[_Piece]:
    for name in names:
        size = math.prod(shapes[name])
        for kind in KINDS:
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


def _complete(temporary: Path, path: Path, index: dict[str, Any]) -> None:
    for file, entry in index["files"].items():
        if not (temporary / file).exists() or (temporary / file).stat().st_size != entry["bytes"]:
            raise OSError(f"{file} is not there; run.dir must be on a file system that all ranks share")
    with open(temporary / INDEX, "w") as file:
        json.dump({"format": FORMAT, **index}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    _sync_folder(temporary)
    replaced = path.with_name(f".{path.name}.replaced")
    if path.exists():  # a run that was resumed from an earlier checkpoint comes by here again
        os.rename(path, replaced)
    os.rename(temporary, path)
    _sync_folder(path.parent)
    _remove(replaced)


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _prune(directory: Path, written: Path, keep: int, spare: int | None, milestones: Collection[int]) -> None:
    """Those after `written` stay: of a run that goes on from an earlier one, since they are damaged, until it is there.

    Nor do damaged ones count among those that are kept.
    """
    kept, spared = 1, spare is None or step_of(written) <= spare
    for path in reversed([path for path in steps(directory) if step_of(path) < step_of(written)]):
        complete = is_complete(path)
        if complete and step_of(path) in milestones:
            spared = spared or step_of(path) <= (spare or 0)
        elif complete and kept < keep:
            kept += 1
            spared = spared or step_of(path) <= (spare or 0)
        elif complete and not spared and step_of(path) <= (spare or 0):
            spared = True
        else:
            shutil.rmtree(path, ignore_errors=True)


def _check_model(
    stored: Stored, parameters: dict[str, nn.Parameter], buffers: dict[str, Tensor], kinds: tuple[str, ...] = KINDS
) -> None:
    expected = {name: shape_of(parameter) for name, parameter in parameters.items()}
    expected |= {name: buffer.shape for name, buffer in buffers.items()}
    if problems := differences(stored, expected):
        raise CheckpointError(
            f"checkpoint {stored.path} must be of this model; {problems}. Use the model that it was saved with, or "
            "another run.dir"
        )
    keys = [_key(kind, name) for name in parameters for kind in kinds]
    if missing := [key for key in keys if key not in stored.tensors]:
        raise CheckpointError(
            f"checkpoint {stored.path} must hold the optimizer's moments to be resumed; got it without {missing[0]}. "
            "Begin from its weights: init_from instead of checkpoint.resume"
        )


def _agree(error: str | None, mesh: Mesh, path: Path) -> None:
    try:
        agree(error, mesh.world_size)
    except ValueError as failure:
        raise CheckpointError(
            f"checkpoint {path} could not be written: {failure}. Earlier ones stay; {remedy(failure)}"
        ) from None
