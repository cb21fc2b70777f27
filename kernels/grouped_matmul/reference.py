"""Grouped matrix products as they are written: a matrix for each row."""

from __future__ import annotations

import torch
from torch import Tensor


def product(x: Tensor, weight: Tensor, ends: Tensor, transposed: bool) -> Tensor:
    """`[M, N]` of x `[M, K]` and weight `[E, N, K]`, transposed; or `[M, K]` of x `[M, N]` and weight as it is."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    of_row = torch.einsum("me,enk->mnk", _members(x, ends, dtype), weight.to(dtype))
    return torch.einsum("mnk,mk->mn" if transposed else "mnk,mn->mk", of_row, x.to(dtype)).to(x.dtype)


def gradient(dout: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """That of the weight, `[E, N, K]`."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.einsum("me,mn,mk->enk", _members(x, ends, dtype), dout.to(dtype), x.to(dtype)).to(x.dtype)


def _members(x: Tensor, ends: Tensor, dtype: torch.dtype) -> Tensor:
    """`[M, E]`: 1 where row m is of group e."""
    rows = torch.arange(x.shape[0], device=x.device).unsqueeze(1)
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    return ((rows >= starts) & (rows < ends)).to(dtype)
