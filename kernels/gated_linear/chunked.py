"""Gated linear attention in chunks: forward, a hand-written backward, and what an entering state adds.

With S_n the state that enters chunk n, and the factors `enter`, `leave`, `through` of `decay.py`,

    O = A V + (Q ⊙ enter) S_n                A_ij = (q_i · k_j) e^{G_i − G_j} for j <= i
    S_{n+1} = through ⊙ S_n + (K ⊙ leave)ᵀ V
    dS_n = through ⊙ dS_{n+1} + (Q ⊙ enter)ᵀ dO
    dV = Aᵀ dO + (K ⊙ leave) dS_{n+1}        dA = dO Vᵀ
    dQ = dA's part + enter ⊙ (dO S_nᵀ)       dK = dA's part + leave ⊙ (V dS_{n+1}ᵀ)
    dg_t = Σ_{s>=t} (q_s ⊙ dq_s − k_s ⊙ dk_s) + Σ_v S_{n+1} ⊙ dS_{n+1}     over the rest of the chunk

A decay w per value channel does to V and O what g does to K and Q, with factors of its own: then o_i = Σ_j A_ij v_j ⊙
e^{W_i − W_j} + …, and dw_t sums o_s ⊙ do_s − v_s ⊙ dv_s. What other variants of the op there are is made of this in
`variants.py`.

(Hua et al., 2022; Yang et al., 2024, arXiv 2312.06635). Backward sweeps once from the left for the states at the
starts of slabs, then from the right, where each slab recomputes its own: no more states than that are ever kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..chunks.channel import CHUNK as CHANNEL_CHUNK
from ..chunks.channel import ChannelDecay, SplitChannelDecay
from ..chunks.decay import Decay, SplitTokenDecay, TokenDecay, Wanted
from ..chunks.slabs import CHUNK, Block, Borders, Grid, Lanes, Slab, States, blocks, fade
from ..documents import Documents


@dataclass(frozen=True)
class Problem:
    """A whole call: its inputs, and how its blocks are cut."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    documents: Documents
    scale: float
    value_log_decay: Tensor | None = None  # [B, T, H, V]
    wide: bool = False  # whether outputs stay in what is computed in, for arithmetic on them to follow

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in: float32, or float64 for float64."""
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32

    @property
    def heads(self) -> int:
        return self.v.shape[2]

    @property
    def per_channel(self) -> bool:
        return self.log_decay is not None and self.log_decay.dim() in (2, 4)

    @property
    def longest_chunk(self) -> int:
        return CHANNEL_CHUNK if self.per_channel or self.value_log_decay is not None else CHUNK

    def new_output(self) -> Tensor:
        return self.v.new_empty(self.v.shape, dtype=self.dtype if self.wide else self.q.dtype)

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

    def cut(self, length: int) -> Problem:
        """The first tokens of every row."""
        q, k, v = (x[:, :length] for x in (self.q, self.k, self.v))
        log_decay, value_log_decay = (
            x if x is None or x.dim() < 3 else x[:, :length] for x in (self.log_decay, self.value_log_decay)
        )
        documents = self.documents.slice(0, length)
        return Problem(q, k, v, log_decay, documents, self.scale, value_log_decay, self.wide)

    def sweeps(self) -> list[Sweep]:
        repeats = math.lcm(self.heads // self.q.shape[2], self.heads // self.k.shape[2])
        return [Sweep(self, block) for block in blocks(self.v.shape[0], self.heads, self.heads // repeats)]


class Sweep:
    """One block of rows and heads: its grid of slabs, its parts of tensors, its workspaces."""

    def __init__(self, problem: Problem, block: Block) -> None:
        self.block, self.problem = block, problem
        rows, length, heads, self.value_dim = problem.v[block.rows, :, block.heads].shape
        self.key_dim = problem.k.shape[-1]
        self.grid = Grid(rows, heads, length, problem.dtype, problem.q.device, problem.longest_chunk)
        self.borders = Borders(problem.documents.rows(block.rows.start, block.rows.stop), self.grid)
        self.decay = self._decay(problem.log_decay)
        self.value_decay = None
        if problem.value_log_decay is not None:
            self.value_decay = ChannelDecay(block.of(problem.value_log_decay, problem.heads), self.grid)
        self.sources = {name: self.part(x) for name, x in zip("qkv", (problem.q, problem.k, problem.v), strict=True)}
        self.works: dict[tuple[str, int], Tensor] = {}

    def _decay(self, log_decay: Tensor | None) -> Decay:
        if log_decay is not None and log_decay.dim() == 2:
            shape = self.problem.v.shape[0], self.grid.length, -1, -1
            log_decay = log_decay.expand(shape)  # read slab by slab, never held
        if log_decay is not None and log_decay.dim() > 1:
            kind = SplitChannelDecay if self.problem.per_channel else SplitTokenDecay
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
        return self.sources["q"].load(slab, self.problem.scale)

    def prepare(self, slab: Slab, wanted: Wanted = "all") -> None:
        masks = self.borders.masks(slab)
        self.decay.load(slab, masks, wanted)
        self.through = self.decay.through
        if self.value_decay is not None:
            self.value_decay.load(slab, masks, wanted)
            across = zip(self.decay.through, self.value_decay.through, strict=True)
            self.through = [keys * values.mT for keys, values in across]

    def scored(self, slab: Slab, q: Tensor, k: Tensor) -> Tensor:
        scores = self.work("scores", self.grid.chunk, slab)
        self.decay.scores(q, k, scores)
        return scores

    def mixed(self, slab: Slab, scores: Tensor, v: Tensor, out: Tensor) -> Tensor:
        """What the scores make of the slab's own values; writes `out`."""
        if self.value_decay is None:
            return torch.bmm(scores, v, out=out)
        self.value_decay.mix(scores, v, out)
        return out

    def leaving(self, slab: Slab, v: Tensor) -> Tensor:
        """The slab's values as they leave their chunks."""
        if self.value_decay is None:
            return v
        return torch.mul(v, self.value_decay.leave, out=self.work("leaving", self.value_dim, slab))

    def entered(self, slab: Slab, dout: Tensor) -> Tensor:
        """The outputs' gradients as they come to the states that enter the chunks."""
        if self.value_decay is None:
            return dout
        return torch.mul(dout, self.value_decay.enter, out=self.work("entered", self.value_dim, slab))

    def read(self, slab: Slab, out: Tensor, queries: Tensor, states: Tensor) -> None:
        """Adds to `out` what decayed queries read of the states that enter the chunks."""
        if self.value_decay is None:
            out.baddbmm_(queries, states)
        else:
            found = torch.bmm(queries, states, out=self.work("found", self.value_dim, slab))
            out.addcmul_(found, self.value_decay.enter)

    def new_states(self) -> States:
        return States(self.grid, self.key_dim, self.value_dim)

    def advance(self, states: States, keys: Tensor, v: Tensor, slab: Slab) -> None:
        """Fills the states after each chunk from the one before the first, the slab's decayed keys and its values."""
        torch.bmm(keys.mT, v, out=states.after[slab.chunks])
        for n in range(slab.chunks):
            states.at[n + 1].addcmul_(states.at[n], self.through[n])

    def retreat(self, dstates: States, queries: Tensor, dout: Tensor, slab: Slab) -> None:
        """Fills the gradients before each chunk from the one after the last, and the slab's decayed queries."""
        torch.bmm(queries.mT, dout, out=dstates.before[slab.chunks])
        for n in reversed(range(slab.chunks)):
            dstates.at[n].addcmul_(dstates.at[n + 1], self.through[n])

    def lanes(self, state: Tensor) -> Tensor:
        """The block's part of a state `[B, H, K, V]` as `[lanes, K, V]`."""
        return self.block.of_state(state).reshape(-1, self.key_dim, self.value_dim)

    def put(self, state: Tensor, lanes: Tensor) -> None:
        part = self.block.of_state(state)
        part.copy_(lanes.view_as(part))


def forward(problem: Problem, initial_state: Tensor | None, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(out, written to `out` where given, else new in q's type; final state)."""
    out = problem.new_output() if out is None else out
    entering, final = problem.entering(initial_state), problem.new_states()
    for sweep in problem.sweeps():
        states, part = sweep.new_states(), sweep.part(out)
        states.at[0].copy_(sweep.lanes(entering))
        for slab in sweep.grid.slabs():
            q, k, v = sweep.load_queries(slab), sweep.sources["k"].load(slab), sweep.sources["v"].load(slab)
            sweep.prepare(slab)
            o = sweep.mixed(slab, sweep.scored(slab, q, k), v, part.flat[slab.chunks])
            sweep.advance(states, k.mul_(sweep.decay.leave), sweep.leaving(slab, v), slab)
            sweep.read(slab, o, sweep.decay.entered(q, q), states.before[slab.chunks])
            part.store(slab)
            states.at[0].copy_(states.at[slab.chunks])
        sweep.put(final, states.at[0])
    return out, final


def correct(problem: Problem, out: Tensor, state: Tensor) -> Tensor:
    """Adds scale (q_t ⊙ e^{G_t}) S to the outputs that the entering state reaches, until it has faded."""
    entering = problem.entering(state)
    for sweep in problem.sweeps():
        states, part, first = sweep.new_states(), sweep.part(out), sweep.lanes(entering)
        decay = first.new_ones(1, 1, 1)
        for slab in sweep.grid.slabs(problem.reach):
            if not fade(decay):
                break
            q = sweep.load_queries(slab)
            sweep.prepare(slab, "enter")
            for n in range(slab.chunks):
                torch.mul(first, decay, out=states.at[n])
                decay = decay * sweep.through[n]
            o = torch.bmm(q.mul_(sweep.decay.enter), states.before[slab.chunks], out=part.flat[slab.chunks])
            if sweep.value_decay is not None:
                o.mul_(sweep.value_decay.enter)
            part.store(slab, add=True)
    return out


def summarize_backward(problem: Problem, dout: Tensor) -> Tensor:
    """Σ_t scale (q_t ⊙ e^{G_t})ᵀ do_t over the tokens that an entering state reaches, until it has faded."""
    dinitial = problem.new_states()
    for sweep in problem.sweeps():
        dstates, dpart = sweep.new_states(), sweep.part(dout)
        total, decay = torch.zeros_like(dstates.at[0]), dinitial.new_ones(1, 1, 1)
        for slab in sweep.grid.slabs(problem.reach):
            if not fade(decay):
                break
            q, do = sweep.load_queries(slab), dpart.load(slab)
            sweep.prepare(slab, "enter")
            torch.bmm(q.mul_(sweep.decay.enter).mT, sweep.entered(slab, do), out=dstates.before[slab.chunks])
            for n in range(slab.chunks):
                total.addcmul_(dstates.at[n], decay)
                decay = decay * sweep.through[n]
        sweep.put(dinitial, total)
    return problem.entering(dinitial)


def backward(
    problem: Problem, dout: Tensor, dfinal_state: Tensor | None, initial_state: Tensor | None
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None], Tensor]:
    """The gradients of (q, k, v, log_decay, value_log_decay), in their types, and of the initial state."""
    dq, dk, dv = (torch.empty_like(x) for x in (problem.q, problem.k, problem.v))
    decays = problem.log_decay, problem.value_log_decay
    ddecay, dvalue_decay = (None if x is None else new_gradient(x) for x in decays)
    entering, dinitial = problem.entering(initial_state), problem.new_states()
    for sweep in problem.sweeps():
        into = Gradients(sweep, dq, dk, dv, ddecay, dvalue_decay)
        given, states, dstates = sweep.part(dout), sweep.new_states(), sweep.new_states()
        if dfinal_state is not None:
            dstates.at[0].copy_(sweep.lanes(dfinal_state))
        starts = _slab_starts(sweep, sweep.lanes(entering))
        for slab, start in zip(reversed(sweep.grid.slabs()), reversed(starts), strict=True):
            states.at[0].copy_(start)
            dstates.at[slab.chunks].copy_(dstates.at[0])
            _slab_backward(sweep, slab, given.load(slab), states, dstates, into)
            into.store(slab, states, dstates)
        sweep.put(dinitial, dstates.at[0])
    if ddecay is not None and problem.log_decay is not None:
        ddecay = ddecay.to(problem.log_decay.dtype)
    return (dq, dk, dv, ddecay, dvalue_decay), problem.entering(dinitial)


def new_gradient(log_decay: Tensor) -> Tensor:
    """Zeros for the gradient of a decay; that of a constant is a sum over all tokens, in float64."""
    return torch.zeros_like(log_decay, dtype=torch.float64 if log_decay.dim() < 3 else None)


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
        sweep.advance(states, k.mul_(sweep.decay.leave), sweep.leaving(slab, v), slab)
        starts[number + 1] = states.at[slab.chunks]
    return list(starts)


def _slab_backward(sweep: Sweep, slab: Slab, do: Tensor, states: States, dstates: States, into: Gradients) -> None:
    """Fills the slab's gradients, that of the scaled queries among them, and completes `states` and `dstates`."""
    n = slab.chunks
    q, k, v = sweep.load_queries(slab), sweep.sources["k"].load(slab), sweep.sources["v"].load(slab)
    dq, dk, dv = into.q.flat[n], into.k.flat[n], into.v.flat[n]
    sweep.prepare(slab)
    decay, value_decay = sweep.decay, sweep.value_decay

    scores = sweep.scored(slab, q, k)
    dscores = sweep.work("dscores", sweep.grid.chunk, slab)
    if value_decay is None:
        torch.bmm(scores.mT, do, out=dv)
        torch.bmm(do, v.mT, out=dscores)
    else:
        value_decay.scores(do, v, dscores)
        value_decay.scores_backward(scores, do, v, sweep.work("out", sweep.value_dim, slab), dv)
    decay.scores_backward(dscores, q, k, dq, dk)

    spare = sweep.work("spare", sweep.key_dim, slab)
    do_entered, v_leaving = sweep.entered(slab, do), sweep.leaving(slab, v)
    queries = decay.entered(q, spare)
    sweep.retreat(dstates, queries, do_entered, slab)
    keys = spare if value_decay is None else sweep.work("keys", sweep.key_dim, slab)
    torch.mul(k, decay.leave, out=keys)
    sweep.advance(states, keys, v_leaving, slab)
    if value_decay is None:
        dv.baddbmm_(keys, dstates.after[n])
    else:
        sweep.read(slab, sweep.work("out", sweep.value_dim, slab), queries, states.before[n])
        found = torch.bmm(keys, dstates.after[n], out=sweep.work("found", sweep.value_dim, slab))
        dv.addcmul_(found, value_decay.leave)
        into.of_values(slab, do, v, dv, sweep.work("out", sweep.value_dim, slab))
    decay.add_entered(dq, do_entered, states.before[n], spare)
    dk.addcmul_(torch.bmm(v_leaving, dstates.after[n].mT, out=spare), decay.leave)


class Gradients:
    """Where a block's gradients go: its parts of those of q, k, v and, where there are any, of the decays."""

    def __init__(
        self, sweep: Sweep, dq: Tensor, dk: Tensor, dv: Tensor, ddecay: Tensor | None, dvalue_decay: Tensor | None
    ) -> None:
        self.sweep = sweep
        self.q, self.k, self.v = (sweep.part(x) for x in (dq, dk, dv))
        self.decay = self.value_decay = self.constant = None
        if ddecay is not None and ddecay.dim() < 3:
            self.constant = ddecay[sweep.block.heads]
        elif ddecay is not None:
            self.decay = sweep.part(ddecay if ddecay.dim() == 4 else ddecay.unsqueeze(-1))
        if dvalue_decay is not None:
            self.value_decay = sweep.part(dvalue_decay)

    def of_values(self, slab: Slab, do: Tensor, v: Tensor, dv: Tensor, out: Tensor) -> None:
        """Keeps what the gradient of the value channels' decays is the sum of, in the place of `out`."""
        self.moments = out.mul_(do).addcmul_(v, dv, value=-1.0)

    def store(self, slab: Slab, states: States, dstates: States) -> None:
        """Writes the slab's gradients, given its states and the gradients of those; scales that of the queries."""
        sweep, n = self.sweep, slab.chunks
        if self.decay is not None or self.constant is not None:
            self._store_decay(slab, states, dstates)
        if self.value_decay is not None and sweep.value_decay is not None:
            ends = (states.after[n] * dstates.after[n]).sum(1)
            self.value_decay.flat[n].copy_(sweep.value_decay.gradient(self.moments, ends))
            self.value_decay.store(slab)
        sweep.decay.finish(self.q.flat[n], self.k.flat[n])
        self.q.store(slab, scale=sweep.problem.scale)
        self.k.store(slab)
        self.v.store(slab)

    def _store_decay(self, slab: Slab, states: States, dstates: States) -> None:
        sweep, n = self.sweep, slab.chunks
        q, k = sweep.sources["q"].flat[n], sweep.sources["k"].flat[n]
        spare = sweep.work("spare", sweep.key_dim, slab)
        moments = torch.mul(q, self.q.flat[n], out=spare).addcmul_(k, self.k.flat[n], value=-1.0)
        gradient = sweep.decay.gradient(moments, torch.linalg.vecdot(states.after[n], dstates.after[n]))
        if self.decay is not None:
            self.decay.flat[n].copy_(gradient)
            self.decay.store(slab)
        if self.constant is not None:
            # Without what is past the end: [heads, rows, tokens, 1 or K].
            grid = sweep.grid
            by_head = gradient.view(n, grid.rows, grid.heads, grid.chunk, -1).permute(2, 1, 0, 3, 4).flatten(2, 3)
            total = by_head[:, :, : slab.stop - slab.start].sum((1, 2), dtype=torch.float64)
            self.constant += total.view_as(self.constant)
