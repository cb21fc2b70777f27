"""RWKV-6's time mixing."""

from __future__ import annotations

from types import MappingProxyType

import torch
from torch import Tensor, nn

from ....parallel import ops
from ....parallel.sequence import Sequence
from ...layers.decay_gate import GateLinear
from ...layers.low_rank import LowRank
from ...layers.token_shift import log_decay
from .rwkv5 import MatrixMixing


class RWKV6(MatrixMixing):
    """RWKV-5 with shifts and decays that depend on the data (RWKV-6 "Finch", Peng et al., 2024, arXiv 2404.05892).

        s = lerp(x_t, x_(t-1), mix_s)
        x_c = lerp(x_t, x_(t-1), mix_c + B_c tanh(A_c s))       for each c of r, k, v, g, w: the paper's ddlerp
        r, k, v, g = W_c x_c                                    w_t = b + W_2 tanh(W_1 x_w)
        o_t = r_t (S_(t-1) + diag(u) k_t^T v_t)                 S_t = diag(e^(-e^(w_t))) S_(t-1) + k_t^T v_t
        y = W_o (silu(g) * HeadNorm(o))

    A_c and W_1 are of rank mix_rank and decay_rank: 32 and 64 in the released models up to 3B, 64 and 128 in larger
    ones. head_dim, norm and initial values as in `RWKV5`. The paper and its code agree. Raises ValueError for a
    head_dim that does not divide, or a rank below 1.
    """

    no_weight_decay = ("mix", "bonus")
    small = MappingProxyType({"mix_rank": 8, "decay_rank": 8})

    def __init__(
        self, *, width: int, layer: int, depth: int, head_dim: int = 64, mix_rank: int = 32, decay_rank: int = 64
    ) -> None:
        super().__init__(width=width, layer=layer, depth=depth, head_dim=head_dim, mixes=6)
        if mix_rank < 1 or decay_rank < 1:
            raise ValueError(f"mix_rank and decay_rank must be at least 1; got {mix_rank} and {decay_rank}")
        self.mix_down = nn.Linear(width, 5 * mix_rank, bias=False)
        self.mix_up = nn.ModuleList(nn.Linear(mix_rank, width, bias=False) for _ in range(5))
        self.decay = LowRank(width, decay_rank, torch.tanh, up=GateLinear, zero_start=True)

    def shifted(self, x: Tensor, seq: Sequence) -> tuple[Tensor, ...]:
        before = ops.token_shift(x, seq=seq)
        *mixes, first = self.mix.to(x.dtype)
        hidden = torch.tanh(self.mix_down(torch.lerp(x, before, first))).chunk(5, dim=-1)
        *inputs, x_w = (
            torch.lerp(x, before, mix + up(each)) for mix, up, each in zip(mixes, self.mix_up, hidden, strict=True)
        )
        return *inputs, log_decay(self.decay(x_w)).unflatten(-1, (self.heads, self.head_dim))

    def initialise_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> bool:
        if name == "mix":
            tensor.copy_(self.start.mixes(0.5, 1.0, 1.0, 0.5, 1.0, 1.0))
            tensor[2] -= 0.3 * self.start.late
        elif name == "decay.up.bias":
            tensor.copy_(self.start.speeds(-6.0, 5.0))
        elif name == "mix_down.weight":
            tensor.zero_()
        elif name == "decay.up.weight" or name.startswith("mix_up."):
            tensor.uniform_(-0.01, 0.01, generator=generator)
        else:
            return super().initialise_parameter(name, tensor, generator)
        return True
