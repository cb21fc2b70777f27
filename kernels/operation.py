"""Operation: an op with its own backward, and the autograd function through which every op runs.

The public op on one device and the op on ranks that share rows run alike, and differ only in `where`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

Tensors: TypeAlias = tuple[Tensor | None, ...]


class Operation(Protocol):
    """One op as forward and backward on explicit tensors; both run without autograd.

    `where` describes the tokens of the tensors: documents on one device, or a sequence that ranks share.
    """

    def forward(self, inputs: Tensors, where: Any, /) -> tuple[Tensors, Tensors]:
        """The outputs, and what backward needs besides inputs and outputs."""
        ...

    def backward(
        self, gradients: Tensors, inputs: Tensors, outputs: tuple[Tensor, ...], saved: Tensors, where: Any, /
    ) -> Tensors:
        """The gradient of each input (None for an input that is None), from those of the outputs (None for 0)."""
        ...


class Elsewhere(Protocol):
    """Where tensors are kept that leave their device."""

    def pack(self, x: Tensor, /) -> Any:
        """What stands for the tensor."""
        ...

    def unpack(self, kept: Any, /) -> Tensor:
        """The tensor again."""
        ...


class Kept:
    """The results of the ops of one layer, kept for the recomputation of the layer in backward.

    The first call for a slot stores its result and the second takes it back, so that a recomputation repeats no
    collective. A slot is therefore used once in a layer's forward. elsewhere: where to keep the tensors; None keeps
    them as they are.
    """

    def __init__(self, elsewhere: Elsewhere | None = None) -> None:
        self.elsewhere = elsewhere
        self._results: dict[Hashable, Any] = {}
        self._parts: dict[str, Kept] = {}

    def of(self, part: str) -> Kept:
        """The results of one part of the layer, which has slots of its own."""
        return self._parts.setdefault(part, Kept(self.elsewhere))

    def take(self, slot: Hashable) -> Any:
        """What the first call stored; None if this is the first."""
        results = self._results.pop(slot, None)
        if self.elsewhere is None or results is None:
            return results
        return tuple(tuple(None if x is None else self.elsewhere.unpack(x) for x in part) for part in results)

    def store(self, slot: Hashable, result: tuple[Tensors, Tensors]) -> None:
        if self.elsewhere is None:
            self._results[slot] = result
            return
        pack = self.elsewhere.pack
        self._results[slot] = tuple(tuple(None if x is None else pack(x) for x in part) for part in result)


def run(
    operation: Operation, inputs: Tensors, where: Any, *, kept: Kept | None = None, slot: str = "", note: str = ""
) -> tuple[Tensor, ...]:
    """The operation's outputs, differentiable in every input.

    kept, slot: where to keep the results for a recomputation. note: added to a RuntimeError, to say where it arose.
    """
    return Run.call(operation, where, kept, slot, note, *inputs)


@contextmanager
def recording() -> Iterator[None]:
    """Autograd records what runs within, for ops whose backward is that of their forward.

    `torch.enable_grad` alone does not do: in a compiled graph ops run where torch has left autograd's dispatch keys
    out, and there is no public way to have them back.
    """
    included, excluded = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    for key in (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.ADInplaceOrView):
        excluded = excluded.remove(key)
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield


def own_outputs(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of an autograd function; where torch compiles its outputs are copies, which the compiler may fuse."""

    @wraps(forward)
    def with_own_outputs(ctx: Any, *arguments: Any) -> Any:
        outputs = forward(ctx, *arguments)
        if not torch.compiler.is_compiling():
            return outputs
        if isinstance(outputs, Tensor):
            return outputs.clone()
        return tuple(x.clone() if isinstance(x, Tensor) else x for x in outputs)

    return with_own_outputs


class _NoBackward:
    """The context of a forward that no backward follows."""

    needs_input_grad = ()

    def set_materialize_grads(self, value: bool) -> None: ...

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...


# Compiled by torch 2.11, and not by 2.13, an output that is the result of an operation in place, or of a conversion to
# the type at hand, loses its gradients without a word.
LOSES_GRADIENTS = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13)


class Function(torch.autograd.Function):
    """Base of this package's autograd functions, which run through `call`."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if LOSES_GRADIENTS and "forward" in cls.__dict__:
            cls.forward = staticmethod(own_outputs(cls.forward))  # type: ignore[method-assign]

    @classmethod
    def call(cls, *arguments: Any) -> Any:
        """What `apply` returns, without what autograd costs a single token where no gradient is taken."""
        return cls.runner()(*arguments)

    @classmethod
    def runner(cls) -> Callable[..., Any]:
        """What `call` calls, for callers to whom one frame more matters."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return cls.apply
        return partial(cls.forward, _NoBackward())


class Run(Function):
    """The one through which ops run: see `run`."""

    @staticmethod
    def forward(
        ctx: Any, operation: Operation, where: Any, kept: Kept | None, slot: str, note: str, *inputs: Tensor | None
    ) -> Tensors:
        results = None if kept is None else kept.take(slot)
        if results is None:
            try:
                results = operation.forward(inputs, where)
            except RuntimeError as error:
                error.add_note(note)
                raise
            if kept is not None:
                kept.store(slot, results)
        outputs, saved = results
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, *outputs, *saved)
        ctx.operation, ctx.where, ctx.note, ctx.counts = operation, where, note, (len(inputs), len(outputs))
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        number, produced = ctx.counts
        tensors = ctx.saved_tensors
        inputs, outputs, saved = tensors[:number], tensors[number : number + produced], tensors[number + produced :]
        try:
            dinputs = ctx.operation.backward(gradients, inputs, outputs, saved, ctx.where)
        except RuntimeError as error:
            error.add_note(ctx.note)
            raise
        return None, None, None, None, None, *dinputs
