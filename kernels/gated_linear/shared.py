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
SUMMED = 8  # chunks whose sums of S ⊙ dS follow from one


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
            sweep.scale_state(state, slab.first)
            sweep.read(state, out[row, slab.start : slab.stop])
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
    exact = q.dtype == problem.dtype  # else what was read has been rounded, and is computed again
    out = problem.out() if exact and problem.out is not None else None
    for row in range(len(dout)):
        sweep = Row(problem, row)
        dstate = sweep.columns(dinitial[row] if dfinal_state is None else dfinal_state[row].to(problem.dtype))
        decays = DecayGradient(sweep)
        for slab, before, after in sweep.backwards(sweep.columns(entering[row])):
            if slab.stop == sweep.grid.length:
                decays.ends = sweep.along(after, dstate)
            sweep.scale_state(dstate, slab.first + 1)
            dout_here, *gradients = (x[row, slab.start : slab.stop] for x in (dout, dq, dk, dv))
            read = None if out is None else out[row, slab.start : slab.stop]
            sweep.differentiate(dout_here, read, before, dstate, *gradients, decays.moments(slab))
            decays.step(slab, before, dstate)
        sweep.scale_state(dstate, 0)
        dinitial[row] = sweep.heads(dstate)
        dlog_decay[row] = decays.all()
    return (dq, dk, dv, dlog_decay, *(None for _ in rest)), problem.entering(dinitial)


class HalvedDecay(TokenDecay):
    """Decays from the middle of each chunk's on, `falling`, and up to it, `rising`: `[chunks, C, heads, 1]`.

    half, last: e^M and the last of `falling`, `[chunks, heads]`. mild: the chunks in which these are in range, with
    whatever products they take.
    """

    def __init__(self, log_decay: Tensor, grid: Grid) -> None:
        super().__init__(log_decay, grid)
        sums = self.steps.squeeze(1).cumsum(-2).transpose(1, 2)
        ends, lowest = sums[:, -1:], FLOOR[grid.dtype]
        self.mild = (ends.amin((1, 2, 3)) > 2 * lowest).tolist() if on_host(log_decay) else [False] * len(ends)
        falling = (sums - ends / 2).clamp_(lowest, -lowest).to(grid.dtype).exp_().contiguous()
        self.falling, self.rising = falling.unbind(0), falling.reciprocal().unbind(0)
        self.half = (ends / 2).clamp_(min=lowest).to(grid.dtype).exp_()[:, 0, :, 0]
        self.last = falling[:, -1, :, 0]


class Row:
    """A sweep over one row, chunk by chunk: the slabs. States are `[G, K, R V]`, with the R heads of each group as
    columns beside one another, and those before a chunk are what its queries read: S', or S where it is not split.

    split: of each chunk, whether its decays are factors of tokens.
    """

    def __init__(self, problem: Problem[GatedLinearInputs], row: int) -> None:
        q, k, v, log_decay, *_ = problem.inputs
        assert log_decay is not None
        self.dtype, self.scale = problem.dtype, problem.scale
        length, self.count, self.value_dim = v.shape[1:]
        self.groups = k.shape[2]
        self.grid = Grid(1, self.count, length, problem.dtype, problem.device, CHUNK, matrices=self.count)
        self.slabs = self.grid.slabs()
        self.q, self.k, self.v = (x[row].split(self.grid.chunk) for x in (q, k, v))
        self.decay = HalvedDecay(log_decay[row : row + 1], self.grid)
        self.borders = Borders(rows_of(problem.documents, slice(row, row + 1)), self.grid)
        met = self.borders.met(self.slabs)
        self.split = [mild and not meets for mild, meets in zip(self.decay.mild, met, strict=True)]
        self.factors = self._factors()
        self.works: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}

    def _factors(self) -> tuple[Tensor, ...]:
        """What the states that each chunk leaves behind lack of those before the next; those of the ends, too."""
        decay = self.decay
        split = torch.tensor(self.split, device=decay.half.device)[:, None]
        before, after = (torch.where(split, x, 1.0) for x in (decay.half, decay.last))
        factors = F.pad(before, (0, 0, 0, 1), value=1.0).mul_(F.pad(after, (0, 0, 1, 0), value=1.0))
        return factors.view(len(factors), self.groups, 1, -1, 1).unbind(0)

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
        """Brings a state that comes to the border before so many chunks, from either side, to the other, in place."""
        self.by_head(state).mul_(self.factors[border])

    def along(self, state: Tensor, dstate: Tensor) -> Tensor:
        """Σ S ⊙ dS of each head, `[H]`, of both at one side of a border."""
        return self.by_head(state * dstate).sum((1, 3), dtype=torch.float64).flatten()

    def of_group(self, tokens: Tensor) -> Tensor:
        """Values `[C, H, V]` as `[G, C, R V]`."""
        return tokens.view(len(tokens), self.groups, -1).transpose(0, 1)

    def work(self, name: str) -> tuple[Tensor, Tensor]:
        """Room for the chunk's values, as they lie in memory, by head `[C, H, V]` and by group `[G, C, R V]`."""
        key = name, self.slab.tokens
        if key not in self.works:
            room = torch.empty(key[1], self.count, self.value_dim, dtype=self.dtype, device=self.grid.device)
            self.works[key] = room, self.of_group(room)
        return self.works[key]

    def place(self, x: Tensor, name: str) -> tuple[Tensor, Tensor]:
        """Where to compute the values of the chunk that are to be in x, as of `work`: in x itself where types allow."""
        return (x, self.of_group(x)) if x.dtype == self.dtype else self.work(name)

    def load(self, slab: Slab) -> None:
        """Makes a chunk the one that the other methods are about."""
        self._aim(slab)
        own, self.leaving = self.work("leaving")
        torch.mul(self.values, self.rising, out=own)

    def _aim(self, slab: Slab) -> None:
        self.slab, decay, number = slab, self.decay, slab.first
        self.queries, self.keys = (x[number].transpose(0, 1).to(self.dtype) for x in (self.q, self.k))
        self.values, self.whole = self.v[number].to(self.dtype), not self.split[number]
        if self.whole:
            decay.load(slab, self.borders.masks(slab))
            rising, falling = decay.leave.transpose(0, 1), decay.enter.transpose(0, 1)
            self.through = decay.through[0].view(self.groups, 1, -1, 1)
        else:
            decay.masks = None
            rising, falling = decay.rising[number], decay.falling[number]
        self.rising, self.falling = rising[: slab.tokens], falling[: slab.tokens] * self.scale

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

    def read(self, state: Tensor, out: Tensor) -> None:
        """Writes the outputs of the chunk `[C, H, V]`, given the state before it."""
        own, columns = self.place(out, "read")
        torch.bmm(self.queries, state, out=columns)
        if self.whole:
            mixed = torch.bmm(self.products(), self.values.transpose(0, 1))
            own.mul_(self.falling).add_(mixed.transpose(0, 1))
        else:
            columns.baddbmm_(self.products(), self.leaving)
            own.mul_(self.falling)
        if own is not out:
            out.copy_(own)

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
                self._through(slab, state, state)
            starts.append(state)
        states = state.new_empty(span + 1, *state.shape).unbind(0)
        for stretch, start in zip(reversed(stretches), reversed(starts), strict=True):
            states[0].copy_(start)
            for number, slab in enumerate(stretch):
                self._through(slab, states[number], states[number + 1])
            for number, slab in reversed(list(enumerate(stretch))):
                self.load(slab)
                yield slab, states[number], states[number + 1]

    def _through(self, slab: Slab, state: Tensor, out: Tensor) -> None:
        """Makes of the state before a chunk, in `out`, that before the next one."""
        self._aim(slab)
        own, leaving = self.work("leaving")
        factor = self.factors[slab.first + 1]
        torch.mul(self.values, self.rising * factor.view(-1, 1), out=own)
        torch.mul(self.by_head(state), self.through * factor if self.whole else factor, out=self.by_head(out))
        out.baddbmm_(self.keys.mT, leaving)

    def differentiate(
        self, dout: Tensor, read: Tensor | None, state: Tensor, dstate: Tensor,
        dq: Tensor, dk: Tensor, dv: Tensor, moments: Tensor,
    ) -> None:  # fmt: skip
        """Writes the chunk's gradients, and makes that of the state after it, in place, that of the one before it.

        read: the chunk's outputs, None to compute them again. moments: gets o · do − v · dv of tokens `[C, H]`.
        """
        dout, (entered, columns) = dout.to(self.dtype), self.work("entered")
        along = self.work("along")[0]
        if read is None:
            self.read(state, along)
        torch.mul(along if read is None else read, dout, out=along)
        torch.mul(dout, self.falling, out=entered)
        dvalues, dvalues_columns = self.place(dv, "dvalues")
        torch.bmm(self.keys, dstate, out=dvalues_columns)
        products = self.products()
        if self.whole:
            by_head = dout.transpose(0, 1)
            dscores = torch.bmm(by_head, self.values.permute(1, 2, 0))
            dproducts = self._of_groups(dscores.mul_(self._between())).sum(1).mul_(self.scale)
            dvalues.mul_(self.rising).add_(torch.bmm(products.mT, by_head).transpose(0, 1))
        else:
            dproducts = torch.bmm(columns, self.leaving.mT).tril_()
            dvalues_columns.baddbmm_(products.mT, columns)
            dvalues.mul_(self.rising)
        torch.sum(along.addcmul_(dvalues, self.values, value=-1.0), -1, out=moments)
        if dvalues is not dv:
            dv.copy_(dvalues)
        self._store(dq, dproducts, self.keys, columns, state)
        self._store(dk, dproducts.mT, self.queries, self.leaving, dstate)
        if self.whole:
            self.by_head(dstate).mul_(self.through)
        dstate.baddbmm_(self.queries.mT, columns)

    def _store(self, out: Tensor, products: Tensor, tokens: Tensor, values: Tensor, state: Tensor) -> None:
        """out `[C, G, K]` = products tokens + values stateᵀ."""
        place = out.transpose(0, 1)
        own = place if out.dtype == self.dtype else tokens.new_empty(tokens.shape)
        torch.bmm(products, tokens, out=own).baddbmm_(values, state.mT)
        if own is not place:
            place.copy_(own)


class DecayGradient:
    """The gradients of the decays of a row, whose chunks come from the right.

    ends: Σ S ⊙ dS of each head after the chunk at hand.
    """

    def __init__(self, row: Row) -> None:
        self.row, chunk = row, row.grid.chunk
        self.own = torch.zeros(len(row.slabs) * chunk, row.count, dtype=row.dtype, device=row.grid.device)
        self.ends = torch.zeros(row.count, dtype=torch.float64, device=row.grid.device)
        self.after: list[Tensor] = []
        self.masked: dict[int, Tensor] = {}

    def moments(self, slab: Slab) -> Tensor:
        """Where o · do − v · dv of the chunk's tokens belong, `[C, H]`."""
        return self.own[slab.start : slab.stop]

    def step(self, slab: Slab, state: Tensor, dstate: Tensor) -> None:
        """Goes to the next chunk on the left, given the state before this one and its gradient."""
        self.after.append(self.ends)
        masked = self.row.decay.masks is not None
        if masked:
            chunk = self.row.grid.chunk
            own = self.own[slab.first * chunk : (slab.first + 1) * chunk]
            self.masked[slab.first] = self.row.decay.gradient(own.T.unsqueeze(-1), self.ends.unsqueeze(-1))[..., 0].T
        if masked or slab.first % SUMMED == 0:
            self.ends = self.row.along(state, dstate)
        else:
            self.ends = self.ends + self.moments(slab).sum(0, dtype=torch.float64)

    def all(self) -> Tensor:
        """The gradients `[T, H]`, in float64."""
        row = self.row
        own = self.own.double().view(len(row.slabs), row.grid.chunk, row.count)
        gradients = own.flip(1).cumsum_(1).flip(1).add_(torch.stack(self.after[::-1])[:, None])
        for number, masked in self.masked.items():
            gradients[number] = masked
        return gradients.flatten(0, 1)[: row.grid.length]
