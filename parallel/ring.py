"""Ring attention: key/value blocks travel round the sequence ranks while each rank keeps its queries.

Liu et al., 2023, "Ring Attention with Blockwise Transformers", arXiv 2310.01889. Any op with `attend`, `merge` and
`attend_backward` runs this way: partial results of a block are merged by log-sum-exp.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..kernels.mask import Mask, Tile
from ..kernels.softmax import apply_sink, attend, attend_backward, merge, sink_backward
from .collectives import exchange
from .operation import Tensors
from .sequence import Sequence


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


class _Block:
    """Keys and values of one rank, travelling as one message."""

    def __init__(self, flat: Tensor, k_shape: torch.Size, v_shape: torch.Size) -> None:
        self.flat, self.shapes = flat, (k_shape, v_shape)

    @classmethod
    def pack(cls, k: Tensor, v: Tensor) -> _Block:
        return cls(torch.cat([k.reshape(-1), v.reshape(-1)]), k.shape, v.shape)

    def like(self) -> _Block:
        return _Block(torch.empty_like(self.flat), *self.shapes)

    def unpack(self) -> tuple[Tensor, Tensor]:
        split = self.shapes[0].numel()
        return self.flat[:split].view(self.shapes[0]), self.flat[split:].view(self.shapes[1])


class _Travel:
    """Circulation of the key/value blocks: while block s is worked on, block s + 1 is under way."""

    def __init__(self, k: Tensor, v: Tensor, seq: Sequence, plan: RingPlan) -> None:
        self.seq, self.plan, self.ranks = seq, plan, seq.layout.ranks
        self.here: _Block | None = _Block.pack(k, v) if self.ranks > 1 else None
        self.own = (k, v)
        self.shapes = (k.shape, v.shape)
        self.next: _Block | None = None
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
                self.next = _Block(self.own[0].new_empty(sum(s.numel() for s in self.shapes)), *self.shapes)
                receives.append((self.next.flat, (rank - 1) % self.ranks))
        self.works = exchange(sends, receives, self.seq)

    def finish(self) -> None:
        for work in self.works:
            work.wait()
        self.here = self.next

    def block(self, step: int) -> tuple[Tensor, Tensor]:
        if step == 0:
            return self.own
        assert self.here is not None
        return self.here.unpack()


@dataclass(frozen=True)
class RingAttention:
    """softmax(scale q kᵀ + mask) v over keys and values of all sequence ranks; on one rank, over those held.

    Forward sends each block once round as far as the mask lets it be seen. Backward circulates keys and values again
    with the final log-sum-exp, rather than keeping every block alive, and each rank sends the gradient of a block
    straight to its owner, which adds them in the order of distance: the result is the same at every run. Keys and
    values travel in their own type, which loses nothing; partial results and gradients are float32 (float64).

    An `Operation`; its inputs are (q, k, v, sink_logits or None). It saves the output in float32, where it is not
    already, and the log-sum-exp.
    """

    causal: bool
    window: int | None
    sink_tokens: int
    scale: float

    @property
    def mask(self) -> Mask:
        return Mask(self.causal, self.window, self.sink_tokens)

    def forward(self, inputs: Tensors, seq: Sequence) -> tuple[Tensor, Tensors]:
        q, k, v, sink_logits = _present(inputs)
        out, lse = _forward(q, k, v, sink_logits, self.mask, seq, self.scale)
        return out.to(q.dtype), (None if out.dtype == q.dtype else out, lse)

    def backward(self, dout: Tensor, inputs: Tensors, out: Tensor, saved: Tensors, seq: Sequence) -> Tensors:
        q, k, v, sink_logits = _present(inputs)
        exact, lse = saved
        assert lse is not None
        out = out if exact is None else exact
        dout = dout.to(out.dtype)
        dsink = None if sink_logits is None else sink_backward(dout, out, lse, sink_logits)
        dq, dk, dv = _backward(dout, q, k, v, out, lse, self.mask, seq, self.scale)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dsink

    def like(self, inputs: Tensors, ranks: int, spans: int) -> tuple[Tensor, Tensors]:
        q, _, v, _ = _present(inputs)
        shape, exact = (*q.shape[:-1], v.shape[-1]), torch.promote_types(q.dtype, torch.float32)
        out = None if exact == q.dtype else q.new_empty(shape, dtype=exact)
        return q.new_empty(shape), (out, q.new_empty(shape[:-1], dtype=exact))


def _present(inputs: Tensors) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    q, k, v, sink_logits = inputs
    assert q is not None
    assert k is not None
    assert v is not None
    return q, k, v, sink_logits


def _forward(
    q: Tensor, k: Tensor, v: Tensor, sink_logits: Tensor | None, mask: Mask, seq: Sequence, scale: float
) -> tuple[Tensor, Tensor]:
    plan = RingPlan.of(mask, seq)
    travel = _Travel(k, v, seq, plan)
    result: tuple[Tensor, Tensor] | None = None
    for step, tile in enumerate(plan.tiles):
        travel.start(step)
        if tile is not None:
            partial = attend(q, *travel.block(step), tile=tile, scale=scale, backend=seq.backend)
            result = partial if result is None else merge(*result, *partial)
        travel.finish()
    if result is None:  # every token held here is padding
        dtype = torch.promote_types(q.dtype, torch.float32)
        out = q.new_zeros((*q.shape[:-1], v.shape[-1]), dtype=dtype)
        result = out, q.new_full(q.shape[:-1], float("-inf"), dtype=dtype)
    out, lse = result
    return result if sink_logits is None else apply_sink(out, lse, sink_logits)


def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Mask,
    seq: Sequence,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    plan = RingPlan.of(mask, seq)
    ranks, rank = seq.layout.ranks, seq.rank
    travel = _Travel(k, v, seq, plan)
    dq = torch.zeros_like(q, dtype=out.dtype)
    dkv = _Block.pack(torch.zeros_like(k, dtype=out.dtype), torch.zeros_like(v, dtype=out.dtype))
    for step, tile in enumerate(plan.tiles):
        travel.start(step)
        part: _Block | None = None
        if tile is not None:
            dq_part, dk_part, dv_part = attend_backward(
                dout, q, *travel.block(step), out, lse, tile=tile, scale=scale, backend=seq.backend
            )
            dq += dq_part
            part = _Block.pack(dk_part, dv_part)
        if step == 0:
            if part is not None:
                dkv.flat += part.flat
        else:
            _send_home(part, dkv, step, seq, returns=step in plan.seen_by[rank], owner=(rank - step) % ranks)
        travel.finish()
    return dq, *dkv.unpack()


def _send_home(part: _Block | None, dkv: _Block, step: int, seq: Sequence, *, returns: bool, owner: int) -> None:
    """Sends this rank's part of a block's gradient to its owner, and adds what comes back for the own block."""
    sends = [] if part is None else [(part.flat, owner)]
    back = dkv.like() if returns else None
    receives = [] if back is None else [(back.flat, (seq.rank + step) % seq.layout.ranks)]
    for work in exchange(sends, receives, seq):
        work.wait()
    if back is not None:
        dkv.flat += back.flat
