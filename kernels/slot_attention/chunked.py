"""Slot attention as two passes of gated linear attention: one of keys, whose outputs are scores, and one of values.

Neither state depends on weights, so that both are known before either output is. On ranks, backward needs the gradient
of the weights, V_t do_t, before it knows that of the state that leaves: a third pass, which reads values by the
gradients of outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..gated_linear import GatedLinearInputs, GatedLinearRecurrence
from ..operation import Tensors
from ..problem import Problem
from . import SlotInputs

Pass = Problem[GatedLinearInputs]


def forward(problem: Problem[SlotInputs], initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
    """(out, final state)."""
    out, final, _ = attend(problem, initial_state)
    return out, final


def attend(problem: Problem[SlotInputs], initial_state: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(out, final state, weights `[B, T, H, M]` in the type of the accumulators)."""
    keys, values = _split(problem, initial_state)
    of_keys = _of_keys(problem)
    scores, last_keys = of_keys.implementation.forward(of_keys, keys)
    weights = scores.softmax(-1)
    of_values = _of_values(problem, weights)
    out, last_values = of_values.implementation.forward(of_values, values)
    out = out if problem.exact else out.to(problem.inputs.q.dtype)
    return out, torch.cat([last_keys.mT, last_values], dim=-1), weights


def final_state(problem: Problem[SlotInputs]) -> Tensor:
    """The state after each row's last token, from zero: of one pass that writes keys and values side by side."""
    _, k, v, entering, log_decay = problem.inputs
    written = _pass(problem, GatedLinearInputs(entering, entering, torch.cat([k, v], dim=-1), log_decay))
    return written.implementation.final_state(written)


def backward(
    problem: Problem[SlotInputs],
    dout: Tensor,
    dfinal_state: Tensor | None,
    initial_state: Tensor | None,
    weights: Tensor | None = None,
) -> tuple[Tensors, Tensor]:
    """The gradients of the inputs and of the initial state; `weights` where they have been kept."""
    weights = attend(problem, initial_state)[2] if weights is None else weights
    keys, values = _split(problem, initial_state)
    dkeys, dvalues = _split(problem, dfinal_state)
    of_keys, of_values = _of_keys(problem), _of_values(problem, weights)
    gradients, dvalues = of_values.op.backward(of_values, dout, dvalues, values)
    dweights, dentering, dv, dlog_decay, *_ = gradients
    known = problem.once(_dscores_once)
    dscores = known[0] if known else _of_softmax(weights, dweights)
    gradients, dkeys = of_keys.op.backward(of_keys, dscores, dkeys, keys)
    dq, dk, entering_too, _, decay_too, *_ = gradients
    results = dq, dk, dv, dentering + entering_too, dlog_decay + decay_too
    dinputs = tuple(d.to(x.dtype) for d, x in zip(results, problem.inputs, strict=True))
    return dinputs, torch.cat([dkeys.mT, dvalues], dim=-1)


def summarize_backward(
    problem: Problem[SlotInputs], dout: Tensor, initial_state: Tensor | None, weights: Tensor | None = None
) -> Tensor:
    """The gradient of the initial state that the rows' own outputs give."""
    weights = attend(problem, initial_state)[2] if weights is None else weights
    keys, values = _split(problem, initial_state)
    of_keys, of_values = _of_keys(problem), _of_values(problem, weights)
    dvalues = of_values.op.summarize_backward(of_values, dout, values, None)
    _, _, v, entering, log_decay = problem.inputs
    read = _pass(problem, GatedLinearInputs(dout.to(v.dtype), v, entering, None, log_decay))
    dweights, _ = read.implementation.forward(read, None if values is None else values.mT)
    dscores = _of_softmax(weights, dweights)
    problem.once(_dscores_once).append(dscores)
    return torch.cat([of_keys.op.summarize_backward(of_keys, dscores, keys, None).mT, dvalues], dim=-1)


def _of_keys(problem: Problem[SlotInputs]) -> Pass:
    """The pass whose outputs are scores and whose states are the keys of the slots, `[B, H, K, M]`."""
    q, k, _, entering, log_decay = problem.inputs
    return _pass(problem, GatedLinearInputs(q, k, entering, None, log_decay), problem.scale)


def _of_values(problem: Problem[SlotInputs], weights: Tensor) -> Pass:
    """The pass whose queries are weights and whose states are the values of the slots, `[B, H, M, V]`."""
    _, _, v, entering, log_decay = problem.inputs
    queries = weights.to(v.dtype) if problem.backend == "triton" else weights  # its products are of one type
    return _pass(problem, GatedLinearInputs(queries, entering, v, log_decay), exact=problem.exact)


def _pass(problem: Problem[SlotInputs], inputs: GatedLinearInputs, scale: float = 1.0, exact: bool = True) -> Pass:
    op = GatedLinearRecurrence(scale=scale)
    return Problem(op, inputs, problem.documents, problem.backend, exact=exact, unrounded=True)


def _split(problem: Problem[SlotInputs], state: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Keys `[B, H, K, M]` and values `[B, H, M, V]` of the slots, or their gradients."""
    if state is None:
        return None, None
    keys, values = state.split([problem.sizes["K"], problem.sizes["V"]], dim=-1)
    return keys.mT.contiguous(), values.contiguous()


def _of_softmax(weights: Tensor, dweights: Tensor) -> Tensor:
    """The gradient of scores, given that of their softmax."""
    weighted = weights * dweights
    return weighted.addcmul_(weights, weighted.sum(-1, keepdim=True), value=-1.0)


def _dscores_once(problem: Problem[SlotInputs]) -> list[Tensor]:
    """The gradient of scores, once it is known: the parts of a backward share it."""
    return []
