"""WKV in slabs of tokens: forward, a hand-written backward, and outputs given the state that enters.

A slab is copied with time first, `[C, lanes, B, D]`: C steps advance all its chunks of C tokens at once. Of several
lanes each runs twice, from zero to find the state that enters the next one, and from the state that enters it. With
sums n and d relative to e^m of the state before a token, its past and its own weight are p and q,

    out = (p n + q v) / (p d + q)        p = e^{m − M}    q = e^{u + k − M}    M = max(m, u + k)

and the state after it has n' = a n + b v, d' = a d + b with a = e^{m + w − m'} and b = e^{k − m'}. Since no result
depends on the scales, gradients take them for constants: with g = dout / (p d + q),

    dn = a dn' + p g        dd = a dd' − p g out        dv = q g + b dn'        du = q g (v − out)
    dk = du + b (v dn' + dd')                           dw = a (n dn' + d dd')
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..chunks.decay import factor
from ..dispatch import kind_of
from ..documents import PADDING
from ..gated_linear.stable import LOWEST, going_on
from ..operation import Tensors
from ..problem import Problem, per_row
from . import WKVInputs

CHUNK = 64  # tokens of a lane
SLAB = {"cpu": 1 << 18, "cuda": 1 << 26}  # numbers of one tensor of a slab: on a CPU, few enough to stay in its cache
FEW = 4  # lanes that are not worth running twice


class Slab:
    """Some tokens, as many as lanes of a chunk hold, and what they make of the state `[3, B, D]` that enters."""

    def __init__(self, problem: Problem[WKVInputs], tokens: slice, lanes: int, entering: Tensor) -> None:
        k, v, log_decay, bonus = problem.inputs
        self.problem, self.tokens, self.lanes = problem, tokens, lanes
        self.k, self.v = self.load(k), self.load(v)
        decay = torch.zeros_like(k[0, 0]) if log_decay is None else log_decay
        self.log_decay = self.load(decay) if decay.dim() == 3 else decay.to(problem.dtype)
        self.going: Tensor | None = None
        self.real: Tensor | None = None
        if not bool(problem.documents.derive(going_on)[:, tokens].all()):
            self.going = self.load(problem.documents.on(k.device, going_on)[..., None], torch.bool)
            self.real = self.load((problem.documents.ids(k.device) != PADDING)[..., None], torch.bool)
            self.k = self.k.masked_fill(~self.real, LOWEST)
            self.log_decay = self.log_decay.expand_as(self.k).masked_fill(~self.going, -torch.inf)
        shape = (3, self.k.shape[0] + 1, *self.k.shape[1:])
        self.states = torch.empty(shape, dtype=problem.dtype, device=k.device)  # that enter each token, and the last
        if lanes > 1:
            self.states[:, 0] = 0.0
            self.states[2, 0] = LOWEST
            self.run()
            entering = self.between(entering)
        self.states[:, 0] = entering if lanes > 1 else entering.unsqueeze(1)
        self.run()
        self.bonus = 0.0 if bonus is None else bonus.to(problem.dtype)

    def load(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The slab's tokens of `[B, T, D]` as `[C, lanes, B, D]`."""
        rows = x[:, self.tokens].unflatten(1, (self.lanes, -1)).permute(2, 1, 0, 3)
        return rows.to(dtype or self.problem.dtype).contiguous()

    def store(self, x: Tensor, target: Tensor) -> None:
        """Writes `[C, lanes, B, D]` to the slab's tokens of `[B, T, D]`."""
        target[:, self.tokens].unflatten(1, (self.lanes, -1)).copy_(x.permute(2, 1, 0, 3))

    def run(self) -> None:
        """The states after each token, from those that enter the lanes; sets a and b."""
        sums, weights, scales = self.states
        at, keys = scales.unbind(0), self.k.unbind(0)
        steps = self.log_decay.unbind(0) if self.log_decay.dim() == 4 else [self.log_decay] * len(keys)
        for t, (key, step) in enumerate(zip(keys, steps, strict=True)):
            torch.add(at[t], step, out=at[t + 1])
            torch.maximum(at[t + 1], key, out=at[t + 1])
        self.a = factor(scales[:-1] + self.log_decay - scales[1:], self.problem.dtype)
        self.b = factor(self.k - scales[1:], self.problem.dtype)
        if self.going is not None and self.real is not None:
            self.a.mul_(self.going)
            self.b.mul_(self.real)
        torch.mul(self.b, self.v, out=sums[1:])
        weights[1:] = self.b
        kept = self.a.unbind(0)
        for each in (sums.unbind(0), weights.unbind(0)):
            for t, a in enumerate(kept):
                each[t + 1].addcmul_(each[t], a)

    def between(self, entering: Tensor) -> Tensor:
        """The states that enter the lanes, `[3, lanes, B, D]`, given what each lane makes of nothing."""
        reach = self.log_decay.sum(0) if self.log_decay.dim() == 4 else self.log_decay * self.k.shape[0]
        ends, states = self.states[:, -1], torch.empty_like(self.states[:, -1])
        reaches = reach.expand(self.lanes, *entering.shape[1:])
        for lane in range(self.lanes):
            states[:, lane] = entering
            before = entering[2] + reaches[lane]
            scale = torch.maximum(before, ends[2, lane])
            old, new = (before - scale).exp(), (ends[2, lane] - scale).exp()
            entering = torch.stack([*(entering[:2] * old + ends[:2, lane] * new), scale])
        return states

    @property
    def leaving(self) -> Tensor:
        """The state after the last token, `[3, B, D]`."""
        return self.states[:, -1, -1]

    def read(self) -> Tensor:
        """The outputs; sets the weights p and q, and 1 / (p d + q), which is 0 in padding."""
        sums, weights, scales = self.states[:, :-1]
        scales = scales if self.going is None else torch.where(self.going, scales, LOWEST)
        own = self.k + self.bonus
        unit = torch.maximum(scales, own)
        self.past, self.own = factor(scales - unit, self.problem.dtype), factor(own.sub_(unit), self.problem.dtype)
        if self.going is not None:
            self.past.mul_(self.going)
        self.inverse = torch.addcmul(self.own, self.past, weights).reciprocal_()
        if self.real is not None:
            self.inverse.mul_(self.real)
        return torch.addcmul(self.own * self.v, self.past, sums).mul_(self.inverse)

    def backward(self, dout: Tensor, carry: Tensor) -> tuple[Tensor, ...]:
        """Gradients of k, v, log_decay and bonus, and of the sums that enter, given those of the sums that leave."""
        out = self.read()
        g = self.load(dout) * self.inverse  # of one row `load` may copy nothing
        dsums = torch.empty(2, *self.states.shape[1:], dtype=g.dtype, device=g.device)
        reads = self.past * g
        reads = torch.stack([reads, -reads * out])
        if self.lanes > 1:
            dsums[:, -1] = 0.0
            self._retreat(dsums, reads)
            through, ends = self.a.prod(0), dsums[:, 0]
            last = torch.empty_like(ends)
            for lane in reversed(range(self.lanes)):
                last[:, lane] = carry
                carry = torch.addcmul(ends[:, lane], through[lane], carry)
            dsums[:, -1] = last
        else:
            dsums[:, -1, 0] = carry
        self._retreat(dsums, reads)
        sums, weights, _ = self.states[:, :-1]
        dsum, dweight = dsums[:, 1:]
        own = g.mul_(self.own)
        dv = torch.addcmul(own, self.b, dsum)
        dbonus = own * (self.v - out)
        dk = torch.addcmul(dbonus, self.b, torch.addcmul(dweight, self.v, dsum))
        ddecay = torch.addcmul(weights * dweight, sums, dsum).mul_(self.a)
        return dk, dv, ddecay, dbonus, dsums[:, 0, 0]

    def _retreat(self, dsums: Tensor, reads: Tensor) -> None:
        """Gradients of the sums before each token, from those after the last and what each token reads."""
        dsums[:, :-1] = reads
        at, kept = dsums.unbind(1), self.a.unbind(0)
        for t in reversed(range(len(kept))):
            at[t].addcmul_(at[t + 1], kept[t])


def forward(problem: Problem[WKVInputs], initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
    """(output, final state)."""
    out = problem.new_output()
    state = entering_states(problem, initial_state)
    for tokens, lanes in _slabs(problem):
        slab = Slab(problem, tokens, lanes, state)
        slab.store(slab.read(), out)
        state = slab.leaving
    return out, state.permute(1, 2, 0).contiguous()


def correct(problem: Problem[WKVInputs], out: Tensor, state: Tensor) -> Tensor:
    """Computes the outputs that the entering state reaches again, with it; in place."""
    entering = entering_states(problem, state)
    for tokens, lanes in _slabs(problem):
        if tokens.start >= problem.reach:
            break
        slab = Slab(problem, tokens, lanes, entering)
        slab.store(slab.read(), out)
        entering = slab.leaving
    return out


def summarize_backward(problem: Problem[WKVInputs], dout: Tensor, initial_state: Tensor | None) -> Tensor:
    """The gradient of the initial state that comes from the outputs alone."""
    return backward(problem, dout, None, initial_state)[1]


def backward(
    problem: Problem[WKVInputs], dout: Tensor, dfinal_state: Tensor | None, initial_state: Tensor | None
) -> tuple[Tensors, Tensor]:
    """The gradients of all inputs, in their types, and of the initial state, which says its scale as it does."""
    k, v, log_decay, bonus = problem.inputs
    state, slabs, entering = entering_states(problem, initial_state), list(_slabs(problem)), []
    for tokens, lanes in slabs:
        entering.append(state)
        state = Slab(problem, tokens, lanes, state).leaving
    carry = leaving_gradient(problem, dfinal_state, state)
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    of_tokens = log_decay is not None and log_decay.dim() == 3
    ddecay = torch.empty_like(log_decay) if of_tokens and log_decay is not None else None
    totals = torch.zeros(2, k.shape[2], dtype=torch.float64, device=k.device)  # of a constant decay, and the bonus
    for (tokens, lanes), before in zip(reversed(slabs), reversed(entering), strict=True):
        slab = Slab(problem, tokens, lanes, before)
        *gradients, by_decay, by_bonus, carry = slab.backward(dout, carry)
        for gradient, target in zip(gradients, (dk, dv), strict=True):
            slab.store(gradient, target)
        totals[1] += by_bonus.sum((0, 1, 2), dtype=torch.float64)
        if ddecay is not None:
            slab.store(by_decay, ddecay)
        else:
            totals[0] += by_decay.sum((0, 1, 2), dtype=torch.float64)
    if log_decay is not None and ddecay is None:
        ddecay = totals[0].to(log_decay.dtype)
    dinitial = with_scale(carry, initial_state)
    return WKVInputs(dk, dv, ddecay, None if bonus is None else totals[1].to(bonus.dtype)), dinitial


def entering_states(problem: Problem[WKVInputs], state: Tensor | None) -> Tensor:
    """The states that enter the rows as `[3, B, D]`."""
    entering = problem.entering(state).permute(2, 0, 1).clone(memory_format=torch.contiguous_format)
    keeps = torch.zeros_like(problem.continues) if state is None else problem.continues
    entering[2].masked_fill_(~per_row(keeps, entering[2]), LOWEST)
    return entering


def leaving_gradient(problem: Problem[WKVInputs], dfinal_state: Tensor | None, final: Tensor) -> Tensor:
    """The gradient of the last sums as `[2, B, D]`, in units of the final state, itself `[3, B, D]`."""
    gradient = problem.leaving(dfinal_state).permute(2, 0, 1)
    return gradient[:2] * (final[2] - gradient[2]).clamp(max=80.0).exp()  # a bare zero may have any scale


def with_scale(dsums: Tensor, initial_state: Tensor | None) -> Tensor:
    """The gradient of the initial state `[B, D, 3]`, which says its scale, of that of its sums `[2, B, D]`."""
    scale = torch.full_like(dsums[0], LOWEST) if initial_state is None else initial_state[..., 2].to(dsums.dtype)
    return torch.stack([*dsums, scale], dim=-1)


def _slabs(problem: Problem[WKVInputs]) -> Iterator[tuple[slice, int]]:
    """The slabs in order: their tokens and lanes."""
    batch, length, channels = problem.inputs.k.shape
    most = max(1, SLAB.get(kind_of(problem.device), SLAB["cpu"]) // (CHUNK * batch * channels))
    start = 0
    while start < length:
        lanes = min(most, (length - start) // CHUNK)
        lanes = lanes if lanes >= FEW else 1
        stop = min(length, start + lanes * CHUNK)
        yield slice(start, stop), lanes
        start = stop
