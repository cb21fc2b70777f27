"""Several steps per token: the rule runs as on a row of N times the length, on views of what the steps bring along.

Keys, values and betas `[B, T, H, N, …]` become `[B, T N, H, …]`. The decay of a token is that of its first step, its
query reads after its last. Queries and outputs stay `[B, T, …]`: implementations place them among the steps as they go.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..documents import Documents
from ..operation import Tensors
from ..problem import Problem
from . import DeltaInputs

STEPPED = ("k", "v", "beta", "a", "b", "erase")  # the inputs that each step has of its own


def by_step(problem: Problem[DeltaInputs]) -> Problem[DeltaInputs]:
    """The problem with a row of each step; itself where tokens take one."""
    inputs, steps = problem.inputs, problem.inputs.steps
    if inputs.k.dim() == 4:
        return problem
    rows = {name: _rows(x) for name in STEPPED if (x := getattr(inputs, name)) is not None}
    if inputs.log_decay is not None and steps > 1:
        rest = inputs.log_decay.new_zeros(()).expand(
            *inputs.log_decay.shape[:2], steps - 1, *inputs.log_decay.shape[2:]
        )
        rows["log_decay"] = torch.cat([inputs.log_decay.unsqueeze(2), rest], dim=2).flatten(1, 2)
    return replace(problem, inputs=inputs._replace(**rows), documents=problem.documents.derive(in_steps, steps))


def by_token(gradients: Tensors, problem: Problem[DeltaInputs]) -> Tensors:
    """The gradients of the inputs of `by_step(problem)` as those of the problem's."""
    inputs, steps = problem.inputs, problem.inputs.steps
    if inputs.k.dim() == 4:
        return gradients
    found = dict(zip(DeltaInputs._fields, gradients, strict=True))
    for name, x in found.items():
        if x is not None and name in STEPPED:
            found[name] = x.unflatten(1, (-1, steps)).movedim(2, 3)
        elif x is not None and name == "log_decay":
            found[name] = x[:, ::steps]
    return tuple(found.values())


def in_steps(documents: Documents, steps: int) -> Documents:
    """The documents of a row of `steps` for each token."""
    return Documents(
        documents.table * torch.tensor([1, 1, steps, steps, steps]), documents.batch, documents.length * steps
    )


def _rows(x: Tensor) -> Tensor:
    """`[B, T, H, N, …]` as `[B, T N, H, …]`: a view where the steps are before the heads in memory."""
    return x.movedim(3, 2).flatten(1, 2)
