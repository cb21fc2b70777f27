"""Grouped matrix products by torch: on the CPU one matrix product for each group that has rows.

Elsewhere the host does not know the groups and would have to wait for them: there every matrix meets every row, and
only its own rows are kept. This is for what the Triton kernels do not take, float64. On `meta` there is the result
alone, as kernels and the CPU's products hold nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def product(x: Tensor, weight: Tensor, ends: Tensor, transposed: bool) -> Tensor:
    """See `reference.product`."""
    matrices = weight.transpose(1, 2) if transposed else weight
    if x.device.type == "meta":
        return x.new_empty(x.shape[0], matrices.shape[2])
    if not _host_knows(ends):
        out = x.new_zeros(x.shape[0], matrices.shape[2])
        for matrix, inside in zip(matrices, _inside(x, ends), strict=True):
            out = torch.where(inside, x @ matrix, out)
        return out
    out, last = x.new_empty(x.shape[0], matrices.shape[2]), 0
    for group, start, end in groups_of(ends, x.shape[0]):
        torch.mm(x[start:end], matrices[group], out=out[start:end])
        last = end
    out[last:].zero_()
    return out


def gradient(dout: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """See `reference.gradient`."""
    if x.device.type == "meta":
        return x.new_empty(ends.shape[0], dout.shape[1], x.shape[1])
    if not _host_knows(ends):
        zero = dout.new_zeros(())
        return torch.stack([torch.where(inside, dout, zero).T @ x for inside in _inside(x, ends)])
    dweight = x.new_empty(ends.shape[0], dout.shape[1], x.shape[1])
    for group, start, end in groups_of(ends, x.shape[0]):
        torch.mm(dout[start:end].T, x[start:end], out=dweight[group])
    return dweight


def _host_knows(ends: Tensor) -> bool:
    return ends.device.type == "cpu"


def groups_of(ends: Tensor, rows: int) -> Iterator[tuple[int, int, int]]:
    """(group, first row, end) of every group, those without rows too: a product of none is 0.

    On `meta`, where nothing has a value, all groups are alike.
    """
    start, number = 0, ends.shape[0]
    even = ends.device.type == "meta"
    for group, end in enumerate([rows * n // number for n in range(1, number + 1)] if even else ends.tolist()):
        yield group, start, end
        start = end


def _inside(x: Tensor, ends: Tensor) -> Iterator[Tensor]:
    """`[M, 1]` for each group: which rows are its own."""
    rows, start = torch.arange(x.shape[0], device=x.device).unsqueeze(1), 0
    for end in ends:
        yield (rows >= start) & (rows < end)
        start = end
