"""Windows of documents across ranks: their rows, their means, and the summaries of all of them on every rank.

Windows are those of `kernels.select_blocks.WindowLayout`: complete, `size` tokens from every `stride`-th position of
each document, numbered document by document over the row; blocks are windows whose stride is their size. Every rank
derives from the documents which tokens each window has and which ranks hold them, as a `Combination` of rows, whose
transpose gives the gradient. Every rank gets all summaries, as `[B, N // stride, …]`, zero past the last window
of the row: a shape that does not depend on where documents start.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...kernels.documents import per_token
from ...kernels.masks.pattern import Intervals
from ...kernels.windows import WindowLayout
from ..collectives import Gathering, scatter_sum
from ..decoding_cache import Stretch
from ..layout import Layout
from ..operation import OfOneTensor
from ..sequence import Sequence
from .halo import Halo, last_rows


class Combination(NamedTuple):
    """out_i = Σ_j x[index_ij]: rows of x added up in one order on every device; an index of `rows` adds nothing.

    `index` int64 `[outputs, most]`; `back` is that of the transpose.
    """

    index: Tensor
    rows: int
    back: Tensor

    @classmethod
    def of(cls, index: Tensor, rows: int) -> Combination:
        """The combination by an index on the host."""
        outputs, most = index.shape
        order = index.flatten().argsort(stable=True)
        row = index.flatten()[order]
        row, output = row[row < rows], order[row < rows] // max(most, 1)
        place = torch.arange(len(row)) - torch.searchsorted(row, row)
        back = index.new_full((rows, int(place.max()) + 1 if len(row) else 1), outputs)
        back[row, place] = output
        return cls(index, rows, back)

    def __call__(self, x: Tensor) -> Tensor:
        """`[rows, …]` to `[outputs, …]`."""
        return torch.cat([x, x.new_zeros(1, *x.shape[1:])])[self.index].sum(1)

    @property
    def transpose(self) -> Combination:
        """x_r = Σ of the out_i that row r is part of: what the gradient of this combination is."""
        return Combination(self.back, self.index.shape[0], self.index)


def _plan(seq: Sequence, op: WindowMeans | LocalWindows | GatherWindows) -> Any:
    """Which rows an op combines: what it makes of the documents and the layout."""
    return op.make_plan(seq)


def check_windows(size: int, stride: int) -> None:
    """Raises ValueError unless windows of `size` at every `stride`-th token are made of whole strides."""
    if size < 1 or stride < 1 or size % stride:
        raise ValueError(f"windows must have a size that is a multiple of their stride; got {size} and {stride}")


@dataclass(frozen=True)
class WindowMeans(OfOneTensor):
    """The mean of every window's tokens, `[B, T, …]` of this rank to `[B, N // stride, …]` of the whole row.

    A window is added up from parts: the tokens of one stride of a document that one rank holds. Parts are gathered,
    in float32 (float64), so that a window may lie over any number of ranks and spans. Backward, every rank sends each
    other the gradients of its parts, in one message, and adds those that it receives in the order of ranks.
    """

    size: int
    stride: int

    def apply(self, x: Tensor, seq: Sequence) -> Tensor:
        parts_of, windows_of, parts = seq.on(x.device, _plan, self)
        rows = parts_of(x.to(_exact(x)).flatten(0, 1)).unflatten(0, (x.shape[0], parts))
        gathered = _gather(rows, seq).flatten(0, 2)
        means = windows_of(gathered) / self.size
        return means.to(x.dtype).unflatten(0, (x.shape[0], -1))

    def transpose(self, dout: Tensor, x: Tensor, seq: Sequence) -> Tensor:
        parts_of, windows_of, parts = seq.on(x.device, _plan, self)
        dparts = windows_of.transpose(dout.to(_exact(x)).flatten(0, 1) / self.size)
        dparts = scatter_sum(dparts.unflatten(0, (seq.layout.ranks, x.shape[0] * parts)), seq)
        return parts_of.transpose(dparts).to(x.dtype).view(x.shape)

    def shape(self, x: Tensor, ranks: int, spans: int) -> tuple[int, ...]:
        return (x.shape[0], x.shape[1] * ranks // self.stride, *x.shape[2:])

    def make_plan(self, seq: Sequence) -> tuple[Combination, Combination, int]:
        """This rank's tokens to parts `[B, parts]`, all ranks' parts to windows, and the most parts of any rank."""
        documents, layout, rows = seq.documents, seq.layout, seq.derive(tokens_of_ranks)
        windows, total = _windows_of_tokens(documents.derive(WindowLayout, self.size, self.stride))
        key = torch.stack([documents.ids(), documents.positions() // self.stride], dim=-1)
        local, key = (x[:, rows].transpose(0, 1) for x in (windows, key))  # [P, B, T, …]
        used = (local < total).any(-1)
        starts = used.clone()
        starts[:, :, 1:] &= (key[:, :, 1:] != key[:, :, :-1]).any(-1)  # tokens of one key are used alike
        number = starts.cumsum(2) - 1
        parts, batch = int(number.max()) + 1, documents.batch
        index = torch.full((layout.ranks, batch, parts, windows.shape[-1]), total)
        rank, row, token = starts.nonzero(as_tuple=True)
        index[rank, row, number[rank, row, token]] = local[rank, row, token]
        mine = number[seq.rank] + torch.arange(batch).view(-1, 1) * parts
        flat = torch.where(used[seq.rank], mine, batch * parts)
        to_parts = Combination.of(flat.flatten().unsqueeze(1), batch * parts).transpose
        return to_parts, Combination.of(index.flatten(0, 2), total).transpose, parts


@dataclass(frozen=True)
class LocalWindows(OfOneTensor):
    """The rows of the windows whose last token is on this rank: `[B, T, …]` to `[B, W, size, …]`.

    W = spans · ceil(span length / stride): as many as can end in the spans, span after span; places that are left are
    zero. A window that begins before its span takes those rows from a halo of `size − 1`.
    """

    size: int
    stride: int

    def apply(self, x: Tensor, seq: Sequence) -> Tensor:
        folded = seq.fold(x)
        before = self._before(folded, seq)
        rows = seq.on(x.device, _plan, self)(torch.cat([before, folded], dim=1).flatten(0, 1))
        return rows.view(x.shape[0], -1, self.size, *x.shape[2:])

    def transpose(self, dout: Tensor, x: Tensor, seq: Sequence) -> Tensor:
        folded = seq.fold(x)
        drows = seq.on(x.device, _plan, self).transpose(dout.to(_exact(x)).flatten(0, 2))
        drows = drows.unflatten(0, (folded.shape[0], -1))
        dfolded = drows[:, self.size - 1 :]
        if seq.layout.ranks > 1 and self.size > 1:
            dfolded = dfolded + self._halo.transpose(drows[:, : self.size - 1], folded, seq)
        return seq.unfold(dfolded).to(x.dtype)

    def shape(self, x: Tensor, ranks: int, spans: int) -> tuple[int, ...]:
        spans = spans if ranks > 1 else 1
        windows = spans * _windows_per_span(x.shape[1] // spans, self.stride)
        return (x.shape[0], windows, self.size, *x.shape[2:])

    @property
    def _halo(self) -> Halo:
        return Halo(self.size - 1)

    def _before(self, folded: Tensor, seq: Sequence) -> Tensor:
        if seq.layout.ranks == 1:
            return folded.new_zeros(folded.shape[0], self.size - 1, *folded.shape[2:])
        return self._halo.apply(folded, seq)

    def make_plan(self, seq: Sequence) -> Combination:
        """Of the folded rows, each after its halo."""
        layout, batch = _cut(seq), seq.documents.batch
        length, spans, before = layout.span_length, layout.spans, self.size - 1
        rows, each = before + length, _windows_per_span(length, self.stride)
        index = torch.full((batch, spans, each, self.size), spans * batch * rows)
        starts, owner, place = _owners(seq, self.size, self.stride)
        turn = torch.full((layout.ranks * spans + 1,), -1)
        turn[torch.tensor(layout.spans_of(seq.rank))] = torch.arange(spans)
        row, window = (turn[owner] >= 0).nonzero(as_tuple=True)
        owner, place = owner[row, window], place[row, window]
        first = starts[row, window] - owner * length + before + (turn[owner] * batch + row) * rows
        index[row, turn[owner], place] = first.unsqueeze(1) + torch.arange(self.size)
        return Combination.of(index.view(-1, 1), spans * batch * rows)


@dataclass(frozen=True)
class GatherWindows(OfOneTensor):
    """The summaries of every rank's `LocalWindows`, `[B, W, …]`, to those of the whole row, `[B, N // stride, …]`.

    One all-gather, in the type of the summaries; backward, every rank sends each other the gradients of its windows,
    in one message, and adds those that it receives in the order of ranks, in float32 (float64).

    `length` is N.
    """

    length: int
    size: int
    stride: int

    def apply(self, x: Tensor, seq: Sequence) -> Tensor:
        summaries = seq.on(x.device, _plan, self)(_gather(x, seq).flatten(0, 2))
        return summaries.unflatten(0, (x.shape[0], -1))

    def transpose(self, dout: Tensor, x: Tensor, seq: Sequence) -> Tensor:
        dgathered = seq.on(x.device, _plan, self).transpose(dout.to(_exact(x)).flatten(0, 1))
        return scatter_sum(dgathered.unflatten(0, (seq.layout.ranks, -1)), seq).to(x.dtype).view(x.shape)

    def shape(self, x: Tensor, ranks: int, spans: int) -> tuple[int, ...]:
        return (x.shape[0], self.length // self.stride, *x.shape[2:])

    def make_plan(self, seq: Sequence) -> Combination:
        """From the windows of all ranks to those of the rows."""
        layout, batch = _cut(seq), seq.documents.batch
        each = _windows_per_span(layout.span_length, self.stride)
        places = layout.spans * each
        spans = torch.tensor([layout.spans_of(rank) for rank in range(layout.ranks)])
        first = torch.zeros(spans.numel() + 1, dtype=torch.int64)  # of a span's places, in the first row
        first[spans] = torch.arange(layout.ranks).unsqueeze(1) * batch * places + torch.arange(layout.spans) * each
        index, none = torch.empty(batch, self.length // self.stride, dtype=torch.int64), layout.ranks * batch * places
        _, owner, place = _owners(seq, self.size, self.stride)
        at = first[owner] + torch.arange(batch).unsqueeze(1) * places + place
        index.fill_(none)[:, : at.shape[1]] = torch.where(owner < spans.numel(), at, none)
        return Combination.of(index.view(-1, 1), none)


def tokens_of_ranks(seq: Sequence) -> Tensor:
    """int64 `[P, T]`: indices in the row of the tokens that each rank holds, ascending."""
    layout = seq.layout
    spans = torch.tensor([layout.spans_of(rank) for rank in range(layout.ranks)])
    return (spans.unsqueeze(-1) * layout.span_length + torch.arange(layout.span_length)).flatten(1)


def _cut(seq: Sequence) -> Layout:
    """The layout whose spans are folded: on one rank, whole rows."""
    return seq.layout if seq.layout.ranks > 1 else Layout(seq.layout.length)


def _exact(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def windows_held(seq: Sequence, stride: int) -> int:
    """How many places for windows `LocalWindows` has on this rank, over all rows."""
    layout = _cut(seq)
    return seq.documents.batch * layout.spans * _windows_per_span(layout.span_length, stride)


def _windows_per_span(length: int, stride: int) -> int:
    """The most windows that can end in `length` tokens: their last tokens are a stride apart, across documents too."""
    return -(-length // stride)


def _windows_of_tokens(layout: WindowLayout) -> tuple[Tensor, int]:
    """int64 `[B, N, size / stride]`: the windows that hold each token, numbered over `[B, N // stride]`.

    And how many numbers there are, which stands for no window.
    """
    documents, stride = layout.documents, layout.stride
    each, first_of_run = layout.stretches
    first = per_token(documents, first_of_run + documents.columns.row * (documents.length // stride))
    count = per_token(documents, each)
    total = documents.batch * (documents.length // stride)
    window = (documents.positions().long() // stride).unsqueeze(-1) - torch.arange(layout.size // stride)
    inside = (window >= 0) & (window < count.unsqueeze(-1))
    return torch.where(inside, window + first.unsqueeze(-1), total), total


def _owners(seq: Sequence, size: int, stride: int) -> tuple[Tensor, Tensor, Tensor]:
    """For each window of the rows, `[B, windows]`: its first token, the span that holds its last, its number there.

    Where a row has no window any more, the span is the number of spans.
    """
    table, layout = seq.documents.derive(WindowLayout, size, stride).table().long(), _cut(seq)
    exists, starts = table[..., 0] >= 0, table[..., 2]
    last = (starts + size - 1) // layout.span_length
    owner = torch.where(exists, last, layout.ranks * layout.spans).contiguous()
    place = torch.arange(owner.shape[1]) - torch.searchsorted(owner, owner)
    return starts, owner, place


def _gather(x: Tensor, seq: Sequence) -> Tensor:
    """`[…]` of every rank, in the order of ranks: `[P, …]`."""
    return x.unsqueeze(0) if seq.layout.ranks == 1 else Gathering(x, seq).wait()


def windows_decoded(x: Tensor, seq: Sequence, size: int, stride: int, slot: str) -> Tensor:
    """The windows that these tokens of one document per row complete, `[B, most new of any row, size, …]`.

    The cache, on every rank alike, keeps what later windows begin with. Places that a row leaves over hold any rows.
    """
    assert seq.cache is not None
    rows, columns = seq.cache.rows_of(seq.layer, slot), seq.cache.columns
    (memory,), stretches = rows.append((x,), columns.room(_all_but_one(size)), ((columns.length, x.shape[1]),))
    rows.keep(seq.derive(_columns_to_come, size, stride))
    if not seq.derive(_most_new, size, stride):
        return memory.new_zeros(memory.shape[0], 0, size, *memory.shape[2:])
    index = seq.on(x.device, _rows_of_windows, stretches, size, stride)
    batch = torch.arange(len(memory), device=x.device).unsqueeze(1)
    return memory[batch, index.expand(len(memory), -1)].unflatten(1, (-1, size))


def keep_last_rows(x: Tensor, seq: Sequence, size: int, stride: int, slot: str) -> None:
    """Keeps on every rank what later windows begin with, of the tokens of all ranks."""
    assert seq.cache is not None
    width = min(size - 1, seq.layout.length)
    last = last_rows(seq.fold(x), seq, width)
    rows, room = seq.cache.rows_of(seq.layer, slot), seq.cache.columns.room(_all_but_one(size))
    rows.append((last,), room, ((seq.layout.length - width, width),))
    rows.keep(seq.derive(_columns_to_come, size, stride))


def summaries_decoded(x: Tensor, seq: Sequence, size: int, stride: int, slot: str) -> Tensor:
    """The summaries of all windows so far, from those of the new ones and the cache; it is the same on every rank."""
    assert seq.cache is not None
    most = seq.cache.columns.most
    room = None if most is None else max(1, (most - size) // stride + 1)
    return seq.cache.rows_of(seq.layer, slot).fill(x, seq.derive(_windows_counted, size, stride), room)


def _windows_counted(seq: Sequence, size: int, stride: int) -> list[tuple[int, int]]:
    """How many complete windows each row has before the new tokens, and after them."""
    assert seq.cache is not None
    columns = seq.cache.columns
    ends = columns.before(columns.length), columns.before(columns.length + seq.layout.length)
    done, count = ([max(0, (tokens - size) // stride + 1) for tokens in each] for each in ends)
    return list(zip(done, count, strict=True))


def _most_new(seq: Sequence, size: int, stride: int) -> int:
    return max(count - done for done, count in seq.derive(_windows_counted, size, stride))


def _columns_to_come(seq: Sequence, size: int, stride: int) -> Intervals:
    """The columns of which some row has later windows."""
    assert seq.cache is not None
    columns = seq.cache.columns
    stop, counts = columns.length + seq.layout.length, seq.derive(_windows_counted, size, stride)
    begins = [start + count * stride for start, (_, count) in zip(columns.starts or [0], counts, strict=True)]
    return [(min(begins), stop)]


def _rows_of_windows(seq: Sequence, stretches: tuple[Stretch, ...], size: int, stride: int) -> Tensor:
    """int64 `[B or 1, new * size]`: where in memory the tokens of the windows stand that the new ones complete."""
    assert seq.cache is not None
    columns = seq.cache.columns
    held = [part for part in stretches if part.column >= 0]
    first, stop = min(part.column for part in held), columns.length + seq.layout.length
    place = torch.zeros(stop - first, dtype=torch.int64)
    for start, length, column in held:
        place[column - first : column - first + length] = torch.arange(start, start + length)
    new = torch.arange(seq.derive(_most_new, size, stride)).unsqueeze(1) * stride + torch.arange(size)
    counts = seq.derive(_windows_counted, size, stride)
    begins = [start + done * stride for start, (done, _) in zip(columns.starts or [0], counts, strict=True)]
    return place[(torch.tensor(begins).view(-1, 1) + new.flatten() - first).clamp(0, stop - first - 1)]


def _all_but_one(size: int) -> Callable[[int, int], int]:
    return lambda columns, beginnings: size - 1
