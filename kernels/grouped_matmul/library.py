"""Grouped matrix products by torch's own kernel, which on CUDA is CUTLASS's, for bfloat16."""

from __future__ import annotations

import torch
from torch import Tensor

ALIGNED = 16  # bytes: rows must be a multiple of it


def product(x: Tensor, weight: Tensor, ends: Tensor, transposed: bool) -> Tensor:
    """See `reference.product`. Raises ValueError for what torch's kernel does not take."""
    _check(x, weight)
    matrices = weight.transpose(1, 2) if transposed else weight
    out = torch._grouped_mm(x, matrices, offs=ends)
    rows = torch.arange(x.shape[0], device=x.device)
    return out.masked_fill_((rows >= ends[-1]).unsqueeze(1), 0.0)  # which it leaves as they were allocated


def gradient(dout: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """See `reference.gradient`."""
    _check(x, dout)
    return torch._grouped_mm(dout.T, x, offs=ends)


def _check(x: Tensor, other: Tensor) -> None:
    if x.dtype != torch.bfloat16 and not (x.dtype == torch.float32 and x.device.type == "cpu"):
        raise ValueError(
            f"kernels.grouped_matmul must not be 'library' in {str(x.dtype).removeprefix('torch.')} on "
            f"{x.device.type}, which torch's kernel does not take. Use auto"
        )
    sizes = dict.fromkeys((x.shape[1], *other.shape[1:]))
    if any(size * x.element_size() % ALIGNED for size in sizes):
        raise ValueError(
            f"sizes of matrices must be multiples of {ALIGNED // x.element_size()} for kernels.grouped_matmul=library; "
            f"got {' and '.join(map(str, sizes))}. Use auto"
        )
