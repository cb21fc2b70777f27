"""Gated linear attention by flash-linear-attention's chunk kernels; see `longreach.kernels.chunks.library`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..chunks import library
from ..problem import Problem
from .parts import GatedLinearInputs


def forward(problem: Problem[GatedLinearInputs], initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
    """(output, final state)."""
    kind = _kind(problem.inputs)

    def call(inputs: GatedLinearInputs, rest: dict[str, Any]) -> tuple[Tensor, Tensor]:
        q, k, v, log_decay, *_ = inputs
        q, k = (library.by_heads(x, v.shape[2]) for x in (q, k))
        if log_decay is not None and log_decay.dim() < 3:
            log_decay = log_decay.expand(*v.shape[:2], *log_decay.shape)
        decay = None if log_decay is None else log_decay.float()
        return library.function(kind)(q, k, v, g=decay, **rest)

    return library.forward(problem, initial_state, call)


def refusal(problem: Problem[GatedLinearInputs]) -> str | None:
    """Why the library cannot run the problem, or None."""
    op, inputs = problem.op, problem.inputs
    if op.read != "inclusive" or op.raw or op.stabilised or inputs.value_log_decay is not None:
        return "flash-linear-attention is called for the plain recurrence alone"
    return library.refusal(problem, _kind(inputs))


def _kind(inputs: GatedLinearInputs) -> str:
    by_channel = inputs.log_decay is not None and inputs.log_decay.dim() in (2, 4)
    return "chunk_gla" if by_channel else "chunk_simple_gla"
