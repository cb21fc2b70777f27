"""Operation: how an op runs on a sequence that ranks share, with its own backward; eagerly or under torch.compile.

Eagerly an operation is one autograd function. Under torch.compile it is one custom op over tensors, an integer that
stands for the sequence and the operation's name; what backward needs are outputs. So graphs are whole, hold no
document border, and are not recompiled for the next batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from ..kernels import operation
from ..kernels.dispatch import note
from ..kernels.operation import Tensors
from .sequence import Sequence

Setting: TypeAlias = bool | int | float | str | tuple[int, ...] | Callable | None


class Operation(ABC):
    """One op under one strategy, a `kernels.operation.Operation`; every rank calls its methods in the same order."""

    outputs: ClassVar[int] = 1
    sends: ClassVar[bool] = True  # whether ranks that share a row exchange anything in it

    @property
    def kernel(self) -> str | None:
        """The public op whose kernels it runs; None where it has none."""
        return None

    @abstractmethod
    def forward(self, inputs: Tensors, seq: Sequence) -> tuple[Tensors, Tensors]:
        """The outputs for the tokens of this rank, and what backward needs besides inputs and outputs."""

    @abstractmethod
    def backward(
        self, gradients: Tensors, inputs: Tensors, outputs: tuple[Tensor, ...], saved: Tensors, seq: Sequence
    ) -> Tensors:
        """The gradient of each input (None for an input that is None), from those of the outputs (None for 0)."""

    @abstractmethod
    def like(self, inputs: Tensors, ranks: int, spans: int) -> tuple[tuple[Tensor, ...], Tensors]:
        """Empty tensors of the shapes and types that `forward` returns, in dense layout, for `spans` spans per rank."""


class Exchange(ABC):
    """What ranks exchange outside of an op, as those who count it replay it: see `tell`. It computes nothing else."""

    where: ClassVar[str]  # whose it is, and
    what: ClassVar[str]  # what travels, as tables show it

    @abstractmethod
    def forward(self, inputs: Tensors, seq: Sequence) -> tuple[Tensors, Tensors]:
        """What comes, and nothing for backward."""

    def backward(
        self, gradients: Tensors, inputs: Tensors, outputs: tuple[Tensor, ...], saved: Tensors, seq: Sequence
    ) -> Tensors:
        """Nothing, unless a class says otherwise."""
        return tuple(None for _ in inputs)


class OfOneTensor(Operation):
    """An operation of one tensor that saves no tensor for backward."""

    @abstractmethod
    def apply(self, x: Tensor, seq: Sequence) -> Tensor:
        """The output."""

    @abstractmethod
    def transpose(self, dout: Tensor, x: Tensor, seq: Sequence) -> Tensor:
        """The gradient of x."""

    @abstractmethod
    def shape(self, x: Tensor, ranks: int, spans: int) -> tuple[int, ...]:
        """That of the output, which has x's type."""

    def forward(self, inputs: Tensors, seq: Sequence) -> tuple[Tensors, Tensors]:
        (x,) = present(*inputs)
        return (self.apply(x, seq),), ()

    def backward(
        self, gradients: Tensors, inputs: Tensors, outputs: tuple[Tensor, ...], saved: Tensors, seq: Sequence
    ) -> Tensors:
        dout, x = present(*gradients, *inputs)
        return (self.transpose(dout, x, seq),)

    def like(self, inputs: Tensors, ranks: int, spans: int) -> tuple[tuple[Tensor, ...], Tensors]:
        (x,) = present(*inputs)
        return (x.new_empty(self.shape(x, ranks, spans)),), ()


def present(*inputs: Tensor | None) -> tuple[Tensor, ...]:
    """Inputs, none of which may be None."""
    tensors = tuple(x for x in inputs if x is not None)
    assert len(tensors) == len(inputs)
    return tensors


def is_sequence(x: Tensor) -> bool:
    """Whether an input has a time dimension: `[B, T, …]`, and is not a constant per head."""
    return x.dim() >= 3


def check_class(name: str, op: Any) -> None:
    """Raises ValueError unless an op is named by its class, which compiled graphs can be keyed by."""
    if not isinstance(op, type):
        raise ValueError(
            f"{name} must get the op's class, and its settings as a tuple after the inputs; got {type(op).__name__}. "
            f"Write ops.{name}(Op, Inputs(...), (setting, ...), seq=seq)"
        )


def mix(
    build: Callable[..., Operation], settings: tuple[Setting, ...], inputs: Tensors, seq: Sequence, slot: str
) -> tuple[Tensor, ...]:
    """Runs the operation `build(*settings)`; `slot` names its state within the layer, for recomputation.

    Settings are plain values and classes, so that a compiled graph can be keyed by them. Tensors without data, on
    `meta`, are a rehearsal, unless the sequence names a backend: they get the shapes and types of a run on as many
    ranks, and nothing is sent.
    """
    if torch.compiler.is_compiling():
        name = _name(build, settings)
        present = [x for x in inputs if x is not None]
        places = [x is not None for x in inputs]
        results = _mix(seq.handle, name, present, places, seq.layout.ranks, seq.layout.spans)
        return tuple(results[: _outputs(name)])
    seq.claim(slot)
    op = build(*settings)
    if seq.backend == "auto" and next(x.device.type for x in inputs if x is not None) == "meta":
        return operation.run(_Rehearsal(op), inputs, seq, kept=seq.kept, slot=slot)
    ranks = f"rank {seq.rank} of the {seq.layout.ranks} that share a row"
    note = f"in {type(op).__name__} of layer {seq.layer}, on {ranks}"
    return operation.Run.runner()(op, seq, seq.kept, slot, note, *inputs)


Observer: TypeAlias = Callable[[str, Operation | Exchange, Tensors, Sequence], None]
_observers: list[Observer] = []


@contextmanager
def observing(observer: Observer) -> Iterator[None]:
    """Within, rehearsed operations and exchanges are told to it as they run: "forward" or "backward", operation,
    inputs, sequence.

    What is recomputed runs forward again, unless its results were kept.
    """
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


def tell(phase: str, what: Operation | Exchange, inputs: Tensors, seq: Sequence) -> None:
    """Tells `observing` of what runs on tensors without data."""
    for observer in _observers:
        observer(phase, what, inputs, seq)


class _Rehearsal:
    """The operation's shapes and types on tensors without data."""

    def __init__(self, op: Operation) -> None:
        self.op = op

    def forward(self, inputs: Tensors, where: Sequence) -> tuple[Tensors, Tensors]:
        if self.op.kernel is not None:
            note(self.op.kernel)
        tell("forward", self.op, inputs, where)
        return self.op.like(inputs, where.layout.ranks, where.layout.spans)

    def backward(
        self, gradients: Tensors, inputs: Tensors, outputs: tuple[Tensor, ...], saved: Tensors, where: Sequence
    ) -> Tensors:
        tell("backward", self.op, inputs, where)
        return tuple(None if x is None else torch.empty_like(x) for x in inputs)


_operations: dict[str, Operation] = {}


@torch.compiler.assume_constant_result
def _name(build: Callable[..., Operation], settings: tuple[Setting, ...]) -> str:
    """A name by which the custom op finds the operation again; plain settings are what graphs are guarded on."""
    name = f"{build.__module__}.{build.__qualname__}{settings}"
    if name not in _operations:
        _operations[name] = build(*settings)
    return name


@torch.compiler.assume_constant_result
def _outputs(name: str) -> int:
    return _operations[name].outputs


def _spread(tensors: list[Tensor], mask: list[bool]) -> Tensors:
    """The tensors in their places, None elsewhere."""
    rest = iter(tensors)
    return tuple(next(rest) if is_present else None for is_present in mask)


def _dense(tensors: Tensors, example: Tensor) -> list[Tensor]:
    """Tensors as a custom op may return them: contiguous, none of them missing (an empty one stands for None)."""
    return [example.new_empty(0) if x is None else x.contiguous() for x in tensors]


def _unaliased(tensors: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """A custom op may return neither its inputs nor two views of one storage."""
    storages = {x.untyped_storage().data_ptr() for x in inputs}
    results = []
    for x in tensors:
        storage = x.untyped_storage().data_ptr()
        results.append(x.clone() if x.numel() and storage in storages else x)
        storages.add(storage)
    return results


def _missing(tensors: list[Tensor], pattern: Tensors) -> Tensors:
    return tuple(None if p is None else x for x, p in zip(tensors, pattern, strict=True))


@torch.library.custom_op("longreach::mix", mutates_args=())
def _mix(handle: Tensor, name: str, tensors: list[Tensor], mask: list[bool], ranks: int, spans: int) -> list[Tensor]:
    outputs, saved = _operations[name].forward(_spread(tensors, mask), Sequence.of(handle))
    return _unaliased(_dense((*outputs, *saved), tensors[0]), tensors)


@_mix.register_fake
def _(handle: Tensor, name: str, tensors: list[Tensor], mask: list[bool], ranks: int, spans: int) -> list[Tensor]:
    outputs, saved = _operations[name].like(_spread(tensors, mask), ranks, spans)
    return _dense((*outputs, *saved), tensors[0])


@torch.library.custom_op("longreach::mix_backward", mutates_args=())
def _mix_backward(
    handle: Tensor,
    name: str,
    gradients: list[Tensor],
    tensors: list[Tensor],
    mask: list[bool],
    results: list[Tensor],
    ranks: int,
    spans: int,
) -> list[Tensor]:
    op, inputs = _operations[name], _spread(tensors, mask)
    pattern = op.like(tuple(None if x is None else x.to("meta") for x in inputs), ranks, spans)[1]
    outputs, saved = tuple(results[: op.outputs]), _missing(results[op.outputs :], pattern)
    dinputs = op.backward(tuple(gradients), inputs, outputs, saved, Sequence.of(handle))
    dense = [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, dinputs, strict=True) if x is not None]
    return _unaliased(_dense(tuple(dense), tensors[0]), [*gradients, *tensors, *results])


@_mix_backward.register_fake
def _(
    handle: Tensor,
    name: str,
    gradients: list[Tensor],
    tensors: list[Tensor],
    mask: list[bool],
    results: list[Tensor],
    ranks: int,
    spans: int,
) -> list[Tensor]:
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    handle, ctx.name, tensors, ctx.mask, ctx.ranks, ctx.spans = inputs
    ctx.number = len(tensors)
    ctx.save_for_backward(handle, *tensors, *output)


def _differentiate(ctx: Any, gradients: list[Tensor | None]) -> tuple[Any, ...]:
    handle, *kept = ctx.saved_tensors
    tensors, results = kept[: ctx.number], kept[ctx.number :]
    number = _operations[ctx.name].outputs
    of_outputs = [
        torch.zeros_like(x) if g is None else g for x, g in zip(results[:number], gradients[:number], strict=True)
    ]
    dinputs = _mix_backward(handle, ctx.name, of_outputs, tensors, ctx.mask, results, ctx.ranks, ctx.spans)
    return None, None, dinputs, None, None, None


_mix.register_autograd(_differentiate, setup_context=_save)
