"""Operation: how an op runs on a sequence shared by ranks, with its own backward; eagerly or as torch.compile sees it.

Eagerly an operation is one autograd function. Under torch.compile it is one custom op over tensors, an integer that
stands for the sequence and the operation's name; what backward needs are outputs. So graphs are whole, hold no
document border, and are not compiled anew for the next batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from .sequence import Sequence

Tensors: TypeAlias = tuple[Tensor | None, ...]
Setting: TypeAlias = bool | int | float | str | tuple[int, ...] | Callable | None


class Operation(Protocol):
    """One op under one strategy. All methods run without autograd; every rank calls them in the same order."""

    def forward(self, inputs: Tensors, seq: Sequence) -> tuple[Tensor, Tensors]:
        """The output for the tokens held here, and what backward needs besides inputs and output."""
        ...

    def backward(self, dout: Tensor, inputs: Tensors, out: Tensor, saved: Tensors, seq: Sequence) -> Tensors:
        """The gradient of each input, None for an input that is None."""
        ...

    def like(self, inputs: Tensors, ranks: int, spans: int) -> tuple[Tensor, Tensors]:
        """Empty tensors of the shapes and types that `forward` returns, in dense layout, for `spans` spans a rank."""
        ...


def present(*inputs: Tensor | None) -> tuple[Tensor, ...]:
    """Inputs that an operation is never without."""
    given = tuple(x for x in inputs if x is not None)
    assert len(given) == len(inputs)
    return given


def is_sequence(x: Tensor) -> bool:
    """Whether an input has a time dimension: `[B, T, …]`, and is not a constant a head."""
    return x.dim() >= 3


def mix(
    build: Callable[..., Operation], settings: tuple[Setting, ...], inputs: Tensors, seq: Sequence, slot: str
) -> Tensor:
    """Runs the operation `build(*settings)`; `slot` names its state within the layer, for recomputation.

    Settings are plain values and classes, so that a compiled graph can be keyed by them. Tensors without data, on
    `meta`, are a rehearsal: their shapes and types are those of a run on as many ranks, and nothing is sent.
    """
    if torch.compiler.is_compiling():
        name = _name(build, settings)
        given = [x for x in inputs if x is not None]
        mask = [x is not None for x in inputs]
        return _mix(seq.handle, name, given, mask, seq.layout.ranks, seq.layout.spans)[0]
    seq.claim(slot)
    rehearsed = next(x.device.type for x in inputs if x is not None) == "meta"
    run = _Rehearsed if rehearsed else _Mix
    return run.apply(build(*settings), seq, slot, *inputs)  # type: ignore[return-value]


class _Rehearsed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, operation: Operation, seq: Sequence, slot: str, *inputs: Tensor | None) -> Tensor:
        ctx.save_for_backward(*inputs)
        return operation.like(inputs, seq.layout.ranks, seq.layout.spans)[0]

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, *(None if x is None else torch.empty_like(x) for x in ctx.saved_tensors)


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, operation: Operation, seq: Sequence, slot: str, *inputs: Tensor | None) -> Tensor:
        with _named(operation, seq):
            out, saved = seq.once(slot, lambda: operation.forward(inputs, seq))
        ctx.save_for_backward(*inputs, out, *saved)
        ctx.operation, ctx.seq, ctx.inputs = operation, seq, len(inputs)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        held = ctx.saved_tensors
        inputs, out, saved = held[: ctx.inputs], held[ctx.inputs], held[ctx.inputs + 1 :]
        with _named(ctx.operation, ctx.seq):
            return None, None, None, *ctx.operation.backward(dout, inputs, out, saved, ctx.seq)


@contextmanager
def _named(operation: Operation, seq: Sequence) -> Iterator[None]:
    """Errors within, a silent peer among them, say where they arose."""
    try:
        yield
    except RuntimeError as error:
        ranks = f"rank {seq.rank} of the {seq.layout.ranks} that share a row"
        error.add_note(f"in {type(operation).__name__} of layer {seq.layer}, on {ranks}")
        raise


_operations: dict[str, Operation] = {}


@torch.compiler.assume_constant_result
def _name(build: Callable[..., Operation], settings: tuple[Setting, ...]) -> str:
    """A name by which the custom op finds the operation again; plain settings are what graphs are guarded on."""
    name = f"{build.__module__}.{build.__qualname__}{settings}"
    if name not in _operations:
        _operations[name] = build(*settings)
    return name


def _spread(given: list[Tensor], mask: list[bool]) -> Tensors:
    """The given tensors in their places, None elsewhere."""
    rest = iter(given)
    return tuple(next(rest) if there else None for there in mask)


def _dense(tensors: Tensors, like: Tensor) -> list[Tensor]:
    """Tensors as a custom op may return them: contiguous, none of them missing (an empty one stands for None)."""
    return [like.new_empty(0) if x is None else x.contiguous() for x in tensors]


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
def _mix(handle: Tensor, name: str, given: list[Tensor], mask: list[bool], ranks: int, spans: int) -> list[Tensor]:
    inputs = _spread(given, mask)
    out, saved = _operations[name].forward(inputs, Sequence.of(handle))
    return _unaliased(_dense((out, *saved), out), given)


@_mix.register_fake
def _(handle: Tensor, name: str, given: list[Tensor], mask: list[bool], ranks: int, spans: int) -> list[Tensor]:
    out, saved = _operations[name].like(_spread(given, mask), ranks, spans)
    return _dense((out, *saved), out)


@torch.library.custom_op("longreach::mix_backward", mutates_args=())
def _mix_backward(
    handle: Tensor,
    name: str,
    dout: Tensor,
    given: list[Tensor],
    mask: list[bool],
    results: list[Tensor],
    ranks: int,
    spans: int,
) -> list[Tensor]:
    operation, inputs = _operations[name], _spread(given, mask)
    pattern = operation.like(tuple(None if x is None else x.to("meta") for x in inputs), ranks, spans)[1]
    saved = _missing(results[1:], pattern)
    gradients = operation.backward(dout, inputs, results[0], saved, Sequence.of(handle))
    dense = [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, gradients, strict=True) if x is not None]
    return _unaliased(_dense(tuple(dense), dout), [dout, *given, *results])


@_mix_backward.register_fake
def _(
    handle: Tensor,
    name: str,
    dout: Tensor,
    given: list[Tensor],
    mask: list[bool],
    results: list[Tensor],
    ranks: int,
    spans: int,
) -> list[Tensor]:
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in given]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    handle, ctx.name, given, ctx.mask, ctx.ranks, ctx.spans = inputs
    ctx.given = len(given)
    ctx.save_for_backward(handle, *given, *output)


def _differentiate(ctx: Any, gradients: list[Tensor]) -> tuple[Any, ...]:
    handle, *held = ctx.saved_tensors
    given, results = held[: ctx.given], held[ctx.given :]
    dinputs = _mix_backward(handle, ctx.name, gradients[0], given, ctx.mask, results, ctx.ranks, ctx.spans)
    return None, None, dinputs, None, None, None


_mix.register_autograd(_differentiate, setup_context=_save)
