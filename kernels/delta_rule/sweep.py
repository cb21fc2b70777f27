"""A sweep of the delta rule over one block of rows and heads, slab by slab; see `chunked.py`."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from copy import copy

import torch
from torch import Tensor

from ..chunks import sweep as sweeps
from ..chunks.centred import CentredChannelDecay
from ..chunks.slabs import Block, Grid, Slab, States
from ..chunks.sweep import Parts
from ..problem import Problem
from . import CHUNK, DeltaInputs
from .rules import BetaRule, EraseRule

MATRICES = 32  # chunks times lanes in a slab: with 64 its states alone are more than a core's caches hold


class Sweep(sweeps.Sweep):
    """A sweep by the rule that the problem's inputs ask for."""

    channel_decay = CentredChannelDecay

    def __init__(self, problem: Problem[DeltaInputs], block: Block) -> None:
        super().__init__(problem, block)
        self.rule = self._rule(BetaRule if problem.inputs.a is None else EraseRule)
        self.z: Tensor  # of the slab that `retraced` is at

    def wider(self, columns: int) -> Sweep:
        """The same sweep for states of so many columns more, into which the values write nothing."""
        wide = copy(self)
        wide.value_dim += columns
        wide.works, wide.cut = {}, {}
        wide.rule = wide._rule(type(self.rule))
        return wide

    def _rule(self, kind: type[BetaRule | EraseRule]) -> BetaRule | EraseRule:
        """A rule refers back weakly: in a cycle all workspaces would wait for Python's collector of cycles."""
        return kind(weakref.proxy(self))

    def new_grid(self, rows: int, heads: int, length: int) -> Grid:
        return Grid(rows, heads, length, self.problem.dtype, self.problem.device, CHUNK, MATRICES)

    def load(self, slab: Slab, *, reads: bool = True) -> None:
        """Fills the workspaces: the system (I + L), R, Ê, B̂, and with `reads` the queries, their scores and factors."""
        keys = self.key_dim
        self.masks = self.borders.masks(slab)
        self.decay.load(slab, self.masks)
        self.rule.load(slab)
        if reads:
            q = self.sources["q"].load(slab, self.problem.scale)
            torch.mul(q, self.decay.enter, out=self.work("query", keys, slab))
            self.decay.scores(q, self.rule.columns, self.square("scores", slab))
            self.rule.load_reads(slab, q)

    def advance(self, slab: Slab, states: States) -> None:
        """Fills Z besides."""
        keys, values, size = self.key_dim, self.value_dim, self.grid.chunk
        system, erase = self.by_chunk("system", size, slab), self.by_chunk("erase", keys, slab)
        right, z = self.by_chunk("right", values, slab), self.by_chunk("z", values, slab)
        write = self.by_chunk("write", keys, slab)
        self.rule.write(slab, states)
        for n in range(slab.chunks):
            before, after = states.at[n], states.at[n + 1]
            right[n].baddbmm_(erase[n], before, alpha=-1.0)
            torch.linalg.solve_triangular(system[n], right[n], upper=False, unitriangular=True, out=z[n])
            self.rule.carry(before, self.decay.through[n], after).baddbmm_(write[n].mT, z[n])

    def read(self, slab: Slab, states: States, out: Tensor) -> None:
        z = self.work("z", self.value_dim, slab)
        torch.bmm(self.square("scores", slab), z, out=out)
        out.baddbmm_(self.work("query", self.key_dim, slab), states.before[slab.chunks])
        self.rule.read(slab, out)

    def retraced(self, state: Tensor) -> Iterator[tuple[Slab, States]]:
        """As for every op, but with all states and Z, kept: reading them takes less time than advancing again."""
        grid, slabs, kept = self.grid, self.grid.slabs(), list[tuple[Slab, States, Tensor]]()
        shape = (len(slabs) * grid.chunks + 1, *state.shape)
        each = torch.empty(shape, dtype=state.dtype, device=state.device)
        each[0] = state
        for slab in slabs:
            states = States(grid, self.key_dim, self.value_dim, each[slab.first : slab.first + grid.chunks + 1])
            self.load(slab, reads=False)
            self.advance(slab, states)
            kept.append((slab, states, self.work("z", self.value_dim, slab).clone()))
        while kept:
            slab, states, self.z = kept.pop()
            yield slab, states

    def retreat(
        self, slab: Slab, dout: Tensor, states: States, dstates: States, dcolumns: Tensor, ends: Tensor | None
    ) -> Tensor:
        """Fills dR and the gradients of the states before each chunk, from that of the one after the last.

        And, while its states are in cache, each chunk's products with them: dB̂, in `ends` `[N, K]`, where that is
        wanted, Σ_v S ⊙ dS of the state that leaves it, and what is returned: dQ̂ above dÊ `[N, 2 C, K]`.
        """
        keys, values, size = self.key_dim, self.value_dim, self.grid.chunk
        torch.bmm(self.square("scores", slab).mT, dout, out=self.work("dz", values, slab))
        system, erase = self.by_chunk("system", size, slab), self.by_chunk("erase", keys, slab)
        query, write = self.by_chunk("query", keys, slab), self.by_chunk("write", keys, slab)
        dright, dz = self.by_chunk("dright", values, slab), self.by_chunk("dz", values, slab)
        # dO above −dR, which the states that enter turn into dQ̂ and dÊ in one product: a state is packed for it once.
        given = self.work("given", 2 * values, slab).view(-1, 2 * size, values)
        found = self.work("found", 2 * keys, slab).view(-1, 2 * size, keys)
        given[:, :size] = dout
        by_chunk = (x.view(slab.chunks, -1, *x.shape[1:]) for x in (dout, dcolumns, self.z, given, found))
        dout, dcolumns, z, givens, founds = by_chunk
        product = torch.empty_like(dstates.at[0])
        for n in reversed(range(slab.chunks)):
            entering, before, after = states.at[n], dstates.at[n], dstates.at[n + 1]
            dz[n].baddbmm_(write[n], after)
            torch.linalg.solve_triangular(system[n].mT, dz[n], upper=True, unitriangular=True, out=dright[n])
            torch.mul(after, self.decay.through[n], out=before)
            before.baddbmm_(query[n].mT, dout[n]).baddbmm_(erase[n].mT, dright[n], alpha=-1.0)
            if ends is not None:
                torch.sum(torch.mul(states.at[n + 1], after, out=product), -1, out=ends.view(slab.chunks, -1, keys)[n])
            torch.bmm(z[n], after.mT, out=dcolumns[n])
            torch.neg(dright[n], out=givens[n][:, size:])
            torch.bmm(givens[n], entering.mT, out=founds[n])
        return found

    def differentiate(self, slab: Slab, dout: Tensor, states: States, dstates: States, parts: Parts) -> None:
        n, keys, values, size = slab.chunks, self.key_dim, self.value_dim, self.grid.chunk
        self.load(slab)
        q, z, dright = self.sources["q"].flat[n], self.z, self.work("dright", values, slab)
        dq, drows, dcolumns = parts["q"].flat[n], self.work("drows", keys, slab), self.rule.dcolumns(slab, parts)
        ends = q.new_empty(q.shape[0], keys) if "log_decay" in parts else None
        found = self.retreat(slab, dout, states, dstates, dcolumns, ends)
        torch.mul(found[:, :size], self.decay.enter, out=dq)
        torch.mul(found[:, size:], self.rule.enter, out=drows)
        dcolumns.mul_(self.decay.leave)

        dscores = self.square("dscores", slab)
        self.decay.add_gradients(torch.bmm(dout, z.mT, out=dscores), q, self.rule.columns, dq, dcolumns)
        torch.baddbmm(dscores, dright, z.mT, beta=0.0, alpha=-1.0, out=dscores)
        self.rule.meeting.add_gradients(slab, dscores, drows, self.rule.columns, dcolumns)
        moments = None if ends is None else self.work("moments", keys, slab)
        self.rule.differentiate(slab, dout, dright, drows, dstates, parts, moments)
        if moments is not None and ends is not None:
            moments.addcmul_(q, dq)
            parts["log_decay"].flat[n].copy_(self.decay.gradient(moments, ends))
