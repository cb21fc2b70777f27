"""Synchronisation: which operations of a step make the host wait for the device, and where they stand in the code.

On CUDA an operation waits that gives the host a value, whose result has a shape that depends on values, or that copies
to or from memory that is not pinned: a tensor made from a list is such a copy. Tensors on `meta` show the same
operations without a GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PACKAGE = Path(__file__).parents[2]
SKIPPED = (__file__, str(Path(torch.__file__).parent))  # files and folders of which no line is told

# Operations that give the host a value, or whose result has a shape that depends on values.
WAITING = frozenset(
    {
        "_local_scalar_dense",
        "_unique2",
        "bincount",
        "equal",
        "masked_select",
        "nonzero",
        "nonzero_numpy",
        "unique_consecutive",
        "unique_dim",
    }
)
# What makes a tensor from values of the host, and how many of its arguments are not those values.
FROM_VALUES: dict[Any, int] = {torch.tensor: 0, torch.as_tensor: 0, torch.asarray: 0, Tensor.new_tensor: 1}
INDEXING = frozenset({Tensor.__getitem__, Tensor.__setitem__})


class Synchronisation(NamedTuple):
    """An operation that waits for the device, and the line that asks for it."""

    operation: str
    place: str

    def __str__(self) -> str:
        return f"{self.place}: {self.operation}"


class Synchronisations:
    """Records, while it is entered, what would make the host wait for a device of the type `device`.

    It sees the thread that enters it, and what `Tensor.backward` runs in this thread: on CUDA enter also
    `torch.autograd.set_multithreading_enabled(False)`.

        with Synchronisations("cuda") as found:
            loss.backward()
        print(*found, sep="\\n")
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.found: list[Synchronisation] = []
        self._modes = ExitStack()

    def __enter__(self) -> Synchronisations:
        self._modes.enter_context(_Operations(self))
        self._modes.enter_context(_Values(self))
        return self

    def __exit__(self, *error: object) -> None:
        self._modes.close()

    def __iter__(self) -> Iterator[Synchronisation]:
        return iter(self.found)

    def __len__(self) -> int:
        return len(self.found)

    def is_here(self, x: Any) -> bool:
        """Whether x is a tensor on the device."""
        return isinstance(x, Tensor) and x.device.type == self.device

    def record(self, operation: str | None) -> None:
        if operation is not None:
            self.found.append(Synchronisation(operation, _place()))


class _Values(TorchFunctionMode):
    """Sees tensors made from values of the host, of which dispatch shows nothing."""

    def __init__(self, owner: Synchronisations) -> None:
        super().__init__()
        self.owner = owner

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, owner = kwargs or {}, self.owner
        if func is Tensor.backward:
            return self._backward(*args, **kwargs)
        if func in INDEXING and owner.is_here(args[0]) and _has_list(args[1]):
            owner.record("indexing by a list")
        result = func(*args, **kwargs)
        if func in FROM_VALUES and owner.is_here(result):
            values = [*args[FROM_VALUES[func] :], *kwargs.values()]
            if not isinstance(values[0], Tensor):
                owner.record(f"{func.__name__} of values of the host")
        return result

    def _backward(
        self,
        x: Tensor,
        gradient: Tensor | None = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        inputs: Any = None,
    ) -> None:
        """`Tensor.backward`, in which this mode stays entered; torch's own leaves it."""
        gradients = (torch.ones_like(x) if gradient is None else gradient,)
        keep = create_graph if retain_graph is None else retain_graph
        leaves = () if inputs is None else (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
        with self:
            _engine_run_backward(
                (x,), gradients, keep, create_graph, leaves, allow_unreachable=True, accumulate_grad=True
            )


class _Operations(TorchDispatchMode):
    def __init__(self, owner: Synchronisations) -> None:
        super().__init__()
        self.owner = owner

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self.owner.record(self._waits(func.overloadpacket.__name__, args, kwargs))
        return func(*args, **kwargs)

    def _waits(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """What waits, in words; None for an operation that does not."""
        if name in COPIES:
            return self._copies(*COPIES[name](args, kwargs))
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if not any(map(self.owner.is_here, tensors)):
            return None
        if name in WAITING:
            return name
        if name == "repeat_interleave" and kwargs.get("output_size") is None:
            return "repeat_interleave without output_size"
        if name in BY_MASK and BY_MASK[name](args):
            return f"{name} by a mask"
        if any(x.dim() and not self.owner.is_here(x) for x in tensors):
            return f"{name} of tensors on {self.owner.device} and on another device"
        return None

    def _copies(self, source: Tensor, target: str, non_blocking: bool) -> str | None:
        if source.device.type == target or self.owner.device not in (source.device.type, target):
            return None
        if target != self.owner.device:
            return f"a copy from {source.device.type} to {target}"
        pinned = source.is_pinned()
        return None if pinned and non_blocking else f"a {'blocking' if pinned else 'pageable'} copy to {target}"


def _to_copy(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, str, bool]:
    return args[0], torch.device(kwargs.get("device") or args[0].device).type, bool(kwargs.get("non_blocking"))


def _copy_(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, str, bool]:
    return args[1], args[0].device.type, bool(kwargs.get("non_blocking") or args[2:3] == (True,))


# The source of a copy, the type of device of its target, and whether the host goes on meanwhile.
COPIES: dict[str, Callable[[tuple[Any, ...], dict[str, Any]], tuple[Tensor, str, bool]]] = {
    "_to_copy": _to_copy,
    "copy_": _copy_,
}


def _by_mask(args: tuple[Any, ...]) -> bool:
    return any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])


def _puts_by_mask(args: tuple[Any, ...]) -> bool:
    """One value at one mask is filled in without a look at the mask."""
    _, indices, values, *rest = args
    filled = values.numel() == 1 and rest[:1] != [True] and sum(x is not None for x in indices) == 1
    return _by_mask(args) and not filled


BY_MASK: dict[str, Callable[[tuple[Any, ...]], bool]] = {
    "index": _by_mask,
    "index_put": _puts_by_mask,
    "index_put_": _puts_by_mask,
}


def _has_list(index: Any) -> bool:
    return any(isinstance(x, list) for x in (index if isinstance(index, tuple) else (index,)))


def _place() -> str:
    """The innermost line in the call that is neither of torch nor of this module; of the package by its path there."""
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(SKIPPED):
        frame = frame.f_back
    path = Path(frame.f_code.co_filename)
    return f"{path.relative_to(PACKAGE) if path.is_relative_to(PACKAGE) else path.name}:{frame.f_lineno}"
