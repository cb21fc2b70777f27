"""Rows: a recurrence as an operation on rows that one device holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .documents import Documents
from .operation import Tensors


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
        problem = self.op.problem(inputs[:-1], where, backend=self.backend)
        dinputs, dinitial = self.op.backward(problem, dout, dfinal, initial)
        if initial is None:
            return *dinputs, None
        return *dinputs, self.op.with_units(dinitial, torch.zeros_like(dinitial)).to(initial.dtype)
