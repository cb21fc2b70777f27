"""The channel mixing of RWKV, its feed-forward layer."""

from __future__ import annotations

from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...parallel.sequence import Sequence
from ..layers.token_shift import Start, start_at, token_shifts
from ..part import FeedForward


class RWKVChannelMixing(FeedForward):
    """Squared ReLU of inputs mixed with those of the token before (RWKV-4, Peng et al., 2023, arXiv 2305.13048).

        y = sigmoid(W_r lerp(x_t, x_(t-1), mix_r)) * W_down relu(W_up lerp(x_t, x_(t-1), mix_k))^2

    receptance=False leaves the sigmoid out, as in RWKV-7 (arXiv 2503.14456); RWKV-5 and 6 have it. `[B, T, width]` to
    the same. own_mix: whether the parameter `mix` holds the parts of the token itself, 1 - mix_k and 1 - mix_r, as in
    the authors' checkpoints of RWKV-4. Parameters start as in the authors' code, W_down and W_r at 0; in RWKV-4's, W_up
    is sqrt(hidden / width) times larger. Raises ValueError if `hidden` is not positive.
    """

    no_weight_decay = ("mix",)
    small = MappingProxyType({"hidden": 48})

    def __init__(
        self, *, width: int, hidden: int, layer: int, depth: int, receptance: bool = True, own_mix: bool = False
    ) -> None:
        super().__init__()
        if hidden < 1:
            raise ValueError(f"feed_forward.hidden must be at least 1; got {hidden}. 3.5 or 4 times the width is usual")
        self.layer, self.depth, self.own_mix = layer, depth, own_mix
        self.mix = nn.Parameter(torch.empty(2 if receptance else 1, width))
        self.up = nn.Linear(width, hidden, bias=False)
        self.receptance = nn.Linear(width, width, bias=False) if receptance else None
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, seq: Sequence) -> Tensor:
        return self.by_tiles(self._mixed, *token_shifts(x, self.mix, seq, self.own_mix))

    def _mixed(self, x_k: Tensor, *x_r: Tensor) -> Tensor:
        out = self.down(F.relu(self.up(x_k)).square())
        return out if self.receptance is None else torch.sigmoid(self.receptance(x_r[0])) * out

    def initialise_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> bool:
        start = Start(self.up.in_features, self.layer, self.depth)
        power = 1.0 if self.receptance is not None else start.early**3  # early^4 in all for RWKV-7
        before = start.mixes(*[power] * len(tensor))
        values = {"mix": lambda: 1 - before if self.own_mix else before}
        gains = {"up.weight": 1.0, "down.weight": 0.0, "receptance.weight": 0.0}
        return start_at(name, tensor, generator, values, gains)
