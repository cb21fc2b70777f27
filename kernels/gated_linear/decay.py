"""What decay does within the chunks of a slab: factors between tokens and chunk borders, and the decayed scores.

With G the running sum of the log decays in a chunk, a token i gets e^{G_i} of the state that enters the chunk, a token
j leaves e^{G_C − G_j} of itself in the state that leaves it, and i sees e^{G_i − G_j} of j. No exponent is ever
positive, so nothing overflows however strong the decay, and none is below the floor of its type: what would be
e^-1280 is e^-40, since products with subnormal numbers take a hundred times as long and add nothing.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .slabs import Grid, Lanes, Masks, Slab

# Two factors at the floor still multiply to a normal number.
FLOOR = {torch.float32: -40.0, torch.float64: -300.0}
LEAF = 8  # tokens whose decays per channel are multiplied step by step; longer reaches have a reference point


def factor(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """e^exponent in `dtype`, floored; in place where `exponent` has that type."""
    return exponent.clamp_(min=FLOOR[dtype], max=0.0).to(dtype).exp_()


class TokenDecay:
    """One decay a token and head, `log_decay [B, T, H]`; a constant a head comes expanded to that."""

    def __init__(self, log_decay: Tensor, grid: Grid, constant: Tensor | None = None) -> None:
        self.grid, size = grid, grid.chunk
        padded = F.pad(log_decay.double(), (0, 0, 0, -grid.length % size)).unflatten(1, (-1, size))
        # Sums in float64, as differences of long sums follow: [all chunks, rows, heads, C, 1].
        self.sums = padded.cumsum(2).permute(1, 0, 3, 2).unsqueeze(-1).contiguous()
        ends = self.sums[..., -1:, :]
        self.entering, self.leaving = factor(self.sums.clone(), grid.dtype), factor(ends - self.sums, grid.dtype)
        self.passing = factor(ends.clone(), grid.dtype)
        self.between = grid.workspace(size).flatten(0, 2)  # e^{G_i − G_j}
        self.fixed = None
        if constant is not None:
            steps = torch.arange(size, dtype=torch.float64, device=grid.device)
            exponents = constant.double()[:, None, None] * (steps[:, None] - steps).clamp_(min=0)
            self.fixed = factor(exponents, grid.dtype).tril_()

    def load(self, slab: Slab, masks: Masks | None, *, scores: bool = True) -> None:
        """Sets `enter` and `leave` `[N, C, 1]`, `through` (`[lanes, 1, 1]` a chunk), and what scores need."""
        dtype, chunks = self.grid.dtype, slice(slab.first, slab.first + slab.chunks)
        enter, leave, through = self.entering[chunks], self.leaving[chunks], self.passing[chunks]
        if masks is not None:
            enter, leave, through = enter * masks.enter, leave * masks.leave, through * masks.through
        self.masks = masks
        self.enter, self.leave = enter.flatten(0, 2), leave.flatten(0, 2)
        self.through = through.flatten(1, 2).unbind(0)
        if scores and self.fixed is None:
            sums = self.sums[chunks].flatten(0, 2)
            self.scored = torch.sub(sums, sums.mT, out=self.between[: len(sums)])
            self.scored.clamp_(min=FLOOR[dtype], max=0.0).exp_().tril_()

    def scores(self, q: Tensor, k: Tensor, out: Tensor) -> None:
        """out_ij = (q_i · k_j) e^{G_i − G_j} for j <= i of one document, else 0."""
        self._decay(torch.bmm(q, k.mT, out=out))

    def scores_backward(self, dscores: Tensor, q: Tensor, k: Tensor, dq: Tensor, dk: Tensor) -> None:
        """Writes the gradients of q and k; `dscores` is changed."""
        self._decay(dscores)
        torch.bmm(dscores, k, out=dq)
        torch.bmm(dscores.mT, q, out=dk)

    def _decay(self, scores: Tensor) -> None:
        if self.fixed is None:
            scores.mul_(self.scored)
        else:
            scores.view(-1, *self.fixed.shape).mul_(self.fixed)
        if self.masks is not None:
            _by_row(scores, self.grid).mul_(self.masks.same)

    def gradient(self, moments: Tensor, ends: Tensor) -> Tensor:
        """dg_t = Σ_{s>=t} moment_s + end, for `moments` = q ⊙ dq − k ⊙ dk `[N, C, K]`, `ends` = Σ_v S ⊙ dS `[N, K]`."""
        own = moments.sum(-1, keepdim=True).double()
        end = ends.sum(-1, dtype=torch.float64)[:, None, None]
        if self.masks is None:
            return own.flip(1).cumsum_(1).flip(1).add_(end)
        return _later(own, self.masks, self.grid).addcmul_(end, _spread(self.masks.leave, self.grid).double())


class ChannelDecay:
    """One decay a token, head and key channel: `log_decay [B, T, H, K]`.

    e^{G_i − G_j} does not split into a factor of i and one of j without overflow, but it does about a point between
    them: the pairs of two neighbouring blocks of h tokens meet at the border between the blocks, for h = LEAF, 2 LEAF,
    …, C/2, and become one product a pair of blocks. Pairs nearer than that go offset by offset. All exponents are sums
    of log decays over the very tokens between, so none is a difference of longer sums.
    """

    def __init__(self, log_decay: Tensor, grid: Grid) -> None:
        self.grid, keys = grid, log_decay.shape[-1]
        self.log_decay = Lanes(log_decay, grid)
        self.leaf = min(LEAF, grid.chunk)
        self.leaves = grid.chunk // self.leaf
        self.reaches = [self.leaf << level for level in range(self.leaves.bit_length() - 1)]
        self.works = [grid.workspace(keys).flatten(0, 2) for _ in range(len(self.reaches) + 4)]
        within = torch.ones(self.leaf, self.leaf, dtype=grid.dtype, device=grid.device)
        self.upto, self.beyond = within.tril(), within.triu(1)
        self.others = _leaves_between(self.leaves, [reach // self.leaf for reach in self.reaches]).to(within)
        self.later = grid.workspace(0).new_ones(grid.chunk, grid.chunk).triu_()

    def load(self, slab: Slab, masks: Masks | None, *, scores: bool = True) -> None:
        """Sets `enter` and `leave` `[N, C, K]`, `through` (`[lanes, K, 1]` a chunk), and what scores need."""
        dtype, floor = self.grid.dtype, math.exp(FLOOR[self.grid.dtype])
        decays = self.log_decay.load(slab)
        n, _, keys = decays.shape
        upto, beyond, enter, leave, *works = (work[:n] for work in self.works)
        by_leaf = decays.view(-1, self.leaf, keys)
        torch.bmm(self.upto.expand(len(by_leaf), -1, -1), by_leaf, out=upto.view_as(by_leaf))
        torch.bmm(self.beyond.expand(len(by_leaf), -1, -1), by_leaf, out=beyond.view_as(by_leaf))
        shape = (n, self.leaves, self.leaf, keys)
        totals = upto.view(shape)[:, :, -1]
        others = factor(torch.matmul(self.others, totals), dtype).view(n, -1, self.leaves, 1, keys)
        upto, beyond = factor(upto, dtype).view(shape), factor(beyond, dtype).view(shape)
        self.masks, self.factors = masks, {}
        if scores:
            self.steps = self._steps(decays, floor)
            for level, (reach, work) in enumerate(zip(self.reaches, works, strict=True)):
                earlier, later = _halves(work.view(shape), reach // self.leaf)
                other = _halves(others[:, level], reach // self.leaf)
                torch.mul(_halves(beyond, reach // self.leaf)[0], other[0], out=earlier)
                torch.mul(_halves(upto, reach // self.leaf)[1], other[1], out=later)
                self.factors[reach] = work.clamp_(min=floor)
        torch.mul(upto, others[:, -2], out=enter.view(shape))
        torch.mul(beyond, others[:, -1], out=leave.view(shape))
        self.enter, self.leave = enter.clamp_(min=floor), leave.clamp_(min=floor)
        through = enter[:, -1].reshape(slab.chunks, self.grid.rows, self.grid.heads, keys, 1)
        if masks is not None:
            through = through * masks.through
            _by_row(enter, self.grid).mul_(masks.enter)
            _by_row(leave, self.grid).mul_(masks.leave)
        self.through = through.flatten(1, 2).unbind(0)

    def _steps(self, log_decay: Tensor, floor: float) -> list[Tensor]:
        """For offsets d = 1 … leaf − 1: e^{g_{i−d+1} + … + g_i} for i >= d in each leaf; changes its input."""
        step = factor(log_decay, self.grid.dtype).unflatten(1, (-1, self.leaf))
        reached, steps = step[:, :, 1:], []
        for offset in range(1, self.leaf):
            if offset > 1:
                reached = torch.mul(reached[:, :, :-1], step[:, :, offset:]).clamp_(min=floor)
            steps.append(reached)
        return steps

    def scores(self, q: Tensor, k: Tensor, out: Tensor) -> None:
        """out_ij = Σ_c q_ic k_jc e^{G_ic − G_jc} for j <= i of one document; above the diagonal `out` stays 0."""
        for reach, decay in self.factors.items():
            later, earlier = self._about(q, k, decay, reach)
            _border_blocks(out, reach).copy_(torch.bmm(later, earlier.mT).view(len(q), -1, reach, reach))
        q_leaf, k_leaf = q.unflatten(1, (-1, self.leaf)), k.unflatten(1, (-1, self.leaf))
        for offset in range(self.leaf):
            past = k_leaf if offset == 0 else k_leaf[:, :, :-offset] * self.steps[offset - 1]
            _leaf_diagonal(out, self.leaf, offset).copy_((q_leaf[:, :, offset:] * past).sum(-1))
        self._mask(out)

    def scores_backward(self, dscores: Tensor, q: Tensor, k: Tensor, dq: Tensor, dk: Tensor) -> None:
        """Writes the gradients of q and k; `dscores` is changed."""
        self._mask(dscores)
        q_leaf, k_leaf = q.unflatten(1, (-1, self.leaf)), k.unflatten(1, (-1, self.leaf))
        dq_leaf, dk_leaf = dq.unflatten(1, (-1, self.leaf)), dk.unflatten(1, (-1, self.leaf))
        own = _leaf_diagonal(dscores, self.leaf, 0).unsqueeze(-1)
        torch.mul(k_leaf, own, out=dq_leaf)
        torch.mul(q_leaf, own, out=dk_leaf)
        for offset in range(1, self.leaf):
            given = _leaf_diagonal(dscores, self.leaf, offset).unsqueeze(-1) * self.steps[offset - 1]
            dq_leaf[:, :, offset:].addcmul_(given, k_leaf[:, :, :-offset])
            dk_leaf[:, :, :-offset].addcmul_(given, q_leaf[:, :, offset:])
        for reach, decay in self.factors.items():
            later, earlier = self._about(q, k, decay, reach)
            given = _border_blocks(dscores, reach).reshape(-1, reach, reach)
            before, after = _halves(decay, reach)
            dlater, dearlier = _halves(dq, reach)[1], _halves(dk, reach)[0]
            dlater.addcmul_(torch.bmm(given, earlier).view_as(dlater), after)
            dearlier.addcmul_(torch.bmm(given.mT, later).view_as(dearlier), before)

    def _about(self, q: Tensor, k: Tensor, decay: Tensor, reach: int) -> tuple[Tensor, Tensor]:
        """Queries of each later block decayed from the border on, keys of each earlier one decayed up to it."""
        before, after = _halves(decay, reach)
        later, earlier = _halves(q, reach)[1] * after, _halves(k, reach)[0] * before
        return later.flatten(0, 1), earlier.flatten(0, 1)

    def _mask(self, scores: Tensor) -> None:
        if self.masks is not None:
            _by_row(scores, self.grid).mul_(self.masks.same)

    def gradient(self, moments: Tensor, ends: Tensor) -> Tensor:
        """dg_t = Σ_{s>=t} moment_s + end, for `moments` = q ⊙ dq − k ⊙ dk `[N, C, K]`, `ends` = Σ_v S ⊙ dS `[N, K]`."""
        if self.masks is None:
            return torch.bmm(self.later.expand(len(moments), -1, -1), moments).add_(ends[:, None])
        return _later(moments, self.masks, self.grid).addcmul_(ends[:, None], _spread(self.masks.leave, self.grid))


def _by_row(x: Tensor, grid: Grid) -> Tensor:
    """`[N, …]` as `[chunks, rows, heads, …]`."""
    return x.view(-1, grid.rows, grid.heads, *x.shape[1:])


def _later(moments: Tensor, masks: Masks, grid: Grid) -> Tensor:
    """Σ over the tokens from t on that are of t's document."""
    return torch.matmul(masks.same.mT.to(moments.dtype), _by_row(moments, grid)).view_as(moments)


def _spread(mask: Tensor, grid: Grid) -> Tensor:
    """A mask of rows for every head: `[N, …]`."""
    return mask.expand(-1, -1, grid.heads, -1, -1).flatten(0, 2)


def _leaves_between(leaves: int, reaches: list[int]) -> Tensor:
    """0/1 rows `[(levels + 2) leaves, leaves]`: which other leaves lie between a leaf and what it is measured to.

    For each reach that is the border between its pair of blocks of so many leaves; then the chunk's start and end.
    """
    index = torch.arange(leaves)
    before, after = index < index[:, None], index > index[:, None]
    rows = []
    for reach in reaches:
        block = index // reach
        side = torch.where((block % 2 == 1)[:, None], before, after)
        rows.append(side & (block == block[:, None]))
    return torch.cat([*rows, before, after])


def _halves(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Dimension 1 of x as pairs of neighbouring blocks of `size`: the earlier and the later ones `[N, P, size, …]`."""
    pairs = x.unflatten(1, (-1, 2, size))
    return pairs[:, :, 0], pairs[:, :, 1]


def _border_blocks(scores: Tensor, reach: int) -> Tensor:
    """The view `[N, C / 2h, h, h]` of scores `[N, C, C]`: later blocks' queries against their earlier blocks' keys."""
    size = scores.shape[1]
    square = scores.view(-1, size // (2 * reach), 2, reach, size // (2 * reach), 2, reach)[:, :, 1, :, :, 0]
    return square.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)


def _leaf_diagonal(scores: Tensor, leaf: int, offset: int) -> Tensor:
    """The view `[N, C / leaf, leaf − offset]` of scores: each leaf's queries against keys `offset` tokens before."""
    size = scores.shape[1]
    blocks = scores.view(-1, size // leaf, leaf, size // leaf, leaf).diagonal(dim1=1, dim2=3)
    return blocks.diagonal(-offset, dim1=1, dim2=2)
