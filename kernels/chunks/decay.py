"""What decay does within the chunks of a slab: factors between tokens and chunk borders, and the decayed scores.

With G the running sum of the log decays in a chunk, a token i gets e^{G_i} of the state that enters the chunk, a token
j leaves e^{G_C − G_j} of itself in the state that leaves it, and i sees e^{G_i − G_j} of j. No exponent is ever
positive, so nothing overflows however strong the decay, and none is below the floor of its type: what would be
e^-1280 is e^-40, since products with subnormal numbers take a hundred times as long and add nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from .slabs import Grid, Masks, Slab, on_host

# Two factors at the floor still multiply to a normal number.
FLOOR = {torch.float32: -40.0, torch.float64: -300.0}

Wanted = Literal["all", "enter", "leave"]


def factor(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """e^exponent in `dtype`, floored; in place where `exponent` has that type."""
    return exponent.clamp_(min=FLOOR[dtype], max=0.0).to(dtype).exp_()


class Decay:
    """What the sweep asks of a decay."""

    grid: Grid
    enter: Tensor  # what is left to apply to queries that read the entering state
    leave: Tensor  # … and to keys on their way to the leaving one
    through: Sequence[Tensor]  # of each chunk: what the entering state keeps

    def load(self, slab: Slab, masks: Masks | None, wanted: Wanted = "all") -> None:
        """Sets `enter`, `leave` and `through`, and for "all" what scores need."""
        raise NotImplementedError

    def scores(self, q: Tensor, k: Tensor, out: Tensor) -> None:
        """out_ij = Σ_c q_ic k_jc e^{G_ic − G_jc} for j <= i of one document, else 0."""
        raise NotImplementedError

    def scores_backward(self, dscores: Tensor, q: Tensor, k: Tensor, dq: Tensor, dk: Tensor) -> None:
        """Writes the gradients of the q and k that `scores` was called with; `dscores` is changed."""
        raise NotImplementedError

    def add_gradients(self, dscores: Tensor, q: Tensor, k: Tensor, dq: Tensor, dk: Tensor) -> None:
        """Adds the same, for one of several pairs of q and k that have scores under these decays."""
        raise NotImplementedError

    def entered(self, q: Tensor, out: Tensor) -> Tensor:
        """q ⊙ enter: in `out`, or q itself where nothing is left to apply."""
        return torch.mul(q, self.enter, out=out)

    def add_entered(self, dq: Tensor, dout: Tensor, states: Tensor, spare: Tensor) -> None:
        """dq += enter ⊙ (dout statesᵀ)."""
        dq.addcmul_(torch.bmm(dout, states.mT, out=spare), self.enter)

    def finish(self, dq: Tensor, dk: Tensor) -> None:
        """Makes of the gradients of q and k as `scores` left them those of q and k as they came."""

    def gradient(self, moments: Tensor, ends: Tensor) -> Tensor:
        """dg_t = Σ_{s>=t} moment_s + end, for `moments` = q ⊙ dq − k ⊙ dk `[N, C, K]`, `ends` = Σ_v S ⊙ dS `[N, K]`."""
        raise NotImplementedError


class Splitting(Decay):
    """A decay that becomes factors of queries and keys where that is in range.

    Where nothing in a slab decays below the floor within a chunk, e^{G_i} and e^{−G_j} are both numbers of the type:
    `scores` then scales q and k by them, in place, and is a plain product. Each term of it has one more factor and is
    as exact as before. Chunks in which documents meet are left to the other form.

    falls: of each chunk, the least that any decay comes to over it; −inf where reading that would wait for a device.
    """

    falls: list[float]
    split = False

    def load(self, slab: Slab, masks: Masks | None, wanted: Wanted = "all") -> None:
        mild = min(self.falls[slab.first : slab.first + slab.chunks]) > FLOOR[self.grid.dtype]
        self.split = mild and masks is None and wanted == "all"
        super().load(slab, masks, "enter" if self.split else wanted)

    def scores(self, q: Tensor, k: Tensor, out: Tensor) -> None:
        if not self.split:
            super().scores(q, k, out)
            return
        self.falling, self.rising = self.enter, self.enter.reciprocal()
        self.leave = self.enter[:, -1:]
        torch.bmm(q.mul_(self.falling), k.mul_(self.rising).mT, out=out).tril_()

    def scores_backward(self, dscores: Tensor, q: Tensor, k: Tensor, dq: Tensor, dk: Tensor) -> None:
        if not self.split:
            super().scores_backward(dscores, q, k, dq, dk)
            return
        torch.bmm(dscores.tril_(), k, out=dq)
        torch.bmm(dscores.mT, q, out=dk)

    def entered(self, q: Tensor, out: Tensor) -> Tensor:
        return q if self.split else super().entered(q, out)

    def add_entered(self, dq: Tensor, dout: Tensor, states: Tensor, spare: Tensor) -> None:
        if self.split:
            dq.baddbmm_(dout, states.mT)
        else:
            super().add_entered(dq, dout, states, spare)

    def finish(self, dq: Tensor, dk: Tensor) -> None:
        if self.split:
            dq.mul_(self.falling)
            dk.mul_(self.rising)


class TokenDecay(Decay):
    """One decay per token and head, `log_decay [B, T, H]`; a constant a head comes expanded to that."""

    def __init__(self, log_decay: Tensor, grid: Grid, constant: Tensor | None = None) -> None:
        self.grid, size = grid, grid.chunk
        finite = log_decay.double().clamp(min=FLOOR[torch.float64])  # so that sums can be subtracted
        padded = F.pad(finite, (0, 0, 0, -grid.length % size)).unflatten(1, (-1, size))
        # [all chunks, rows, heads, C, 1], in float64, as differences of long sums follow.
        self.steps = padded.permute(1, 0, 3, 2).unsqueeze(-1).contiguous()
        sums = self.steps.cumsum(-2)
        entering, leaving, passing = self._factors(sums)
        # Flat, so that a slab's part is one view: making views costs as much as small products.
        self.entering, self.leaving = entering.flatten(0, 2), leaving.flatten(0, 2)
        self.passing = passing.flatten(1, 2).unbind(0)
        self.sums = _halves(sums.flatten(0, 2), grid.dtype)
        self.between = grid.workspace(size).flatten(0, 2)  # e^{G_i − G_j}
        self.fixed = None
        if constant is not None:
            steps = torch.arange(size, dtype=torch.float64, device=grid.device)
            exponents = constant.double().clamp(min=FLOOR[torch.float64])[:, None, None] * (
                steps[:, None] - steps
            ).clamp_(min=0)
            self.fixed = factor(exponents, grid.dtype).tril_()

    def _factors(self, sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From the start of the chunk to each token, from there to the end, and through the chunk."""
        ends, dtype = sums[..., -1:, :], self.grid.dtype
        return factor(sums.clone(), dtype), factor(ends - sums, dtype), factor(ends.clone(), dtype)

    def load(self, slab: Slab, masks: Masks | None, wanted: Wanted = "all") -> None:
        """`enter` and `leave` are `[N, C, 1]`, `through` is `[lanes, 1, 1]` per chunk."""
        here = slice(slab.first * self.grid.lanes, (slab.first + slab.chunks) * self.grid.lanes)
        self.masks = masks
        if masks is None:
            self.enter, self.leave = self.entering[here], self.leaving[here]
            self.through = self.passing[slab.first : slab.first + slab.chunks]
            sums = [half[here] for half in self.sums]
        else:
            # Sums over the own document alone, so that no bit of an output depends on another.
            chunks = slice(slab.first, slab.first + slab.chunks)
            exact = torch.matmul(masks.same.double(), self.steps[chunks])
            enter, leave, through = self._factors(exact)
            self.enter, self.leave = enter.mul_(masks.enter).flatten(0, 2), leave.mul_(masks.leave).flatten(0, 2)
            self.through = through.mul_(masks.through).flatten(1, 2).unbind(0)
            sums = _halves(exact.flatten(0, 2), self.grid.dtype)
        if wanted == "all" and self.fixed is None:
            self.scored = _differences(sums, self.between[: self.enter.shape[0]])
            self.scored.clamp_(min=FLOOR[self.grid.dtype], max=0.0).exp_().tril_()

    def scores(self, q: Tensor, k: Tensor, out: Tensor) -> None:
        self._decay(torch.bmm(q, k.mT, out=out))

    def scores_backward(self, dscores: Tensor, q: Tensor, k: Tensor, dq: Tensor, dk: Tensor) -> None:
        self._decay(dscores)
        torch.bmm(dscores, k, out=dq)
        torch.bmm(dscores.mT, q, out=dk)

    def add_gradients(self, dscores: Tensor, q: Tensor, k: Tensor, dq: Tensor, dk: Tensor) -> None:
        self._decay(dscores)
        dq.baddbmm_(dscores, k)
        dk.baddbmm_(dscores.mT, q)

    def _decay(self, scores: Tensor) -> None:
        if self.fixed is None:
            scores.mul_(self.scored)
        else:
            scores.view(-1, *self.fixed.shape).mul_(self.fixed)
        if self.masks is not None:
            by_row(scores, self.grid).mul_(self.masks.same)

    def gradient(self, moments: Tensor, ends: Tensor) -> Tensor:
        own = moments.sum(-1, keepdim=True).double()
        end = ends.sum(-1, dtype=torch.float64)[:, None, None]
        if self.masks is None:
            return own.flip(1).cumsum_(1).flip(1).add_(end)
        return later_of(own, self.masks, self.grid).addcmul_(end, spread(self.masks.leave, self.grid).double())


class SplitTokenDecay(Splitting, TokenDecay):
    """One decay per token and head."""

    def __init__(self, log_decay: Tensor, grid: Grid) -> None:
        super().__init__(log_decay, grid)
        falls = self.steps.sum((3, 4)).amin((1, 2)) if on_host(log_decay) else None
        self.falls = [-math.inf] * len(self.steps) if falls is None else falls.tolist()


def _halves(sums: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """float64 as one tensor of `dtype`, or two whose sum it is to float32's precision of each: faster than float64."""
    if dtype == torch.float64:
        return [sums]
    high = sums.to(dtype)
    return [high, (sums - high).to(dtype)]


def _differences(sums: list[Tensor], out: Tensor) -> Tensor:
    """out_ij = sums_i − sums_j, `[N, C, C]` of `[N, C, 1]`."""
    torch.sub(sums[0], sums[0].mT, out=out)
    for rest in sums[1:]:
        out.add_(rest).sub_(rest.mT)
    return out


def by_row(x: Tensor, grid: Grid) -> Tensor:
    """`[N, …]` as `[chunks, rows, heads, …]`."""
    return x.view(-1, grid.rows, grid.heads, *x.shape[1:])


def later_of(moments: Tensor, masks: Masks, grid: Grid) -> Tensor:
    """Σ over the tokens from t on that are of t's document."""
    return torch.matmul(masks.same.mT.to(moments.dtype), by_row(moments, grid)).view_as(moments)


def spread(mask: Tensor, grid: Grid) -> Tensor:
    """A mask of rows for every head: `[N, …]`."""
    return mask.expand(-1, -1, grid.heads, -1, -1).flatten(0, 2)
