"""Grouped matrix products by torch's own kernel, which on CUDA is CUTLASS's, for bfloat16."""

from __future__ import annotations

import torch
from torch import Tensor

ALIGNED = 16  # bytes: rows must be a multiple of it
FASTER = (9, 0)  # compute capability on which it was right and took 0.6 to 0.75 of the time of the kernels here


def is_faster(x: Tensor, other: Tensor) -> bool:
    """Whether it takes these, and is known to be faster than the kernels of this package on their device."""
    if x.device.type != "cuda" or x.dtype != torch.bfloat16 or _misaligned(x, other):
        return False
    return torch.cuda.get_device_capability(x.device) == FASTER


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
    if _misaligned(x, other):
        sizes = dict.fromkeys((x.shape[1], *other.shape[1:]))
        raise ValueError(
            f"sizes of matrices must be multiples of {ALIGNED // x.element_size()} for kernels.grouped_matmul=library; "
            f"got {' and '.join(map(str, sizes))}. Use auto"
        )


def _misaligned(x: Tensor, other: Tensor) -> bool:
    return any(size * x.element_size() % ALIGNED for size in (x.shape[1], *other.shape[1:]))
