"""Factors on the logits of attention that depend on the query's position."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...parallel.sequence import Sequence


class LogitFactor:
    """Multiplies the queries `[B, T, H, K]` of `seq`, and so their logits, by a factor of the position i, from 0 on.

        log_length m:                               log(i + 1) / log(m)
        temperature b with temperature_length L:    1 + b log(1 + floor((i + 1) / L))

    The first keeps the entropy of the weights as there are more keys, and is 1 for m of them (Su, 2021, "log n" scaled
    attention). The second is that of Llama 4's layers without positions (b = 0.1, L = 8192). Factors and products are
    float32 at least.
    """

    def __init__(self, log_length: int | None, temperature: float | None, temperature_length: int | None) -> None:
        self.log_length, self.temperature, self.temperature_length = log_length, temperature, temperature_length

    def __call__(self, q: Tensor, seq: Sequence) -> Tensor:
        wide = torch.promote_types(q.dtype, torch.float32)
        count = seq.positions(q.device) + 1
        factor = torch.ones((), dtype=wide, device=q.device)
        if self.log_length is not None:
            factor = factor * count.to(wide).log() / math.log(self.log_length)
        if self.temperature is not None and self.temperature_length is not None:
            steps = torch.div(count, self.temperature_length, rounding_mode="floor")
            factor = factor * (1 + self.temperature * steps.to(wide).log1p())
        return (q * factor[..., None, None]).to(q.dtype)


def logit_factor(
    log_length: int | None, temperature: float | None, temperature_length: int | None
) -> LogitFactor | None:
    """The factor by the settings of a mixer; None for none. Raises ValueError for settings that do not fit."""
    if log_length is not None and log_length < 2:
        raise ValueError(f"log_length must be at least 2, a length of training rows; got {log_length}")
    if (temperature is None) != (temperature_length is None):
        raise ValueError(
            "temperature and temperature_length must come together; "
            f"got {temperature} and {temperature_length}. Llama 4 has 0.1 and 8192"
        )
    if temperature_length is not None and temperature_length < 1:
        raise ValueError(f"temperature_length must be at least 1; got {temperature_length}")
    if log_length is None and temperature is None:
        return None
    return LogitFactor(log_length, temperature, temperature_length)
