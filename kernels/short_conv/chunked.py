"""The short convolution in slabs of tokens, with a hand-written backward that recomputes the activation's input.

Rows are first laid out so that no tap needs to know of documents: every run of tokens has W − 1 rows before it, zeros
at a document's start, or the earlier rows. One run per row needs no rearrangement.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dispatch import starts
from ..documents import Documents
from ..operation import Function

SLAB = 256  # tokens in flight: what keeps a slab of a wide model within a core's caches


def short_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, documents: Documents, history: Tensor, activation: str | None
) -> Tensor:
    """See the package's `short_conv`; `history` is always a tensor, zero where there is none."""
    rows = torch.cat([_valid(history, documents), x], dim=1)
    if _is_plain(documents):
        return _Convolve.call(rows, weight, bias, activation)
    rows = torch.cat([x.new_zeros(1, x.shape[2]), rows.flatten(0, 1)])
    source, where = documents.on(x.device, _layout, weight.shape[1] - 1)
    out = _Convolve.call(rows.index_select(0, source)[None], weight, bias, activation)
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
    """out_t = activation(Σ_i weight_i rows_{t+i} + bias) for rows `[B, T + W − 1, D]`."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
        ctx.save_for_backward(rows, weight, bias)
        ctx.activation = activation
        taps = _taps(rows, weight)
        out = rows.new_empty(rows.shape[0], rows.shape[1] - len(taps) + 1, rows.shape[2])
        for start in starts(out.shape[1], SLAB, out.device):
            part = out[:, start : start + SLAB]
            summed = _convolve(rows, taps, bias, start, part.shape[1])
            part.copy_(torch.nn.functional.silu(summed) if activation == "silu" else summed)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        rows, weight, bias = ctx.saved_tensors
        taps = _taps(rows, weight)
        drows = torch.zeros_like(rows, dtype=taps.dtype)
        dtaps, dbias = torch.zeros_like(taps), taps.new_zeros(rows.shape[2])
        for start in starts(dout.shape[1], SLAB, dout.device):
            dsum = dout[:, start : start + SLAB].to(taps.dtype)
            if ctx.activation == "silu":
                summed = _convolve(rows, taps, bias, start, dsum.shape[1])
                gate = torch.sigmoid(summed)
                dsum = dsum * gate * (1 + summed * (1 - gate))
            for tap, factor in enumerate(taps):
                near = slice(start + tap, start + tap + dsum.shape[1])
                drows[:, near].addcmul_(dsum, factor)
                dtaps[tap] += (dsum * rows[:, near]).sum((0, 1))
            dbias += dsum.sum((0, 1))
        return (
            drows.to(rows.dtype),
            dtaps.T.to(weight.dtype),
            None if bias is None else dbias.to(bias.dtype),
            None,
        )


def _taps(rows: Tensor, weight: Tensor) -> Tensor:
    """The weights tap by tap `[W, D]`, in the type that is computed in."""
    return weight.T.to(torch.float64 if rows.dtype == torch.float64 else torch.float32).contiguous()


def _convolve(rows: Tensor, taps: Tensor, bias: Tensor | None, start: int, length: int) -> Tensor:
    """The convolution of `length` tokens from `start`, before the activation."""
    summed = rows[:, start : start + length].to(taps.dtype) * taps[0]
    for tap in range(1, len(taps)):
        summed.addcmul_(rows[:, start + tap : start + tap + length].to(taps.dtype), taps[tap])
    return summed if bias is None else summed.add_(bias)
