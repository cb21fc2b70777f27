"""Levels: how far back a token is, by the highest bit in which two positions differ.

Of positions r < s < t, the level between r and t is the greater one of those between r and s and between s and t. So
from s to t every level up to that between s and t becomes that one, and the others stay.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..documents import Documents


def level_between(earlier: Tensor, later: Tensor, levels: int) -> Tensor:
    """int64: the place of the highest bit in which positions differ, 1 being the lowest, 0 for none; below `levels`."""
    powers = 1 << torch.arange(levels - 1, device=later.device)
    return torch.bucketize((earlier ^ later).long(), powers, right=True)


def merge_matrix(level: Tensor, levels: int, dtype: torch.dtype) -> Tensor:
    """`[…, L, L]`, by which a state's levels up to `level` `[…]` merge into it."""
    own = torch.arange(levels, device=level.device)
    return (torch.maximum(own, level[..., None, None]) == own[:, None]).to(dtype)


def positions_of_ends(documents: Documents) -> Tensor:
    """int64 `[B, 2]`: the positions of each row's first and last token in their documents."""
    return documents.positions()[:, [0, -1]].long()
