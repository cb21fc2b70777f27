"""The short convolution in slabs of tokens, with a hand-written backward that recomputes the activation's input.

Rows are first laid out so that no tap needs to know of documents: every run of tokens has W − 1 rows before it, zeros
at a document's start, or the earlier rows. One run per row needs no rearrangement, and one that begins its document
none of the rows before it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dispatch import starts
from ..documents import Documents
from ..operation import Function

SLAB = 1 << 18  # numbers in flight: what keeps a slab within a core's caches


def short_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, documents: Documents, history: Tensor, activation: str | None
) -> Tensor:
    """See the package's `short_conv`; `history` is always a tensor, zero where there is none."""
    width = history.shape[1]
    if _is_plain(documents) and not history.requires_grad and documents.derive(_none_reaches, width):
        return _Convolve.call(x, weight, bias, activation, width)
    rows = torch.cat([_valid(history, documents), x], dim=1)
    if _is_plain(documents):
        return _Convolve.call(rows, weight, bias, activation, 0)
    rows = torch.cat([x.new_zeros(1, x.shape[2]), rows.flatten(0, 1)])
    source, where = documents.on(x.device, _layout, weight.shape[1] - 1)
    out = _Convolve.call(rows.index_select(0, source)[None], weight, bias, activation, 0)
    return _without_padding(out[0].index_select(0, where).view_as(x), documents)


def token_shift(x: Tensor, documents: Documents, history: Tensor) -> Tensor:
    """See the package's `token_shift`."""
    earlier = torch.cat([_valid(history, documents), x[:, :-1]], dim=1)
    if _is_plain(documents):
        return earlier
    return earlier.masked_fill(documents.positions(x.device)[..., None] == 0, 0.0)


def _is_plain(documents: Documents) -> bool:
    """Whether every row is one document, without padding."""
    return documents.is_whole and not documents.has_padding


def _without_padding(out: Tensor, documents: Documents) -> Tensor:
    if not documents.has_padding:
        return out
    return out.masked_fill(documents.ids(out.device)[..., None] < 0, 0.0)


def _valid(history: Tensor, documents: Documents) -> Tensor:
    """Zeroes the history rows that a row's first document does not reach back to."""
    width = history.shape[1]
    if documents.derive(_all_reach, width):
        return history
    return torch.where(documents.on(history.device, _reached, width)[..., None], history, 0.0)


def _reached(documents: Documents, width: int) -> Tensor:
    """bool `[B, W − 1]`: the rows of the history that the first document of each row reaches back to."""
    first = documents.columns.at(documents.columns.start == 0)
    reach = torch.where(first.real, first.position, 0)
    return torch.arange(width, 0, -1) <= reach[:, None]


def _all_reach(documents: Documents, width: int) -> bool:
    return bool(_reached(documents, width).all())


def _none_reaches(documents: Documents, width: int) -> bool:
    return not bool(_reached(documents, width).any())


def _layout(documents: Documents, width: int) -> tuple[Tensor, Tensor]:
    """Where the rows of the laid-out sequence come from (0 = zeros), and where in its output each token lies.

    Padding is not laid out; its tokens point at any output.
    """
    number, _, start, length, _ = documents.columns.at(documents.columns.real)
    where = torch.zeros(documents.batch * documents.length, dtype=torch.int64)
    if not len(length):
        return torch.zeros(width + 1, dtype=torch.int64), where
    sizes = width + length
    offset = sizes.cumsum(0) - sizes
    run = torch.repeat_interleave(sizes)
    place = torch.arange(len(run)) - offset[run] - width  # in the run, negative in the rows before it
    first = 1 + number * (width + documents.length) + width + start
    source = torch.where((place < 0) & (start[run] > 0), 0, first[run] + place)
    own = place >= 0
    token = (number * documents.length + start)[run] + place
    where[token[own]] = (offset[run] + place)[own]
    return source, where


class _Convolve(Function):
    """out_t = activation(Σ_i weight_i rows_{t+i−before} + bias) for rows `[B, T + W − 1 − before, D]`.

    before: how many rows of 0 come before them, 0 or W − 1.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, before: int
    ) -> Tensor:
        ctx.save_for_backward(rows, weight, bias)
        ctx.activation, ctx.before = activation, before
        taps = _taps(rows, weight)
        length = rows.shape[1] + before - len(taps) + 1
        out = torch.empty(rows.shape[0], length, rows.shape[2], dtype=rows.dtype, device=rows.device)
        slab = _slab(rows)
        for start in starts(length, slab, rows.device):
            part = out[:, start : start + slab]
            summed = _convolve(_window(rows, taps, start - before, part.shape[1]), taps, bias)
            if activation == "silu" and part.dtype == summed.dtype:
                torch.ops.aten.silu.out(summed, out=part)
            else:
                part.copy_(torch.nn.functional.silu(summed) if activation == "silu" else summed)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        rows, weight, bias = ctx.saved_tensors
        taps, before = _taps(rows, weight), ctx.before
        (batch, length, dim), slab = dout.shape, max(1, _slab(rows) // 2)  # of twice as many tensors
        drows, last = taps.new_empty(batch, before + rows.shape[1], dim), len(taps) - 1
        drows[:, :last].zero_()
        # Of the tokens of all slabs at one place in them, and of all these at last: a pass less than sums of slabs.
        dtaps = taps.new_zeros(len(taps), batch, min(slab, length), dim)
        dbias = taps.new_zeros(dim)
        for start in starts(length, slab, rows.device):
            dsum = dout[:, start : start + slab].to(taps.dtype)
            size = dsum.shape[1]
            near = _window(rows, taps, start - before, size)
            if ctx.activation == "silu":
                dsum = torch.ops.aten.silu_backward(dsum, _convolve(near, taps, bias))
            torch.mul(dsum, taps[last], out=drows[:, start + last : start + last + size])  # the first to come there
            for tap, factor in enumerate(taps):
                if tap < last:
                    drows[:, start + tap : start + tap + size].addcmul_(dsum, factor)
                dtaps[tap, :, :size].addcmul_(dsum, near[:, tap : tap + size])
            if bias is not None:
                dbias += dsum.sum((0, 1))
        return (
            drows[:, before:].to(rows.dtype),
            dtaps.sum((1, 2)).T.to(weight.dtype),
            None if bias is None else dbias.to(bias.dtype),
            None,
            None,
        )


def _slab(rows: Tensor) -> int:
    """The tokens of a slab."""
    return max(1, SLAB // max(1, rows.shape[0] * rows.shape[2]))


def _taps(rows: Tensor, weight: Tensor) -> Tensor:
    """The weights tap by tap `[W, D]`, in the type that is computed in."""
    return weight.T.to(torch.float64 if rows.dtype == torch.float64 else torch.float32).contiguous()


def _window(rows: Tensor, taps: Tensor, start: int, length: int) -> Tensor:
    """The rows that `length` outputs take from `start` on, in the type that is computed in; before the first 0."""
    near = rows[:, max(start, 0) : start + length + len(taps) - 1].to(taps.dtype)
    return near if start >= 0 else torch.nn.functional.pad(near, (0, 0, -start, 0))


def _convolve(rows: Tensor, taps: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution of a window, before the activation."""
    length = rows.shape[1] - len(taps) + 1
    if (
        length > 1
        and rows.device.type == "cpu"
        and taps.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
    ):
        # Channels are the last dimension in memory, as oneDNN's depthwise convolutions have it: nothing is copied.
        images, weight = rows.transpose(1, 2).unsqueeze(2), taps.T[:, None, None]
        summed = torch.nn.functional.conv2d(
            images, weight, None if bias is None else bias.to(taps.dtype), groups=rows.shape[2]
        )
        return summed.squeeze(2).transpose(1, 2)
    summed = rows[:, :length] * taps[0]
    for tap in range(1, len(taps)):
        summed.addcmul_(rows[:, tap : tap + length], taps[tap])
    return summed if bias is None else summed.add_(bias)
