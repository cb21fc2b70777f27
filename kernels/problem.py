"""Problem: one call of an op with a state, as its implementations get it; and such calls on rows of one device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from .dims import shape_of, sizes_of
from .documents import Documents, Runs, continuing
from .operation import Tensors

Record = TypeVar("Record", bound=tuple[Any, ...])
Made = TypeVar("Made")


@dataclass(frozen=True)
class Problem(Generic[Record]):
    """One call of an op: its inputs, their documents, and the backend that runs it.

    exact: whether outputs stay in the type of the accumulators, for arithmetic on them to follow. unrounded: whether
    gradients of queries, keys and values do, for the same reason. out: gives the output of forward, for backward.
    """

    op: Any  # a Recurrence, with the settings of its class
    inputs: Record
    documents: Documents
    backend: str
    exact: bool = False
    unrounded: bool = False
    out: Callable[[], Tensor] | None = None
    _made: dict[Callable[..., Any], Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def once(self, make: Callable[[Problem[Record]], Made]) -> Made:
        """`make(problem)`, made by the first of the calls on this problem and kept for the others.

        What several parts of a run need, such as sums of decays: the forward parts of a segment share a problem, and
        the backward parts another one. It is freed with the problem.
        """
        if make not in self._made:
            self._made[make] = make(replace(self))  # a copy, so that nothing kept here refers back to it
        return self._made[make]

    @cached_property
    def implementation(self) -> Any:
        """What runs the backend, see `Recurrence.implementation`."""
        return self.op.implementation(self.backend)

    @cached_property
    def sizes(self) -> dict[str, int]:
        """What the letters of `Recurrence.dims` stand for."""
        return sizes_of(self.op.dims, self.inputs)

    @cached_property
    def scale(self) -> float:
        """The factor of the queries: by default K^(-1/2)."""
        return self.sizes["K"] ** -0.5 if self.op.scale is None else self.op.scale

    @cached_property
    def dtype(self) -> torch.dtype:
        """The type of accumulators and states: float32, or float64 for float64 inputs."""
        return accumulator(self.inputs[0])

    @property
    def device(self) -> torch.device:
        return self.inputs[0].device

    @property
    def reach(self) -> int:
        """The tokens up to which an entering state reaches in some row."""
        return self.documents.derive(_reach)

    @property
    def through(self) -> Tensor:
        """bool `[B]`: the rows that one document passes through, begun before and not ended in them."""
        return self.documents.on(self.device, _going_through)

    @property
    def continues(self) -> Tensor:
        """bool `[B]`: the rows whose first token continues a document, which an entering state enters."""
        return self.documents.on(self.device, continuing)

    def new_output(self) -> Tensor:
        """An empty output, in the inputs' type or, where exact, in that of the accumulators."""
        shape = shape_of(self.op.out, self.sizes)
        return torch.empty(shape, dtype=self.dtype if self.exact else self.inputs[0].dtype, device=self.device)

    def gradient_type(self, x: Tensor) -> torch.dtype:
        """The type of the gradient of queries, keys or values x."""
        return self.dtype if self.unrounded else x.dtype

    def new_states(self) -> Tensor:
        """Zeros for the states of all rows."""
        return torch.zeros(shape_of(self.op.state, self.sizes), dtype=self.dtype, device=self.device)

    def entering(self, state: Tensor | None) -> Tensor:
        """The state that enters each row: zero where a row does not continue a document."""
        if state is None:
            return self.new_states()
        if all(self.documents.continues):
            return state.to(self.dtype).contiguous()
        return torch.where(per_row(self.continues, state), state.to(self.dtype), 0.0).contiguous()

    def leaving(self, dfinal_state: Tensor | None) -> Tensor:
        """A copy of the gradient of the final state; 0 in rows that end in padding, after which every state is 0."""
        if dfinal_state is None:
            return self.new_states()
        gradient = dfinal_state.to(self.dtype, copy=True)
        if self.documents.has_padding:
            gradient.masked_fill_(per_row(self.documents.on(self.device, _ending_in_padding), gradient), 0.0)
        return gradient

    def only(self, rows: Tensor, state: Tensor) -> Tensor:
        """The states `[B, …]` of these rows, bool `[B]` of `tokens`, and 0 in others."""
        return state if self.documents.goes_through else torch.where(per_row(rows, state), state, 0.0)

    def tokens(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """For each token t in order: t, whether it continues the document before it, and whether it is no padding.

        Both are bool `[B]`. What references, which go token by token, need to know of documents.
        """
        ids = self.documents.ids(self.device)
        goes_on = self.continues
        for t in range(self.documents.length):
            yield t, goes_on if t == 0 else ids[:, t] == ids[:, t - 1], ids[:, t] >= 0


def accumulator(x: Tensor) -> torch.dtype:
    """float32, or float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def per_row(rows: Tensor, like: Tensor) -> Tensor:
    """One bool per row, to broadcast against `like` `[B, …]`."""
    return rows.view(-1, *[1] * (like.dim() - 1))


def first_runs(documents: Documents) -> Runs:
    """The first run of each row."""
    return documents.columns.at(documents.columns.start == 0)


def _reach(documents: Documents) -> int:
    return int((first_runs(documents).length * continuing(documents)).max())


def _going_through(documents: Documents) -> Tensor:
    return continuing(documents) & (first_runs(documents).length == documents.length)


def _ending_in_padding(documents: Documents) -> Tensor:
    runs = documents.columns
    return ~runs.real[runs.stop == documents.length]


@dataclass(frozen=True)
class Rows:
    """A recurrence on rows that one device holds, a `kernels.operation.Operation`; the last input is the state."""

    op: Any  # a Recurrence
    backend: str

    def forward(self, inputs: Tensors, where: Documents) -> tuple[Tensors, Tensors]:
        problem = self.op.problem(inputs[:-1], where, backend=self.backend)
        return problem.implementation.forward(problem, inputs[-1]), ()

    def backward(
        self, gradients: Tensors, inputs: Tensors, outputs: tuple[Tensor, ...], saved: Tensors, where: Documents
    ) -> Tensors:
        (dout, dfinal), (out, final), initial = gradients, outputs, inputs[-1]
        dout = torch.zeros_like(out) if dout is None else dout
        dfinal = None if dfinal is None else self.op.with_units(dfinal, final)
        problem = replace(self.op.problem(inputs[:-1], where, backend=self.backend), out=lambda: out)
        dinputs, dinitial = self.op.backward(problem, dout, dfinal, initial)
        if initial is None:
            return *dinputs, None
        return *dinputs, self.op.with_units(dinitial, torch.zeros_like(dinitial)).to(initial.dtype)
