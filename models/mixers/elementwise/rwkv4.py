"""RWKV-4's time mixing."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ....kernels.wkv import flops
from ....parallel import ops
from ....parallel.sequence import Sequence
from ...layers.token_shift import Start, log_decay, start_at, token_shifts
from ...mixer import Mixer


class RWKV4(Mixer):
    """A mean of values weighted by keys that fade at a rate per channel (RWKV-4, Peng et al., 2023, arXiv 2305.13048).

        r, k, v = W_c lerp(x_t, x_(t-1), mix_c)        for each c of r, k, v
        n_t = e^(-e^w) n_(t-1) + e^(k_t) v_t           d_t = e^(-e^w) d_(t-1) + e^(k_t)
        o_t = (n_(t-1) + e^(u + k_t) v_t) / (d_(t-1) + e^(u + k_t))
        y = W_o (sigmoid(r) * o)

    w and u are learned for each channel. The paper and its code agree. Values and rates start as in the authors' code,
    where all matrices but that of v start at 0. own_mix: whether the parameter `mix` holds 1 - mix_c, the part of the
    token itself, as in the authors' checkpoints.
    """

    in_float32 = ("decay", "bonus")
    no_weight_decay = ("mix",)

    def __init__(self, *, width: int, layer: int, depth: int, own_mix: bool = False) -> None:
        super().__init__()
        self.layer, self.depth, self.own_mix = layer, depth, own_mix
        self.mix = nn.Parameter(torch.empty(3, width))
        self.decay = nn.Parameter(torch.empty(width))
        self.bonus = nn.Parameter(torch.empty(width))
        self.receptance = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, seq: Sequence) -> Tensor:
        x_r, x_k, x_v = token_shifts(x, self.mix, seq, self.own_mix)
        out = ops.wkv(self.key(x_k), self.value(x_v), log_decay(self.decay), self.bonus, seq=seq)
        return self.output(torch.sigmoid(self.receptance(x_r)) * out)

    def mixing_flops(self, seq: Sequence) -> int:
        return flops(seq.places, channels=self.output.in_features)

    def initialise_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> bool:
        start = Start(self.output.in_features, self.layer, self.depth)

        def mixes() -> Tensor:
            before = start.mixes(0.5, 1.0, 1.0) - torch.tensor([[0.0], [0.0], [0.3 * start.late]])
            return 1 - before if self.own_mix else before

        values = {
            "mix": mixes,
            "decay": lambda: start.speeds(-5.0, 8.0),
            "bonus": lambda: math.log(0.3) + 0.5 * start.zigzag,
        }
        gains = {"receptance.weight": 0.0, "key.weight": 0.0, "value.weight": 1.0, "output.weight": 0.0}
        return start_at(name, tensor, generator, values, gains)
