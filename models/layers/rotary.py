"""Rotary positions, as the mixers apply them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...kernels.pointwise import RopeScaling, rope, rope_frequencies


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

    x `[B, T, H, head_dim]`, positions `[B, T]`; half-split pairing. The frequencies are float32 and belong to no
    module, so that neither a cast of the model to bfloat16 nor its construction on `meta` touches them. Raises
    ValueError where the fraction does not give an even number of dims.
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
        self.rotated, self.base = rotated, float(base)
        self.scaling = RopeScaling(**scaling) if scaling else None
        self._frequencies: dict[torch.device, tuple[Tensor, float]] = {}

    @torch.compiler.assume_constant_result
    def frequencies(self, device: torch.device) -> tuple[Tensor, float]:
        """float32 `[rotated / 2]` on `device`, and the factor by which long-context scalings sharpen attention."""
        if device not in self._frequencies:
            with torch.device("cpu"):
                inverse_frequencies, attention_factor = rope_frequencies(self.rotated, self.base, self.scaling)
            self._frequencies[device] = (inverse_frequencies.to(device), attention_factor)
        return self._frequencies[device]

    def __call__(self, x: Tensor, positions: Tensor) -> Tensor:
        inverse_frequencies, attention_factor = self.frequencies(x.device)
        return rope(x, positions, inverse_frequencies=inverse_frequencies, attention_factor=attention_factor)
