"""Mesa in chunks: states at their starts, then conjugate gradients for the queries of some chunks at a time.

A product with the covariances H_t of all tokens of a chunk is a read of a gated linear memory whose values are the
keys: (x ⊙ e^{G}) H_start plus scores within the chunk. For a solution x of x (H + R) = q with the gradient dx, that of
q is the solution y of y (H + R) = dx, and that of H is −xᵀ y. So backward solves for y, and the rest is the backward of
one gated linear read by x, whose outputs' gradients are −y where values are keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..documents import Documents, continuing
from ..gated_linear import GatedLinearInputs, GatedLinearRecurrence
from ..problem import Problem
from . import MesaInputs

CHUNK = 64
SLAB = 512  # tokens that are solved for at a time: what iterations read again and again stays in a cache
TINY = 1e-30  # keeps 0 / 0 away where a system is solved before the last iteration


class _Slab(NamedTuple):
    """Some chunks `[B, N, H, C, …]`, in the type of the accumulators."""

    tokens: slice
    q: Tensor
    k: Tensor
    v: Tensor
    regulariser: Tensor  # [H, 1, K]
    scores: Tensor  # [B, N, H, C, C]: beta_j e^{G_i − G_j} where token i sees token j of its chunk, else 0
    entering: Tensor  # [B, N, H, C, 1]: e^{G_i} where token i sees the state that enters its chunk, else 0
    states: Tensor  # [B, N, H, K, K + V]: those that enter

    def read(self, x: Tensor, keys: bool) -> Tensor:
        """x_t H_t, or x_t S_t."""
        size = self.k.shape[-1]
        memory = self.states[..., :size] if keys else self.states[..., size:]
        return (x * self.entering) @ memory + ((x @ self.k.mT) * self.scores) @ (self.k if keys else self.v)

    def read_backward(self, dout: Tensor) -> Tensor:
        """The gradient of x, given that of x_t S_t."""
        memory = self.states[..., self.k.shape[-1] :]
        return (dout @ memory.mT) * self.entering + ((dout @ self.v.mT) * self.scores) @ self.k

    def solve(self, q: Tensor, iterations: int) -> Tensor:
        """x_t with x_t (H_t + R) = q_t, by conjugate gradients."""
        x, rest = torch.zeros_like(q), q
        direction, error = rest, rest.square().sum(-1, keepdim=True)
        for _ in range(iterations):
            image = self.read(direction, keys=True).addcmul_(self.regulariser, direction)
            step = error / (direction * image).sum(-1, keepdim=True).clamp_(min=TINY)
            x, rest = torch.addcmul(x, step, direction), torch.addcmul(rest, step, image, value=-1)
            before, error = error, rest.square().sum(-1, keepdim=True)
            direction = torch.addcmul(rest, error / before.clamp(min=TINY), direction)
        return x

    def whole(self, x: Tensor) -> Tensor:
        """`[B, N, H, C, D]` as `[B, T, H, D]`."""
        return x.transpose(2, 3).flatten(1, 2)[:, : self.tokens.stop - self.tokens.start]


def forward(problem: Problem[MesaInputs], initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
    """(out, final state)."""
    out, final = problem.new_output(), problem.new_states()
    for slab, after in _slabs(problem, problem.entering(initial_state)):
        solved = slab.solve(slab.q, problem.op.iterations)
        out[:, slab.tokens] = slab.whole(slab.read(solved, keys=False)).to(out.dtype)
        final = after
    return out, final


def final_state(problem: Problem[MesaInputs]) -> Tensor:
    """The state after each row's last token, from zero."""
    *_, (_, final) = _slabs(problem, problem.new_states())
    return final


def backward(
    problem: Problem[MesaInputs], dout: Tensor, dfinal_state: Tensor | None, initial_state: Tensor | None
) -> tuple[tuple[Tensor, ...], Tensor]:
    """The gradients of the inputs and of the initial state."""
    k, v, beta = problem.inputs.k, problem.inputs.v, problem.inputs.beta
    solved, dq = _solutions(problem, dout, initial_state)
    read, dread = _as_read(problem, solved, dq, dout)
    gradients, dinitial = read.op.backward(read, dread, dfinal_state, initial_state)
    _, dkeys, dvalues, dlog_decay, *_ = gradients
    joined = torch.cat([k, v], dim=-1).to(problem.dtype)
    dbeta = (dvalues * joined).sum(-1)
    dk, dv = (dvalues * beta.to(problem.dtype)[..., None]).split([k.shape[-1], v.shape[-1]], dim=-1)
    dregulariser = -(solved * dq).sum((0, 1))
    results = dq, dkeys + dk, dv, dlog_decay, dbeta, dregulariser
    return tuple(d.to(x.dtype) for d, x in zip(results, problem.inputs, strict=True)), dinitial


def summarize_backward(problem: Problem[MesaInputs], dout: Tensor, initial_state: Tensor | None) -> Tensor:
    """The gradient of the initial state that the rows' own outputs give."""
    read, dread = _as_read(problem, *_solutions(problem, dout, initial_state), dout)
    return read.op.summarize_backward(read, dread, initial_state, None)


def _solutions(problem: Problem[MesaInputs], dout: Tensor, initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
    """What queries are solved to, and their gradients, `[B, T, H, K]`: solved once for all parts of a backward."""
    kept = problem.once(_kept)
    if not kept:
        dout = dout.to(problem.dtype)
        solved, dq = (torch.empty_like(problem.inputs.q, dtype=problem.dtype) for _ in range(2))
        for slab, _ in _slabs(problem, problem.entering(initial_state)):
            solved[:, slab.tokens] = slab.whole(slab.solve(slab.q, problem.op.iterations))
            dsolved = slab.read_backward(_chunks(dout[:, slab.tokens], slab.q.shape[3]))
            dq[:, slab.tokens] = slab.whole(slab.solve(dsolved, problem.op.iterations))
        kept.extend((solved, dq))
    solved, dq = kept
    return solved, dq


def _kept(problem: Problem[MesaInputs]) -> list[Tensor]:
    return []


def _as_read(
    problem: Problem[MesaInputs], solved: Tensor, dq: Tensor, dout: Tensor
) -> tuple[Problem[GatedLinearInputs], Tensor]:
    """The read of both memories by what queries are solved to, and the gradient of its output."""
    _, k, v, log_decay, beta, _ = problem.inputs
    exact = problem.dtype
    values = torch.cat([k, v], dim=-1).to(exact) * beta.to(exact)[..., None]
    inputs = GatedLinearInputs(solved, k.to(exact), values, log_decay.to(exact), None, None, None)
    read = GatedLinearRecurrence(scale=1.0).problem(inputs, problem.documents, backend="chunked", exact=True)
    return read, torch.cat([-dq, dout.to(exact)], dim=-1)


def _slabs(problem: Problem[MesaInputs], state: Tensor) -> Iterator[tuple[_Slab, Tensor]]:
    """Each slab in the order of the row, and the state after it."""
    length = problem.inputs.q.shape[1]
    size = min(CHUNK, length)
    ids, before = problem.documents.on(problem.device, _ids, size)
    for start in range(0, length, SLAB):
        tokens = slice(start, min(start + SLAB, length))
        own = ids[:, start // size :][:, : -(-(tokens.stop - start) // size)]
        slab, state = _slab(problem, tokens, own, before[:, start // size :][:, : own.shape[1]], state)
        yield slab, state


def _slab(
    problem: Problem[MesaInputs], tokens: slice, own: Tensor, before: Tensor, state: Tensor
) -> tuple[_Slab, Tensor]:
    """The slab of these tokens, of documents `own` `[B, N, 1, C, 1]` after `before` `[B, N, 1, 1, 1]`."""
    exact, size = problem.dtype, own.shape[3]
    *sequences, regulariser = problem.inputs
    parts = (_chunks(x[:, tokens] if x.dim() > 3 else x[:, tokens, :, None], size) for x in sequences)
    q, k, v, log_decay, beta = (x.to(exact) for x in parts)
    real, last = own >= 0, own[:, :, :, -1:]
    seen = (own == own.mT) & real & own.new_ones(size, size, dtype=torch.bool).tril_()
    sums = seen.double() @ log_decay.double()  # of each document's own, so that none changes another's rounding
    scores = torch.where(seen, (sums - sums.mT).clamp_(max=0.0).exp(), 0.0).to(exact) * beta.mT
    entering = torch.where((own == before) & real, sums.exp(), 0.0).to(exact)
    leaving = torch.where((own == last) & real, (sums[:, :, :, -1:] - sums).clamp_(max=0.0).exp(), 0.0).to(exact)
    written = (k * leaving * beta).mT @ torch.cat([k, v], dim=-1)
    states = torch.empty_like(written)
    for n in range(states.shape[1]):
        states[:, n] = state
        state = entering[:, n, :, -1:] * state + written[:, n]
    return _Slab(tokens, q, k, v, regulariser.to(exact)[:, None], scores, entering, states), state


def _chunks(x: Tensor, size: int) -> Tensor:
    """`[B, T, H, D]` as `[B, N, H, C, D]`, filled up with zeros."""
    filled = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % size))
    return filled.unflatten(1, (-1, size)).transpose(2, 3)


def _ids(documents: Documents, size: int) -> tuple[Tensor, Tensor]:
    """The document of each token, in chunks `[B, N, 1, C, 1]`, and of the state before each chunk `[B, N, 1, 1, 1]`.

    -1 for padding, -2 for no state; what fills up the last chunk is of its last document, which so reaches the end.
    """
    ids = documents.ids().long()
    first = torch.where(continuing(documents), ids[:, 0], -2)
    before = torch.cat([first[:, None], ids[:, size - 1 : -1 : size]], dim=1)
    filled = torch.cat([ids, ids[:, -1:].expand(-1, -ids.shape[1] % size)], dim=1).unflatten(1, (-1, size))
    return filled[:, :, None, :, None], before[:, :, None, None, None]
