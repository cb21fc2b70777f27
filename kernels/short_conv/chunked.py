"""The short convolution in slabs of tokens, with a hand-written backward that recomputes the activation's input.

Rows are first laid out so that no tap needs to know of documents: every run of tokens has W − 1 rows before it, zeros
at a document's start, or the earlier rows. One run per row needs no rearrangement.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..documents import Documents

SLAB = 256  # tokens in flight: what keeps a slab of a wide model within a core's caches


def short_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, documents: Documents, history: Tensor, activation: str | None
) -> Tensor:
    """See the package's `short_conv`; `history` is always a tensor, zero where there is none."""
    rows = torch.cat([_valid(history, documents), x], dim=1)
    if documents.is_whole and not _padded(documents):
        return _Convolve.apply(rows, weight, bias, activation)  # type: ignore[return-value]
    rows = torch.cat([x.new_zeros(1, x.shape[2]), rows.flatten(0, 1)])
    source, where = _layout(documents, weight.shape[1] - 1, x.device)
    out = _Convolve.apply(rows.index_select(0, source)[None], weight, bias, activation)
    return _without_padding(out[0].index_select(0, where).view_as(x), documents)


def token_shift(x: Tensor, documents: Documents, history: Tensor) -> Tensor:
    """See the package's `token_shift`."""
    earlier = torch.cat([_valid(history, documents), x[:, :-1]], dim=1)
    if documents.is_whole and not _padded(documents):
        return earlier
    return earlier.masked_fill(documents.positions(x.device)[..., None] == 0, 0.0)


def _padded(documents: Documents) -> bool:
    return documents.has_padding


def _without_padding(out: Tensor, documents: Documents) -> Tensor:
    return out.masked_fill(documents.ids(out.device)[..., None] < 0, 0.0) if _padded(documents) else out


def _valid(history: Tensor, documents: Documents) -> Tensor:
    """Zeroes the history rows that a row's first document does not reach back to."""
    width = history.shape[1]
    reach = [
        row[0].position if continues else 0 for row, continues in zip(documents.runs, documents.continues, strict=True)
    ]
    if all(n >= width for n in reach):
        return history
    back = torch.arange(width, 0, -1, device=history.device)
    return torch.where((back <= torch.tensor(reach, device=history.device)[:, None])[..., None], history, 0.0)


def _layout(documents: Documents, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where the rows of the laid-out sequence come from (0 = zeros), and where in its output each token lies.

    Padding is not laid out; its tokens point at any output.
    """
    zeros = torch.zeros(width, dtype=torch.int64)
    source, where, offset = [], torch.zeros(documents.batch, documents.length, dtype=torch.int64), 0
    for number, row in enumerate(documents.runs):
        for run in row:
            if run.is_padding:
                continue
            first = 1 + number * (width + documents.length) + width + run.start
            source.append(torch.arange(first - width, first) if run.start == 0 else zeros)
            source.append(torch.arange(first, first + run.length))
            where[number, run.start : run.stop] = torch.arange(offset, offset + run.length)
            offset += width + run.length
    rows = torch.cat(source) if source else torch.zeros(width + 1, dtype=torch.int64)
    return rows.to(device), where.flatten().to(device)


class _Convolve(torch.autograd.Function):
    """out_t = activation(Σ_i weight_i rows_{t+i} + bias) for rows `[B, T + W − 1, D]`."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
        ctx.save_for_backward(rows, weight, bias)
        ctx.activation = activation
        taps = _taps(rows, weight)
        out = rows.new_empty(rows.shape[0], rows.shape[1] - len(taps) + 1, rows.shape[2])
        for start in range(0, out.shape[1], SLAB):
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
        for start in range(0, dout.shape[1], SLAB):
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
