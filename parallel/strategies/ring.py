"""Ring attention: key/value blocks travel round the sequence ranks while each rank keeps its queries.

Liu et al., 2023, "Ring Attention with Blockwise Transformers", arXiv 2310.01889. Any op with `attend`, `merge` and
`attend_backward` runs this way: partial results of a block are merged by log-sum-exp.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ...kernels.mask import Mask, Tile
from ...kernels.softmax import attend, attend_backward, merge
from ..collectives import exchange, finish
from ..sequence import Sequence
from .attention import Block, SharedAttention


@dataclass(frozen=True)
class RingPlan:
    """Who needs whose keys and values under a mask: the same on every rank, so that nobody waits in vain.

    tiles[s]: this rank's queries against the keys of the rank s places before it; None where the mask leaves nothing.
    hops[r]: how far the block of rank r travels: to the last rank after it that sees any of it.
    seen_by[r]: the distances from rank r at which its block is used, and from which a gradient comes back to it.
    """

    tiles: tuple[Tile | None, ...]
    hops: tuple[int, ...]
    seen_by: tuple[frozenset[int], ...]

    @classmethod
    def of(cls, mask: Mask, seq: Sequence) -> RingPlan:
        return seq.derive(("ring", mask), lambda: cls._make(mask, seq))

    @classmethod
    def _make(cls, mask: Mask, seq: Sequence) -> RingPlan:
        ranks = seq.layout.ranks
        held = [seq.documents_of(rank) for rank in range(ranks)]
        seen_by = tuple(
            frozenset(d for d in range(ranks) if mask.reaches(held[(owner + d) % ranks], held[owner]))
            for owner in range(ranks)
        )
        tiles = tuple(mask.tile(held[seq.rank], held[(seq.rank - s) % ranks]) for s in range(ranks))
        return cls(tiles, tuple(max(distances, default=0) for distances in seen_by), seen_by)


class _Travel:
    """Circulation of the key/value blocks: while block s is worked on, block s + 1 is under way."""

    def __init__(self, k: Tensor, v: Tensor, seq: Sequence, plan: RingPlan) -> None:
        self.seq, self.plan, self.ranks = seq, plan, seq.layout.ranks
        self.here: Block | None = Block.pack(k, v) if self.ranks > 1 else None
        self.own = (k, v)
        self.shapes = (k.shape, v.shape)
        self.next: Block | None = None
        self.works: list[dist.Work] = []

    def owner(self, step: int) -> int:
        return (self.seq.rank - step) % self.ranks

    def start(self, step: int) -> None:
        """Passes on the block of this step where somebody further along needs it, and awaits that of the next."""
        rank, hops = self.seq.rank, self.plan.hops
        sends, receives = [], []
        if step + 1 < self.ranks:
            if hops[self.owner(step)] > step and self.here is not None:
                sends.append((self.here.flat, (rank + 1) % self.ranks))
            self.next = None
            if hops[self.owner(step + 1)] > step:
                self.next = Block(self.own[0].new_empty(sum(s.numel() for s in self.shapes)), *self.shapes)
                receives.append((self.next.flat, (rank - 1) % self.ranks))
        self.works = exchange(sends, receives, self.seq)

    def finish(self) -> None:
        finish(self.works)
        self.here = self.next

    def block(self, step: int) -> tuple[Tensor, Tensor]:
        if step == 0:
            return self.own
        assert self.here is not None
        return self.here.unpack()


class _Returns:
    """Gradients of blocks on their way to the owners: those of one block travel while the next is worked on.

    An owner adds them to `total` in the order of distance: the result is the same at every run.
    """

    def __init__(self, total: Block, seq: Sequence, plan: RingPlan) -> None:
        self.total, self.seq, self.ranks = total, seq, seq.layout.ranks
        self.returns = plan.seen_by[seq.rank]
        self.part: Block | None = None  # kept while its memory is being sent
        self.back: Block | None = None
        self.works: list[dist.Work] = []

    def start(self, part: Block | None, step: int) -> None:
        """Sends this rank's part for the block of this step home, and awaits what comes back for the own block."""
        if step == 0:
            if part is not None:
                self.total.flat += part.flat
            return
        rank = self.seq.rank
        self.part, self.back = part, self.total.like() if step in self.returns else None
        sends = [] if part is None else [(part.flat, (rank - step) % self.ranks)]
        receives = [] if self.back is None else [(self.back.flat, (rank + step) % self.ranks)]
        self.works = exchange(sends, receives, self.seq)

    def finish(self) -> None:
        finish(self.works)
        if self.back is not None:
            self.total.flat += self.back.flat
        self.works, self.part, self.back = [], None, None


class RingAttention(SharedAttention):
    """Keys and values travel round the ranks.

    Forward sends each block once round as far as the mask lets it be seen. Backward circulates keys and values again
    with the final log-sum-exp, rather than keeping every block alive, and each rank sends the gradient of a block
    straight to its owner. While a block is worked on, the next one is under way, and the gradient of the one before.
    """

    def attend(self, q: Tensor, k: Tensor, v: Tensor, seq: Sequence) -> tuple[Tensor, Tensor] | None:
        plan = RingPlan.of(self.mask, seq)
        travel = _Travel(k, v, seq, plan)
        result: tuple[Tensor, Tensor] | None = None
        for step, tile in enumerate(plan.tiles):
            travel.start(step)
            if tile is not None:
                partial = attend(q, *travel.block(step), tile=tile, scale=self.scale, backend=seq.backend)
                result = partial if result is None else merge(*result, *partial)
            travel.finish()
        return result

    def attend_backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, seq: Sequence
    ) -> tuple[Tensor, Tensor, Tensor]:
        plan = RingPlan.of(self.mask, seq)
        travel = _Travel(k, v, seq, plan)
        dq = torch.zeros_like(q, dtype=out.dtype)
        dkv = Block.pack(torch.zeros_like(k, dtype=out.dtype), torch.zeros_like(v, dtype=out.dtype))
        returns = _Returns(dkv, seq, plan)
        for step, tile in enumerate(plan.tiles):
            travel.start(step)
            part: Block | None = None
            if tile is not None:
                dq_part, dk_part, dv_part = attend_backward(
                    dout, q, *travel.block(step), out, lse, tile=tile, scale=self.scale, backend=seq.backend
                )
                dq += dq_part
                part = Block.pack(dk_part, dv_part)
            returns.finish()
            returns.start(part, step)
            travel.finish()
        returns.finish()
        return dq, *dkv.unpack()
