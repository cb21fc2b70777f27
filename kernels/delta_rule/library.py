"""The delta rule by flash-linear-attention's chunk kernels; see `longreach.kernels.chunks.library`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..chunks import library
from ..problem import Problem
from . import DeltaInputs


def forward(problem: Problem[DeltaInputs], initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
    """(output, final state)."""
    kind = _kind(problem.inputs)

    def call(inputs: DeltaInputs, rest: dict[str, Any]) -> tuple[Tensor, Tensor]:
        q, k, v, beta, log_decay, *_ = inputs
        q, k = (library.by_heads(x, v.shape[2]) for x in (q, k))
        beta = torch.ones_like(v[..., 0]) if beta is None else beta
        decay = () if log_decay is None else (log_decay.float(),)
        return library.function(kind)(q, k, v, *decay, beta, **rest)

    return library.forward(problem, initial_state, call)


def refusal(problem: Problem[DeltaInputs]) -> str | None:
    """Why the library cannot run the problem, or None."""
    if problem.inputs.a is not None or problem.inputs.erase is not None or problem.op.erase_first:
        return "flash-linear-attention is not called for `erase`"
    if problem.inputs.k.dim() == 5:
        return "flash-linear-attention is not called for several steps per token"
    return library.refusal(problem, _kind(problem.inputs))


def _kind(inputs: DeltaInputs) -> str:
    if inputs.log_decay is None:
        return "chunk_delta_rule"
    return "chunk_gated_delta_rule" if inputs.log_decay.dim() == 3 else "chunk_kda"
