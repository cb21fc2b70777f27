"""The selective scan a few tokens at a time: forward, a hand-written backward, and what an entering state adds.

The states of a slab of tokens are `[tokens, rows, N, channels]` in a workspace that stays in cache, filled by a
product over all of them and a step for each token. A block of rows and channels is swept over the whole sequence
before the next one; what is as long as the sequence never has the dim N but for states at the starts of slabs, which
backward keeps of one block at a time. With dh_t the whole gradient of h_t,

    dh_t = c_t dy_t + decay_{t+1} dh_{t+1}         dc_t = h_t dy_t        du_t = dh_t b_t        db_t = dh_t u_t
    dg_t = decay_t h_{t−1} dh_t                    u_t = Δ_t x_t          g_t = Δ_t a, the log decay
    dΔ_t = dg_t a + x_t du_t                       da = Σ_t Δ_t dg_t      dx_t = Δ_t du_t

summed over the dims that the left side lacks. Longhorn's decay is 1 − Δ_t b_t², which takes no exponential.
No exponent is below the floor of its type, as products with subnormal numbers take a hundred times as long.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..chunks import scan
from ..chunks.decay import FLOOR
from ..chunks.slabs import Slab, on_host
from ..documents import Documents
from ..operation import Tensors
from ..problem import Problem, first_runs
from . import SelectiveInputs

SLAB = 16  # tokens whose states are held at once
WIDTH = 8192  # rows × channels × N of a token's step: enough to hide its call, few enough to keep a slab in cache


class Masks(NamedTuple):
    """Where documents of a slab meet, or end in padding."""

    keeps: Tensor  # 0/1 `[tokens, rows, 1, 1]`: the token goes on with the document of the token before it
    padding: Tensor  # bool `[tokens, rows, 1]`: the token is padding


class Sweep(scan.Sweep):
    """A sweep with workspaces `[tokens, rows, N, channels]`."""

    width, chunk, chunks = WIDTH, 1, SLAB

    def __init__(self, problem: Problem[SelectiveInputs], rows: slice, channels: slice) -> None:
        super().__init__(problem, rows, channels)
        inputs = problem.inputs
        self.delta, self.b, self.c = self.part(inputs.delta), inputs.b[rows], inputs.c[rows]
        self.state_shape = (len(self.b), self.b.shape[2], self.x.shape[2])
        self.each: dict[str, tuple[Tensor, ...]] = {}  # the same token by token: views take longer than one is used
        self.a = None
        if inputs.a is not None:
            self.a = inputs.a[channels].T.to(self.dtype).contiguous()
            self.floored = not on_host(self.a) or self._is_strong(self.a)

    def _is_strong(self, a: Tensor) -> bool:
        """Whether some exponent may be below the floor: once for the block, so that most models need no pass for it."""
        return not float(self.delta.amax().double() * a.amin().double()) >= FLOOR[self.dtype]

    def lanes(self, state: Tensor) -> Tensor:
        """The block's part of states `[B, D, N]`, as `[rows, N, channels]`."""
        return state[self.rows, self.channels].mT

    def work(self, name: str, tokens: int) -> Tensor:
        """The workspace `name`; the states have room for one token more, the one before."""
        if name not in self.works:
            shape = (min(SLAB, self.length) + 1, *self.state_shape)
            self.works[name] = torch.empty(shape, dtype=self.dtype, device=self.device)
            self.each[name] = self.works[name].unbind(0)
        return self.works[name][:tokens]

    def of(self, source: Tensor, slab: Slab) -> Tensor:
        """The slab's tokens of `[rows, T, …]`, time first."""
        return source[:, slab.start : slab.stop].transpose(0, 1).to(self.dtype).contiguous()

    def store(self, values: Tensor, target: Tensor, slab: Slab, *, add: bool = False) -> None:
        """Writes, or adds, `[tokens * rows, …]` to the slab's tokens of `[rows, T, …]`."""
        tokens = target[:, slab.start : slab.stop].transpose(0, 1)
        values = values.reshape(tokens.shape)
        if add:
            tokens.add_(values)
        else:
            tokens.copy_(values)

    def masks(self, slab: Slab) -> Masks | None:
        """The masks of a slab, or None where each of its rows goes on through it in one document."""
        if not self.meets(slab):
            return None
        ids = self.ids[:, slab.start : slab.stop + 1].T
        real = ids[1:] >= 0
        return Masks(((ids[1:] == ids[:-1]) & real)[..., None, None].to(self.dtype), ~real[..., None])


class Loaded:
    """A slab's inputs: decays in a workspace, u = Δ x, and the rest time first."""

    def __init__(self, sweep: Sweep, slab: Slab) -> None:
        self.sweep, self.slab, self.masks = sweep, slab, sweep.masks(slab)
        self.delta, self.b = sweep.of(sweep.delta, slab), sweep.of(sweep.b, slab)
        self.squares = self.b.square() if sweep.a is None else self.b

    def log_decay(self) -> Tensor:
        """g in the workspace of the decays."""
        work = self.sweep.work("decay", self.slab.tokens)
        if self.sweep.a is None:
            return torch.mul(self.delta.unsqueeze(2), self.squares.unsqueeze(3), out=work).neg_().log1p_()
        return torch.mul(self.delta.unsqueeze(2), self.sweep.a, out=work)

    def decay(self) -> Tensor:
        """e^g, 0 where a document starts."""
        if self.sweep.a is None:
            work, one = self.sweep.work("decay", self.slab.tokens), self.delta.new_ones(())
            torch.addcmul(one, self.delta.unsqueeze(2), self.squares.unsqueeze(3), value=-1.0, out=work)
        else:
            work = self.log_decay()
            if self.sweep.floored:
                work.clamp_(min=FLOOR[self.sweep.dtype])
            work.exp_()
        return work if self.masks is None else work.mul_(self.masks.keeps)

    def states(self, before: Tensor) -> Tensor:
        """h of the token before the slab, `before`, and of its tokens. After `decay`."""
        x = self.sweep.of(self.sweep.x, self.slab)
        if self.masks is not None:
            x = x.masked_fill(self.masks.padding, 0.0)
        self.x, self.u = x, x * self.delta
        h = self.sweep.work("h", self.slab.tokens + 1)
        h[0] = before
        torch.mul(self.u.unsqueeze(2), self.b.unsqueeze(3), out=h[1:])
        at, factors = self.sweep.each["h"], self.sweep.each["decay"]
        for t in range(self.slab.tokens):
            at[t + 1].addcmul_(at[t], factors[t])
        return h

    def read(self, h: Tensor) -> Tensor:
        """y = Σ_n h c, `[tokens * rows, 1, channels]`."""
        return torch.bmm(self.sweep.of(self.sweep.c, self.slab).flatten(0, 1).unsqueeze(1), h.flatten(0, 1))


def forward(problem: Problem[SelectiveInputs], initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
    """(y, final state)."""
    out, state = problem.new_output(), problem.entering(initial_state).clone()
    for sweep in Sweep.over(problem):
        carry, target = sweep.lanes(state), sweep.part(out)
        before = carry.contiguous()
        for slab in sweep.slabs():
            loaded = Loaded(sweep, slab)
            loaded.decay()
            h = loaded.states(before)
            sweep.store(loaded.read(h[1:]), target, slab)
            before = h[-1]
        carry.copy_(before)
    return out, state


class RunningSum:
    """e^{g_1 + … + g_t} over a row's first document, slab after slab."""

    def __init__(self, sweep: Sweep) -> None:
        self.sweep = sweep
        rows, size, channels = sweep.state_shape
        shape = (rows, size, channels) if sweep.a is None else (rows, channels)
        self.total = torch.zeros(shape, dtype=torch.float64, device=sweep.device)
        self.least = int(sweep.documents.derive(first_stops).min())
        self.stops = sweep.documents.on(sweep.device, first_stops)

    def factors(self, loaded: Loaded) -> Tensor:
        """In the workspace of the decays; 0 beyond the first document."""
        work = self.sweep.work("decay", loaded.slab.tokens)
        if self.sweep.a is None:
            sums = loaded.log_decay().cumsum(0, dtype=torch.float64).add_(self.total)
            work.copy_(sums)
        else:
            sums = loaded.delta.cumsum(0, dtype=torch.float64).add_(self.total)
            torch.mul(sums.unsqueeze(2).to(work.dtype), self.sweep.a, out=work)
        self.total = sums[-1]
        work.clamp_(min=FLOOR[self.sweep.dtype]).exp_()
        if loaded.slab.stop <= self.least:
            return work
        tokens = torch.arange(loaded.slab.start, loaded.slab.stop, device=work.device)[:, None]
        return work.mul_((tokens < self.stops)[..., None, None].to(work))


def first_stops(documents: Documents) -> Tensor:
    """`[B]`, on the host: how many tokens each row's first document, or padding, has."""
    return first_runs(documents).length


def total_decay(problem: Problem[SelectiveInputs]) -> Tensor:
    """e^{g_1 + … + g_T} `[B, D, N]`."""
    total = problem.new_states()
    for sweep in Sweep.over(problem):
        sums = torch.zeros(sweep.state_shape, dtype=torch.float64, device=sweep.device)
        for slab in sweep.slabs():
            sums += Loaded(sweep, slab).log_decay().sum(0, dtype=torch.float64)
        sweep.lanes(total).copy_(sums.exp_())
    return total


def correct(problem: Problem[SelectiveInputs], out: Tensor, state: Tensor) -> Tensor:
    """Adds Σ_n e^{g_1 + … + g_t} state c_t to the outputs that the entering state reaches."""
    entering = problem.entering(state)
    for sweep in Sweep.over(problem):
        before, target, sums = sweep.lanes(entering), sweep.part(out), RunningSum(sweep)
        for slab in sweep.slabs(problem.reach):
            loaded = Loaded(sweep, slab)
            sweep.store(loaded.read(sums.factors(loaded).mul_(before)), target, slab, add=True)
    return out


def summarize_backward(problem: Problem[SelectiveInputs], dout: Tensor, initial_state: Tensor | None = None) -> Tensor:
    """Σ_t e^{g_1 + … + g_t} c_t dy_t `[B, D, N]` over the tokens that an entering state reaches."""
    dinitial = problem.new_states()
    for sweep in Sweep.over(problem):
        gradient, given, sums = sweep.lanes(dinitial), sweep.part(dout), RunningSum(sweep)
        for slab in sweep.slabs(problem.reach):
            factors = sums.factors(Loaded(sweep, slab)).mul_(sweep.of(given, slab).unsqueeze(2))
            gradient += factors.mul_(sweep.of(sweep.c, slab).unsqueeze(3)).sum(0)
    return problem.entering(dinitial)


def backward(
    problem: Problem[SelectiveInputs], dout: Tensor, dfinal_state: Tensor | None, initial_state: Tensor | None
) -> tuple[Tensors, Tensor]:
    """The gradients of the inputs, in their types, and of the initial state.

    Those of b and c are sums over blocks, that of a over tokens too.
    """
    x, delta, a, b, c = problem.inputs
    da = None if a is None else torch.zeros_like(a, dtype=torch.float64)
    db, dc = (torch.zeros_like(tensor, dtype=problem.dtype) for tensor in (b, c))
    into = SelectiveInputs(torch.empty_like(x), torch.empty_like(delta), da, db, dc)
    dstate = problem.leaving(dfinal_state)
    entering = problem.entering(initial_state)
    for sweep in Sweep.over(problem):
        slabs, carry, given = sweep.slabs(), sweep.lanes(dstate), sweep.part(dout)
        starts = _slab_starts(sweep, slabs, sweep.lanes(entering))
        after = carry.contiguous()
        for number in reversed(range(len(slabs))):
            after = _slab_backward(sweep, slabs[number], given, starts[number], after, into)
        carry.copy_(after)
    gradients = tuple(
        dx if x is None or dx is None else dx.to(x.dtype) for x, dx in zip(problem.inputs, into, strict=True)
    )
    return gradients, problem.entering(dstate)


def _slab_starts(sweep: Sweep, slabs: list[Slab], state: Tensor) -> Tensor:
    """The states before all slabs, `[slabs, rows, N, channels]`."""
    starts = torch.empty(len(slabs), *sweep.state_shape, dtype=sweep.dtype, device=sweep.device)
    starts[0] = state
    for number, slab in enumerate(slabs[:-1]):
        loaded = Loaded(sweep, slab)
        loaded.decay()
        starts[number + 1] = loaded.states(starts[number])[-1]
    return starts


def _slab_backward(
    sweep: Sweep, slab: Slab, given: Tensor, before: Tensor, after: Tensor, into: SelectiveInputs
) -> Tensor:
    """Writes a slab's gradients, given what later tokens ask of its last h; returns what it asks of the h before."""
    loaded = Loaded(sweep, slab)
    decay = loaded.decay()
    h = loaded.states(before)
    dy = sweep.of(given, slab)
    if loaded.masks is not None:
        dy = dy.masked_fill(loaded.masks.padding, 0.0)
    dh = torch.mul(dy.unsqueeze(2), sweep.of(sweep.c, slab).unsqueeze(3), out=sweep.work("dh", slab.tokens))
    at, factors = sweep.each["dh"], sweep.each["decay"]
    at[slab.tokens - 1].add_(after)
    for t in reversed(range(slab.tokens - 1)):
        at[t].addcmul_(at[t + 1], factors[t + 1])

    rows = sweep.rows
    sweep.store(_over_channels(dy, h[1:]), into.c[rows], slab, add=True)
    db = _over_channels(loaded.u, dh)
    du = torch.bmm(loaded.b.flatten(0, 1).unsqueeze(1), dh.flatten(0, 1)).view_as(dy)
    sweep.store(du * loaded.delta, sweep.part(into.x), slab)
    earlier = at[0] * factors[0]
    ddelta = du.mul_(loaded.x)
    if sweep.a is None:
        dh.mul_(h[:-1])
        if loaded.masks is not None:
            dh.mul_(loaded.masks.keeps)
        flat = dh.flatten(0, 1)
        ddelta.sub_(torch.bmm(loaded.squares.flatten(0, 1).unsqueeze(1), flat).view_as(ddelta))
        db.addcmul_(_over_channels(loaded.delta, dh), loaded.b.view_as(db), value=-2.0)
    else:
        assert into.a is not None
        dh.mul_(h[:-1]).mul_(decay)
        ddelta.add_(torch.mul(dh, sweep.a, out=decay).sum(2))
        into.a[sweep.channels] += dh.mul_(loaded.delta.unsqueeze(2)).sum((0, 1)).T
    sweep.store(db, into.b[rows], slab, add=True)
    sweep.store(ddelta, sweep.part(into.delta), slab)
    return earlier


def _over_channels(x: Tensor, states: Tensor) -> Tensor:
    """Σ_d x states `[tokens * rows, 1, N]`; a product with a row is three times as fast as one with a column."""
    return torch.bmm(x.flatten(0, 1).unsqueeze(1), states.flatten(0, 1).mT)
