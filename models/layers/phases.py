"""Rotations by angles that depend on tokens: what a complex decay is beside its size."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...parallel import ops
from ...parallel.sequence import Sequence


def cumulative_phases(angles: Tensor, seq: Sequence, slot: str = "phases") -> Tensor:
    """The sum of each document's angles so far, modulo 2 pi: `[B, T, …]` to the same, in float32 at least.

    Sums are float64, so that they stay exact over long documents. Queries and keys turned by them meet under the sum
    of the angles between: with a real decay beside it, a state of complex decays.
    """
    wide = torch.promote_types(angles.dtype, torch.float32)
    nothing = torch.zeros(angles.shape[2:], dtype=torch.float64, device=angles.device)
    sums = ops.diagonal_scan(angles.double(), nothing, seq=seq, slot=slot)
    return sums.remainder(2 * math.pi).to(wide)


def turned(x: Tensor, phases: Tensor) -> Tensor:
    """Rotates neighbouring channels as one complex number: the first 2 A of x `[…, K]` by phases `[…, A]`.

    Differentiable in both; computed and returned in the type of the phases. A phase's gradient is the small difference
    of what later queries and keys say of it: these are not to be rounded before their op.
    """
    turning, rest = x.split([2 * phases.shape[-1], x.shape[-1] - 2 * phases.shape[-1]], dim=-1)
    cos, sin = phases.cos(), phases.sin()
    first, second = turning.to(phases.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    pairs = torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1)
    return torch.cat([pairs.flatten(-2), rest.to(phases.dtype)], dim=-1)
