"""Gated linear attention in chunks: forward, a hand-written backward, and what an entering state adds.

With S_n the state that enters chunk n, and the factors `enter`, `leave`, `through` of `decay.py`,

    O = A V + (Q ⊙ enter) S_n                A_ij = (q_i · k_j) e^{G_i − G_j} for j <= i
    S_{n+1} = through ⊙ S_n + (K ⊙ leave)ᵀ V
    dS_n = through ⊙ dS_{n+1} + (Q ⊙ enter)ᵀ dO
    dV = Aᵀ dO + (K ⊙ leave) dS_{n+1}        dA = dO Vᵀ
    dQ = dA's part + enter ⊙ (dO S_nᵀ)       dK = dA's part + leave ⊙ (V dS_{n+1}ᵀ)
    dg_t = Σ_{s>=t} (q_s ⊙ dq_s − k_s ⊙ dk_s) + Σ_v S_{n+1} ⊙ dS_{n+1}     over the rest of the chunk

(Hua et al., 2022; Yang et al., 2024, arXiv 2312.06635). Backward sweeps once from the left for the states at the
starts of slabs, then from the right, where each slab recomputes its own: no more states than that are ever kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..documents import Documents
from .decay import ChannelDecay, TokenDecay
from .slabs import Block, Borders, Grid, Slab, blocks, load, store


@dataclass(frozen=True)
class Problem:
    """A whole call: its inputs, and how its blocks are cut."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    documents: Documents
    scale: float

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in: float32, or float64 for float64."""
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32

    @property
    def heads(self) -> int:
        return self.v.shape[2]

    @property
    def state_shape(self) -> tuple[int, int, int, int]:
        return self.v.shape[0], self.heads, self.k.shape[-1], self.v.shape[-1]

    def new_states(self) -> Tensor:
        return torch.zeros(self.state_shape, dtype=self.dtype, device=self.q.device)

    def entering(self, state: Tensor | None) -> Tensor:
        """The state that enters each row: zero where a row does not continue a document."""
        if state is None:
            return self.new_states()
        if all(self.documents.continues):
            return state.to(self.dtype)
        keep = torch.tensor(self.documents.continues, device=state.device)[:, None, None, None]
        return torch.where(keep, state.to(self.dtype), 0.0)

    @property
    def reach(self) -> int:
        """The tokens up to which an entering state reaches in some row."""
        rows = zip(self.documents.runs, self.documents.continues, strict=True)
        return max((row[0].stop for row, continues in rows if continues), default=0)

    def sweeps(self) -> list[Sweep]:
        repeats = math.lcm(self.heads // self.q.shape[2], self.heads // self.k.shape[2])
        return [Sweep(self, block) for block in blocks(self.v.shape[0], self.heads, self.heads // repeats)]


class Sweep:
    """One block of rows and heads: its parts of the inputs, its grid of slabs, its workspaces."""

    def __init__(self, problem: Problem, block: Block) -> None:
        self.block, self.scale, self.heads = block, problem.scale, problem.heads
        self.q, self.k, self.v = (block.of(x, problem.heads) for x in (problem.q, problem.k, problem.v))
        rows, length, heads, self.value_dim = self.v.shape
        self.key_dim = self.k.shape[-1]
        self.grid = Grid(rows, heads, length, problem.dtype, problem.q.device)
        self.borders = Borders(problem.documents.rows(block.rows.start, block.rows.stop), self.grid)
        self.decay = self._decay(problem.log_decay)
        self.works: dict[str, Tensor] = {}

    def _decay(self, log_decay: Tensor | None) -> TokenDecay | ChannelDecay:
        if log_decay is not None and log_decay.dim() == 4:
            return ChannelDecay(self.block.of(log_decay, self.heads), self.grid)
        if log_decay is not None and log_decay.dim() == 3:
            return TokenDecay(self.block.of(log_decay, self.heads), self.grid)
        constant = self.v.new_zeros(self.grid.heads) if log_decay is None else log_decay[self.block.heads]
        return TokenDecay(constant.expand(self.grid.rows, self.grid.length, -1), self.grid, constant)

    def work(self, name: str, dim: int, slab: Slab) -> Tensor:
        """The workspace `name` for a slab, `[N, C, dim]`; zero when first used."""
        if name not in self.works:
            self.works[name] = self.grid.workspace(dim).zero_()
        return self.works[name][: slab.chunks].view(-1, self.grid.chunk, dim)

    def load(self, name: str, x: Tensor, slab: Slab) -> Tensor:
        self.work(name, x.shape[-1], slab)
        return load(self.works[name], x, slab)

    def load_queries(self, slab: Slab) -> Tensor:
        q = self.load("q", self.q, slab)
        return q if self.scale == 1.0 else q.mul_(self.scale)

    def prepare(self, slab: Slab, *, scores: bool = True) -> None:
        self.decay.load(slab, self.borders.masks(slab), scores=scores)

    def scored(self, slab: Slab, q: Tensor, k: Tensor) -> Tensor:
        scores = self.work("scores", self.grid.chunk, slab)
        self.decay.scores(q, k, scores)
        return scores

    def advance(self, states: Tensor, keys: Tensor, v: Tensor, slab: Slab) -> None:
        """Fills `states[1:]` from `states[0]` and the slab's decayed keys and values."""
        torch.bmm(keys.mT, v, out=states[1 : slab.chunks + 1].view(-1, self.key_dim, self.value_dim))
        for n in range(slab.chunks):
            states[n + 1].addcmul_(states[n], self.decay.through[n])

    def retreat(self, dstates: Tensor, queries: Tensor, dout: Tensor, slab: Slab) -> None:
        """Fills `dstates[:chunks]` from `dstates[chunks]` and the slab's decayed queries and output gradients."""
        torch.bmm(queries.mT, dout, out=dstates[: slab.chunks].view(-1, self.key_dim, self.value_dim))
        for n in reversed(range(slab.chunks)):
            dstates[n].addcmul_(dstates[n + 1], self.decay.through[n])

    def lanes(self, state: Tensor) -> Tensor:
        """The block's part of a state `[B, H, K, V]` as `[lanes, K, V]`."""
        return self.block.of_state(state).reshape(-1, self.key_dim, self.value_dim)

    def put(self, state: Tensor, lanes: Tensor) -> None:
        part = self.block.of_state(state)
        part.copy_(lanes.view_as(part))

    def flat(self, states: Tensor) -> Tensor:
        return states.reshape(-1, self.key_dim, self.value_dim)


def forward(problem: Problem, initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
    """(out in q's type, final state)."""
    out = torch.empty(problem.v.shape, dtype=problem.q.dtype, device=problem.q.device)
    entering, final = problem.entering(initial_state), problem.new_states()
    for sweep in problem.sweeps():
        states = sweep.grid.states(sweep.key_dim, sweep.value_dim)
        states[0] = sweep.lanes(entering)
        part = sweep.block.of(out, problem.heads)
        for slab in sweep.grid.slabs():
            q, k, v = sweep.load_queries(slab), sweep.load("k", sweep.k, slab), sweep.load("v", sweep.v, slab)
            sweep.prepare(slab)
            o = torch.bmm(sweep.scored(slab, q, k), v, out=sweep.work("o", sweep.value_dim, slab))
            sweep.advance(states, k.mul_(sweep.decay.leave), v, slab)
            o.baddbmm_(q.mul_(sweep.decay.enter), sweep.flat(states[: slab.chunks]))
            store(part, o, slab)
            states[0] = states[slab.chunks]
        sweep.put(final, states[0])
    return out, final


def correct(problem: Problem, out: Tensor, state: Tensor) -> Tensor:
    """Adds scale (q_t ⊙ e^{G_t}) S to the outputs that the entering state reaches."""
    entering = problem.entering(state)
    for sweep in problem.sweeps():
        states = sweep.grid.states(sweep.key_dim, sweep.value_dim)
        states[0] = sweep.lanes(entering)
        part = sweep.block.of(out, problem.heads)
        for slab in sweep.grid.slabs(problem.reach):
            q = sweep.load_queries(slab)
            sweep.prepare(slab, scores=False)
            for n in range(slab.chunks):
                torch.mul(states[n], sweep.decay.through[n], out=states[n + 1])
            o = sweep.work("o", sweep.value_dim, slab)
            torch.bmm(q.mul_(sweep.decay.enter), sweep.flat(states[: slab.chunks]), out=o)
            store(part, o, slab, add=True)
            states[0] = states[slab.chunks]
    return out


def summarize_backward(problem: Problem, dout: Tensor) -> Tensor:
    """Σ_t scale (q_t ⊙ e^{G_t})ᵀ do_t over the tokens that an entering state reaches."""
    dinitial = problem.new_states()
    for sweep in problem.sweeps():
        dstates = sweep.grid.states(sweep.key_dim, sweep.value_dim)
        dpart = sweep.block.of(dout, problem.heads)
        for slab in reversed(sweep.grid.slabs(problem.reach)):
            dstates[slab.chunks] = dstates[0]
            q, do = sweep.load_queries(slab), sweep.load("do", dpart, slab)
            sweep.prepare(slab, scores=False)
            sweep.retreat(dstates, q.mul_(sweep.decay.enter), do, slab)
        sweep.put(dinitial, dstates[0])
    return problem.entering(dinitial)


def backward(
    problem: Problem, dout: Tensor, dfinal_state: Tensor | None, initial_state: Tensor | None
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor | None], Tensor]:
    """The gradients of (q, k, v, log_decay), in their types, and of the initial state."""
    dq, dk, dv = (torch.empty_like(x) for x in (problem.q, problem.k, problem.v))
    log_decay = problem.log_decay
    dlog_decay = None
    if log_decay is not None:
        dlog_decay = torch.zeros_like(log_decay, dtype=torch.float64 if log_decay.dim() == 1 else None)
    entering, dinitial = problem.entering(initial_state), problem.new_states()
    for sweep in problem.sweeps():
        targets = [sweep.block.of(x, problem.heads) for x in (dq, dk, dv)]
        dstates = sweep.grid.states(sweep.key_dim, sweep.value_dim)
        if dfinal_state is not None:
            dstates[0] = sweep.lanes(dfinal_state)
        starts = _slab_starts(sweep, sweep.lanes(entering))
        states = sweep.grid.states(sweep.key_dim, sweep.value_dim)
        for slab, start in zip(reversed(sweep.grid.slabs()), reversed(starts), strict=True):
            states[0] = start
            dstates[slab.chunks] = dstates[0]
            do = sweep.load("do", sweep.block.of(dout, problem.heads), slab)
            gradients = _slab_backward(sweep, slab, do, states, dstates)
            if dlog_decay is not None:
                _add_decay_gradient(sweep, slab, gradients[0], gradients[1], states, dstates, dlog_decay)
            gradients[0].mul_(problem.scale)
            for target, gradient in zip(targets, gradients, strict=True):
                store(target, gradient, slab)
        sweep.put(dinitial, dstates[0])
    if dlog_decay is not None and log_decay is not None:
        dlog_decay = dlog_decay.to(log_decay.dtype)
    return (dq, dk, dv, dlog_decay), problem.entering(dinitial)


def _slab_starts(sweep: Sweep, state: Tensor) -> list[Tensor]:
    """The states at the starts of all slabs."""
    slabs = sweep.grid.slabs()
    starts = torch.empty(len(slabs), *state.shape, dtype=state.dtype, device=state.device)
    starts[0] = state
    states = sweep.grid.states(sweep.key_dim, sweep.value_dim)
    for number, slab in enumerate(slabs[:-1]):
        states[0] = starts[number]
        k, v = sweep.load("k", sweep.k, slab), sweep.load("v", sweep.v, slab)
        sweep.prepare(slab, scores=False)
        sweep.advance(states, k.mul_(sweep.decay.leave), v, slab)
        starts[number + 1] = states[slab.chunks]
    return list(starts)


def _slab_backward(
    sweep: Sweep, slab: Slab, do: Tensor, states: Tensor, dstates: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq of the scaled queries, dk, dv) as workspaces; completes the slab's `states` and `dstates`."""
    n, key_dim, value_dim = slab.chunks, sweep.key_dim, sweep.value_dim
    q, k, v = sweep.load_queries(slab), sweep.load("k", sweep.k, slab), sweep.load("v", sweep.v, slab)
    sweep.prepare(slab)
    enter, leave = sweep.decay.enter, sweep.decay.leave
    dq, dk, spare = (sweep.work(name, key_dim, slab) for name in ("dq", "dk", "spare"))

    scores = sweep.scored(slab, q, k)
    dv = torch.bmm(scores.mT, do, out=sweep.work("o", value_dim, slab))
    dscores = torch.bmm(do, v.mT, out=sweep.work("dscores", sweep.grid.chunk, slab))
    sweep.decay.scores_backward(dscores, q, k, dq, dk)

    keys = torch.mul(k, leave, out=spare)
    sweep.advance(states, keys, v, slab)
    queries = torch.mul(q, enter, out=sweep.work("queries", key_dim, slab))
    sweep.retreat(dstates, queries, do, slab)
    dv.baddbmm_(keys, sweep.flat(dstates[1 : n + 1]))
    dq.addcmul_(torch.bmm(do, sweep.flat(states[:n]).mT, out=spare), enter)
    dk.addcmul_(torch.bmm(v, sweep.flat(dstates[1 : n + 1]).mT, out=spare), leave)
    return dq, dk, dv


def _add_decay_gradient(
    sweep: Sweep, slab: Slab, dq: Tensor, dk: Tensor, states: Tensor, dstates: Tensor, dlog_decay: Tensor
) -> None:
    """Writes the slab's part of the decay's gradient, or adds it to that of a constant."""
    q, k = (sweep.work(name, sweep.key_dim, slab) for name in ("q", "k"))
    moments = torch.mul(q, dq, out=sweep.work("spare", sweep.key_dim, slab)).addcmul_(k, dk, value=-1.0)
    inner = slice(1, slab.chunks + 1)
    ends = torch.linalg.vecdot(states[inner], dstates[inner]).flatten(0, 1)
    gradient = sweep.decay.gradient(moments, ends)
    if dlog_decay.dim() == 1:
        by_head = gradient.view(slab.chunks, sweep.grid.rows, sweep.grid.heads, -1)
        real = slab.stop - slab.start
        by_token = by_head.permute(0, 3, 1, 2).flatten(0, 1)[:real]
        dlog_decay[sweep.block.heads] += by_token.sum((0, 1))
    else:
        part = sweep.block.of(dlog_decay, sweep.heads)
        store(part if part.dim() == 4 else part.unsqueeze(-1), gradient, slab)
