"""Rotary positions, as the mixers apply them."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from ...kernels.pointwise import RopeScaling, Rotation, rotate
from ...parallel.sequence import Sequence


def rotary(head_dim: int, base: float | None, fraction: float, scaling: dict[str, Any] | None) -> Rotary | None:
    """The rotation by a mixer's settings `rope_base`, `rope_fraction` and `rope_scaling`; None without a base.

    Raises ValueError for settings that then have no effect.
    """
    if base is not None:
        return Rotary(head_dim, base, fraction, scaling)
    if fraction != 1.0 or scaling:
        raise ValueError("rope_fraction and rope_scaling must come with a rope_base; got rope_base=None")
    return None


class Rotary:
    """Rotates the first `fraction` of a head's dims by each token's position (Su et al., 2021, arXiv 2104.09864).

    x `[B, T, H, head_dim]`, tokens of `seq`; half-split pairing. It holds settings and no tensor, so that neither a
    cast of the model to bfloat16 nor its construction on `meta` touches the frequencies; the sequence keeps the angles
    for all layers that share them. Raises ValueError where the fraction does not give an even number of dims, for a
    scaling that does not fit, and, called, for documents beyond its `RopeScaling.longest`.
    """

    def __init__(
        self, head_dim: int, base: float, fraction: float = 1.0, scaling: dict[str, Any] | None = None
    ) -> None:
        rotated = round(head_dim * fraction)
        if not 0 < fraction <= 1 or rotated % 2 or abs(rotated - head_dim * fraction) > 1e-6:
            raise ValueError(
                f"rope_fraction must leave an even number of a head's {head_dim} dims, in (0, 1]; got {fraction}"
            )
        if base <= 0:
            raise ValueError(f"rope_base must be positive; got {base}")
        self.rotation = Rotation(rotated, float(base), _scaling(scaling))
        if self.rotation.scaling is not None:
            self.rotation.scaling.check(rotated)

    def __call__(self, x: Tensor, seq: Sequence) -> Tensor:
        return rotate(x, *seq.rotations(self.rotation, x.device, torch.promote_types(x.dtype, torch.float32)))


def _scaling(settings: dict[str, Any] | None) -> RopeScaling | None:
    if not settings:
        return None
    known = [field.name for field in fields(RopeScaling)]
    if unknown := sorted(set(settings) - set(known)):
        raise ValueError(f"rope_scaling must have settings of {', '.join(known)}; got {', '.join(unknown)}")
    if missing := sorted({"kind", "factor"} - set(settings)):
        raise ValueError(f"rope_scaling must have {' and '.join(missing)}; got {', '.join(sorted(settings))}")
    return RopeScaling(**settings)
