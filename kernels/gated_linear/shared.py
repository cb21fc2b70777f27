"""Gated linear attention whose heads share queries and keys, in chunks, with one decay per token and head.

Values stay as they lie in memory: the heads of a group are columns beside one another, so that a chunk takes one
product for all of them wherever no decay stands between queries and keys. None does where decay in the chunk is mild.
With G the running sum of log decays in it, M half their whole sum, and per head, row by row,

    V' = e^{M − G} V        S' = e^M S        P = tril(Q Kᵀ), one for the group
    O = scale e^{G − M} (P V' + Q S')        S_next = e^{G_C − M} (S' + Kᵀ V')

where no exponent is beyond ± M, which is in range down to twice the floor of `chunks.decay`. Backward is that of plain
linear attention, on scaled tensors:

    dO' = scale e^{G − M} dO        dS' = e^{G_C − M} dS_next        dP = tril(dO' V'ᵀ)
    dQ = dP K + dO' S'ᵀ        dK = dPᵀ Q + V' dS'ᵀ
    dV = e^{M − G} (Pᵀ dO' + K dS')        dS = e^M (dS' + Qᵀ dO')
    dg_t = Σ_{s>=t} (o_s · do_s − v_s · dv_s) + Σ S_next ⊙ dS_next        over the rest of the chunk

Other chunks, and those in which documents meet, have decays e^{G_i − G_j} of each head between queries and keys, which
make products of each head of P; all that has to do with states is done for the group as before.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from ..chunks.decay import FLOOR, TokenDecay
from ..chunks.slabs import Borders, Grid, Slab, on_host, rows_of
from ..operation import Tensors
from ..problem import Problem
from .parts import GatedLinearInputs

CHUNK = 64
KEPT = 1 << 24  # numbers of the states that backward keeps at once


def fits(problem: Problem[GatedLinearInputs]) -> bool:
    """Whether heads share queries and keys, and have one decay per token."""
    q, k, v, log_decay, value_log_decay, *_ = problem.inputs
    shared = q.shape[2] == k.shape[2] < v.shape[2]
    return shared and log_decay is not None and log_decay.dim() == 3 and value_log_decay is None


def forward(
    problem: Problem[GatedLinearInputs], initial_state: Tensor | None, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(out, written to `out` where it is passed; final state)."""
    out = problem.new_output() if out is None else out
    entering, final = problem.entering(initial_state), problem.new_states()
    for row in range(len(out)):
        sweep = Row(problem, row)
        state = sweep.columns(entering[row])
        for slab in sweep.slabs:
            sweep.load(slab)
            sweep.read(state, out[row, slab.start : slab.stop].transpose(0, 1))
            sweep.advance(state)
        final[row] = sweep.heads(state)
    return out, final


def backward(
    problem: Problem[GatedLinearInputs], dout: Tensor, dfinal_state: Tensor | None, initial_state: Tensor | None
) -> tuple[Tensors, Tensor]:
    """The gradients of the inputs, in their types, and of the initial state."""
    q, k, v, log_decay, *rest = problem.inputs
    assert log_decay is not None
    dq, dk, dv = (torch.empty(x.shape, dtype=problem.gradient_type(x), device=x.device) for x in (q, k, v))
    dlog_decay = torch.empty(log_decay.shape, dtype=log_decay.dtype, device=log_decay.device)
    entering, dinitial = problem.entering(initial_state), problem.new_states()
    for row in range(len(dout)):
        sweep = Row(problem, row)
        dstate = sweep.columns(dinitial[row] if dfinal_state is None else dfinal_state[row].to(problem.dtype))
        ends = None
        for slab, before, after in sweep.backwards(sweep.columns(entering[row])):
            here = row, slice(slab.start, slab.stop)
            dout_here, *gradients = (x[here].transpose(0, 1) for x in (dout, dq, dk, dv))
            ends = sweep.ends(after, dstate) if ends is None else ends
            steps, ends = sweep.differentiate(dout_here, before, dstate, ends, *gradients)
            dlog_decay[here].copy_(steps)
        dinitial[row] = sweep.heads(dstate)
    return (dq, dk, dv, dlog_decay, *(None for _ in rest)), problem.entering(dinitial)


class HalvedDecay(TokenDecay):
    """Decays from the middle of each chunk's on, `falling`, and up to it, `rising`: `[chunks, heads, C, 1]`.

    half: e^M `[chunks, heads, 1, 1]`. mild: the chunks in which these are in range, with whatever products they take.
    """

    def __init__(self, log_decay: Tensor, grid: Grid) -> None:
        super().__init__(log_decay, grid)
        sums = self.steps.squeeze(1).cumsum(-2)
        ends, lowest = sums[:, :, -1:], FLOOR[grid.dtype]
        self.mild = (ends.amin((1, 2, 3)) > 2 * lowest).tolist() if on_host(log_decay) else [False] * len(ends)
        self.falling = (sums - ends / 2).clamp_(lowest, -lowest).to(grid.dtype).exp_()
        self.rising = self.falling.reciprocal()
        self.half = (ends / 2).clamp_(min=lowest).to(grid.dtype).exp_()


class Row:
    """A sweep over one row, chunk by chunk: the slabs. States are `[G, K, R V]`, with the R heads of each group as
    columns beside one another."""

    def __init__(self, problem: Problem[GatedLinearInputs], row: int) -> None:
        q, k, v, log_decay, *_ = problem.inputs
        assert log_decay is not None
        self.dtype, self.scale = problem.dtype, problem.scale
        self.q, self.k, self.v = (x[row].transpose(0, 1) for x in (q, k, v))  # heads or groups first
        self.groups, (self.count, length, self.value_dim) = len(k[row, 0]), self.v.shape
        self.grid = Grid(1, self.count, length, problem.dtype, problem.device, CHUNK, matrices=self.count)
        self.slabs = self.grid.slabs()
        self.decay = HalvedDecay(log_decay[row : row + 1], self.grid)
        self.borders = Borders(rows_of(problem.documents, slice(row, row + 1)), self.grid)
        self.works: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}

    def columns(self, state: Tensor) -> Tensor:
        """Of states `[H, K, V]`, a copy."""
        by_group = state.unflatten(0, (self.groups, -1)).transpose(1, 2)
        return by_group.clone(memory_format=torch.contiguous_format).flatten(2)

    def heads(self, state: Tensor) -> Tensor:
        """The inverse of `columns`."""
        return self.by_head(state).transpose(1, 2).flatten(0, 1)

    def by_head(self, state: Tensor) -> Tensor:
        """`[G, K, R, V]`."""
        return state.view(self.groups, -1, self.count // self.groups, self.value_dim)

    def work(self, name: str) -> tuple[Tensor, Tensor]:
        """Room for the chunk's values, as they lie in memory: by head `[H, C, V]` and by group `[G, C, R V]`."""
        key = name, self.slab.tokens
        if key not in self.works:
            room = torch.empty(key[1], self.count, self.value_dim, dtype=self.dtype, device=self.v.device)
            self.works[key] = room.transpose(0, 1), room.view(key[1], self.groups, -1).transpose(0, 1)
        return self.works[key]

    def load(self, slab: Slab) -> None:
        """Makes a chunk the one that the other methods are about."""
        self.slab, decay, here = slab, self.decay, slice(slab.start, slab.stop)
        self.queries, self.keys, self.values = (x[:, here].to(self.dtype) for x in (self.q, self.k, self.v))
        masks = self.borders.masks(slab)
        self.split = masks is None and decay.mild[slab.first]
        if self.split:
            decay.masks = None
            self.rising, self.falling = decay.rising[slab.first], decay.falling[slab.first]
            self.first, self.last = (
                x.view(self.groups, 1, -1, 1) for x in (decay.half[slab.first], self.falling[:, -1])
            )
        else:
            decay.load(slab, masks)
            self.rising, self.falling = decay.leave, decay.enter
            self.through = decay.through[0].view(self.groups, 1, -1, 1)
        self.rising, self.falling = self.rising[:, : slab.tokens], self.falling[:, : slab.tokens] * self.scale
        own, self.leaving = self.work("leaving")
        torch.mul(self.values, self.rising, out=own)

    def products(self) -> Tensor:
        """Q Kᵀ up to the diagonal, of groups; where decays stand between them that of heads, times scale."""
        products = torch.bmm(self.queries, self.keys.mT)
        if self.split:
            return products.tril_()
        by_head = torch.empty_like(self._between())
        torch.mul(products.mul_(self.scale)[:, None], self._of_groups(self._between()), out=self._of_groups(by_head))
        return by_head

    def _between(self) -> Tensor:
        """The decays between tokens `[H, C, C]`, where the chunk is not split."""
        size = self.slab.tokens
        between = self.decay.scored[:, :size, :size]
        return between if self.decay.masks is None else between * self.decay.masks.same[0, 0, :, :size, :size]

    def _of_groups(self, x: Tensor) -> Tensor:
        """`[H, …]` as `[G, R, …]`."""
        return x.view(self.groups, -1, *x.shape[1:])

    def enter(self, state: Tensor, out: Tensor) -> Tensor:
        """What the chunk's queries read of the state before it, in `out`."""
        if self.split:
            torch.mul(self.by_head(state), self.first, out=self.by_head(out))
        elif out is not state:
            out.copy_(state)
        return out

    def read(self, state: Tensor, out: Tensor) -> None:
        """Writes the outputs of the chunk `[H, C, V]`, and makes of the state before it what its queries read."""
        self.enter(state, state)
        own, columns = self.work("read")
        torch.bmm(self.queries, state, out=columns)
        if self.split:
            columns.baddbmm_(self.products(), self.leaving)
            torch.mul(own, self.falling, out=out)
        else:
            out.copy_(torch.bmm(self.products(), self.values).addcmul_(own, self.falling))

    def advance(self, state: Tensor) -> None:
        """Makes of what the chunk's queries read, in place, the state after it."""
        if not self.split:
            self.by_head(state).mul_(self.through)
        state.baddbmm_(self.keys.mT, self.leaving)
        if self.split:
            self.by_head(state).mul_(self.last)

    def backwards(self, state: Tensor) -> Iterator[tuple[Slab, Tensor, Tensor]]:
        """The chunks from the right, loaded, each with the states before and after it; the first may be changed.

        state: the one before the row. KEPT limits what is kept at once: beyond it, states are computed twice.
        """
        span = min(len(self.slabs), max(1, KEPT // state.numel()))
        stretches = [self.slabs[first : first + span] for first in range(0, len(self.slabs), span)]
        starts = [state]
        for stretch in stretches[:-1]:
            state = torch.empty_like(state).copy_(state)
            for slab in stretch:
                self._through(slab, state, state)
            starts.append(state)
        states = state.new_empty(span + 1, *state.shape)
        for stretch, start in zip(reversed(stretches), reversed(starts), strict=True):
            states[0] = start
            for number, slab in enumerate(stretch):
                self._through(slab, states[number], states[number + 1])
            for number, slab in reversed(list(enumerate(stretch))):
                self.load(slab)
                yield slab, states[number], states[number + 1]

    def _through(self, slab: Slab, state: Tensor, out: Tensor) -> None:
        self.load(slab)
        self.advance(self.enter(state, out))

    def ends(self, state: Tensor, dstate: Tensor) -> Tensor:
        """Σ S ⊙ dS of each head, `[H, 1]`."""
        return self.by_head(state * dstate).sum((1, 3)).view(-1, 1)

    def differentiate(
        self, dout: Tensor, state: Tensor, dstate: Tensor, ends: Tensor, dq: Tensor, dk: Tensor, dv: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Writes the chunk's gradients, and makes that of the state after it, in place, that of the one before it.

        ends: of the state after the chunk. Returns the gradient of the decays `[C, H]`, and `ends` before the chunk.
        """
        dout, (entered, columns), (read, read_columns) = dout.to(self.dtype), self.work("entered"), self.work("read")
        torch.mul(dout, self.falling, out=entered)
        self.enter(state, state)
        if self.split:
            self.by_head(dstate).mul_(self.last)
        torch.bmm(self.queries, state, out=read_columns)
        dvalues, dvalues_columns = self.work("dvalues")
        torch.bmm(self.keys, dstate, out=dvalues_columns)
        products = self.products()
        if self.split:
            read_columns.baddbmm_(products, self.leaving)
            moments = read.mul_(entered).sum(-1)
            dproducts = torch.bmm(columns, self.leaving.mT).tril_()
            dvalues_columns.baddbmm_(products.mT, columns)
            torch.mul(dvalues, self.rising, out=dvalues)
        else:
            dscores = torch.bmm(dout, self.values.mT)
            moments = read.mul_(entered).sum(-1).add_((dscores * products).sum(-1))
            dproducts = self._of_groups(dscores.mul_(self._between())).sum(1).mul_(self.scale)
            dvalues.mul_(self.rising).add_(torch.bmm(products.mT, dout))
        dv.copy_(dvalues)
        moments -= dvalues.mul_(self.values).sum(-1)
        dq.copy_(torch.bmm(dproducts, self.keys).baddbmm_(columns, state.mT))
        dk.copy_(torch.bmm(dproducts.mT, self.queries).baddbmm_(self.leaving, dstate.mT))
        if not self.split:
            self.by_head(dstate).mul_(self.through)
        dstate.baddbmm_(self.queries.mT, columns)
        before = self.ends(state, dstate)
        if self.split:
            self.by_head(dstate).mul_(self.first)
        padded = F.pad(moments, (0, self.grid.chunk - self.slab.tokens)).unsqueeze(-1)
        return self.decay.gradient(padded, ends)[:, : self.slab.tokens, 0].T, before
