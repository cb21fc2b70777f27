"""Decay per key channel within chunks, as factors of queries and keys about the middle of each chunk."""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor

from .channel import ChannelDecay
from .decay import FLOOR, Decay, Wanted
from .slabs import Grid, Lanes, Masks, Slab, on_host


class CentredChannelDecay(Decay):
    """One decay per token, head and key channel: `log_decay [B, T, H, K]`.

    Where neither half of a chunk decays below the floor, e^{G_i − G_m} and e^{G_m − G_j} are numbers of the type for
    the middle m of the chunk, however i and j lie: the scores are one product of queries and keys that these factors
    multiply. Slabs with a stronger decay, and those in which documents meet, go step by step, as `ChannelDecay`.
    """

    def __init__(self, log_decay: Tensor, grid: Grid) -> None:
        self.grid, self.given, self.log_decay = grid, log_decay, Lanes(log_decay, grid)
        size, self.middle = grid.chunk, grid.chunk // 2
        later = torch.ones(size, size, dtype=grid.dtype, device=grid.device).triu()
        # ±1: the tokens whose decays lie between the middle and each token.
        self.between = later.T - (torch.arange(size, device=grid.device) < self.middle).to(grid.dtype)
        self.later = later
        names = ("falling", "rising", "enter", "leave", "q", "k", "room")
        self.works = {name: grid.workspace(log_decay.shape[-1]).flatten(0, 2) for name in names}
        self.falls = _falls(log_decay, size, self.middle)

    @cached_property
    def stepwise(self) -> ChannelDecay:
        return ChannelDecay(self.given, self.grid)

    def load(self, slab: Slab, masks: Masks | None, wanted: Wanted = "all") -> None:
        """`enter` and `leave` are `[N, C, K]`, `through` is `[lanes, K, 1]` per chunk."""
        mild = min(self.falls[slab.first : slab.first + slab.chunks]) > FLOOR[self.grid.dtype]
        self.centred = mild and masks is None
        if not self.centred:
            own = self.stepwise
            own.load(slab, masks, wanted)
            self.enter, self.leave, self.through = own.enter, own.leave, own.through
            return
        decays = self.log_decay.load(slab)
        self.falling, self.rising, enter, leave = (
            self.works[name][: len(decays)] for name in ("falling", "rising", "enter", "leave")
        )
        torch.bmm(self.between.expand(len(decays), -1, -1), decays, out=self.falling).exp_()
        torch.reciprocal(self.falling, out=self.rising)
        first = decays[:, : self.middle].sum(1, keepdim=True).exp_()
        self.enter = torch.mul(self.falling, first, out=enter)
        self.leave = torch.mul(self.rising, self.falling[:, -1:], out=leave)
        lanes = (slab.chunks, self.grid.lanes, -1, 1)
        self.through = self.enter[:, -1].contiguous().view(lanes).unbind(0)

    def scores(self, q: Tensor, k: Tensor, out: Tensor) -> None:
        if not self.centred:
            self.stepwise.scores(q, k, out)
            return
        torch.bmm(self._product(q, "q"), self._product(k, "k").mT, out=out).tril_()

    def add_gradients(self, dscores: Tensor, q: Tensor, k: Tensor, dq: Tensor, dk: Tensor) -> None:
        if not self.centred:
            self.stepwise.add_gradients(dscores, q, k, dq, dk)
            return
        room = self.works["room"][: len(q)]
        torch.bmm(dscores.tril_(), self._product(k, "k"), out=room)
        dq.addcmul_(room, self.falling)
        torch.bmm(dscores.mT, self._product(q, "q"), out=room)
        dk.addcmul_(room, self.rising)

    def gradient(self, moments: Tensor, ends: Tensor) -> Tensor:
        if not self.centred:
            return self.stepwise.gradient(moments, ends)
        room = self.works["room"][: len(moments)]
        return torch.bmm(self.later.expand(len(moments), -1, -1), moments, out=room).add_(ends[:, None])

    def _product(self, x: Tensor, name: str) -> Tensor:
        """Queries or keys as the product of the scores takes them."""
        factors = self.falling if name == "q" else self.rising
        return torch.mul(x, factors, out=self.works[name][: len(x)])


def _falls(log_decay: Tensor, size: int, middle: int) -> list[float]:
    """Of each chunk, the least that any decay comes to over a half; −inf where reading that would wait for a device."""
    length = log_decay.shape[1]
    if not on_host(log_decay):
        return [-math.inf] * -(-length // size)
    cut = length // size * size
    whole = log_decay[:, :cut].unflatten(1, (-1, size))
    halves = [half.sum(2).amin((0, 2, 3)) for half in (whole[:, :, :middle], whole[:, :, middle:])]
    falls = torch.minimum(*halves).tolist()
    return falls + ([float(log_decay[:, cut:].sum(1).min())] if cut < length else [])
