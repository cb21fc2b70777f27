"""The delta rule in chunks: forward, a hand-written backward, and runs from nothing.

Within a chunk that S enters, with the factors `enter`, `leave`, `through` of the decays and e^{G_i − G_j} in every
score, z_i is what token i adds along b_i, so that

    (I + L) Z = R − Ê S             L_ij = e_i · b_j for j < i,  Ê = e ⊙ enter
    O = (Q ⊙ enter) S + A Z         A_ij = q_i · b_j for j <= i
    S' = through ⊙ S + B̂ᵀ Z         B̂ = b ⊙ leave

With beta, e = beta k, b = k and R = beta v (Yang et al., 2024, arXiv 2406.06484; with decay arXiv 2412.06464). With
erase = (a, b), e = −a, which meets the state before the token's own decay; R comes from the written k and v, which
also add to O and S' (`rules.py`). Given the gradients dO and dS',

    dZ = Aᵀ dO + B̂ dS'              (I + L)ᵀ dR = dZ
    dS = through ⊙ dS' + (Q ⊙ enter)ᵀ dO − Êᵀ dR
    dA = dO Zᵀ      dL = −dR Zᵀ     dÊ = −dR Sᵀ      dB̂ = Z dS'ᵀ

so nothing is differentiated through a solve. Backward sweeps once from the left for the states at the starts of slabs,
then from the right, where each slab recomputes its own: no more states than that are ever kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..chunks.slabs import fade
from .sweep import Problem, Sweep

Gradients = tuple[Tensor | None, ...]


def forward(problem: Problem, initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
    """(out in q's type, final state)."""
    out = torch.empty(problem.v.shape, dtype=problem.q.dtype, device=problem.q.device)
    entering, final = problem.entering(initial_state), problem.new_states()
    for sweep in problem.sweeps():
        states, part = sweep.new_states(), sweep.part(out)
        states.at[0].copy_(sweep.lanes(entering))
        for slab in sweep.grid.slabs():
            sweep.load(slab)
            sweep.advance(slab, states)
            sweep.read(slab, states, part.flat[slab.chunks])
            part.store(slab)
            states.at[0].copy_(states.at[slab.chunks])
        sweep.put(final, states.at[0])
    return out, final


def begin(problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, transition `[B, H, K, K]`, state `[B, H, K, V]`, reads `[B, T, H, K]`) of a run from nothing.

    Where rows continue documents, the identity goes along as K more columns of the state until those documents end or
    it has faded: what becomes of it is the transition, and what queries read of it is what they read of any state.
    """
    out, reads = torch.empty(problem.v.shape, dtype=problem.dtype, device=problem.q.device), problem.of_keys().zero_()
    state = problem.new_states()
    transition = state.new_zeros(*state.shape[:2], state.shape[2], state.shape[2])
    for sweep in problem.sweeps():
        states, part = sweep.new_states(), sweep.part(out)
        reached = _begin_reached(sweep, states.at[0], out, reads, transition) if problem.reach else 0
        for slab in sweep.grid.slabs()[reached:]:
            sweep.load(slab)
            sweep.advance(slab, states)
            sweep.read(slab, states, part.flat[slab.chunks])
            part.store(slab)
            states.at[0].copy_(states.at[slab.chunks])
        sweep.put(state, states.at[0])
    return out, transition, state, reads


def _begin_reached(narrow: Sweep, state: Tensor, out: Tensor, reads: Tensor, transition: Tensor) -> int:
    """The slabs that an entering state reaches; fills the state after them, and returns how many they were."""
    problem, values, keys = narrow.problem, narrow.value_dim, narrow.key_dim
    sweep = Sweep(problem, narrow.block, further=keys)
    states, parts = sweep.new_states(), [sweep.part(out), sweep.part(reads)]
    own, carried = states.at[0].split([values, keys], dim=-1)
    continues = torch.tensor(problem.documents.continues[sweep.block.rows], dtype=problem.dtype, device=out.device)
    start = continues[:, None, None, None] * torch.eye(keys, dtype=problem.dtype, device=out.device)
    carried.copy_(start.expand(-1, sweep.grid.heads, -1, -1).flatten(0, 1))
    reached = 0
    for slab in sweep.grid.slabs(problem.reach):
        if not fade(carried):
            break
        sweep.load(slab)
        sweep.advance(slab, states)
        found = sweep.work("out", values + keys, slab)
        sweep.read(slab, states, found)
        for part, x in zip(parts, found.split([values, keys], dim=-1), strict=True):
            part.flat[slab.chunks].copy_(x)
            part.store(slab)
        states.at[0].copy_(states.at[slab.chunks])
        reached += 1
    state.copy_(own)
    sweep.put(transition, carried)
    return reached


def backward(
    problem: Problem, dout: Tensor, dfinal_state: Tensor | None, initial_state: Tensor | None
) -> tuple[Gradients, Tensor]:
    """The gradients of (q, k, v, beta, log_decay, a, b), in their types, and of the initial state."""
    gradients = tuple(None if x is None else torch.empty_like(x) for x in problem.inputs)
    entering, dinitial = problem.entering(initial_state), problem.new_states()
    for sweep in problem.sweeps():
        parts = sweep.gradient_parts(gradients)
        given, states, dstates = sweep.part(dout), sweep.new_states(), sweep.new_states()
        if dfinal_state is not None:
            dstates.at[0].copy_(sweep.lanes(dfinal_state))
        starts = _slab_starts(sweep, sweep.lanes(entering))
        for slab, start in zip(reversed(sweep.grid.slabs()), reversed(starts), strict=True):
            states.at[0].copy_(start)
            dstates.at[slab.chunks].copy_(dstates.at[0])
            dout_slab = given.load(slab)
            sweep.load(slab)
            sweep.advance(slab, states)
            sweep.retreat(slab, dstates, dout_slab)
            sweep.differentiate(slab, states, dstates, dout_slab, parts)
            for part in parts.values():
                part.store(slab)
        sweep.put(dinitial, dstates.at[0])
    return gradients, problem.entering(dinitial)


def _slab_starts(sweep: Sweep, state: Tensor) -> list[Tensor]:
    """The states at the starts of all slabs."""
    slabs = sweep.grid.slabs()
    starts = torch.empty(len(slabs), *state.shape, dtype=state.dtype, device=state.device)
    starts[0] = state
    states = sweep.new_states()
    for number, slab in enumerate(slabs[:-1]):
        states.at[0].copy_(starts[number])
        sweep.load(slab, reads=False)
        sweep.advance(slab, states)
        starts[number + 1] = states.at[slab.chunks]
    return list(starts)
