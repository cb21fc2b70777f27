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

(Hua et al., 2022; Yang et al., 2024, arXiv 2312.06635).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..chunks import sweep as sweeps
from ..chunks.channel import CHUNK as CHANNEL_CHUNK
from ..chunks.channel import ChannelDecay, SplitChannelDecay
from ..chunks.decay import SplitTokenDecay, Wanted
from ..chunks.slabs import CHUNK, Block, Grid, Slab, States, fade
from ..chunks.sweep import Parts
from ..operation import Tensors
from ..problem import Problem
from . import shared
from .parts import GatedLinearInputs


class Sweep(sweeps.Sweep):
    """A sweep whose values may decay too."""

    token_decay, channel_decay = SplitTokenDecay, SplitChannelDecay

    def __init__(self, problem: Problem[GatedLinearInputs], block: Block) -> None:
        super().__init__(problem, block)
        self.value_decay = None
        if problem.inputs.value_log_decay is not None:
            self.value_decay = ChannelDecay(block.of(problem.inputs.value_log_decay, problem.sizes["H"]), self.grid)

    def new_grid(self, rows: int, heads: int, length: int) -> Grid:
        longest = CHANNEL_CHUNK if self.problem.op.by_channel(self.problem.inputs) else CHUNK
        return Grid(rows, heads, length, self.problem.dtype, self.problem.device, longest)

    def load(self, slab: Slab, *, reads: bool = True) -> None:
        self.k, self.v = self.sources["k"].load(slab), self.sources["v"].load(slab)
        if reads:
            self.load_queries(slab)
        self.load_decays(slab, "all" if reads else "leave")
        if reads:
            self.decay.scores(self.q, self.k, self.scores(slab))

    def load_queries(self, slab: Slab) -> Tensor:
        self.q = self.sources["q"].load(slab, self.problem.scale)
        return self.q

    def load_decays(self, slab: Slab, wanted: Wanted = "all") -> None:
        masks = self.borders.masks(slab)
        self.decay.load(slab, masks, wanted)
        self.through = self.decay.through
        if self.value_decay is not None:
            self.value_decay.load(slab, masks, wanted)
            across = zip(self.decay.through, self.value_decay.through, strict=True)
            self.through = [keys * values.mT for keys, values in across]

    def scores(self, slab: Slab) -> Tensor:
        return self.square("scores", slab)

    def advance(self, slab: Slab, states: States) -> None:
        self.fill(slab, states, self.k.mul_(self.decay.leave), self.leaving(slab))

    def fill(self, slab: Slab, states: States, keys: Tensor, values: Tensor) -> None:
        """`advance`, given the keys and values as they leave their chunks."""
        torch.bmm(keys.mT, values, out=states.after[slab.chunks])
        for n in range(slab.chunks):
            states.at[n + 1].addcmul_(states.at[n], self.through[n])

    def read(self, slab: Slab, states: States, out: Tensor) -> None:
        if self.value_decay is None:
            torch.bmm(self.scores(slab), self.v, out=out)
        else:
            self.value_decay.mix(self.scores(slab), self.v, out)
        self.read_states(slab, out, self.decay.entered(self.q, self.q), states.before[slab.chunks])

    def read_states(self, slab: Slab, out: Tensor, queries: Tensor, states: Tensor) -> None:
        """Adds to `out` what decayed queries read of the states that enter the chunks."""
        if self.value_decay is None:
            out.baddbmm_(queries, states)
        else:
            read = torch.bmm(queries, states, out=self.work("read", self.value_dim, slab))
            out.addcmul_(read, self.value_decay.enter)

    def leaving(self, slab: Slab) -> Tensor:
        """The slab's values as they leave their chunks."""
        if self.value_decay is None:
            return self.v
        return torch.mul(self.v, self.value_decay.leave, out=self.work("leaving", self.value_dim, slab))

    def entered(self, slab: Slab, dout: Tensor) -> Tensor:
        """The outputs' gradients as they come to the states that enter the chunks."""
        if self.value_decay is None:
            return dout
        return torch.mul(dout, self.value_decay.enter, out=self.work("entered", self.value_dim, slab))

    def differentiate(self, slab: Slab, dout: Tensor, states: States, dstates: States, parts: Parts) -> None:
        n, decay, value_decay = slab.chunks, self.decay, self.value_decay
        dq, dk, dv = (parts[name].flat[n] for name in "qkv")
        self.load(slab)
        q, k, v = self.q, self.k, self.v

        scores, dscores = self.scores(slab), self.square("dscores", slab)
        if value_decay is None:
            torch.bmm(scores.mT, dout, out=dv)
            torch.bmm(dout, v.mT, out=dscores)
        else:
            value_decay.scores(dout, v, dscores)
            value_decay.scores_backward(scores, dout, v, self.work("out", self.value_dim, slab), dv)
        decay.scores_backward(dscores, q, k, dq, dk)

        spare = self.work("spare", self.key_dim, slab)
        entered, leaving = self.entered(slab, dout), self.leaving(slab)
        queries = decay.entered(q, spare)
        torch.bmm(queries.mT, entered, out=dstates.before[n])
        for chunk in reversed(range(n)):
            dstates.at[chunk].addcmul_(dstates.at[chunk + 1], self.through[chunk])
        keys = spare if value_decay is None else self.work("keys", self.key_dim, slab)
        self.fill(slab, states, torch.mul(k, decay.leave, out=keys), leaving)
        if value_decay is None:
            dv.baddbmm_(keys, dstates.after[n])
        else:
            out = self.work("out", self.value_dim, slab)
            self.read_states(slab, out, queries, states.before[n])
            carried = torch.bmm(keys, dstates.after[n], out=self.work("read", self.value_dim, slab))
            dv.addcmul_(carried, value_decay.leave)
            moments = out.mul_(dout).addcmul_(v, dv, value=-1.0)
            ends = (states.after[n] * dstates.after[n]).sum(1)
            parts["value_log_decay"].flat[n].copy_(value_decay.gradient(moments, ends))
        decay.add_entered(dq, entered, states.before[n], spare)
        dk.addcmul_(torch.bmm(leaving, dstates.after[n].mT, out=spare), decay.leave)
        if "log_decay" in parts or self.constant is not None:
            moments = torch.mul(q, dq, out=spare).addcmul_(k, dk, value=-1.0)
            self._differentiate_decay(slab, moments, states, dstates, parts)
        decay.finish(dq, dk)

    def _differentiate_decay(self, slab: Slab, moments: Tensor, states: States, dstates: States, parts: Parts) -> None:
        n, grid = slab.chunks, self.grid
        gradient = self.decay.gradient(moments, torch.linalg.vecdot(states.after[n], dstates.after[n]))
        if self.constant is None:
            parts["log_decay"].flat[n].copy_(gradient)
            return
        # Without what is past the end: [heads, rows, tokens, 1 or K].
        by_head = gradient.view(n, grid.rows, grid.heads, grid.chunk, -1).permute(2, 1, 0, 3, 4).flatten(2, 3)
        total = by_head[:, :, : slab.stop - slab.start].sum((1, 2), dtype=torch.float64)
        self.constant += total.view_as(self.constant)


def forward(
    problem: Problem[GatedLinearInputs], initial_state: Tensor | None, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(out, written to `out` where it is passed; final state)."""
    if shared.fits(problem):
        return shared.forward(problem, initial_state, out)
    return sweeps.forward(Sweep, problem, initial_state, out)


def final_state(problem: Problem[GatedLinearInputs]) -> Tensor:
    """The state after each row's last token, from zero."""
    return sweeps.final_state(Sweep, problem)


def backward(
    problem: Problem[GatedLinearInputs], dout: Tensor, dfinal_state: Tensor | None, initial_state: Tensor | None
) -> tuple[Tensors, Tensor]:
    """The gradients of the inputs, in their types, and of the initial state."""
    if shared.fits(problem):
        return shared.backward(problem, dout, dfinal_state, initial_state)
    return sweeps.backward(Sweep, problem, dout, dfinal_state, initial_state)


def correct(problem: Problem[GatedLinearInputs], out: Tensor, state: Tensor) -> Tensor:
    """Adds scale (q_t ⊙ e^{G_t}) S to the outputs that the entering state reaches, until it has faded."""
    entering = problem.entering(state)
    for sweep in problem.once(Sweep.over):
        states, part, first = sweep.new_states(), sweep.part(out), sweep.lanes(entering)
        decay = first.new_ones(1, 1, 1)
        for slab in sweep.grid.slabs(problem.reach):
            if not fade(decay):
                break
            q = sweep.load_queries(slab)
            sweep.load_decays(slab, "enter")
            for n in range(slab.chunks):
                torch.mul(first, decay, out=states.at[n])
                decay = decay * sweep.through[n]
            o = torch.bmm(q.mul_(sweep.decay.enter), states.before[slab.chunks], out=part.flat[slab.chunks])
            if sweep.value_decay is not None:
                o.mul_(sweep.value_decay.enter)
            part.store(slab, add=True)
    return out


def summarize_backward(
    problem: Problem[GatedLinearInputs], dout: Tensor, initial_state: Tensor | None = None
) -> Tensor:
    """Σ_t scale (q_t ⊙ e^{G_t})ᵀ do_t over the tokens that an entering state reaches, until it has faded."""
    dinitial = problem.new_states()
    for sweep in problem.once(Sweep.over):
        dstates, dpart = sweep.new_states(), sweep.part(dout)
        total, decay = torch.zeros_like(dstates.at[0]), dinitial.new_ones(1, 1, 1)
        for slab in sweep.grid.slabs(problem.reach):
            if not fade(decay):
                break
            q, do = sweep.load_queries(slab), dpart.load(slab)
            sweep.load_decays(slab, "enter")
            torch.bmm(q.mul_(sweep.decay.enter).mT, sweep.entered(slab, do), out=dstates.before[slab.chunks])
            for n in range(slab.chunks):
                total.addcmul_(dstates.at[n], decay)
                decay = decay * sweep.through[n]
        sweep.put(dinitial, total)
    return problem.entering(dinitial)
