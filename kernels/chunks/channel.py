"""Decay per key channel within the chunks of a slab."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .decay import FLOOR, Decay, Splitting, Wanted, by_row, factor, later_of, spread
from .slabs import Grid, Lanes, Masks, Slab, on_host

CHUNK = 32  # shorter than for one decay per token: a slab has three times the workspaces to keep in cache
LEAF = 8  # tokens whose decays are multiplied step by step; longer reaches have a reference point


class ChannelDecay(Decay):
    """One decay per token, head and key channel: `log_decay [B, T, H, K]`.

    e^{G_i − G_j} does not split into a factor of i and one of j without overflow, but it does about a point between
    them: the pairs of two neighbouring blocks of h tokens meet at the border between the blocks, for h = LEAF, 2 LEAF,
    …, C/2, and become one product a pair of blocks. Pairs nearer than that go offset by offset. All exponents are sums
    of log decays over the very tokens between, so none is a difference of longer sums.
    """

    def __init__(self, log_decay: Tensor, grid: Grid) -> None:
        self.grid, keys = grid, log_decay.shape[-1]
        self.log_decay = Lanes(log_decay, grid)
        self.leaf = min(LEAF, grid.chunk)
        self.reaches = [self.leaf << level for level in range((grid.chunk // self.leaf).bit_length() - 1)]
        # All that is as large as a slab is written to these: what is allocated anew costs more than its arithmetic.
        names = ("enter", "leave", "product", "past", *self.reaches)
        self.works: dict[str | int, Tensor] = {name: grid.workspace(keys).flatten(0, 2) for name in names}
        self.works["blocks"] = grid.workspace(grid.chunk // 4 or 1).flatten(0, 2)
        self.about = {reach: grid.workspace(keys).flatten(0, 2) for reach in self.reaches}
        self.steps = {offset: grid.workspace(keys).flatten(0, 2) for offset in range(2, self.leaf)}
        self.spare: tuple[Tensor, ...] | None = None
        self.views = Views()
        whole = torch.ones(grid.chunk, grid.chunk, dtype=grid.dtype, device=grid.device)
        self.later = whole.triu()
        # 0/1: the tokens whose decays lie between a token and the chunk's start or end, or the border at `reach`.
        self.between: dict[str | int, Tensor] = {"enter": whole.tril(), "leave": whole.triu(1)}
        self.between |= {reach: _to_border(reach, grid.device).to(grid.dtype) for reach in self.reaches}

    def load(self, slab: Slab, masks: Masks | None, wanted: Wanted = "all") -> None:
        """`enter` and `leave` are `[N, C, K]`, `through` is `[lanes, K, 1]` per chunk."""
        dtype = self.grid.dtype
        decays = self.log_decay.load(slab).clamp_(min=FLOOR[dtype])  # -inf would make NaN of what it is not part of
        self.masks = masks
        through = factor(decays.sum(1), dtype).view(slab.chunks, self.grid.rows, self.grid.heads, -1, 1)
        self.through = (through if masks is None else through * masks.through).flatten(1, 2).unbind(0)
        if wanted != "leave":
            self.enter = self._factors(decays, "enter", None if masks is None else masks.enter)
        if wanted != "enter":
            self.leave = self._factors(decays, "leave", None if masks is None else masks.leave)
        if wanted == "all":
            for reach in self.reaches:
                self._factors(decays, reach)
            self._load_steps(decays)

    @property
    def floor(self) -> float:
        return math.exp(FLOOR[self.grid.dtype])

    def _factors(self, decays: Tensor, border: str | int, mask: Tensor | None = None) -> Tensor:
        """The factors between the tokens and a border, `[N, C, K]`."""
        between = self.between[border]
        out = self.views(_first, self.works[border], len(decays))
        by_block = self.views(_by_block, decays, len(between))
        torch.bmm(self.views(_expanded, between, len(by_block)), by_block, out=self.views(_by_block, out, len(between)))
        factor(out, self.grid.dtype)
        if mask is not None:
            by_row(out, self.grid).mul_(mask)
        return out

    def _load_steps(self, decays: Tensor) -> None:
        """For offsets d = 1 … leaf − 1: e^{g_{i−d+1} + … + g_i} for i >= d in each leaf; changes its input."""
        step, count = factor(decays, self.grid.dtype), len(decays)
        reached = self.views(_leaf_tail, step, self.leaf, 1)
        self.reached = [reached]
        for offset in range(2, self.leaf):
            out = self.views(_leaf_room, self.steps[offset], count, self.leaf, offset)
            torch.mul(self.views(_but_last, reached), self.views(_leaf_tail, step, self.leaf, offset), out=out)
            reached = out.clamp_(min=self.floor)
            self.reached.append(reached)

    def scores(self, q: Tensor, k: Tensor, out: Tensor) -> None:
        """out_ij = Σ_c q_ic k_jc e^{G_ic − G_jc} for j <= i of one document; above the diagonal `out` stays 0."""
        views, leaf, count = self.views, self.leaf, len(q)
        for reach in self.reaches:
            later, earlier = self._about(q, k, reach)
            blocks = views(_square_room, self.works["blocks"], count, reach)
            torch.bmm(later, views(_transposed, earlier), out=blocks)
            target = views(_border_blocks, out, reach)
            target.copy_(views(_shaped_as, blocks, target))
        for offset in range(leaf):
            product = views(_leaf_room, self.works["product"], count, leaf, offset)
            past = views(_leaf_head, k, leaf, offset)
            if offset:
                past = torch.mul(
                    past, self.reached[offset - 1], out=views(_leaf_room, self.works["past"], count, leaf, offset)
                )
            torch.mul(views(_leaf_tail, q, leaf, offset), past, out=product)
            views(_leaf_diagonal, out, leaf, offset).copy_(product.sum(-1))
        self._mask(out)

    def mix(self, scores: Tensor, k: Tensor, out: Tensor) -> None:
        """out_i = Σ_{j<=i} scores_ij k_j ⊙ e^{G_i − G_j}, for scores that are 0 above the diagonal."""
        views, leaf, count = self.views, self.leaf, len(k)
        for offset in range(leaf):
            given = views(_leaf_diagonal_column, scores, leaf, offset)
            now, past = views(_leaf_tail, out, leaf, offset), views(_leaf_head, k, leaf, offset)
            if offset == 0:
                torch.mul(past, given, out=now)
            else:
                room = views(_leaf_room, self.works["product"], count, leaf, offset)
                now.addcmul_(torch.mul(self.reached[offset - 1], given, out=room), past)
        for reach in self.reaches:
            before, after = views(_halves, views(_first, self.works[reach], count), reach)
            later, earlier = views(_two_rooms, self.about[reach], count, reach)
            torch.mul(views(_halves, k, reach)[0], before, out=views(_shaped_as, earlier, before))
            given, border = (
                views(_square_room, self.works["blocks"], count, reach),
                views(_border_blocks, scores, reach),
            )
            views(_shaped_as, given, border).copy_(border)
            torch.bmm(given, earlier, out=later)
            views(_halves, out, reach)[1].addcmul_(views(_shaped_as, later, after), after)

    def scores_backward(self, dscores: Tensor, q: Tensor, k: Tensor, dq: Tensor, dk: Tensor) -> None:
        """Writes the gradients of the q and k that `scores` was called with; `dscores` is changed.

        So dq is `mix(dscores, k)`, and dk the same backwards in time.
        """
        views, leaf, count = self.views, self.leaf, len(q)
        self._mask(dscores)
        for offset in range(leaf):
            given = views(_leaf_diagonal_column, dscores, leaf, offset)
            q_now, dq_now = views(_leaf_tail, q, leaf, offset), views(_leaf_tail, dq, leaf, offset)
            k_past, dk_past = views(_leaf_head, k, leaf, offset), views(_leaf_head, dk, leaf, offset)
            if offset == 0:
                torch.mul(k_past, given, out=dq_now)
                torch.mul(q_now, given, out=dk_past)
                continue
            room = views(_leaf_room, self.works["product"], count, leaf, offset)
            decayed = torch.mul(self.reached[offset - 1], given, out=room)
            dq_now.addcmul_(decayed, k_past)
            dk_past.addcmul_(decayed, q_now)
        for reach in self.reaches:
            later, earlier = views(_two_rooms, self.about[reach], count, reach)
            before, after = views(_halves, views(_first, self.works[reach], count), reach)
            given = views(_square_room, self.works["blocks"], count, reach)
            border = views(_border_blocks, dscores, reach)
            views(_shaped_as, given, border).copy_(border)
            dlater, dearlier = views(_halves, dq, reach)[1], views(_halves, dk, reach)[0]
            room = views(_two_rooms, self.works["product"], count, reach)[0]
            shaped = views(_shaped_as, room, dlater)
            torch.bmm(given, earlier, out=room)
            dlater.addcmul_(shaped, after)
            torch.bmm(views(_transposed, given), later, out=room)
            dearlier.addcmul_(shaped, before)

    def add_gradients(self, dscores: Tensor, q: Tensor, k: Tensor, dq: Tensor, dk: Tensor) -> None:
        for reach in self.reaches:  # what another pair may have been written over
            self._about(q, k, reach)
        if self.spare is None:
            self.spare = tuple(self.grid.workspace(q.shape[-1]).flatten(0, 2) for _ in range(2))
        own_dq, own_dk = (spare[: len(q)] for spare in self.spare)
        self.scores_backward(dscores, q, k, own_dq, own_dk)
        dq.add_(own_dq)
        dk.add_(own_dk)

    def _about(self, q: Tensor, k: Tensor, reach: int) -> tuple[Tensor, Tensor]:
        """Queries of each later block decayed from the border on, keys of each earlier one decayed up to it."""
        views = self.views
        before, after = views(_halves, views(_first, self.works[reach], len(q)), reach)
        later, earlier = views(_two_rooms, self.about[reach], len(q), reach)
        torch.mul(views(_halves, q, reach)[1], after, out=views(_shaped_as, later, after))
        torch.mul(views(_halves, k, reach)[0], before, out=views(_shaped_as, earlier, before))
        return later, earlier

    def _mask(self, scores: Tensor) -> None:
        if self.masks is not None:
            by_row(scores, self.grid).mul_(self.masks.same)

    def gradient(self, moments: Tensor, ends: Tensor) -> Tensor:
        if self.masks is None:
            room = self.views(_first, self.works["product"], len(moments))
            expanded = self.views(_expanded, self.later, len(moments))
            return torch.bmm(expanded, moments, out=room).add_(ends[:, None])
        return later_of(moments, self.masks, self.grid).addcmul_(ends[:, None], spread(self.masks.leave, self.grid))


class SplitChannelDecay(Splitting, ChannelDecay):
    """One decay per token, head and key channel."""

    def __init__(self, log_decay: Tensor, grid: Grid) -> None:
        super().__init__(log_decay, grid)
        size = grid.chunk
        if not on_host(log_decay):
            self.falls = [-math.inf] * -(-grid.length // size)
            return
        cut = grid.length // size * size
        whole = log_decay[:, :cut].unflatten(1, (-1, size)).sum(2).amin((0, 2, 3))
        self.falls = whole.tolist() + ([float(log_decay[:, cut:].sum(1).min())] if cut < grid.length else [])


class Views:
    """Views of workspaces, each made once: a slab takes hundreds, and making one costs as much as a small product."""

    def __init__(self) -> None:
        self.known: dict[tuple[Any, ...], tuple[tuple[Any, ...], Any]] = {}

    def __call__(self, make: Callable[..., Any], x: Tensor, *settings: Any) -> Any:
        key = (make, id(x), *(id(s) if isinstance(s, Tensor) else s for s in settings))
        found = self.known.get(key)
        if found is None:
            # The tensors are kept with their view, so that no other can come to have their id.
            found = self.known[key] = ((x, *settings), make(x, *settings))
        return found[1]


def _first(x: Tensor, count: int) -> Tensor:
    return x[:count]


def _expanded(x: Tensor, count: int) -> Tensor:
    return x.expand(count, -1, -1)


def _transposed(x: Tensor) -> Tensor:
    return x.mT


def _but_last(x: Tensor) -> Tensor:
    return x[:, :, :-1]


def _shaped_as(x: Tensor, other: Tensor) -> Tensor:
    return x.view(other.shape)


def _by_block(x: Tensor, size: int) -> Tensor:
    return x.view(-1, size, x.shape[-1])


def _leaf_tail(x: Tensor, leaf: int, offset: int) -> Tensor:
    """`[N, C / leaf, leaf − offset, D]`: the tokens of each leaf that have one `offset` before them in it."""
    return x.unflatten(1, (-1, leaf))[:, :, offset:]


def _leaf_head(x: Tensor, leaf: int, offset: int) -> Tensor:
    """`[N, C / leaf, leaf − offset, D]`: the tokens `offset` before those of `_leaf_tail`."""
    return x.unflatten(1, (-1, leaf))[:, :, : leaf - offset]


def _leaf_room(workspace: Tensor, count: int, leaf: int, offset: int) -> Tensor:
    """Contiguous room for what has the shape of `_leaf_tail`."""
    _, size, dim = workspace.shape
    shape = (count, size // leaf, leaf - offset, dim)
    return workspace.view(-1)[: math.prod(shape)].view(shape)


def _two_rooms(workspace: Tensor, count: int, reach: int) -> tuple[Tensor, Tensor]:
    """Contiguous room `[N · C / 2h, h, D]`, twice, for a half of all blocks of h = `reach` tokens each."""
    first, second = workspace[:count].view(2, -1, reach, workspace.shape[-1])
    return first, second


def _square_room(workspace: Tensor, count: int, reach: int) -> Tensor:
    """Contiguous room `[N · C / 2h, h, h]`."""
    shape = (count * workspace.shape[1] // (2 * reach), reach, reach)
    return workspace.view(-1)[: math.prod(shape)].view(shape)


def _halves(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Dimension 1 of x as pairs of neighbouring blocks of `size`: the earlier and the later ones `[N, P, size, D]`."""
    pairs = x.unflatten(1, (-1, 2, size))
    return pairs[:, :, 0], pairs[:, :, 1]


def _to_border(reach: int, device: torch.device) -> Tensor:
    """bool `[2h, 2h]`: the tokens of two blocks of h = `reach` whose decays lie between a token and their border."""
    token = torch.arange(2 * reach, device=device)
    later = token >= reach
    after, upto = token > token[:, None], token <= token[:, None]
    return torch.where(later[:, None], later & upto, ~later & after)


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


def _leaf_diagonal_column(scores: Tensor, leaf: int, offset: int) -> Tensor:
    return _leaf_diagonal(scores, leaf, offset).unsqueeze(-1)
