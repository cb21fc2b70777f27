"""RWKV-7's time mixing."""

from __future__ import annotations

import math
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ....kernels.delta_rule import flops
from ....kernels.pointwise import l2_norm
from ....parallel import ops
from ....parallel.sequence import Sequence
from ...layers.decay_gate import GateLinear
from ...layers.low_rank import LowRank
from ...layers.normalisation import HeadNorm
from ...layers.token_shift import Start, start_at, token_shifts
from ...mixer import Mixer

MIXES = ("r", "w", "k", "v", "a", "g")


class RWKV7(Mixer):
    """A general diagonal-plus-low-rank state (RWKV-7 "Goose", Peng et al., 2025, arXiv 2503.14456), its time mixing.

        x_c = lerp(x_t, x_(t-1), mix_c)        for each c of r, w, k, v, a, g
        r, k, v = W_c x_c        eta = sigmoid(low_a(x_a))        g = low_g(x_g)
        log w = -exp(-1/2) sigmoid(low_w(x_w))        kappa = (k * k_k) / |k * k_k| in each head
        v = lerp(v, v_first, sigmoid(low_v(x_v)))     in all layers but the first, whose v is v_first
        k' = k * (1 + (eta - 1) * k_a)
        S_t = (diag(w_t) - (kappa_t * eta_t)^T kappa_t) S_(t-1) + k'_t^T v_t           o_t = r_t S_t
        y = W_o (g * (HeadNorm(o) + (sum of r * k' * r_k in each head) v))

    low_c(x) = up_c(f(down_c x)) with f tanh for w, sigmoid for g, and a bias for w, a and v. Ranks default to the
    paper's rule by width. head_dim: of a head, 64 by default; it must divide the width. head_norm_eps: the eps of
    HeadNorm over head_dim. key_eps: added to |k * k_k|^2 under the root, 1e-6 in flash-linear-attention's fused form.
    The first layer of a model (by `occurrence`) publishes `first_value`, the others read it. Raises ValueError for a
    head_dim that does not divide, and for an eps that is not positive (key_eps: that is negative).
    """

    no_weight_decay = ("mix", "bonus")
    small = MappingProxyType({"decay_rank": 8, "rate_rank": 8, "value_rank": 8})

    def __init__(
        self,
        *,
        width: int,
        layer: int,
        depth: int,
        occurrence: int = 0,
        head_dim: int = 64,
        decay_rank: int | None = None,
        rate_rank: int | None = None,
        value_rank: int | None = None,
        gate_rank: int | None = None,
        head_norm_eps: float = 1e-5,
        key_eps: float = 0.0,
    ) -> None:
        super().__init__()
        if head_dim < 1 or width % head_dim:
            raise ValueError(f"head_dim must divide width={width}; got {head_dim}. Change one of them")
        if head_norm_eps <= 0 or key_eps < 0:
            raise ValueError(
                f"head_norm_eps must be positive, and key_eps not negative; got {head_norm_eps} and {key_eps}"
            )
        self.heads, self.head_dim = width // head_dim, head_dim
        self.layer, self.depth, self.key_eps = layer, depth, key_eps
        self.publishes, self.reads = (("first_value",), ()) if occurrence == 0 else ((), ("first_value",))
        self.mix = nn.Parameter(torch.empty(len(MIXES), width))
        self.removal_key = nn.Parameter(torch.empty(width))
        self.replacement_key = nn.Parameter(torch.empty(width))
        self.bonus = nn.Parameter(torch.empty(self.heads, head_dim))
        self.receptance = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.decay = LowRank(width, decay_rank or rank(width, 2.5), torch.tanh, up=GateLinear, zero_start=True)
        self.rate = LowRank(width, rate_rank or rank(width, 2.5), zero_start=True)
        self.value_mix = LowRank(width, value_rank or rank(width, 1.7), zero_start=True) if self.reads else None
        self.gate = LowRank(width, gate_rank or rank(width, 5.0), torch.sigmoid, bias=False, zero_start=True)
        self.norm = HeadNorm(self.heads, head_dim, head_dim * head_norm_eps)
        self.output = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, seq: Sequence, *read: Tensor) -> Tensor | tuple[Tensor, ...]:
        x_r, x_w, x_k, x_v, x_a, x_g = token_shifts(x, self.mix, seq)
        r, k, v = self.receptance(x_r), self.key(x_k), self.value(x_v)
        first_value = v
        if self.value_mix is not None:
            v = torch.lerp(v, read[0], torch.sigmoid(self.value_mix(x_v)))
        decay, rate = self.decay(x_w), torch.sigmoid(self.rate(x_a))
        log_decay = -math.exp(-0.5) * torch.sigmoid(decay)
        removed = self.by_head(k * self.removal_key)
        removed = l2_norm(removed, self.key_eps) if self.key_eps else F.normalize(removed, dim=-1)
        k = self.by_head(torch.addcmul(k, k * (rate - 1), self.replacement_key))
        r, v = self.by_head(r), self.by_head(v)
        erase = -removed, removed * self.by_head(rate)
        out = ops.delta_rule(r, k, v, None, self.by_head(log_decay), erase=erase, seq=seq, scale=1.0)
        bonus = (r * k * self.bonus).sum(-1, keepdim=True) * v
        result = self.output(self.gate(x_g) * (self.norm(out) + bonus.flatten(-2)))
        return (result, first_value) if self.publishes else result

    def by_head(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, self.head_dim))

    def mixing_flops(self, seq: Sequence) -> int:
        return flops(seq.places, heads=self.heads, key_dim=self.head_dim, value_dim=self.head_dim, general=True)

    def initialise_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> bool:
        """As in the authors' code: by channel and depth, the output at 0."""
        width = self.receptance.in_features
        start, linear = Start(width, self.layer, self.depth), torch.arange(width) / max(1, width - 1) - 0.5
        within = torch.arange(width) % self.head_dim * 2 / max(1, self.head_dim - 1) - 1
        zigzag = within * within.abs()
        values = {
            "mix": lambda: start.mixes(0.2, 0.9, 0.7, 0.7, 0.9, 0.2),
            "removal_key": lambda: 0.71 - 0.1 * linear,
            "replacement_key": lambda: torch.tensor(1.02),
            "bonus": lambda: torch.tensor(-0.04),
            "decay.up.bias": lambda: -5.5 + 6 * start.position ** (1 + start.late**0.3) + 2.5 * zigzag,
            "rate.up.bias": lambda: -0.19 + 0.3 * zigzag + 0.4 * linear,
            "value_mix.up.bias": lambda: 0.73 - 0.4 * linear,
            "norm.weight": lambda: torch.tensor(((self.layer + 1) / self.depth) ** 0.7),
        }
        gains = {"receptance.weight": 1.0, "key.weight": 0.1, "value.weight": 1.0, "output.weight": 0.0}
        gains |= {f"{name}.up.weight": 0.1 for name in ("decay", "rate", "value_mix", "gate")}
        return start_at(name, tensor, generator, values, gains)


def rank(width: int, factor: float) -> int:
    """The paper's rank of a low-rank map: factor * sqrt(width) to a multiple of 32, at least 32."""
    return max(32, round(factor * math.sqrt(width) / 32) * 32)
