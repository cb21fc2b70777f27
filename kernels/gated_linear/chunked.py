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
from typing import NamedTuple

import torch
from torch import Tensor

from ..documents import Documents
from .channel import CHUNK as CHANNEL_CHUNK
from .channel import ChannelDecay
from .decay import TokenDecay, Wanted
from .slabs import CHUNK, Block, Borders, Grid, Lanes, Slab, States, blocks


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
    def per_channel(self) -> bool:
        return self.log_decay is not None and self.log_decay.dim() == 4

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
    """One block of rows and heads: its grid of slabs, its parts of tensors, its workspaces."""

    def __init__(self, problem: Problem, block: Block) -> None:
        self.block, self.problem = block, problem
        rows, length, heads, self.value_dim = problem.v[block.rows, :, block.heads].shape
        self.key_dim = problem.k.shape[-1]
        chunk = CHANNEL_CHUNK if problem.per_channel else CHUNK
        self.grid = Grid(rows, heads, length, problem.dtype, problem.q.device, chunk)
        self.borders = Borders(problem.documents.rows(block.rows.start, block.rows.stop), self.grid)
        self.decay = self._decay(problem.log_decay)
        self.sources = {name: self.part(x) for name, x in zip("qkv", (problem.q, problem.k, problem.v), strict=True)}
        self.works: dict[tuple[str, int], Tensor] = {}

    def _decay(self, log_decay: Tensor | None) -> TokenDecay | ChannelDecay:
        if log_decay is not None and log_decay.dim() > 1:
            kind = ChannelDecay if self.problem.per_channel else TokenDecay
            return kind(self.block.of(log_decay, self.problem.heads), self.grid)
        constant = self.problem.v.new_zeros(self.grid.heads) if log_decay is None else log_decay[self.block.heads]
        return TokenDecay(constant.expand(self.grid.rows, self.grid.length, -1), self.grid, constant)

    def part(self, x: Tensor) -> Lanes:
        """The block's part of a tensor `[B, T, heads or groups, D]`."""
        return Lanes(self.block.of(x, self.problem.heads), self.grid)

    def work(self, name: str, dim: int, slab: Slab) -> Tensor:
        """The workspace `name` for a slab, `[N, C, dim]`; zero when first used."""
        key = name, slab.chunks
        if key not in self.works:
            whole = self.works.get((name, 0))
            if whole is None:
                whole = self.works[name, 0] = self.grid.workspace(dim)
            self.works[key] = whole[: slab.chunks].view(-1, self.grid.chunk, dim)
        return self.works[key]

    def load_queries(self, slab: Slab) -> Tensor:
        q = self.sources["q"].load(slab)
        return q if self.problem.scale == 1.0 else q.mul_(self.problem.scale)

    def prepare(self, slab: Slab, wanted: Wanted = "all") -> None:
        self.decay.load(slab, self.borders.masks(slab), wanted)

    def scored(self, slab: Slab, q: Tensor, k: Tensor) -> Tensor:
        scores = self.work("scores", self.grid.chunk, slab)
        self.decay.scores(q, k, scores)
        return scores

    def new_states(self) -> States:
        return States(self.grid, self.key_dim, self.value_dim)

    def advance(self, states: States, keys: Tensor, v: Tensor, slab: Slab) -> None:
        """Fills the states after each chunk from the one before the first, the slab's decayed keys and its values."""
        torch.bmm(keys.mT, v, out=states.after[slab.chunks])
        for n in range(slab.chunks):
            states.at[n + 1].addcmul_(states.at[n], self.decay.through[n])

    def retreat(self, dstates: States, queries: Tensor, dout: Tensor, slab: Slab) -> None:
        """Fills the gradients before each chunk from the one after the last, and the slab's decayed queries."""
        torch.bmm(queries.mT, dout, out=dstates.before[slab.chunks])
        for n in reversed(range(slab.chunks)):
            dstates.at[n].addcmul_(dstates.at[n + 1], self.decay.through[n])

    def lanes(self, state: Tensor) -> Tensor:
        """The block's part of a state `[B, H, K, V]` as `[lanes, K, V]`."""
        return self.block.of_state(state).reshape(-1, self.key_dim, self.value_dim)

    def put(self, state: Tensor, lanes: Tensor) -> None:
        part = self.block.of_state(state)
        part.copy_(lanes.view_as(part))


def forward(problem: Problem, initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
    """(out in q's type, final state)."""
    out = torch.empty(problem.v.shape, dtype=problem.q.dtype, device=problem.q.device)
    entering, final = problem.entering(initial_state), problem.new_states()
    for sweep in problem.sweeps():
        states, part = sweep.new_states(), sweep.part(out)
        states.at[0].copy_(sweep.lanes(entering))
        for slab in sweep.grid.slabs():
            q, k, v = sweep.load_queries(slab), sweep.sources["k"].load(slab), sweep.sources["v"].load(slab)
            sweep.prepare(slab)
            o = torch.bmm(sweep.scored(slab, q, k), v, out=part.flat[slab.chunks])
            sweep.advance(states, k.mul_(sweep.decay.leave), v, slab)
            o.baddbmm_(q.mul_(sweep.decay.enter), states.before[slab.chunks])
            part.store(slab)
            states.at[0].copy_(states.at[slab.chunks])
        sweep.put(final, states.at[0])
    return out, final


def correct(problem: Problem, out: Tensor, state: Tensor) -> Tensor:
    """Adds scale (q_t ⊙ e^{G_t}) S to the outputs that the entering state reaches."""
    entering = problem.entering(state)
    for sweep in problem.sweeps():
        states, part = sweep.new_states(), sweep.part(out)
        states.at[0].copy_(sweep.lanes(entering))
        for slab in sweep.grid.slabs(problem.reach):
            q = sweep.load_queries(slab)
            sweep.prepare(slab, "enter")
            for n in range(slab.chunks):
                torch.mul(states.at[n], sweep.decay.through[n], out=states.at[n + 1])
            torch.bmm(q.mul_(sweep.decay.enter), states.before[slab.chunks], out=part.flat[slab.chunks])
            part.store(slab, add=True)
            states.at[0].copy_(states.at[slab.chunks])
    return out


def summarize_backward(problem: Problem, dout: Tensor) -> Tensor:
    """Σ_t scale (q_t ⊙ e^{G_t})ᵀ do_t over the tokens that an entering state reaches."""
    dinitial = problem.new_states()
    for sweep in problem.sweeps():
        dstates, dpart = sweep.new_states(), sweep.part(dout)
        for slab in reversed(sweep.grid.slabs(problem.reach)):
            dstates.at[slab.chunks].copy_(dstates.at[0])
            q, do = sweep.load_queries(slab), dpart.load(slab)
            sweep.prepare(slab, "enter")
            sweep.retreat(dstates, q.mul_(sweep.decay.enter), do, slab)
        sweep.put(dinitial, dstates.at[0])
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
        parts = Gradients(*(sweep.part(x) for x in (dq, dk, dv)))
        ddecay = None if dlog_decay is None else DecayGradient(sweep, dlog_decay)
        given, states, dstates = sweep.part(dout), sweep.new_states(), sweep.new_states()
        if dfinal_state is not None:
            dstates.at[0].copy_(sweep.lanes(dfinal_state))
        starts = _slab_starts(sweep, sweep.lanes(entering))
        for slab, start in zip(reversed(sweep.grid.slabs()), reversed(starts), strict=True):
            states.at[0].copy_(start)
            dstates.at[slab.chunks].copy_(dstates.at[0])
            _slab_backward(sweep, slab, given.load(slab), states, dstates, parts)
            if ddecay is not None:
                ddecay.add(slab, parts, states, dstates)
            if problem.scale != 1.0:
                parts.q.flat[slab.chunks].mul_(problem.scale)
            for part in parts:
                part.store(slab)
        sweep.put(dinitial, dstates.at[0])
    if dlog_decay is not None and log_decay is not None:
        dlog_decay = dlog_decay.to(log_decay.dtype)
    return (dq, dk, dv, dlog_decay), problem.entering(dinitial)


class Gradients(NamedTuple):
    """Where the gradients of q, k and v go."""

    q: Lanes
    k: Lanes
    v: Lanes


def _slab_starts(sweep: Sweep, state: Tensor) -> list[Tensor]:
    """The states at the starts of all slabs."""
    slabs = sweep.grid.slabs()
    starts = torch.empty(len(slabs), *state.shape, dtype=state.dtype, device=state.device)
    starts[0] = state
    states = sweep.new_states()
    for number, slab in enumerate(slabs[:-1]):
        states.at[0].copy_(starts[number])
        k, v = sweep.sources["k"].load(slab), sweep.sources["v"].load(slab)
        sweep.prepare(slab, "leave")
        sweep.advance(states, k.mul_(sweep.decay.leave), v, slab)
        starts[number + 1] = states.at[slab.chunks]
    return list(starts)


def _slab_backward(sweep: Sweep, slab: Slab, do: Tensor, states: States, dstates: States, parts: Gradients) -> None:
    """Fills the slab's gradients, that of the scaled queries among them, and completes `states` and `dstates`."""
    n = slab.chunks
    q, k, v = sweep.load_queries(slab), sweep.sources["k"].load(slab), sweep.sources["v"].load(slab)
    dq, dk, dv = (part.flat[n] for part in parts)
    sweep.prepare(slab)
    enter, leave = sweep.decay.enter, sweep.decay.leave

    torch.bmm(sweep.scored(slab, q, k).mT, do, out=dv)
    dscores = torch.bmm(do, v.mT, out=sweep.work("dscores", sweep.grid.chunk, slab))
    sweep.decay.scores_backward(dscores, q, k, dq, dk)

    spare = sweep.work("spare", sweep.key_dim, slab)
    sweep.retreat(dstates, torch.mul(q, enter, out=spare), do, slab)
    keys = torch.mul(k, leave, out=spare)
    sweep.advance(states, keys, v, slab)
    dv.baddbmm_(keys, dstates.after[n])
    dq.addcmul_(torch.bmm(do, states.before[n].mT, out=spare), enter)
    dk.addcmul_(torch.bmm(v, dstates.after[n].mT, out=spare), leave)


class DecayGradient:
    """Where the gradient of log_decay goes: its block's part, or the sum over tokens for a constant."""

    def __init__(self, sweep: Sweep, dlog_decay: Tensor) -> None:
        self.sweep, self.constant = sweep, None
        if dlog_decay.dim() == 1:
            self.constant = dlog_decay[sweep.block.heads]
        else:
            self.part = sweep.part(dlog_decay if dlog_decay.dim() == 4 else dlog_decay.unsqueeze(-1))

    def add(self, slab: Slab, gradients: Gradients, states: States, dstates: States) -> None:
        sweep, n = self.sweep, slab.chunks
        q, k = sweep.sources["q"].flat[n], sweep.sources["k"].flat[n]
        spare = sweep.work("spare", sweep.key_dim, slab)
        moments = torch.mul(q, gradients.q.flat[n], out=spare).addcmul_(k, gradients.k.flat[n], value=-1.0)
        gradient = sweep.decay.gradient(moments, torch.linalg.vecdot(states.after[n], dstates.after[n]))
        if self.constant is None:
            self.part.flat[n].copy_(gradient)
            self.part.store(slab)
            return
        by_head = gradient.view(n, sweep.grid.rows, sweep.grid.heads, -1).permute(2, 1, 0, 3).flatten(2)
        self.constant += by_head[..., : slab.stop - slab.start].sum((1, 2))
