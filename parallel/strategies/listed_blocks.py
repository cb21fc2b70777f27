"""Block-sparse attention across ranks: every rank is sent only the blocks that its queries list.

At first only the rank with the queries knows which blocks they list. One small all-gather tells every rank which blocks
the others list; since all know the documents, all then know which tokens travel between which ranks. Which ones is
computed on the device; the host reads only how many, while the device goes on. A rank attends to its own listed blocks
while the others are under way, and both parts merge by log-sum-exp: a block that straddles ranks is attended to in
parts. Gradients of keys and values go back to their owners the same way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...kernels.attend import Gradient, ListedAttend, merge
from ...kernels.blocks import BlockLayout
from ...kernels.documents import Documents
from ...kernels.gathered import JoinedTile, left_out_before
from ...kernels.operation import Tensors
from ..collectives import Gathering, agree, exchange, finish
from ..operation import present
from ..reading import Reading
from ..sequence import Sequence
from .attention import SharedAttention
from .windows import tokens_of_ranks


class Holdings(NamedTuple):
    """Where the tokens of all blocks are; depends on documents and layout alone.

    A block is numbered over the batch, row · count + id; B · count stands for no block, that of padding.

    own: int32 `[B · T]`, the block of each of this rank's tokens.
    blocks: int32 `[P · B · T]`, the block of each rank's tokens, in the order in which ranks send them; none for those
        of this rank.
    places: int32 `[P · B · T]`, where those tokens stand in their row once this rank's own and padding are taken out.
    held: int32 `[B · count + 1]`, how many tokens of each block this rank holds.
    others: int32 `[P, B · count + 1]`, how many each other rank holds; 0 for this rank.
    """

    own: Tensor
    blocks: Tensor
    places: Tensor
    held: Tensor
    others: Tensor


def _holdings(seq: Sequence, op: ListedAttend) -> Holdings:
    layout = seq.derive(_layout, op)
    rank, none = seq.rank, seq.documents.batch * layout.count
    ids = layout.ids(seq.documents).long()
    first = torch.arange(len(ids)).unsqueeze(1) * layout.count
    rows = seq.derive(tokens_of_ranks)
    blocks = torch.where(ids < 0, none, ids + first)[:, rows].transpose(0, 1).flatten(1)
    held = torch.stack([torch.bincount(of_rank, minlength=none + 1) for of_rank in blocks])
    held[:, none] = 0
    own, held_here = blocks[rank].clone(), held[rank].clone()
    blocks[rank], held[rank] = none, 0
    elsewhere = (ids >= 0).long()
    elsewhere[:, rows[rank]] = 0
    places = (elsewhere.cumsum(1) - 1)[:, rows].transpose(0, 1).flatten()
    return Holdings(*(x.int() for x in (own, blocks.flatten(), places, held_here, held)))


def _layout(seq: Sequence, op: ListedAttend) -> BlockLayout:
    return op.layout(seq.documents)


def _own_tile(seq: Sequence, op: ListedAttend) -> Any:
    """This rank's queries against its own keys; None where they see none of them."""
    return op.tile(seq.local, seq.local, seq.derive(_layout, op))


def _others_tile(seq: Sequence, op: ListedAttend) -> Any:
    """This rank's queries against all keys of other ranks."""
    return op.tile(seq.local, seq.derive(_elsewhere), seq.derive(_layout, op))


def _elsewhere(seq: Sequence) -> Documents:
    """The documents of the tokens that other ranks hold, `[B, N - T]`, in the order of the row."""
    length, own = seq.layout.span_length, seq.layout.spans_of(seq.rank)
    starts = [0, *((span + 1) * length for span in own)]
    stops = [*(span * length for span in own), seq.layout.length]
    return Documents.concatenate([seq.documents.slice(*between) for between in zip(starts, stops, strict=True)])


@dataclass(frozen=True)
class BlockPlan:
    """Which keys travel for the blocks that ranks list: known on the device, and on the host how many.

    listed: uint8 `[B · count + 1]`, which blocks this rank's queries list, in the numbers of `Holdings`.
    asked: uint8 `[P, B · T]`, which of this rank's tokens each other rank asks for.
    counts: int64 `[2P + 2]`: how many tokens this rank sends to each, and receives from each; the most that it receives
        for any row; and how many ranks have wrong lists.
    error: what is wrong with this rank's lists.
    """

    listed: Tensor
    asked: Tensor
    counts: Reading
    error: str | None = None

    @classmethod
    def of(cls, told: Tensor, here: Holdings, seq: Sequence, error: str | None) -> BlockPlan:
        """From what all ranks list, uint8 `[P, B · count + 1]`; the last of each says whether its lists are wrong."""
        listed, batch = told[seq.rank], seq.documents.batch
        sends = (told * here.held).sum(1)
        sends[seq.rank].zero_()
        by_block = listed * here.others
        most = _by_row(by_block.sum(0), batch).sum(1).max()
        counts = torch.cat([sends, by_block.sum(1), most.view(1), told[:, -1].sum().view(1)])
        asked = told.index_select(1, here.own)
        asked[seq.rank].zero_()
        return cls(listed, asked, Reading(counts), error)

    def read(self, seq: Sequence) -> tuple[list[int], list[int], int]:
        """How many tokens go to each rank, how many come from each, and the most that come for any row.

        Waits for the device. Raises ValueError on all ranks for wrong lists of any.
        """
        ranks = seq.layout.ranks
        *counts, most, wrong = self.counts.wait().tolist()
        if wrong:
            agree(self.error and f"{self.error} (on sequence rank {seq.rank})", ranks, seq.group)
        return counts[:ranks], counts[ranks:], most


def _by_row(x: Tensor, batch: int) -> Tensor:
    """`[B · count + 1]` as `[B, count]`, without the last, which stands for no block."""
    return x[:-1].view(batch, (len(x) - 1) // batch)


def listed_blocks(blocks: Tensor, count: int) -> Tensor:
    """uint8 `[B, count]`: which blocks lists `[B, L, J, M]` name."""
    ids = blocks.flatten(1).long()
    listed = torch.zeros(blocks.shape[0], count + 1, dtype=torch.uint8, device=blocks.device)
    return listed.scatter_(1, torch.where((ids < 0) | (ids >= count), count, ids), 1)[:, :count]


def bytes_sent(
    sends: int,
    receives: int,
    *,
    blocks: int,
    ranks: int,
    kv_heads: int,
    key_dim: int,
    value_dim: int,
    element_bytes: int = 2,
) -> tuple[int, int]:
    """Bytes that a rank sends (forward, backward): what it lists, then the keys and values of `sends` tokens.

    Backward sends them again, and the gradients of those of the `receives` tokens to their owners, in float32 (float64:
    8 bytes). `blocks` counts those of all rows, B times the most of any row.
    """
    per_token = kv_heads * (key_dim + value_dim)
    keys = sends * per_token * element_bytes
    return (ranks - 1) * (blocks + 1) + keys, keys + receives * per_token * max(4, element_bytes)


class _Keys:
    """Keys of the listed blocks that other ranks hold, under way as one message from each.

    index: which of this rank's `[B · T]` tokens it sends, rank after rank. places: where the tokens that it receives,
    rank after rank, stand in `[B · S]`.
    """

    def __init__(self, own: tuple[Tensor, ...], plan: BlockPlan, here: Holdings, seq: Sequence) -> None:
        self.seq, self.counts, self.shapes = seq, plan.counts, [x.shape[2:] for x in own]
        self.batch, tokens = own[0].shape[:2]
        self.sends, self.receives, self.length = plan.read(seq)
        with self.counts.beside(own[0].device):
            packed = self.pack(own)
            self.index = torch.nonzero_static(plan.asked.flatten(), size=sum(self.sends)).squeeze(1)
            self.index %= self.batch * tokens
            self.places = self._places(plan.listed, here, tokens)
            self._sent = packed.index_select(0, self.index)
            self._received = packed.new_empty(sum(self.receives), packed.shape[1])
            self._works = exchange(
                self._messages(self._sent, self.sends), self._messages(self._received, self.receives), seq
            )

    def _places(self, listed: Tensor, here: Holdings, tokens: int) -> Tensor:
        size = sum(self.receives)
        token = torch.nonzero_static(listed.index_select(0, here.blocks), size=size).squeeze(1)
        block = here.blocks.index_select(0, token)
        held = _by_row(here.others.sum(0), self.batch)
        left_out = left_out_before(held, _by_row(listed, self.batch) > 0)
        place = here.places.index_select(0, token) - left_out.flatten().index_select(0, block)
        return place + token // tokens % self.batch * self.length

    @staticmethod
    def _messages(rows: Tensor, counts: list[int]) -> list[tuple[Tensor, int]]:
        return [(part, peer) for peer, part in enumerate(rows.split(counts)) if len(part)]

    @staticmethod
    def pack(tensors: tuple[Tensor, ...]) -> Tensor:
        """One row per token."""
        return torch.cat([x.flatten(2) for x in tensors], dim=-1).flatten(0, 1)

    def unpack(self, rows: Tensor) -> tuple[Tensor, ...]:
        parts = rows.unflatten(0, (self.batch, -1)).split([shape.numel() for shape in self.shapes], dim=-1)
        return tuple(x.unflatten(-1, shape) for x, shape in zip(parts, self.shapes, strict=True))

    def wait(self) -> tuple[Tensor, ...] | None:
        """The keys asked for, `[B, S, …]` in the order of the row; None if there are none."""
        with self.counts.beside(self.index.device):
            finish(self._works)
        self.counts.join(self._received, self.places, self.index)
        if not self.length:
            return None
        rows = self._received.new_zeros(self.batch * self.length, self._received.shape[1])
        return self.unpack(rows.index_copy_(0, self.places, self._received))

    def send_home(self, dkeys: tuple[Tensor, ...], dreceived: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
        """Sends the gradients of received keys to their owners, and adds those that come back for sent ones."""
        total = self.pack(dkeys)
        back = total.new_empty(len(self.index), total.shape[1])
        away = total.new_empty(0, total.shape[1]) if dreceived is None else self.pack(dreceived)[self.places]
        finish(exchange(self._messages(away, self.receives), self._messages(back, self.sends), self.seq))
        for rows, index in zip(back.split(self.sends), self.index.split(self.sends), strict=True):
            total.index_add_(0, index, rows)  # a rank asks for a token once: indices are distinct
        return self.unpack(total)


class _Asked(NamedTuple):
    """A sequence, and the plan for the lists of its queries; None on one rank."""

    seq: Sequence
    plan: BlockPlan | None


class ListedAttention(SharedAttention):
    """An `Attend` over listed blocks of the whole row; on one rank, over its own tokens.

    An owner adds gradients in the order of ranks: the result is the same at every run. Backward sends again rather than
    keep received keys, by the plan that forward made: it saves which of its tokens each rank asks for, and the counts.
    Lists that are wrong on one rank raise ValueError on all of them.
    """

    op: ListedAttend

    def forward(self, inputs: Tensors, where: Sequence) -> tuple[Tensors, Tensors]:
        named = self.op.record(*inputs)
        self.op.check(named)
        plan = self.ask(named, where)
        outputs, saved = super().forward(inputs, _Asked(where, plan))
        return outputs, saved if plan is None else (*saved, plan.asked, plan.counts.wait())

    def backward(
        self, gradients: Tensors, inputs: Tensors, outputs: tuple[Tensor, ...], saved: Tensors, where: Sequence
    ) -> Tensors:
        plan = None
        if where.layout.ranks > 1:
            asked, counts = present(*saved[-2:])
            plan = BlockPlan(self._told(self.op.record(*inputs), where), asked, Reading(counts))
            saved = saved[:-2]
        return super().backward(gradients, inputs, outputs, saved, _Asked(where, plan))

    def like(self, inputs: Tensors, ranks: int, spans: int) -> tuple[tuple[Tensor, ...], Tensors]:
        outputs, saved = super().like(inputs, ranks, spans)
        if ranks == 1:
            return outputs, saved
        q = self.op.record(*inputs).q
        asked = q.new_empty(ranks, q.shape[0] * q.shape[1], dtype=torch.uint8)
        return outputs, (*saved, asked, torch.empty(2 * ranks + 2, dtype=torch.int64, device="cpu"))

    def over_keys(self, inputs: Any, where: _Asked) -> tuple[Tensor, Tensor] | None:
        seq, plan = where
        own, keys = self.op.sent(inputs), None
        if plan is not None and plan.counts.ready:
            keys = self._keys(own, plan, seq)
        tile = seq.derive(_own_tile, self.op)
        result = None if tile is None else self.op.attend(inputs, own, tile, seq.backend)
        if plan is not None:
            keys = self._keys(own, plan, seq) if keys is None else keys
            received, tile = keys.wait(), self._received_tile(seq, plan)
            if received is not None and tile is not None:
                partial = self.op.attend(inputs, received, tile, seq.backend)
                result = partial if result is None else merge(*result, *partial)
        return result

    def over_keys_backward(
        self, gradient: Gradient, inputs: Any, where: _Asked
    ) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        seq, plan = where
        own = self.op.sent(inputs)
        keys = None if plan is None else self._keys(own, plan, seq)

        stay: dict[str, Tensor] = {}

        def backward(received: tuple[Tensor, ...], tile: Any) -> tuple[Tensor, ...]:
            if tile is None:
                return tuple(torch.zeros_like(x, dtype=gradient.exact) for x in received)
            stay_part, gradients = self.op.attend_backward(gradient, inputs, received, tile, seq.backend)
            self.add_up(stay, stay_part)
            return gradients

        dkeys = backward(own, seq.derive(_own_tile, self.op))
        if plan is not None and keys is not None:
            received = keys.wait()
            dreceived = None if received is None else backward(received, self._received_tile(seq, plan))
            dkeys = keys.send_home(dkeys, dreceived)
        return stay, dkeys

    def ask(self, inputs: Any, seq: Sequence) -> BlockPlan | None:
        """Tells the other ranks which blocks this rank lists, and plans what travels; None on one rank."""
        layout = seq.derive(_layout, self.op)
        error = None
        try:
            self.op.check_lists(inputs, layout, seq.local)
        except ValueError as wrong:
            if seq.layout.ranks == 1:
                raise
            error = str(wrong)
        if seq.layout.ranks == 1:
            return None
        told = Gathering(self._told(inputs, seq, error), seq).wait()
        plan = BlockPlan.of(told, self._holdings(seq, inputs.q.device), seq, error)
        if error is not None:
            plan.read(seq)  # raises, before these lists are used
        return plan

    def _told(self, inputs: Any, seq: Sequence, error: str | None = None) -> Tensor:
        """uint8 `[B · count + 1]`: which blocks this rank lists, then whether its lists are wrong."""
        batch, count = seq.documents.batch, seq.derive(_layout, self.op).count
        told = torch.zeros(batch * count + 1, dtype=torch.uint8, device=inputs.q.device)
        if error is None:
            told[:-1] = listed_blocks(inputs.blocks, count).flatten()
        else:
            told[-1] = 1
        return told

    def _keys(self, own: tuple[Tensor, ...], plan: BlockPlan, seq: Sequence) -> _Keys:
        return _Keys(own, plan, self._holdings(seq, own[0].device), seq)

    def _holdings(self, seq: Sequence, device: torch.device) -> Holdings:
        return seq.on(device, _holdings, self.op)

    def _received_tile(self, seq: Sequence, plan: BlockPlan) -> Any:
        """This rank's queries against the keys that it receives."""
        tile, batch = seq.derive(_others_tile, self.op), seq.documents.batch
        return None if tile is None else self.op.gathered(tile, _by_row(plan.listed, batch) > 0)


def by_blocks(build: Callable[..., ListedAttend], *settings: Any) -> ListedAttention:
    """The op `build(*settings)` over listed blocks; plain values, as `mix` wants them."""
    return ListedAttention(build(*settings))


class ListedAtOnce(ListedAttention):
    """The same for an op whose keys must all be there at once, and are constant: a block that straddles ranks too."""

    def over_keys(self, inputs: Any, where: _Asked) -> tuple[Tensor, Tensor] | None:
        keys, tile = self._all(inputs, where)
        return None if tile is None else self.op.attend(inputs, keys, tile, where.seq.backend)

    def over_keys_backward(
        self, gradient: Gradient, inputs: Any, where: _Asked
    ) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        keys, tile = self._all(inputs, where)
        constant = tuple(torch.zeros_like(x, dtype=gradient.exact) for x in self.op.sent(inputs))
        if tile is None:
            return {}, constant
        return self.op.attend_backward(gradient, inputs, keys, tile, where.seq.backend)[0], constant

    def _all(self, inputs: Any, where: _Asked) -> tuple[tuple[Tensor, ...], Any]:
        """This rank's keys, then those that it receives, and their tile."""
        (seq, plan), own = where, self.op.sent(inputs)
        tile = seq.derive(_own_tile, self.op)
        received = None if plan is None else self._keys(own, plan, seq).wait()
        if plan is None or received is None:
            return own, tile
        tiles = (0, tile), (own[0].shape[1], self._received_tile(seq, plan))
        some = tuple((place, each) for place, each in tiles if each is not None)
        keys = tuple(torch.cat(pair, dim=1) for pair in zip(own, received, strict=True))
        return keys, JoinedTile(some) if some else None


def by_blocks_at_once(build: Callable[..., ListedAttend], *settings: Any) -> ListedAtOnce:
    """The op `build(*settings)` over listed blocks that come at once."""
    return ListedAtOnce(build(*settings))
