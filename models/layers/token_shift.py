"""Token shifts of RWKV: inputs mixed with those of the token before, and how its parameters start."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from ...parallel import ops
from ...parallel.sequence import Sequence


def token_shifts(x: Tensor, mix: Iterable[Tensor], seq: Sequence, own: bool = False) -> tuple[Tensor, ...]:
    """lerp(x_t, x_(t-1), m) for each m of `mix`: `[B, T, D]` each; before a document's first token stands 0.

    Each m is `[D]` or `[B, T, D]`, the part of the token before; with `own`, `mix` holds the part of the token itself,
    1 - m. The authors' `time_mix` of RWKV-4 and 5 is the latter; what they call `time_maa`, or `x_` in RWKV-7, is m.
    """
    before = ops.token_shift(x, seq=seq)
    first, last = (before, x) if own else (x, before)
    return tuple(torch.lerp(first, last, each.to(x.dtype)) for each in mix)


def log_decay(speed: Tensor) -> Tensor:
    """-e^speed, in float32 at least, as sums of it over many tokens are exponents."""
    return -speed.to(torch.promote_types(speed.dtype, torch.float32)).exp()


class Start:
    """Where a layer's parameters start, by channel and depth, as in the authors' code.

    channel: i / width. position: the same up to 1, i / (width - 1). early: from 1 in the first layer to almost 0 in the
    last. late: from 0 in the first layer to 1 in the last. zigzag: -1, 0 or 1 in turn.
    """

    def __init__(self, width: int, layer: int, depth: int) -> None:
        self.channel = torch.arange(width) / width
        self.position = torch.arange(width) / max(1, width - 1)
        self.early, self.late = 1 - layer / depth, layer / max(1, depth - 1)
        self.zigzag = (torch.arange(width) + 1) % 3 - 1

    def mixes(self, *powers: float) -> Tensor:
        """1 - channel^(power * early) for each power: late channels and layers see less of the token before."""
        return torch.stack([1 - self.channel ** (power * self.early) for power in powers])

    def speeds(self, slowest: float, span: float) -> Tensor:
        """Logarithms of decay rates by channel: from `slowest` on, most of them slow in later layers."""
        return slowest + span * self.position ** (0.7 + 1.3 * self.late)


def start_at(
    name: str,
    tensor: Tensor,
    generator: torch.Generator,
    values: Mapping[str, Callable[[], Tensor]],
    gains: Mapping[str, float],
) -> bool:
    """Fills a parameter that has its values, or a matrix that has a gain; says whether it was one.

    A gain g stands for g times an orthogonal matrix: normal numbers of the same size, g / sqrt(the larger dim).
    """
    if name in values:
        tensor.copy_(values[name]().reshape(-1).expand(tensor.numel()).view(tensor.shape))
    elif name in gains:
        tensor.normal_(0.0, gains[name] * max(tensor.shape) ** -0.5, generator=generator)
    return name in values or name in gains
