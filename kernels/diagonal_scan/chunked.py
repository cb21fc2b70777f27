"""The diagonal scan in chunks: forward, a hand-written backward, and what an entering state adds.

A slab of tokens is copied as `[C, lanes, rows, channels]`: its chunks of C tokens lie side by side as lanes, so that
C steps advance all of them at once, each from zero. One pass then adds what enters each lane:

    h_t = local_t + e^{a_{t0} + … + a_t} h_{t0 − 1}                t0 the first token of t's lane

Where rows and channels are many, one lane is enough, and there is nothing to add. With dh_t the whole gradient of h_t,

    dh_t = dout_t + e^{a_{t+1}} dh_{t+1}        dx_t = dh_t        da_t = e^{a_t} h_{t−1} dh_t

is the same scan from right to left; backward first runs forward again for the h, in the memory that da_t will take.
Decays of a token alone or within a lane are never below the floor of their type: e^-40 in float32, as products with
subnormal numbers take a hundred times as long and add nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..chunks import scan
from ..chunks.decay import FLOOR
from ..chunks.slabs import Slab
from ..operation import Tensors
from ..problem import Problem
from . import DiagonalInputs

CHUNK = 64  # tokens of a lane
WIDTH = 4096  # rows × lanes × channels of a step: enough to hide its call, few enough to keep a slab in cache


class Masks(NamedTuple):
    """What documents of a slab do not share, as factors 0/1 `[C, lanes, rows, 1]`."""

    keeps: Tensor  # the token goes on with the document of the token before it
    enters: Tensor  # the token is of the document that the token before its lane is of
    leaves: Tensor  # the token is of the document that the last token of its lane is of
    padding: Tensor  # the token is padding (bool)


class Constant(NamedTuple):
    """Factors of a decay that is the same for all tokens, `[C, 1, 1, channels]`."""

    decay: Tensor
    earlier: Tensor
    later: Tensor


def _constant(log_decay: Tensor, chunk: int, dtype: torch.dtype) -> Constant:
    own = log_decay.double().clamp(min=FLOOR[dtype])
    steps = torch.arange(1, chunk + 1, dtype=torch.float64, device=own.device)[:, None, None, None]
    exponents = (torch.ones_like(steps) * own, steps * own, steps.flip(0) * own)
    decay, earlier, later = (exponent.clamp_(min=FLOOR[dtype]).exp_().to(dtype) for exponent in exponents)
    return Constant(decay, earlier, later)


class Sweep(scan.Sweep):
    """A sweep with workspaces, the lanes of a slab being its chunks."""

    width = WIDTH

    def __init__(self, problem: Problem[DiagonalInputs], rows: slice, channels: slice) -> None:
        super().__init__(problem, rows, channels)
        self.log_decay = self.part(problem.inputs.log_decay)
        self.chunk = min(CHUNK, self.length)
        self.chunks = min(max(1, WIDTH // self.x[:, 0].numel()), -(-self.length // self.chunk))
        self.shape = (self.chunk, self.chunks, *self.x[:, 0].shape)
        self.constant = None
        if problem.inputs.log_decay.dim() == 1:
            self.constant = _constant(self.log_decay, self.chunk, self.dtype)
            self.log_decay = self.log_decay.expand_as(self.x)

    def work(self, name: str, slab: Slab) -> Tensor:
        """The workspace `name`, `[C, lanes, rows, channels]`."""
        if name not in self.works:
            self.works[name] = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        return self.works[name][:, : slab.chunks]

    def load(self, name: str, source: Tensor, slab: Slab) -> Tensor:
        """The slab's tokens of `[rows, T, channels]` in a workspace; 0 past the end of the sequence."""
        work = self.work(name, slab)
        for target, tokens in self._pieces(work, source, slab):
            target.copy_(tokens)
        rest = slab.tokens % self.chunk
        if rest:
            work[rest:, -1].zero_()
        return work

    def store(self, work: Tensor, target: Tensor, slab: Slab, *, add: bool = False) -> None:
        """Writes a workspace to the slab's tokens of `[rows, T, channels]`, or adds it."""
        for values, tokens in self._pieces(work, target, slab):
            if add:
                tokens.add_(values)
            else:
                tokens.copy_(values)

    def _pieces(self, work: Tensor, tensor: Tensor, slab: Slab) -> Iterator[tuple[Tensor, Tensor]]:
        """Parts of a workspace and the tokens they hold: the full lanes, and the last one where it is not."""
        whole, rest = divmod(slab.tokens, self.chunk)
        if whole:
            tokens = tensor[:, slab.start : slab.stop - rest].unflatten(1, (whole, self.chunk))
            yield work[:, :whole], tokens.permute(2, 1, 0, 3)
        if rest:
            yield work[:rest, whole], tensor[:, slab.stop - rest : slab.stop].transpose(0, 1)

    def masks(self, slab: Slab) -> Masks | None:
        """The masks of a slab, or None where each of its rows goes on through it in one document."""
        if not self.meets(slab):
            return None
        # One id stands before the first token; past the end the last document goes on.
        ids = self.ids[:, slab.start : slab.stop + 1]
        ids = torch.cat([ids, ids[:, -1:].expand(-1, slab.chunks * self.chunk + 1 - ids.shape[1])], dim=1)
        here = ids[:, 1:].unflatten(1, (slab.chunks, self.chunk)).permute(2, 1, 0)
        previous = ids[:, :-1].unflatten(1, (slab.chunks, self.chunk)).permute(2, 1, 0)
        real = here >= 0
        keeps, enters, leaves = (
            ((here == other) & real).unsqueeze(-1).to(self.dtype) for other in (previous, previous[:1], here[-1:])
        )
        return Masks(keeps, enters, leaves, ~real.unsqueeze(-1))

    def decay(self, slab: Slab, masks: Masks | None) -> Tensor:
        """e^a of each token, 0 where a document starts and 1 past the end of the sequence."""
        if self.constant is not None and self._is_full(slab):
            own = self.constant.decay.expand(self.chunk, slab.chunks, *self.shape[2:])
            return own if masks is None else own * masks.keeps
        sums = self.load("sums", self.log_decay, slab).clamp_(min=FLOOR[self.dtype])  # for `over` to sum
        decay = torch.exp(sums, out=self.work("decay", slab))
        return decay if masks is None else decay.mul_(masks.keeps)

    def over_earlier(self, slab: Slab, masks: Masks | None) -> Tensor:
        """e^{sum of a from the lane's first token to this one}, 0 where a document starts in between. After `decay`.

        Sums of log decays rather than products of decays, so that they can be kept from underflow.
        """
        if self.constant is not None and self._is_full(slab):
            factors = self.constant.earlier.expand(self.chunk, slab.chunks, *self.shape[2:])
            return factors if masks is None else factors * masks.enters
        sums = self.work("sums", slab)
        at = sums.unbind(0)
        for t in range(1, self.chunk):
            at[t].add_(at[t - 1])
        factors = sums.clamp_(min=FLOOR[self.dtype]).exp_()
        return factors if masks is None else factors.mul_(masks.enters)

    def over_later(self, slab: Slab, masks: Masks | None) -> Tensor:
        """The mirror image for the tokens of a lane but its first: e^{sum of a from this token to the lane's last}.

        0 where a document starts between the token before this one and the lane's last. After `decay`.
        """
        if self.constant is not None and self._is_full(slab):
            factors = self.constant.later.expand(self.chunk, slab.chunks, *self.shape[2:])[1:]
            return factors if masks is None else factors * masks.leaves[:-1]
        sums = self.work("sums", slab)[1:]
        at = sums.unbind(0)
        for t in reversed(range(len(at) - 1)):
            at[t].add_(at[t + 1])
        factors = sums.clamp_(min=FLOOR[self.dtype]).exp_()
        return factors if masks is None else factors.mul_(masks.leaves[:-1])

    def _is_full(self, slab: Slab) -> bool:
        return slab.tokens == slab.chunks * self.chunk


def forward(problem: Problem[DiagonalInputs], initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
    """(every h, final state)."""
    out = problem.new_output()
    return out, _run(problem, initial_state, out)


def _run(problem: Problem[DiagonalInputs], initial_state: Tensor | None, out: Tensor) -> Tensor:
    """Writes every h_t to `out` `[B, T, D]` of any type; the state after each row's last token."""
    state = problem.entering(initial_state).clone()
    for sweep in Sweep.over(problem):
        carry, target = sweep.part(state), sweep.part(out)
        for slab in sweep.slabs():
            masks = sweep.masks(slab)
            h = sweep.load("h", sweep.x, slab)
            if masks is not None:
                h.masked_fill_(masks.padding, 0.0)
            _scan(sweep, slab, masks, h, carry)
            sweep.store(h, target, slab)
    return state


def _scan(sweep: Sweep, slab: Slab, masks: Masks | None, h: Tensor, carry: Tensor) -> None:
    """Turns x into h in a workspace, and `carry`, the state before the slab, into that after it."""
    decay = sweep.decay(slab, masks)
    at, decays = h.unbind(0), decay.unbind(0)
    if slab.chunks == 1:
        at[0].addcmul_(carry, decays[0])
    for t in range(1, sweep.chunk):
        at[t].addcmul_(at[t - 1], decays[t])
    if slab.chunks == 1:
        carry.copy_(at[-1][0])
        return
    over = sweep.over_earlier(slab, masks)
    entering = torch.empty_like(at[0])
    for lane, (end, left) in enumerate(zip(at[-1], over[-1].expand_as(at[-1]), strict=True)):
        entering[lane] = carry
        torch.addcmul(end, left, entering[lane], out=carry)
    h.addcmul_(over, entering)


def correct(problem: Problem[DiagonalInputs], out: Tensor, state: Tensor) -> Tensor:
    """Adds e^{a_1 + … + a_t} state to the outputs that the entering state reaches."""
    entering = problem.entering(state).clone()
    for sweep in Sweep.over(problem):
        carry, target = sweep.part(entering), sweep.part(out)
        for slab in sweep.slabs(problem.reach):
            masks = sweep.masks(slab)
            h = sweep.work("h", slab).zero_()
            _scan(sweep, slab, masks, h, carry)
            sweep.store(h, target, slab, add=True)
    return out


def _scan_back(sweep: Sweep, slab: Slab, masks: Masks | None, d: Tensor, carry: Tensor) -> Tensor:
    """Turns dout into dh in a workspace, and `carry`, what reaches the slab's last h from later, into that before it.

    Returns the decays.
    """
    decay = sweep.decay(slab, masks)
    at, decays = d.unbind(0), decay.unbind(0)
    if slab.chunks == 1:
        at[-1].add_(carry)
    for t in reversed(range(sweep.chunk - 1)):
        at[t].addcmul_(at[t + 1], decays[t + 1])
    if slab.chunks == 1:
        torch.mul(at[0][0], decays[0][0], out=carry)
        return decay
    over = sweep.over_later(slab, masks)  # more than one lane are of more than one token
    left, entering = over[0], torch.empty_like(at[0])
    for lane in reversed(range(slab.chunks)):
        entering[lane] = carry
        torch.addcmul(at[0][lane], left[lane], entering[lane], out=carry).mul_(decays[0][lane])
    d[:-1].addcmul_(over, entering)
    at[-1].add_(entering)
    return decay


def summarize_backward(problem: Problem[DiagonalInputs], dout: Tensor, initial_state: Tensor | None = None) -> Tensor:
    """Σ_t e^{a_1 + … + a_t} dout_t `[B, D]` over the tokens that an entering state reaches."""
    dinitial = problem.new_states()
    for sweep in Sweep.over(problem):
        carry, given = sweep.part(dinitial), sweep.part(dout)
        for slab in reversed(sweep.slabs(problem.reach)):
            _scan_back(sweep, slab, sweep.masks(slab), sweep.load("d", given, slab), carry)
    return problem.entering(dinitial)


def backward(
    problem: Problem[DiagonalInputs], dout: Tensor, dfinal_state: Tensor | None, initial_state: Tensor | None
) -> tuple[Tensors, Tensor]:
    """The gradients of x and log_decay, in their types, and of the initial state."""
    (x, log_decay), dtype = problem.inputs, problem.dtype
    dx, constant = torch.empty_like(x), log_decay.dim() == 1
    states = torch.empty(x.shape, dtype=dtype, device=x.device)
    _run(problem, initial_state, states)
    # The states of tokens to the right are not needed any more: there the gradient of log_decay may lie.
    shares = not constant and log_decay.dtype == dtype
    ddecay = (
        log_decay.new_zeros(log_decay.shape, dtype=torch.float64)
        if constant
        else (states if shares else torch.empty_like(log_decay))
    )
    entering, dinitial = problem.entering(initial_state), problem.leaving(dfinal_state)
    for sweep in Sweep.over(problem):
        carry, given, before = sweep.part(dinitial), sweep.part(dout), sweep.part(entering)
        held, to_x, to_decay = sweep.part(states), sweep.part(dx), sweep.part(ddecay)
        for slab in reversed(sweep.slabs()):
            masks = sweep.masks(slab)
            d = sweep.load("d", given, slab)
            if masks is not None:
                d.masked_fill_(masks.padding, 0.0)
            decay = _scan_back(sweep, slab, masks, d, carry)
            sweep.store(d, to_x, slab)
            h = sweep.load("h", held, slab)
            d.mul_(decay)
            d[1:].mul_(h[:-1])
            d[0, 1:].mul_(h[-1, :-1])
            d[0, 0].mul_(held[:, slab.start - 1] if slab.start else before)
            if constant:
                d[(slab.tokens - 1) % sweep.chunk + 1 :, -1] = 0.0  # past the end of the sequence
                to_decay += d.sum((0, 1, 2), dtype=torch.float64)
            else:
                sweep.store(d, to_decay, slab)
    return (dx, ddecay.to(log_decay.dtype)), problem.entering(dinitial)
