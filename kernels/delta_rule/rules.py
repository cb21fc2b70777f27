"""What is erased and written: under keys and by a beta, or by the vectors of a general diagonal-plus-low-rank step.

Both solve (I + L) Z = R − Ê S in each chunk; they differ in the rows e and columns b of L, and in what else is written.
A rule's `columns` are b, its `enter` the factors of Ê. How rows meet the state, decayed or not, is a class of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..chunks.decay import by_row
from ..chunks.slabs import Slab, States
from ..chunks.sweep import Parts, Sweep


class Late:
    """Rows that meet the state after it has decayed at their own token."""

    def __init__(self, sweep: Sweep) -> None:
        self.sweep = sweep

    def load(self, slab: Slab, rows: Tensor) -> None:
        """Takes the rows `[N, C, K]`, and fills Ê."""
        self.rows, self.enter = rows, self.sweep.decay.enter
        torch.mul(rows, self.enter, out=self.sweep.work("erase", self.sweep.key_dim, slab))

    def scores(self, slab: Slab, columns: Tensor, out: Tensor) -> Tensor:
        """out_ij = e_i · column_j for j < i, under the decays between them; what else it holds is not read."""
        self.sweep.decay.scores(self.rows, columns, out)
        return out

    def add_gradients(self, slab: Slab, dscores: Tensor, drows: Tensor, columns: Tensor, dcolumns: Tensor) -> None:
        """Adds to the gradients of rows and columns that of their scores, `dscores` below the diagonal."""
        dscores.diagonal(dim1=-2, dim2=-1).zero_()
        self.sweep.decay.add_gradients(dscores, self.rows, columns, drows, dcolumns)

    def moments(self, drows: Tensor, out: Tensor) -> Tensor:
        """What the rows say of the decay of each token."""
        return torch.mul(self.rows, drows, out=out)


class Early:
    """Rows that meet the state before it decays at their own token.

    The score of e_i, which lacks the decay of token i, is that of row i − 1 with e_i in place of e_{i−1}: so e is also
    kept shifted to the row before, and what comes from it is shifted back.
    """

    def __init__(self, sweep: Sweep) -> None:
        self.sweep = sweep

    def load(self, slab: Slab, rows: Tensor) -> None:
        sweep, enter = self.sweep, self.sweep.decay.enter
        self.rows, self.before = rows, sweep.work("rows before", sweep.key_dim, slab)
        self.before[:, :-1] = rows[:, 1:]
        self.before[:, -1] = 0.0
        self.enter = sweep.work("enter", enter.shape[-1], slab)
        self.enter[:, 1:] = enter[:, :-1]
        self.enter[:, 0] = 1.0
        if sweep.masks is not None:
            by_row(self.enter, sweep.grid).mul_(sweep.masks.enter)
        torch.mul(rows, self.enter, out=sweep.work("erase", sweep.key_dim, slab))

    def scores(self, slab: Slab, columns: Tensor, out: Tensor) -> Tensor:
        sweep = self.sweep
        shifted = sweep.square("shifted", slab)
        sweep.decay.scores(self.before, columns, shifted)
        out[:, 1:] = shifted[:, :-1]
        if sweep.masks is not None:
            by_row(out, sweep.grid).mul_(sweep.masks.same)
        return out

    def add_gradients(self, slab: Slab, dscores: Tensor, drows: Tensor, columns: Tensor, dcolumns: Tensor) -> None:
        sweep = self.sweep
        shifted = sweep.square("dshifted", slab)
        spare = sweep.work("drows before", sweep.key_dim, slab).zero_()
        if sweep.masks is not None:
            by_row(dscores, sweep.grid).mul_(sweep.masks.same)
        shifted[:, :-1] = dscores[:, 1:]
        shifted[:, -1] = 0.0
        sweep.decay.add_gradients(shifted, self.before, columns, spare, dcolumns)
        drows[:, 1:] += spare[:, :-1]

    def moments(self, drows: Tensor, out: Tensor) -> Tensor:
        # A row meets the state without its own decay: what it says is of the decays up to the token before.
        torch.mul(self.rows[:, 1:], drows[:, 1:], out=out[:, :-1])
        out[:, -1] = 0.0
        return out


class BetaRule:
    """e = beta k, b = k, R = beta v: the value at k is moved towards v by beta. Without beta, it becomes v.

    Where `erase` is given, e is beta times that.
    """

    def __init__(self, sweep: Sweep) -> None:
        self.sweep = sweep
        self.meeting = (Early if sweep.problem.op.erase_first else Late)(sweep)
        self.keys, self.values = sweep.sources["k"], sweep.sources["v"]
        self.beta, self.erase = sweep.sources.get("beta"), sweep.sources.get("erase")

    def load(self, slab: Slab) -> None:
        sweep, keys = self.sweep, self.sweep.key_dim
        self.columns, v = self.keys.load(slab), self.values.load(slab)
        self.erased = self.columns if self.erase is None else self.erase.load(slab)
        right, rows = sweep.work("right", sweep.value_dim, slab), self.erased
        if right.shape[-1] > v.shape[-1]:
            right[..., v.shape[-1] :] = 0.0
        right = right[..., : v.shape[-1]]
        if self.beta is None:
            right.copy_(v)
        else:
            beta = self.beta.load(slab)
            rows = torch.mul(self.erased, beta, out=sweep.work("rows", keys, slab))
            torch.mul(v, beta, out=right)
        self.meeting.load(slab, rows)
        self.enter = self.meeting.enter
        self.meeting.scores(slab, self.columns, sweep.square("system", slab))
        torch.mul(self.columns, sweep.decay.leave, out=sweep.work("write", keys, slab))

    def load_reads(self, slab: Slab, q: Tensor) -> None:
        """Nothing is read but what Z writes."""

    def write(self, slab: Slab, states: States) -> None:
        """Nothing is written but Z."""

    def carry(self, before: Tensor, through: Tensor, after: Tensor) -> Tensor:
        """The state after a chunk without Z."""
        return torch.mul(before, through, out=after)

    def read(self, slab: Slab, out: Tensor) -> None:
        """Nothing is read but what Z writes."""

    def dcolumns(self, slab: Slab, parts: Parts) -> Tensor:
        return parts["k"].flat[slab.chunks]

    def differentiate(
        self,
        slab: Slab,
        dout: Tensor,
        dright: Tensor,
        drows: Tensor,
        dstates: States,
        parts: Parts,
        moments: Tensor | None,
    ) -> None:
        """Completes the gradients of k, v, beta and `erase`, and fills `moments` with what all but the queries add."""
        n, v = slab.chunks, self.values.flat[slab.chunks]
        dk = parts["k"].flat[n]
        if moments is not None:
            self.meeting.moments(drows, moments).addcmul_(self.columns, dk, value=-1.0)
        dkeys = dk if self.erase is None else parts["erase"].flat[n].zero_()
        if self.beta is None:
            parts["v"].flat[n].copy_(dright)
            dkeys.add_(drows)
            return
        beta = self.beta.flat[n]
        torch.mul(dright, beta, out=parts["v"].flat[n])
        # In memory that is at hand and needed no more: fresh memory costs more than these sums.
        room = self.sweep.work("query", self.sweep.key_dim, slab), self.sweep.work("dz", self.sweep.value_dim, slab)
        dbeta, of_values = parts["beta"].flat[n], torch.mul(dright, v, out=room[1]).sum(-1, keepdim=True)
        torch.sum(torch.mul(drows, self.erased, out=room[0]), -1, keepdim=True, out=dbeta).add_(of_values)
        dkeys.addcmul_(drows, beta)


class EraseRule:
    """e = −a, which meets the state early, and k and v written besides b: R = −P V with P_ij = e_i · k_j for j < i."""

    def __init__(self, sweep: Sweep) -> None:
        self.sweep, self.meeting = sweep, Early(sweep)
        self.keys, self.values, self.a, self.b = (sweep.sources[name] for name in ("k", "v", "a", "b"))
        self.wide = sweep.value_dim > sweep.problem.inputs.v.shape[-1]

    def load(self, slab: Slab) -> None:
        sweep, keys = self.sweep, self.sweep.key_dim
        k, v, a = self.keys.load(slab), self.values.load(slab), self.a.load(slab)
        self.columns = self.b.load(slab)
        self.meeting.load(slab, torch.neg(a, out=sweep.work("rows", keys, slab)))
        self.enter = self.meeting.enter
        torch.mul(self.columns, sweep.decay.leave, out=sweep.work("write", keys, slab))
        torch.mul(k, sweep.decay.leave, out=sweep.work("keys", keys, slab))
        self.meeting.scores(slab, self.columns, sweep.square("system", slab))
        erased = self.meeting.scores(slab, k, sweep.square("erased keys", slab))
        right = sweep.work("right", sweep.value_dim, slab)
        if self.wide:
            right.zero_()
        right = right[..., : v.shape[-1]]
        right.copy_(torch.bmm(erased, v)).neg_()

    def load_reads(self, slab: Slab, q: Tensor) -> None:
        scores = self.sweep.square("key scores", slab)
        self.sweep.decay.scores(q, self.keys.flat[slab.chunks], scores)

    def write(self, slab: Slab, states: States) -> None:
        """The states after each chunk as the written keys and values alone would have them."""
        v, keys = self.values.flat[slab.chunks], self.sweep.work("keys", self.sweep.key_dim, slab)
        if self.wide:
            states.each[1 : slab.chunks + 1].zero_()
            states.after[slab.chunks][..., : v.shape[-1]] = torch.bmm(keys.mT, v)
        else:
            torch.bmm(keys.mT, v, out=states.after[slab.chunks])

    def carry(self, before: Tensor, through: Tensor, after: Tensor) -> Tensor:
        """The state after a chunk without Z, where `write` has been."""
        return after.addcmul_(before, through)

    def read(self, slab: Slab, out: Tensor) -> None:
        v = self.values.flat[slab.chunks]
        out[..., : v.shape[-1]].baddbmm_(self.sweep.square("key scores", slab), v)

    def dcolumns(self, slab: Slab, parts: Parts) -> Tensor:
        return parts["b"].flat[slab.chunks]

    def differentiate(
        self,
        slab: Slab,
        dout: Tensor,
        dright: Tensor,
        drows: Tensor,
        dstates: States,
        parts: Parts,
        moments: Tensor | None,
    ) -> None:
        """Completes the gradients of all but the decays, and fills `moments` with what all but the queries add."""
        sweep, n = self.sweep, slab.chunks
        k, v, after = self.keys.flat[n], self.values.flat[n], dstates.after[n]
        dk, dv = parts["k"].flat[n], parts["v"].flat[n]
        torch.bmm(v, after.mT, out=dk).mul_(sweep.decay.leave)
        dscores = torch.bmm(dout, v.mT, out=sweep.square("dscores", slab))
        sweep.decay.add_gradients(dscores, sweep.sources["q"].flat[n], k, parts["q"].flat[n], dk)
        torch.baddbmm(dscores, dright, v.mT, beta=0.0, alpha=-1.0, out=dscores)
        self.meeting.add_gradients(slab, dscores, drows, k, dk)

        torch.bmm(sweep.square("key scores", slab).mT, dout, out=dv)
        dv.baddbmm_(sweep.square("erased keys", slab).mT, dright, alpha=-1.0)
        dv.baddbmm_(sweep.work("keys", sweep.key_dim, slab), after)
        torch.neg(drows, out=parts["a"].flat[n])
        if moments is not None:
            self.meeting.moments(drows, moments).addcmul_(self.columns, parts["b"].flat[n], value=-1.0)
            moments.addcmul_(k, dk, value=-1.0)
