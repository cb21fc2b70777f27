"""Gated linear attention whose heads share queries and keys, in chunks, with one decay per token and head.

Values stay as they lie in memory: the heads of a group are columns beside one another, so that a chunk takes one
product for all of them wherever no decay stands between queries and keys. None does where decay in the chunk is mild.
With G the running sum of log decays in it, M half their whole sum, and per head, row by row,

    V' = e^{M − G} V        S' = e^M S        P = tril(Q Kᵀ), one for the group
    O = scale e^{G − M} (P V' + Q S')        S_next = e^{G_C − M} (S' + Kᵀ V')

where no exponent is beyond ± M, which is in range down to twice the floor of `chunks.decay`. From S' + Kᵀ V' to the S'
of the next chunk it is one factor a head. Backward is that of plain linear attention, on scaled tensors:

    dO' = scale e^{G − M} dO        dS' = e^{G_C − M} dS_next        dP = tril(dO' V'ᵀ)
    dQ = dP K + dO' S'ᵀ        dK = dPᵀ Q + V' dS'ᵀ
    dV = e^{M − G} (Pᵀ dO' + K dS')        dS = e^M (dS' + Qᵀ dO')
    dg_t = Σ_{s>=t} (o_s · do_s − v_s · dv_s) + Σ S_next ⊙ dS_next        over the rest of the chunk

The sum of S ⊙ dS is dg of the chunk's first token, so that it is computed from states only now and then.

Other chunks, and those in which documents meet, have decays e^{G_i − G_j} of each head between queries and keys, which
make products of each head of P; all that has to do with states is done for the group as before.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..chunks.decay import FLOOR, TokenDecay
from ..chunks.slabs import Borders, Grid, Slab, on_host, rows_of
from ..operation import Tensors
from ..problem import Problem
from .parts import GatedLinearInputs

CHUNK = 64
KEPT = 1 << 23  # numbers of the states that backward keeps at once
SUMMED = 8  # split chunks whose sums of S ⊙ dS follow from one


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
        for slab, out_here in zip(sweep.slabs, sweep.values_of(out[row]), strict=True):
            sweep.load(slab)
            sweep.scale_state(state, slab.first)
            sweep.read(state, out_here)
            sweep.advance(state)
        sweep.scale_state(state, len(sweep.slabs))
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
    # What was read is computed again where it has been rounded.
    out = problem.out() if problem.out is not None and q.dtype == problem.dtype else None
    for row in range(len(dout)):
        sweep = Row(problem, row)
        dstate = sweep.columns(dinitial[row] if dfinal_state is None else dfinal_state[row].to(problem.dtype))
        decays, size = DecayGradient(sweep), sweep.grid.chunk
        douts, reads = dout[row].split(size), None if out is None else out[row].split(size)
        dqs, dks, dvs = sweep.keys_of(dq[row]), sweep.keys_of(dk[row]), sweep.values_of(dv[row])
        for slab, before, after in sweep.backwards(sweep.columns(entering[row])):
            n = slab.first
            if slab.stop == sweep.grid.length:
                decays.ends = sweep.along(after, dstate)
            sweep.scale_state(dstate, n + 1)
            read = None if reads is None else reads[n]
            sweep.differentiate(douts[n], read, before, dstate, dqs[n], dks[n], dvs[n], decays.moments[n])
            decays.step(slab, before, dstate)
        sweep.scale_state(dstate, 0)
        dinitial[row] = sweep.heads(dstate)
        dlog_decay[row] = decays.all()
    return (dq, dk, dv, dlog_decay, *(None for _ in rest)), problem.entering(dinitial)


class HalvedDecay(TokenDecay):
    """Decays from the middle of each chunk's on, `falling`, and up to it, `rising`: `[chunks, C, heads, 1]`.

    half: e^M `[chunks, heads]`. mild: the chunks in which these are in range, with whatever products they take.
    """

    def __init__(self, log_decay: Tensor, grid: Grid) -> None:
        super().__init__(log_decay, grid)
        sums = self.steps.squeeze(1).cumsum(-2).transpose(1, 2)
        ends, lowest = sums[:, -1:], FLOOR[grid.dtype]
        self.mild = (ends.amin((1, 2, 3)) > 2 * lowest).tolist() if on_host(log_decay) else [False] * len(ends)
        self.falling = (sums - ends / 2).clamp_(lowest, -lowest).to(grid.dtype).exp_().contiguous()
        self.rising = self.falling.reciprocal()
        self.half = (ends / 2).clamp_(min=lowest).to(grid.dtype).exp_()[:, 0, :, 0]


class Values(NamedTuple):
    """Values of a chunk as they lie in memory: by head `[C, H, V]` and by group `[G, C, R V]`."""

    by_head: Tensor
    by_group: Tensor


class Row:
    """A sweep over one row, chunk by chunk: the slabs. States are `[G, K, R V]`, with the R heads of each group as
    columns beside one another, and those before a chunk are what its queries read: S', or S where it is not split.

    split: of each chunk, whether its decays are factors of tokens. factors: what the states that each chunk leaves
    behind lack of those before the next, and the states at both ends.
    """

    def __init__(self, problem: Problem[GatedLinearInputs], row: int) -> None:
        q, k, v, log_decay, *_ = problem.inputs
        assert log_decay is not None
        self.dtype, self.scale = problem.dtype, problem.scale
        length, self.count, self.value_dim = v.shape[1:]
        self.groups = k.shape[2]
        self.grid = Grid(1, self.count, length, problem.dtype, problem.device, CHUNK, matrices=self.count)
        self.slabs = self.grid.slabs()
        self.q, self.k, self.v = self.keys_of(q[row]), self.keys_of(k[row]), v[row].split(self.grid.chunk)
        self.decay = HalvedDecay(log_decay[row : row + 1], self.grid)
        self.borders = Borders(rows_of(problem.documents, slice(row, row + 1)), self.grid)
        met = self.borders.met(self.slabs)
        self.split = [mild and not meets for mild, meets in zip(self.decay.mild, met, strict=True)]
        self.works: dict[tuple[str, int], Values] = {}
        self._scale()

    def _scale(self) -> None:
        """Makes the factors of states, and of the tokens of split chunks: all at once, a row's are few."""
        decay, size = self.decay, self.grid.chunk
        split = torch.tensor(self.split, device=self.grid.device)[:, None]
        before, after = (torch.where(split, x, 1.0) for x in (decay.half, decay.falling[:, -1, :, 0]))
        factors = F.pad(before, (0, 0, 0, 1), value=1.0).mul_(F.pad(after, (0, 0, 1, 0), value=1.0))
        self.factors = factors.view(len(factors), self.groups, 1, -1, 1).unbind(0)
        scaled = decay.rising, decay.rising * factors[1:, None, :, None], decay.falling * self.scale
        self.rising, self.carried, self.falling = (x.flatten(0, 1)[: self.grid.length].split(size) for x in scaled)

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

    def scale_state(self, state: Tensor, border: int) -> None:
        """Brings a state, or its gradient, in place to the other side of the border after so many chunks."""
        self.by_head(state).mul_(self.factors[border])

    def along(self, state: Tensor, dstate: Tensor) -> Tensor:
        """Σ S ⊙ dS of each head, `[H]`, of both at one side of a border."""
        return self.by_head(state * dstate).sum((1, 3)).flatten().double()

    def keys_of(self, x: Tensor) -> tuple[Tensor, ...]:
        """Of queries or keys `[T, G, K]` those of each chunk, `[G, C, K]`."""
        return x.transpose(0, 1).split(self.grid.chunk, dim=1)

    def values_of(self, x: Tensor) -> list[Values]:
        """Of values `[T, H, V]` those of each chunk."""
        by_group = x.view(len(x), self.groups, -1).transpose(0, 1).split(self.grid.chunk, dim=1)
        return [Values(*each) for each in zip(x.split(self.grid.chunk), by_group, strict=True)]

    def work(self, name: str) -> Values:
        """Room for values of the chunk."""
        key = name, self.slab.tokens
        if key not in self.works:
            room = torch.empty(key[1], self.count, self.value_dim, dtype=self.dtype, device=self.grid.device)
            (self.works[key],) = self.values_of(room)
        return self.works[key]

    def place(self, x: Values, name: str) -> Values:
        """Where to compute what is to be in x: in x itself where types allow."""
        return x if x.by_head.dtype == self.dtype else self.work(name)

    def load(self, slab: Slab, *, passing: bool = False) -> None:
        """Makes a chunk the one that the other methods are about.

        passing: only for its values as they come to the state before the next chunk.
        """
        self.slab, number, dtype = slab, slab.first, self.dtype
        self.keys, self.values, self.whole = self.k[number].to(dtype), self.v[number].to(dtype), not self.split[number]
        if self.whole:
            self.decay.load(slab, self.borders.masks(slab), "leave" if passing else "all")
            self.leave, self.enter = (
                x.transpose(0, 1)[: slab.tokens] for x in (self.decay.leave, self.decay.enter * self.scale)
            )
            self.through = self.decay.through[0].view(self.groups, 1, -1, 1)
            leave = self.leave * self.factors[number + 1].view(-1, 1) if passing else self.leave
        else:
            self.decay.masks = None
            self.leave, self.enter = self.rising[number], self.falling[number]
            leave = self.carried[number] if passing else self.leave
        if not passing:
            self.queries = self.q[number].to(dtype)
        own, self.leaving = self.work("leaving")
        torch.mul(self.values, leave, out=own)

    def products(self) -> Tensor:
        """Q Kᵀ up to the diagonal, of groups; where decays stand between them that of heads, times scale."""
        products = torch.bmm(self.queries, self.keys.mT)
        if not self.whole:
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

    def read(self, state: Tensor, out: Values) -> None:
        """Writes the outputs of the chunk, given the state before it."""
        own, columns = self.place(out, "read")
        torch.bmm(self.queries, state, out=columns)
        if self.whole:
            mixed = torch.bmm(self.products(), self.values.transpose(0, 1))
            own.mul_(self.enter).add_(mixed.transpose(0, 1))
        else:
            columns.baddbmm_(self.products(), self.leaving)
            own.mul_(self.enter)
        if own is not out.by_head:
            out.by_head.copy_(own)

    def advance(self, state: Tensor) -> None:
        """Makes of the state before the chunk, in place, that after it."""
        if self.whole:
            self.by_head(state).mul_(self.through)
        state.baddbmm_(self.keys.mT, self.leaving)

    def backwards(self, state: Tensor) -> Iterator[tuple[Slab, Tensor, Tensor]]:
        """The chunks from the right, loaded, each with the states before it and before the next one.

        state: the one that enters the row. KEPT limits what is kept at once: beyond it, states are computed twice.
        """
        span = min(len(self.slabs), max(1, KEPT // state.numel()))
        stretches = [self.slabs[first : first + span] for first in range(0, len(self.slabs), span)]
        self.scale_state(state, 0)
        starts = [state]
        for stretch in stretches[:-1]:
            state = torch.empty_like(state).copy_(state)
            for slab in stretch:
                self._pass(slab, state, state)
            starts.append(state)
        states = state.new_empty(span + 1, *state.shape).unbind(0)
        for stretch, start in zip(reversed(stretches), reversed(starts), strict=True):
            states[0].copy_(start)
            for number, slab in enumerate(stretch):
                self._pass(slab, states[number], states[number + 1])
            for number, slab in reversed(list(enumerate(stretch))):
                self.load(slab)
                yield slab, states[number], states[number + 1]

    def _pass(self, slab: Slab, state: Tensor, out: Tensor) -> None:
        """Makes of the state before a chunk, in `out`, that before the next one."""
        self.load(slab, passing=True)
        factor = self.factors[slab.first + 1]
        torch.mul(self.by_head(state), self.through * factor if self.whole else factor, out=self.by_head(out))
        out.baddbmm_(self.keys.mT, self.leaving)

    def differentiate(
        self, dout: Tensor, read: Tensor | None, state: Tensor, dstate: Tensor,
        dq: Tensor, dk: Tensor, dv: Values, moments: Tensor,
    ) -> None:  # fmt: skip
        """Writes the chunk's gradients, and makes that of the state after it, in place, that of the one before it.

        read: the chunk's outputs, None to compute them again. moments: gets o · do − v · dv of tokens `[C, H]`.
        """
        dout, (entered, columns), along = dout.to(self.dtype), self.work("entered"), self.work("along")
        if read is None:
            self.read(state, along)
        torch.mul(along.by_head if read is None else read, dout, out=along.by_head)
        torch.mul(dout, self.enter, out=entered)
        dvalues, dvalues_columns = self.place(dv, "dvalues")
        torch.bmm(self.keys, dstate, out=dvalues_columns)
        products = self.products()
        if self.whole:
            by_head = dout.transpose(0, 1)
            dscores = torch.bmm(by_head, self.values.permute(1, 2, 0))
            dproducts = self._of_groups(dscores.mul_(self._between())).sum(1).mul_(self.scale)
            dvalues.mul_(self.leave).add_(torch.bmm(products.mT, by_head).transpose(0, 1))
        else:
            dproducts = torch.bmm(columns, self.leaving.mT).tril_()
            dvalues_columns.baddbmm_(products.mT, columns)
            dvalues.mul_(self.leave)
        torch.sum(along.by_head.addcmul_(dvalues, self.values, value=-1.0), -1, out=moments)
        if dvalues is not dv.by_head:
            dv.by_head.copy_(dvalues)
        self._store(dq, dproducts, self.keys, columns, state)
        self._store(dk, dproducts.mT, self.queries, self.leaving, dstate)
        if self.whole:
            self.by_head(dstate).mul_(self.through)
        dstate.baddbmm_(self.queries.mT, columns)

    def _store(self, out: Tensor, products: Tensor, tokens: Tensor, values: Tensor, state: Tensor) -> None:
        """out `[G, C, K]` = products tokens + values stateᵀ."""
        own = out if out.dtype == self.dtype else tokens.new_empty(tokens.shape)
        torch.bmm(products, tokens, out=own).baddbmm_(values, state.mT)
        if own is not out:
            out.copy_(own)


class DecayGradient:
    """The gradients of the decays of a row, whose chunks come from the right.

    moments: where o · do − v · dv of the tokens of each chunk belong, `[C, H]`. ends: Σ S ⊙ dS of each head after the
    chunk at hand, in float64.
    """

    def __init__(self, row: Row) -> None:
        self.row, length, chunk = row, row.grid.length, row.grid.chunk
        padded = torch.zeros(len(row.slabs), chunk, row.count, dtype=row.dtype, device=row.grid.device)
        self.padded, self.moments = padded, padded.flatten(0, 1)[:length].split(chunk)
        self.ends = padded.new_zeros(row.count, dtype=torch.float64)
        self.after: list[Tensor] = []
        self.masked: dict[int, Tensor] = {}

    def step(self, slab: Slab, state: Tensor, dstate: Tensor) -> None:
        """Goes to the next chunk on the left, given the state before this one and its gradient."""
        self.after.append(self.ends)
        own, decay = self.padded[slab.first], self.row.decay
        if decay.masks is not None:
            self.masked[slab.first] = decay.gradient(own.T.unsqueeze(-1), self.ends.unsqueeze(-1))[..., 0].T
        if not self.row.split[slab.first] or slab.first % SUMMED == 0:
            self.ends = self.row.along(state, dstate)
        else:
            self.ends = self.ends + own.sum(0)

    def all(self) -> Tensor:
        """The gradients `[T, H]`, in float64."""
        gradients = self.padded.double().flip(1).cumsum_(1).flip(1).add_(torch.stack(self.after[::-1])[:, None])
        for number, masked in self.masked.items():
            gradients[number] = masked
        return gradients.flatten(0, 1)[: self.row.grid.length]
