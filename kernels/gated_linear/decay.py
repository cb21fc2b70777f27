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

from .slabs import Grid, Masks, Slab, load

# Two factors at the floor still multiply to a normal number.
FLOOR = {torch.float32: -40.0, torch.float64: -300.0}
LEAF = 8  # tokens whose decays per channel are multiplied step by step; longer reaches have a reference point


def factor(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """e^exponent in `dtype`, floored; in place where `exponent` has that type."""
    return exponent.clamp_(min=FLOOR[dtype], max=0.0).to(dtype).exp_()


class TokenDecay:
    """One decay a token and head, `log_decay [B, T, H]`; a constant a head comes expanded to that."""

    def __init__(self, log_decay: Tensor, grid: Grid, constant: Tensor | None = None) -> None:
        self.log_decay, self.grid = log_decay.unsqueeze(-1), grid
        self.work = grid.workspace(1, torch.float64)
        self.between = grid.workspace(grid.chunk)  # e^{G_i − G_j}
        self.fixed = None
        if constant is not None:
            steps = torch.arange(grid.chunk, dtype=torch.float64, device=grid.device)
            exponents = constant.double()[:, None, None] * (steps[:, None] - steps).clamp_(min=0)
            self.fixed = factor(exponents, grid.dtype).tril_()

    def load(self, slab: Slab, masks: Masks | None, *, scores: bool = True) -> None:
        """Computes `enter` and `leave` `[N, C, 1]`, `through` `[chunks, lanes, 1, 1]`, and what scores need."""
        total = load(self.work, self.log_decay, slab).cumsum(1)  # float64: differences of long sums
        dtype = self.grid.dtype
        n, shape = slab.chunks, (slab.chunks, self.grid.rows, self.grid.heads)
        self.enter, self.leave = factor(total.clone(), dtype), factor(total[:, -1:] - total, dtype)
        self.through = factor(total[:, -1:].clone(), dtype).view(n, -1, 1, 1)
        self.masks, self.scored = masks, self.between[:n].view(-1, *self.between.shape[-2:])
        if scores and self.fixed is None:
            torch.sub(total, total.mT, out=self.scored)
            self.scored.clamp_(min=FLOOR[dtype], max=0.0).exp_().tril_()
        if masks is not None:
            for own, mask in zip((self.enter, self.leave, self.through), masks[1:], strict=True):
                own.view(*shape, *mask.shape[3:]).mul_(mask)

    def scores(self, q: Tensor, k: Tensor, out: Tensor) -> None:
        """out_ij = (q_i · k_j) e^{G_i − G_j} for j <= i of one document, else 0."""
        self._decay(torch.bmm(q, k.mT, out=out))

    def scores_backward(self, dscores: Tensor, q: Tensor, k: Tensor, dq: Tensor, dk: Tensor) -> None:
        """Writes the gradients of q and k; `dscores` is changed."""
        self._decay(dscores)
        torch.bmm(dscores, k, out=dq)
        torch.bmm(dscores.mT, q, out=dk)

    def _decay(self, scores: Tensor) -> None:
        by_head = scores.view(-1, self.grid.rows, self.grid.heads, *scores.shape[1:])
        by_head.mul_(self.scored.view_as(by_head) if self.fixed is None else self.fixed)
        if self.masks is not None:
            by_head.mul_(self.masks.same)

    def gradient(self, moments: Tensor, ends: Tensor) -> Tensor:
        """dg_t = Σ_{s>=t} moment_s + Σ S_end ⊙ dS_end, for `moments` = q·dq − k·dk `[N, C, K]`, `ends` `[N, K]`."""
        own = moments.sum(-1, keepdim=True, dtype=torch.float64)
        end = ends.sum(-1, dtype=torch.float64)[:, None, None]
        if self.masks is None:
            return own.flip(1).cumsum_(1).flip(1).add_(end)
        return _later(own, self.masks.same.double()) + end * _spread(self.masks.leave, self.grid).double()


def _later(moments: Tensor, same: Tensor) -> Tensor:
    """Σ over the tokens from t on that are of t's document."""
    n, rows, _, size, _ = same.shape
    by_row = moments.view(n, rows, -1, size, moments.shape[-1])
    return torch.matmul(same.mT, by_row).view_as(moments)


def _spread(mask: Tensor, grid: Grid) -> Tensor:
    """A mask of rows for every head: `[N, …]`."""
    return mask.expand(-1, -1, grid.heads, -1, -1).reshape(-1, *mask.shape[3:])


class ChannelDecay:
    """One decay a token, head and key channel: `log_decay [B, T, H, K]`.

    e^{G_i − G_j} does not split into a factor of i and one of j without overflow, but it does about a point between
    them: the pairs of two neighbouring blocks of h tokens meet at the border between the blocks, for h = LEAF, 2 LEAF,
    …, C/2, and become one product a pair of blocks. Pairs nearer than that go offset by offset. All exponents are sums
    of log decays over the very tokens between, so none is a difference of longer sums.
    """

    def __init__(self, log_decay: Tensor, grid: Grid) -> None:
        self.log_decay, self.grid = log_decay, grid
        keys, size = log_decay.shape[-1], grid.chunk
        self.leaf = min(LEAF, size)
        self.levels = []
        reach = self.leaf
        while reach < size:
            self.levels.append((reach, grid.workspace(keys)))
            reach *= 2
        self.prefix, self.suffix = grid.workspace(keys), grid.workspace(keys)

    def load(self, slab: Slab, masks: Masks | None, *, scores: bool = True) -> None:
        """Computes `enter` and `leave` `[N, C, K]`, `through` `[chunks, lanes, K, 1]`, and what scores need."""
        dtype, n = self.grid.dtype, slab.chunks
        upto = load(self.prefix, self.log_decay, slab)  # becomes the sum of the block's log decays up to a token
        beyond = self.suffix[:n].view_as(upto).zero_()  # … and that of those behind it
        if scores:
            self.steps = self._steps(upto)
        factors = {reach: work[:n].view_as(upto) for reach, work in self.levels} if scores else {}
        reach = 1
        while reach < upto.shape[1]:
            upto_pairs, beyond_pairs = _pairs(upto, reach), _pairs(beyond, reach)
            if reach in factors:
                pairs = _pairs(factors[reach], reach)
                pairs[:, :, 0].copy_(beyond_pairs[:, :, 0])
                pairs[:, :, 1].copy_(upto_pairs[:, :, 1])
                factor(factors[reach], dtype)
            beyond_pairs[:, :, 0] += upto_pairs[:, :, 1, -1:]
            upto_pairs[:, :, 1] += upto_pairs[:, :, 0, -1:]
            reach *= 2
        self.factors, self.masks = factors, masks
        self.enter, self.leave = factor(upto, dtype), factor(beyond, dtype)
        self.through = upto[:, -1].reshape(n, -1, upto.shape[-1], 1)
        if masks is not None:
            shape = (n, self.grid.rows, self.grid.heads)
            self.enter.view(*shape, *upto.shape[1:]).mul_(masks.enter)
            self.leave.view(*shape, *upto.shape[1:]).mul_(masks.leave)
            self.through = (self.through.view(*shape, -1, 1) * masks.through).view_as(self.through)

    def _steps(self, log_decay: Tensor) -> list[Tensor]:
        """For offsets d = 1 … leaf − 1: e^{g_{i−d+1} + … + g_i} for the tokens i >= d of each leaf."""
        floor = math.exp(FLOOR[self.grid.dtype])
        step = factor(log_decay.clone(), self.grid.dtype).unflatten(1, (-1, self.leaf))
        reached, steps = step[:, :, 1:], []
        for offset in range(1, self.leaf):
            if offset > 1:
                reached = torch.mul(reached[:, :, :-1], step[:, :, offset:])
                reached.clamp_(min=floor)
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
            halves, dlater = _pairs(decay, reach), _pairs(dq, reach)[:, :, 1]
            dlater.addcmul_(torch.bmm(given, earlier).view_as(dlater), halves[:, :, 1])
            dearlier = _pairs(dk, reach)[:, :, 0]
            dearlier.addcmul_(torch.bmm(given.mT, later).view_as(dearlier), halves[:, :, 0])

    def _about(self, q: Tensor, k: Tensor, decay: Tensor, reach: int) -> tuple[Tensor, Tensor]:
        """Queries of each later block decayed from the border on, keys of each earlier one decayed up to it."""
        halves = _pairs(decay, reach)
        later, earlier = _pairs(q, reach)[:, :, 1] * halves[:, :, 1], _pairs(k, reach)[:, :, 0] * halves[:, :, 0]
        return later.flatten(0, 1), earlier.flatten(0, 1)

    def _mask(self, scores: Tensor) -> None:
        if self.masks is not None:
            scores.view(-1, self.grid.rows, self.grid.heads, *scores.shape[1:]).mul_(self.masks.same)

    def gradient(self, moments: Tensor, ends: Tensor) -> Tensor:
        """dg_t = Σ_{s>=t} moment_s + end, for `moments` = q ⊙ dq − k ⊙ dk `[N, C, K]`, `ends` = Σ_v S ⊙ dS `[N, K]`."""
        if self.masks is None:
            size = moments.shape[1]
            later = moments.new_ones(size, size).triu_()
            return torch.bmm(later.expand(len(moments), -1, -1), moments).add_(ends[:, None])
        return _later(moments, self.masks.same) + ends[:, None] * _spread(self.masks.leave, self.grid)


def _pairs(x: Tensor, reach: int) -> Tensor:
    """`[N, C, D]` as `[N, C / 2h, 2, h, D]`: neighbouring blocks of h = `reach` tokens, two by two."""
    return x.view(x.shape[0], -1, 2, reach, x.shape[-1])


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
