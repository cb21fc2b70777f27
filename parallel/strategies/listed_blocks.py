"""Block-sparse attention across ranks: every rank is sent only the blocks that its queries list.

At first only the rank with the queries knows which blocks they list. One small all-gather tells every rank which blocks
the others list; since all know the documents, all then know which tokens travel between which ranks. A rank attends to
its own listed blocks while the others are under way, and both parts merge by log-sum-exp: a block that straddles ranks
is attended to in parts. Gradients of keys and values go back to their owners the same way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...kernels.attend import Gradient, ListedAttend, merge
from ...kernels.blocks import BlockLayout
from ...kernels.documents import PADDING, Documents, Run
from ..collectives import Gathering, agree, exchange, finish
from ..sequence import Sequence
from .attention import SharedAttention
from .windows import rows_of


@dataclass(frozen=True)
class BlockPlan:
    """Which keys travel for the blocks that ranks list: all ranks have the same plan, so that each receives what is
    sent.

    sends[a]: indices into this rank's `[B · T]` tokens of those that rank a asks for, in order; none for itself.
    receives[o]: the places of rank o's tokens in the `[B · S]` received, in the order in which o sends them.
    keys: the documents of the received tokens, which stand in the order of the row.
    """

    sends: tuple[Tensor, ...]
    receives: tuple[Tensor, ...]
    keys: Documents

    @classmethod
    def of(cls, listed: Tensor, layout: BlockLayout, seq: Sequence) -> BlockPlan:
        """From bool `[P, B, blocks]` on the host: what the queries of each rank list."""
        ranks, rank = seq.layout.ranks, seq.rank
        ids = layout.derive(_block_ids)
        rows = [seq.derive(rows_of, peer) for peer in range(ranks)]
        no_tokens = torch.empty(0, dtype=torch.int64)
        sends = [
            no_tokens if peer == rank else _asked(listed[peer], ids[:, rows[rank]]).flatten().nonzero().squeeze(1)
            for peer in range(ranks)
        ]
        asked = _asked(listed[rank], ids)
        asked[:, rows[rank]] = False
        place = asked.cumsum(1) - 1
        most = int(asked.sum(1).max())
        place = place + torch.arange(len(place)).unsqueeze(1) * most
        receives = [place[:, rows[peer]][asked[:, rows[peer]]] for peer in range(ranks)]
        return cls(tuple(sends), tuple(receives), _documents_of(asked, layout.documents, most))

    def to(self, device: torch.device) -> BlockPlan:
        sends, receives = (tuple(index.to(device) for index in each) for each in (self.sends, self.receives))
        return BlockPlan(sends, receives, self.keys)


def _layout_of(seq: Sequence, op: ListedAttend) -> BlockLayout:
    return op.layout(seq.documents)


def _own_tile(seq: Sequence, op: ListedAttend) -> Any:
    return op.tile(seq.local, seq.local, seq.derive(_layout_of, op))


def _block_ids(layout: BlockLayout) -> Tensor:
    return layout.ids(layout.documents).long()


def _asked(listed: Tensor, ids: Tensor) -> Tensor:
    """bool `[B, T]`: which tokens, of blocks `ids`, are in the blocks `[B, blocks]` listed; padding is in none."""
    return torch.nn.functional.pad(listed, (0, 1)).gather(1, torch.where(ids < 0, listed.shape[1], ids))


def _documents_of(asked: Tensor, documents: Documents, length: int) -> Documents:
    """The documents of the tokens asked for, `[B, N]`, with those of each row moved together and padded to `length`."""
    ids, positions, rows = documents.ids(), documents.positions(), []
    for row, chosen in enumerate(asked):
        at = chosen.nonzero().squeeze(1)
        document, position = ids[row, at], positions[row, at]
        begins = torch.ones(len(at), dtype=torch.bool)
        begins[1:] = (document[1:] != document[:-1]) | (position[1:] != position[:-1] + 1)
        starts = begins.nonzero().squeeze(1)
        lengths = torch.diff(starts, append=torch.tensor([len(at)]))
        columns = torch.stack([document[starts], starts, lengths, position[starts]], dim=1)
        runs = [Run(*numbers) for numbers in columns.tolist()]
        if len(at) < length:
            runs.append(Run(PADDING, len(at), length - len(at), 0))
        rows.append(tuple(runs))
    return Documents.of_runs(rows, length)


def listed_blocks(blocks: Tensor, count: int) -> Tensor:
    """bool `[B, count]`: which blocks lists `[B, L, J, M]` name."""
    ids = blocks.flatten(1).long()
    listed = torch.zeros(blocks.shape[0], count + 1, dtype=torch.bool, device=blocks.device)
    return listed.scatter_(1, torch.where((ids < 0) | (ids >= count), count, ids), True)[:, :count]


def bytes_sent(
    plan: BlockPlan, *, blocks: int, ranks: int, kv_heads: int, key_dim: int, value_dim: int, element_bytes: int = 2
) -> tuple[int, int]:
    """Bytes that a rank sends (forward, backward): what it lists, then the keys and values that others ask for.

    Backward sends them again, and the gradients of received ones to their owners, in float32 (float64: 8 bytes).
    `blocks` counts those of all rows, B times the most of any row.
    """
    per_token = kv_heads * (key_dim + value_dim)
    forward = (ranks - 1) * (blocks + 1) + sum(map(len, plan.sends)) * per_token * element_bytes
    return forward, forward + sum(map(len, plan.receives)) * per_token * max(4, element_bytes)


class _Keys:
    """Keys of the listed blocks that other ranks hold, under way as one message from each."""

    def __init__(self, own: tuple[Tensor, ...], plan: BlockPlan, seq: Sequence) -> None:
        self.plan, self.shapes = plan, [x.shape[2:] for x in own]
        self.batch = own[0].shape[0]
        packed = self.pack(own)
        self.sends = [(packed[index], peer) for peer, index in enumerate(plan.sends) if len(index)]
        self.receives = [
            (packed.new_empty(len(index), packed.shape[1]), peer)
            for peer, index in enumerate(plan.receives)
            if len(index)
        ]
        self.works = exchange(self.sends, self.receives, seq)

    @staticmethod
    def pack(tensors: tuple[Tensor, ...]) -> Tensor:
        """One row per token."""
        return torch.cat([x.flatten(2) for x in tensors], dim=-1).flatten(0, 1)

    def unpack(self, rows: Tensor) -> tuple[Tensor, ...]:
        parts = rows.unflatten(0, (self.batch, -1)).split([shape.numel() for shape in self.shapes], dim=-1)
        return tuple(x.unflatten(-1, shape) for x, shape in zip(parts, self.shapes, strict=True))

    def wait(self) -> tuple[Tensor, ...] | None:
        """The keys asked for, `[B, S, …]` in the order of the row; None if there are none."""
        finish(self.works)
        if not self.receives:
            return None
        first = self.receives[0][0]
        rows = first.new_zeros(self.batch * self.plan.keys.length, first.shape[1])
        for message, peer in self.receives:
            rows[self.plan.receives[peer]] = message
        return self.unpack(rows)


class ListedAttention(SharedAttention):
    """An `Attend` over listed blocks of the whole row; on one rank, over its own tokens.

    An owner adds gradients in the order of ranks: the result is the same at every run. Backward asks and sends again
    rather than keep received keys. Lists that are wrong on one rank raise ValueError on all of them.
    """

    op: ListedAttend

    def over_keys(self, inputs: Any, where: Sequence) -> tuple[Tensor, Tensor] | None:
        seq, own = where, self.op.sent(inputs)
        plan = self.ask(inputs, seq)
        keys = None if plan is None else _Keys(own, plan, seq)
        tile = self._tile(seq)
        result = None if tile is None else self.op.attend(inputs, own, tile, seq.backend)
        received = None if keys is None else keys.wait()
        if plan is not None and received is not None:
            tile = self._tile(seq, plan.keys)
            if tile is not None:
                partial = self.op.attend(inputs, received, tile, seq.backend)
                result = partial if result is None else merge(*result, *partial)
        return result

    def over_keys_backward(
        self, gradient: Gradient, inputs: Any, where: Sequence
    ) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        seq, own = where, self.op.sent(inputs)
        plan = self.ask(inputs, seq)
        keys = None if plan is None else _Keys(own, plan, seq)

        stay: dict[str, Tensor] = {}

        def backward(received: tuple[Tensor, ...], tile: Any) -> tuple[Tensor, ...]:
            if tile is None:
                return tuple(torch.zeros_like(x, dtype=gradient.exact) for x in received)
            stay_part, gradients = self.op.attend_backward(gradient, inputs, received, tile, seq.backend)
            self.add_up(stay, stay_part)
            return gradients

        dkeys = backward(own, self._tile(seq))
        if plan is not None and keys is not None:
            received, dreceived = keys.wait(), None
            if received is not None:
                dreceived = backward(received, self._tile(seq, plan.keys))
            dkeys = _send_home(dkeys, dreceived, keys, seq)
        return stay, dkeys

    def ask(self, inputs: Any, seq: Sequence) -> BlockPlan | None:
        """Tells the other ranks which blocks this rank lists, and plans what travels; None on one rank."""
        layout = self._layout(seq)
        error = None
        try:
            self.op.check_lists(inputs, layout, seq.local)
        except ValueError as wrong:
            if seq.layout.ranks == 1:
                raise
            error = str(wrong)
        if seq.layout.ranks == 1:
            return None
        batch = seq.documents.batch
        message = torch.zeros(batch * layout.count + 1, dtype=torch.uint8, device=inputs.q.device)
        if error is None:
            message[:-1] = listed_blocks(inputs.blocks, layout.count).flatten()
        else:
            message[-1] = 1
        told = Gathering(message, seq).wait().cpu()
        if told[:, -1].any():
            agree(error and f"{error} (on sequence rank {seq.rank})", seq.layout.ranks, seq.group)
        return BlockPlan.of(told[:, :-1].bool().unflatten(1, (batch, -1)), layout, seq).to(inputs.q.device)

    def _layout(self, seq: Sequence) -> BlockLayout:
        return seq.derive(_layout_of, self.op)

    def _tile(self, seq: Sequence, keys: Documents | None = None) -> Any:
        """This rank's queries against its own keys, or against received ones."""
        if keys is not None:
            return self.op.tile(seq.local, keys, self._layout(seq))
        return seq.derive(_own_tile, self.op)


def _send_home(
    dkeys: tuple[Tensor, ...], dreceived: tuple[Tensor, ...] | None, keys: _Keys, seq: Sequence
) -> tuple[Tensor, ...]:
    """Sends the gradients of received keys to their owners, and adds the gradients that come back for sent ones."""
    total, plan, sends = keys.pack(dkeys), keys.plan, []
    if dreceived is not None:
        packed = keys.pack(dreceived)
        sends = [(packed[index], peer) for peer, index in enumerate(plan.receives) if len(index)]
    receives = [
        (total.new_empty(len(index), total.shape[1]), peer) for peer, index in enumerate(plan.sends) if len(index)
    ]
    finish(exchange(sends, receives, seq))
    for message, peer in receives:
        total[plan.sends[peer]] += message  # a rank asks for a token once: indices are distinct
    return keys.unpack(total)


def by_blocks(build: Callable[..., ListedAttend], *settings: Any) -> ListedAttention:
    """The op `build(*settings)` over listed blocks; plain values, as `mix` wants them."""
    return ListedAttention(build(*settings))
