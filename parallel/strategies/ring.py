"""Ring attention: key/value blocks travel round the sequence ranks while each rank keeps its queries.

Liu et al., 2023, "Ring Attention with Blockwise Transformers", arXiv 2310.01889. Any `Attend` runs this way: partial
results of a block are merged by log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...kernels.attend import Attend, Gradient, merge
from ..collectives import Packed, Work, exchange, finish
from ..sequence import Sequence
from .attention import SharedAttention
from .windows import LocalWindows


@dataclass(frozen=True)
class RingPlan:
    """Which ranks need which keys under an op's mask: the same plan on every rank, so that all that is sent is
    received.

    tiles[s]: this rank's queries against the keys of the rank s places before it; None where the mask hides all.
    hops[r]: how far the block of rank r travels: to the last rank after it that sees any of it.
    seen_by[r]: the distances from rank r at which its block is used, and from which a gradient comes back to it.
    """

    tiles: tuple[Any, ...]
    hops: tuple[int, ...]
    seen_by: tuple[frozenset[int], ...]

    @classmethod
    def of(cls, op: Attend, seq: Sequence) -> RingPlan:
        return seq.derive(cls._make, op)

    @classmethod
    def _make(cls, seq: Sequence, op: Attend) -> RingPlan:
        ranks = seq.layout.ranks
        reached = op.reached(seq.layout.parts(seq.documents), ranks).tolist()
        seen_by = tuple(
            frozenset(d for d in range(ranks) if reached[(owner + d) % ranks][owner]) for owner in range(ranks)
        )
        owners = [(seq.rank - s) % ranks for s in range(ranks)]
        tiles = tuple(
            op.tile_in(seq.documents, seq.local, seq.documents_of(owner)) if reached[seq.rank][owner] else None
            for owner in owners
        )
        return cls(tiles, tuple(max(distances, default=0) for distances in seen_by), seen_by)


class _Travel:
    """Circulation of the blocks of keys: while block s is worked on, block s + 1 is under way."""

    def __init__(self, own: tuple[Tensor, ...], seq: Sequence, plan: RingPlan) -> None:
        self.seq, self.plan, self.ranks, self.own = seq, plan, seq.layout.ranks, own
        self.current: Packed | None = Packed.of(own) if self.ranks > 1 else None
        self.next: Packed | None = None
        self.works: list[Work] = []

    def owner(self, step: int) -> int:
        return (self.seq.rank - step) % self.ranks

    def start(self, step: int) -> None:
        """Passes on the block of this step if a later rank needs it, and starts to receive that of the next."""
        rank, hops = self.seq.rank, self.plan.hops
        sends, receives = [], []
        if step + 1 < self.ranks:
            if hops[self.owner(step)] > step and self.current is not None:
                sends = self.current.to((rank + 1) % self.ranks)
            self.next = None
            if hops[self.owner(step + 1)] > step:
                self.next = Packed.like(self.own)
                receives = self.next.to((rank - 1) % self.ranks)
        self.works = exchange(sends, receives, self.seq)

    def finish(self) -> None:
        finish(self.works)
        self.current = self.next

    def block(self, step: int) -> tuple[Tensor, ...]:
        if step == 0:
            return self.own
        assert self.current is not None
        return self.current.tensors


class _Returns:
    """Gradients of blocks on their way to the owners: those of one block travel while the next is worked on.

    An owner adds them to `total` in the order of distance: the result is the same at every run. Nothing returns of what
    is `constant`.
    """

    def __init__(self, total: Packed, seq: Sequence, plan: RingPlan, *, constant: bool) -> None:
        self.total, self.seq, self.ranks = total, seq, seq.layout.ranks
        self.returns = frozenset[int]() if constant else plan.seen_by[seq.rank]
        self.part: Packed | None = None  # kept while its memory is being sent
        self.back: Packed | None = None
        self.works: list[Work] = []

    def start(self, part: Packed | None, step: int) -> None:
        """Sends this rank's part for this step's block to its owner, and starts to receive one for its own block."""
        if step == 0:
            if part is not None:
                self.total.add(part)
            return
        rank = self.seq.rank
        self.part, self.back = part, Packed.like(self.total.tensors) if step in self.returns else None
        sends = [] if part is None else part.to((rank - step) % self.ranks)
        receives = [] if self.back is None else self.back.to((rank + step) % self.ranks)
        self.works = exchange(sends, receives, self.seq)

    def finish(self) -> None:
        finish(self.works)
        if self.back is not None:
            self.total.add(self.back)
        self.works, self.part, self.back = [], None, None


class RingAttention(SharedAttention):
    """Keys travel round the ranks.

    Forward sends each block round once, up to the last rank that sees it. Backward circulates the blocks again with
    the final log-sum-exp, rather than keeping every block alive, and each rank sends the gradient of a block straight
    to its owner. While a block is worked on, the next block and the gradient of the previous one are under way.
    """

    def over_keys(self, inputs: Any, where: Sequence) -> tuple[Tensor, Tensor] | None:
        seq = self.rows(where)
        plan = RingPlan.of(self.op, seq)
        travel = _Travel(self.sent(inputs, seq), seq, plan)
        result: tuple[Tensor, Tensor] | None = None
        for step, tile in enumerate(plan.tiles):
            travel.start(step)
            if tile is not None:
                partial = self.op.attend(inputs, travel.block(step), tile, seq.backend)
                result = partial if result is None else merge(*result, *partial)
            travel.finish()
        return result

    def over_keys_backward(
        self, gradient: Gradient, inputs: Any, where: Sequence
    ) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        seq = self.rows(where)
        plan = RingPlan.of(self.op, seq)
        own = self.sent(inputs, seq)
        travel = _Travel(own, seq, plan)
        stay: dict[str, Tensor] = {}
        total = Packed.of(tuple(torch.zeros_like(x, dtype=gradient.exact) for x in own))
        returns = _Returns(total, seq, plan, constant=self.op.constant)
        for step, tile in enumerate(plan.tiles):
            travel.start(step)
            part: Packed | None = None
            if tile is not None:
                block = travel.block(step)
                stay_parts, gradients = self.op.attend_backward(gradient, inputs, block, tile, seq.backend)
                self.add_up(stay, stay_parts)
                if not self.op.constant:
                    part = Packed.of(tuple(x.to(gradient.exact) for x in gradients))  # as their owners expect them
            returns.finish()
            returns.start(part, step)
            travel.finish()
        returns.finish()
        return stay, total.tensors

    def sent(self, inputs: Any, seq: Sequence) -> tuple[Tensor, ...]:
        """What this rank sends round."""
        return self.op.sent(inputs)


class RingWithLse(RingAttention):
    """The log-sum-exp, float32 (float64), is its second output."""

    returns_lse: ClassVar[bool] = True
    outputs: ClassVar[int] = 2


class RingOfBlocks(RingAttention):
    """Complete blocks of constant keys travel, `[B, W, op.block_size, …]` from the rank on which they end."""

    def sent(self, inputs: Any, seq: Sequence) -> tuple[Tensor, ...]:
        blocks = LocalWindows(self.op.block_size, self.op.block_size)  # type: ignore[attr-defined]
        return tuple(blocks.apply(x, seq) for x in self.op.sent(inputs))

    def over_keys_backward(
        self, gradient: Gradient, inputs: Any, where: Sequence
    ) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        stay, _ = super().over_keys_backward(gradient, inputs, where)
        return stay, tuple(torch.zeros_like(x, dtype=gradient.exact) for x in self.op.sent(inputs))


def ring(until: int | None, build: Callable[..., Attend], *settings: Any) -> RingAttention:
    """The op `build(*settings)` by a ring; plain values, as `mix` wants them."""
    return RingAttention(build(*settings), until)


def ring_of_blocks(build: Callable[..., Attend], *settings: Any) -> RingOfBlocks:
    """The same for an op over complete blocks."""
    return RingOfBlocks(build(*settings))


def ring_with_lse(build: Callable[..., Attend], *settings: Any) -> RingWithLse:
    """The same, with the log-sum-exp."""
    return RingWithLse(build(*settings))
