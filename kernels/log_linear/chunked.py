"""Log-linear attention in chunks: scores with the weights of levels within, a state of every level at their starts.

A chunk's states are read by queries times the weights of what each level has merged into at the token, and written by
keys at the level that they have at the chunk's last token. Between chunks the levels that no token tells apart are one,
which spares most of them where documents begin with chunks, and empty ones are left out. Backward runs a slab of chunks
again and differentiates it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from ..documents import Documents, continuing
from ..operation import recording
from ..problem import Problem
from . import CHUNK, LogLinearInputs, over_levels
from .levels import level_between, merge_matrix

SLAB = 512  # tokens whose reads and writes of all levels are held at a time


def forward(problem: Problem[LogLinearInputs], initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
    """(out, final state)."""
    out, state = problem.new_output(), problem.entering(initial_state)
    for tokens in _slabs(problem):
        part, state = _run(problem, tokens, _inputs(problem, tokens), state)
        out[:, tokens] = part.to(out.dtype)
    return out, state


def correct(problem: Problem[LogLinearInputs], out: Tensor, state: Tensor) -> Tensor:
    """Adds what the state contributes to an output from the zero state; in place."""
    entering = problem.entering(state).flatten(2, 3)
    for tokens in _slabs(problem, problem.reach):
        out[:, tokens] += (_reads(problem, tokens) @ entering).transpose(1, 2).to(out.dtype)
    return out


def summarize_backward(problem: Problem[LogLinearInputs], dout: Tensor, initial_state: Tensor | None) -> Tensor:
    """The gradient of the initial state that the rows' own outputs give."""
    total = problem.new_states()
    for tokens in _slabs(problem, problem.reach):
        dpart = dout[:, tokens].to(problem.dtype).transpose(1, 2)
        total += (_reads(problem, tokens).mT @ dpart).view_as(total)
    return total


def backward(
    problem: Problem[LogLinearInputs], dout: Tensor, dfinal_state: Tensor | None, initial_state: Tensor | None
) -> tuple[tuple[Tensor, ...], Tensor]:
    """The gradients of the inputs and of the initial state."""
    slabs, states = list(_slabs(problem)), [problem.entering(initial_state)]
    for tokens in slabs[:-1]:
        states.append(_run(problem, tokens, _inputs(problem, tokens), states[-1])[1])
    gradients = [torch.empty_like(x) for x in problem.inputs]
    dstate = problem.leaving(dfinal_state)
    for tokens, state in zip(reversed(slabs), reversed(states), strict=True):
        with recording():
            leaves = [x.detach().requires_grad_() for x in (*_inputs(problem, tokens), state)]
            out, after = _run(problem, tokens, LogLinearInputs(*leaves[:-1]), leaves[-1])
            *parts, dstate = torch.autograd.grad([out, after], leaves, [dout[:, tokens].to(out.dtype), dstate])
        for whole, part in zip(gradients, parts, strict=True):
            whole[:, tokens] = part
    return tuple(gradients), dstate


def _slabs(problem: Problem[LogLinearInputs], stop: int | None = None) -> Iterator[slice]:
    stop = problem.inputs.q.shape[1] if stop is None else stop
    return (slice(start, min(start + SLAB, stop)) for start in range(0, stop, SLAB))


def _inputs(problem: Problem[LogLinearInputs], tokens: slice) -> LogLinearInputs:
    return LogLinearInputs(*(x[:, tokens] for x in problem.inputs))


def _run(
    problem: Problem[LogLinearInputs], tokens: slice, inputs: LogLinearInputs, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The output of a slab's tokens `[B, t, H, V]`, and the state after them; differentiable."""
    exact, (heads, levels) = problem.dtype, inputs.level_weights.shape[2:]
    size = min(CHUNK, problem.inputs.q.shape[1])
    chunks = slice(tokens.start // size, -(-tokens.stop // size))
    ids, positions, before = problem.documents.on(problem.device, _chunked_documents, size)
    ids, positions, before = (x[:, chunks, None, :, None] for x in (ids, positions, before[..., None]))
    q, k, v, decay, weights = (
        _in_chunks(x.to(exact), size) for x in inputs._replace(log_decay=inputs.log_decay.unsqueeze(-1))
    )
    real = ids >= 0
    seen = (ids == ids.mT) & real & ids.new_ones(size, size, dtype=torch.bool).tril_()
    sums = seen.double() @ decay.double()  # of each document's own, so that none changes another's rounding
    decays = _exponential(sums - sums.mT, seen, exact)
    entering = _exponential(sums, (ids == before) & real, exact)
    leaving = _exponential(sums[:, :, :, -1:] - sums, (ids == ids[:, :, :, -1:]) & real, exact)

    within = level_between(positions.mT, positions, levels).expand(*decays.shape)
    scores = _of_heads(problem.scale * q @ k.mT, heads) * decays * weights.gather(-1, within)
    low, high = problem.documents.derive(_levels_read, size, levels)
    some, every = (torch.arange(*bounds, device=ids.device) for bounds in ((low, high + 1), (0, levels)))
    merged = level_between(positions[:, :, :, :1] - 1, positions, levels)
    reads = _at_levels(_of_heads(problem.scale * q, heads), _merged_weights(weights, merged, some) * entering)
    transitions = merge_matrix(merged[:, :, :, -1, 0], levels, exact)[..., low : high + 1] * entering[:, :, :, -1:]
    at = level_between(positions, positions[:, :, :, -1:], levels)
    k = _of_heads(k, heads)

    def written(chunks: slice, at: Tensor, into: Tensor) -> Tensor:
        """What chunks write `[B, n, H, levels, K, V]`, each token at a level `at` among `into`."""
        keys = _at_levels(k[:, chunks], (at[:, chunks] == into).to(exact) * leaving[:, chunks])
        return (keys.mT @ v[:, chunks]).unflatten(3, (-1, k.shape[-1]))

    inner = written(slice(-1), at.clamp(min=low), some)
    states = [torch.cat([state[:, :, : low + 1].sum(2, keepdim=True), state[:, :, low + 1 : high + 1]], dim=2)]
    for n in range(inner.shape[1]):
        states.append(over_levels(transitions[:, n, :, low : high + 1], states[n]) + inner[:, n])
    final = over_levels(transitions[:, -1], states[-1]) + written(slice(-1, None), at, every)[:, 0]
    out = scores @ v + reads @ torch.stack(states, dim=1).flatten(3, 4)
    return out.transpose(2, 3).flatten(1, 2)[:, : tokens.stop - tokens.start], final


def _reads(problem: Problem[LogLinearInputs], tokens: slice) -> Tensor:
    """What tokens `[B, H, t, L K]` read of the state that enters their row."""
    exact, (heads, levels) = problem.dtype, problem.inputs.level_weights.shape[2:]
    positions, ids = problem.documents.positions(problem.device), problem.documents.ids(problem.device)
    decay = problem.once(_sums)[:, tokens].transpose(1, 2)[..., None]
    reached = (ids[:, tokens] == ids[:, :1]) & problem.continues[:, None]
    merged = level_between(positions[:, :1] - 1, positions[:, tokens], levels)[:, None, :, None]
    weights = problem.inputs.level_weights[:, tokens].to(exact).transpose(1, 2)
    q = _of_heads(problem.scale * problem.inputs.q[:, tokens].to(exact).transpose(1, 2), heads)
    every = torch.arange(levels, device=weights.device)
    return _at_levels(
        q, _merged_weights(weights, merged, every) * _exponential(decay, reached[:, None, :, None], exact)
    )


def _sums(problem: Problem[LogLinearInputs]) -> Tensor:
    """Sums of log decays from each row's first token on, in float64."""
    return problem.inputs.log_decay.double().cumsum(1)


def _exponential(exponents: Tensor, where: Tensor, dtype: torch.dtype) -> Tensor:
    """e^exponents in `dtype`, and 0 elsewhere, with gradients of 0."""
    return exponents.masked_fill(~where, -torch.inf).exp().to(dtype)


def _merged_weights(weights: Tensor, merged: Tensor, entering: Tensor) -> Tensor:
    """For each level that enters the weight of the one that it has become, given up to where they have merged."""
    return weights.gather(-1, torch.maximum(entering, merged).expand(*weights.shape[:-1], -1))


def _at_levels(x: Tensor, weights: Tensor) -> Tensor:
    """x `[…, K]` times each of `weights` `[…, L]`: `[…, L K]`."""
    return (weights.unsqueeze(-1) * x.unsqueeze(-2)).flatten(-2)


def _of_heads(x: Tensor, heads: int) -> Tensor:
    """Groups `[…, G, t, D]` repeated for their heads."""
    return x if x.shape[-3] == heads else x.repeat_interleave(heads // x.shape[-3], dim=-3)


def _in_chunks(x: Tensor, size: int) -> Tensor:
    """`[B, t, H, D]` as `[B, N, H, C, D]`, filled up with zeros."""
    filled = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % size))
    return filled.unflatten(1, (-1, size)).transpose(2, 3)


def _chunked_documents(documents: Documents, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Document and position of each token `[B, N, C]`, and the document of the state before each chunk `[B, N]`.

    −1 for padding, −2 for no state; what fills up the last chunk is like its last token, and so the last one of it.
    """
    ids, positions = documents.ids().long(), documents.positions().long()
    first = torch.where(continuing(documents), ids[:, 0], -2)
    before = torch.cat([first[:, None], ids[:, size - 1 : -1 : size]], dim=1)
    ids, positions = (
        torch.cat([x, x[:, -1:].expand(-1, -x.shape[1] % size)], dim=1).unflatten(1, (-1, size))
        for x in (ids, positions)
    )
    return ids, positions, before


def _levels_read(documents: Documents, size: int, levels: int) -> tuple[int, int]:
    """The lowest and highest level that tokens read of the states at the starts of chunks.

    No token tells lower ones apart, since they have merged when the chunk begins: all of a document whose chunks begin
    at multiples of their size.
    """
    ids, positions, before = documents.derive(_chunked_documents, size)
    first = positions[:, :, 0][(ids[:, :, 0] == before) & (before >= 0)]
    if not len(first):
        return 0, 0
    return int(level_between(first - 1, first, levels).min()), int(level_between(0 * first, positions.max(), levels)[0])
