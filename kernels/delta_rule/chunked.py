"""The delta rule in chunks: forward, a hand-written backward, and runs from zero.

Within a chunk that S enters, with the factors `enter`, `leave`, `through` of the decays and e^{G_i − G_j} in every
score, z_i is what token i adds along b_i, so that

    (I + L) Z = R − Ê S             L_ij = e_i · b_j for j < i,  Ê = e ⊙ enter
    O = (Q ⊙ enter) S + A Z         A_ij = q_i · b_j for j <= i
    S' = through ⊙ S + B̂ᵀ Z         B̂ = b ⊙ leave

With beta, e = beta k, b = k and R = beta v (Yang et al., 2024, arXiv 2406.06484; with decay arXiv 2412.06464), where
`erase` stands in for the k of e. With a pair (a, b), e = −a, which as with `erase_first` meets the state before the
token's own decay; R comes from the written k and v, which also add to O and S' (`rules.py`). Given the gradients dO and
dS',

    dZ = Aᵀ dO + B̂ dS'              (I + L)ᵀ dR = dZ
    dS = through ⊙ dS' + (Q ⊙ enter)ᵀ dO − Êᵀ dR
    dA = dO Zᵀ      dL = −dR Zᵀ     dÊ = −dR Sᵀ      dB̂ = Z dS'ᵀ

so nothing is differentiated through a solve.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..chunks import sweep as sweeps
from ..chunks.slabs import fade
from ..operation import Tensors
from ..problem import Problem
from . import DeltaInputs
from .steps import by_step, by_token
from .sweep import Sweep


def forward(problem: Problem[DeltaInputs], initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
    """(out, final state)."""
    return sweeps.forward(Sweep, by_step(problem), initial_state)


def backward(
    problem: Problem[DeltaInputs], dout: Tensor, dfinal_state: Tensor | None, initial_state: Tensor | None
) -> tuple[Tensors, Tensor]:
    """The gradients of the inputs, in their types, and of the initial state."""
    gradients, dinitial = sweeps.backward(Sweep, by_step(problem), dout, dfinal_state, initial_state)
    return by_token(gradients, problem), dinitial


def begin(problem: Problem[DeltaInputs]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, transition `[B, H, K, K]`, state `[B, H, K, V]`, reads `[B, T, H, K]`) of a run from zero.

    Where rows continue documents, the identity goes along as K more columns of the state until those documents end or
    it has faded: what becomes of it is the transition, and what queries read of it is what they read of any state.
    """
    problem = by_step(problem)
    out, state = problem.new_output(), problem.new_states()
    reads = out.new_zeros(*out.shape[:3], state.shape[2], dtype=problem.dtype)
    transition = state.new_zeros(*state.shape[:2], state.shape[2], state.shape[2])
    for sweep in problem.once(Sweep.over):
        states, part = sweep.new_states(), sweep.part(out)
        reached = _begin_reached(sweep, states.at[0], out, reads, transition) if problem.reach else 0
        sweep.run(sweep.grid.slabs()[reached:], states, part)
        sweep.put(state, states.at[0])
    return out, transition, state, reads


def _begin_reached(narrow: Sweep, state: Tensor, out: Tensor, reads: Tensor, transition: Tensor) -> int:
    """The slabs that an entering state reaches; fills the state after them, and returns how many they were."""
    problem, values, keys = narrow.problem, narrow.value_dim, narrow.key_dim
    sweep = narrow.wider(keys)
    states, parts = sweep.new_states(), [sweep.part(out), sweep.part(reads)]
    own, carried = states.at[0].split([values, keys], dim=-1)
    continues = problem.continues[sweep.block.rows].to(problem.dtype)
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
