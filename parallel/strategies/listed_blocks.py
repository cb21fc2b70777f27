"""Block-sparse attention across ranks: every rank is sent the blocks that its queries list, and nothing else.

The lists of blocks are known to the rank that has the queries. One small all-gather tells every rank which blocks the
others ask for; as all know the documents, all know then which tokens travel between which ranks. Listed blocks held
here are attended while the others are under way, and both parts merged by log-sum-exp: a block that straddles ranks is
attended by parts. Gradients of keys and values go back to their owners the same way.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.block_sparse import BlockLayout, BlockTile, attend, attend_backward, check_blocks, merge
from ...kernels.documents import PADDING, Documents, Run
from ...kernels.mask import Mask
from ...kernels.operation import Tensors
from ...kernels.select_blocks import Rule, select_blocks
from ..collectives import Gathering, agree, exchange, finish
from ..operation import Operation, present
from ..sequence import Sequence
from .attention import attention_like, exact_result, rounded_once
from .windows import rows_of


@dataclass(frozen=True)
class BlockPlan:
    """Which keys travel, given the blocks that every rank lists: the same on all ranks, so that nobody waits in vain.

    sends[a]: indices into the `[B · T]` tokens held here of those that rank a asks for, in order; none of its own.
    receives[o]: where the tokens of rank o stand in the `[B · S]` received, in the order in which o sends them.
    keys: the documents of the received tokens, which stand in the order of the row.
    """

    sends: tuple[Tensor, ...]
    receives: tuple[Tensor, ...]
    keys: Documents

    @classmethod
    def of(cls, listed: Tensor, layout: BlockLayout, seq: Sequence) -> BlockPlan:
        """From bool `[P, B, blocks]` on the host: what the queries of each rank list."""
        ranks, rank = seq.layout.ranks, seq.rank
        ids = seq.derive(("block ids", layout.block_size), lambda: layout.ids(layout.documents).long())
        held = [seq.derive(("rows", peer), lambda peer=peer: rows_of(seq, peer)) for peer in range(ranks)]
        nothing = torch.empty(0, dtype=torch.int64)
        sends = [
            nothing if peer == rank else _asked(listed[peer], ids[:, held[rank]]).flatten().nonzero().squeeze(1)
            for peer in range(ranks)
        ]
        asked = _asked(listed[rank], ids)
        asked[:, held[rank]] = False
        place = asked.cumsum(1) - 1
        most = int(asked.sum(1).max())
        place = place + torch.arange(len(place)).unsqueeze(1) * most
        receives = [place[:, held[peer]][asked[:, held[peer]]] for peer in range(ranks)]
        return cls(tuple(sends), tuple(receives), _documents_of(asked, layout.documents, most))

    def to(self, device: torch.device) -> BlockPlan:
        sends, receives = (tuple(index.to(device) for index in each) for each in (self.sends, self.receives))
        return BlockPlan(sends, receives, self.keys)


def _asked(listed: Tensor, ids: Tensor) -> Tensor:
    """bool `[B, T]`: which tokens, of blocks `ids`, are in the blocks `[B, blocks]` listed; padding is in none."""
    return torch.nn.functional.pad(listed, (0, 1)).gather(1, torch.where(ids < 0, listed.shape[1], ids))


def _documents_of(asked: Tensor, documents: Documents, length: int) -> Documents:
    """The documents of the tokens asked for, `[B, N]`, of each row, moved together and padded to `length`."""
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
    return Documents(tuple(rows), length)


def listed_blocks(blocks: Tensor, count: int) -> Tensor:
    """bool `[B, count]`: which blocks lists `[B, L, J, M]` name."""
    ids = blocks.flatten(1).long()
    listed = torch.zeros(blocks.shape[0], count + 1, dtype=torch.bool, device=blocks.device)
    return listed.scatter_(1, torch.where((ids < 0) | (ids >= count), count, ids), True)[:, :count]


def bytes_sent(
    plan: BlockPlan, *, blocks: int, ranks: int, kv_heads: int, key_dim: int, value_dim: int, element_bytes: int = 2
) -> tuple[int, int]:
    """Bytes that a rank sends (forward, backward): what it lists, then the keys and values that others ask it for.

    Backward sends them again, and to their owners the float32 gradients of those received (float64: of 8 bytes).
    `blocks` counts those of all rows, B times the most of any row.
    """
    a_token = kv_heads * (key_dim + value_dim)
    forward = (ranks - 1) * (blocks + 1) + sum(map(len, plan.sends)) * a_token * element_bytes
    return forward, forward + sum(map(len, plan.receives)) * a_token * max(4, element_bytes)


class _Keys:
    """Keys and values of the listed blocks that other ranks hold, under way as one message from each."""

    def __init__(self, k: Tensor, v: Tensor, plan: BlockPlan, seq: Sequence) -> None:
        self.plan, self.shapes = plan, (k.shape[2:], v.shape[2:])
        self.batch = k.shape[0]
        packed = self.pack(k, v)
        self.sends = [(packed[index], peer) for peer, index in enumerate(plan.sends) if len(index)]
        self.receives = [
            (packed.new_empty(len(index), packed.shape[1]), peer)
            for peer, index in enumerate(plan.receives)
            if len(index)
        ]
        self.works = exchange(self.sends, self.receives, seq)

    @staticmethod
    def pack(k: Tensor, v: Tensor) -> Tensor:
        """A row a token."""
        return torch.cat([k.flatten(2), v.flatten(2)], dim=-1).flatten(0, 1)

    def unpack(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        k, v = rows.unflatten(0, (self.batch, -1)).split([shape.numel() for shape in self.shapes], dim=-1)
        return k.unflatten(-1, self.shapes[0]), v.unflatten(-1, self.shapes[1])

    def wait(self) -> tuple[Tensor, Tensor] | None:
        """k `[B, S, G, K]` and v `[B, S, G, V]` of what was asked for, in the order of the row; None where nothing."""
        finish(self.works)
        if not self.receives:
            return None
        like = self.receives[0][0]
        rows = like.new_zeros(self.batch * self.plan.keys.length, like.shape[1])
        for message, peer in self.receives:
            rows[self.plan.receives[peer]] = message
        return self.unpack(rows)


@dataclass(frozen=True)
class BlockSparseAttention(Operation):
    """softmax(scale q kᵀ + mask) v over the listed blocks of the whole row; on one rank, the kernel.

    Keys and values travel in their own type, which loses nothing; partial results and gradients are float32 (float64),
    and an owner adds the gradients in the order of ranks: the result is the same at every run. Backward asks and sends
    again rather than keep what it was sent. Lists that are wrong on one rank raise ValueError on all of them.

    An `Operation`; its inputs are (q, k, v, blocks). It saves the output in float32, where it is not already, and the
    log-sum-exp.
    """

    block_size: int
    query_block: int
    causal: bool
    window: int | None
    sink_tokens: int
    scale: float

    def forward(self, inputs: Tensors, seq: Sequence) -> tuple[Tensors, Tensors]:
        q, k, v, blocks = present(*inputs)
        plan = self.ask(q, k, blocks, seq)
        keys = None if plan is None else _Keys(k, v, plan, seq)
        settings = {"scale": self.scale, "backend": seq.backend}
        out, lse = attend(q, k, v, blocks, tile=self._tile(seq), **settings)
        received = None if keys is None else keys.wait()
        if plan is not None and received is not None:
            out, lse = merge(out, lse, *attend(q, *received, blocks, tile=self._tile(seq, plan.keys), **settings))
        return rounded_once(out, lse, q.dtype)

    def backward(
        self, gradients: Tensors, inputs: Tensors, outputs: tuple[Tensor, ...], saved: Tensors, seq: Sequence
    ) -> Tensors:
        q, k, v, blocks = present(*inputs)
        out, lse = exact_result(outputs, saved)
        (dout,) = present(*gradients)
        dout = dout.to(out.dtype)
        settings = {"scale": self.scale, "backend": seq.backend}
        plan = self.ask(q, k, blocks, seq)
        keys = None if plan is None else _Keys(k, v, plan, seq)
        dq, dk, dv = attend_backward(dout, q, k, v, out, lse, blocks, tile=self._tile(seq), **settings)
        if plan is not None and keys is not None:
            received, dkeys = keys.wait(), None
            if received is not None:
                tile = self._tile(seq, plan.keys)
                dq_part, *dkeys = attend_backward(dout, q, *received, out, lse, blocks, tile=tile, **settings)
                dq = dq + dq_part
            dk, dv = _send_home(dk, dv, dkeys, keys, seq)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None

    def like(self, inputs: Tensors, ranks: int, spans: int) -> tuple[tuple[Tensor, ...], Tensors]:
        q, _, v, _ = present(*inputs)
        return attention_like(q, v)

    def ask(self, q: Tensor, k: Tensor, blocks: Tensor, seq: Sequence) -> BlockPlan | None:
        """Tells the other ranks which blocks are listed here, and plans what travels; None on one rank."""
        layout = self._layout(seq)
        tile = BlockTile(layout, seq.local, seq.local, self._mask, self.query_block)
        error = None
        try:
            check_blocks(blocks, tile, heads=q.shape[2], kv_heads=k.shape[2])
        except ValueError as wrong:
            if seq.layout.ranks == 1:
                raise
            error = str(wrong)
        if seq.layout.ranks == 1:
            return None
        batch = seq.documents.batch
        message = torch.zeros(batch * layout.count + 1, dtype=torch.uint8, device=q.device)
        if error is None:
            message[:-1] = listed_blocks(blocks, layout.count).flatten()
        else:
            message[-1] = 1
        told = Gathering(message, seq).wait().cpu()
        if told[:, -1].any():
            agree(error and f"{error} (on sequence rank {seq.rank})", seq.layout.ranks, seq.group)
        return BlockPlan.of(told[:, :-1].bool().unflatten(1, (batch, -1)), layout, seq).to(q.device)

    @property
    def _mask(self) -> Mask:
        return Mask(self.causal, self.window, self.sink_tokens)

    def _layout(self, seq: Sequence) -> BlockLayout:
        return seq.derive(("blocks", self.block_size), lambda: BlockLayout(seq.documents, self.block_size))

    def _tile(self, seq: Sequence, keys: Documents | None = None) -> BlockTile | None:
        """This rank's queries against the keys that it holds, or against those that it was sent."""

        def make() -> BlockTile | None:
            held = seq.local if keys is None else keys
            return BlockTile.of(self._layout(seq), seq.local, held, mask=self._mask, query_block=self.query_block)

        return (
            seq.derive(("block tile", self.block_size, self._mask, self.query_block), make) if keys is None else make()
        )


def _send_home(dk: Tensor, dv: Tensor, dkeys: list[Tensor] | None, keys: _Keys, seq: Sequence) -> tuple[Tensor, Tensor]:
    """Sends the gradients of received keys to their owners, and adds what comes back for those sent."""
    total, plan, sends = keys.pack(dk, dv), keys.plan, []
    if dkeys is not None:
        packed = keys.pack(*dkeys)
        sends = [(packed[index], peer) for peer, index in enumerate(plan.receives) if len(index)]
    receives = [
        (total.new_empty(len(index), total.shape[1]), peer) for peer, index in enumerate(plan.sends) if len(index)
    ]
    finish(exchange(sends, receives, seq))
    for message, peer in receives:
        total[plan.sends[peer]] += message  # a token is asked for once a rank: indices are distinct
    return keys.unpack(total)


@dataclass(frozen=True)
class BlockSelection(Operation):
    """The blocks that each query held here lists, among those of the whole row: `[B, T, J, count]`, no gradient.

    Sends nothing: summaries are of all windows. An `Operation`, so that graphs hold no document and a recomputation
    takes the lists of the first time; its inputs are (q, summaries, lse or None).
    """

    scale: float
    rule: Rule

    def forward(self, inputs: Tensors, seq: Sequence) -> tuple[Tensors, Tensors]:
        q, summaries, lse = inputs
        assert q is not None
        assert summaries is not None
        lists = select_blocks(
            q, summaries, rule=self.rule, documents=seq.local, row_documents=seq.documents, scale=self.scale, lse=lse,
            backend=seq.backend,
        )  # fmt: skip
        return (lists,), ()

    def backward(
        self, gradients: Tensors, inputs: Tensors, outputs: tuple[Tensor, ...], saved: Tensors, seq: Sequence
    ) -> Tensors:
        return (None,) * len(inputs)

    def like(self, inputs: Tensors, ranks: int, spans: int) -> tuple[tuple[Tensor, ...], Tensors]:
        q, summaries, _ = inputs
        assert q is not None
        assert summaries is not None
        heads = summaries.shape[2] if self.rule.pooled else q.shape[2]
        return (q.new_empty(*q.shape[:2], heads, self.rule.count, dtype=torch.int32),), ()
