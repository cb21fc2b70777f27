"""Gated retention."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from ....kernels.gated_linear import flops
from ....parallel import ops
from ....parallel.sequence import Sequence
from ...layers.decay_gate import GateLinear
from ...layers.normalisation import RMSNorm
from ...layers.rotary import Rotary
from ...mixer import Mixer, head_size


class GatedRetention(Mixer):
    """Retention with a decay per head that depends on the token (gRet, in YOCO, Sun et al., 2024, arXiv 2405.05254).

        S_t = exp(g_t) S_(t-1) + k_t^T v_t        o_t = q_t S_t / sqrt(head_dim)        q, k rotated by position
        g_t = logsigmoid(W_d x_t) / gate_normaliser
        y = W_o (silu(W_g x) * RMSNorm(o))        the norm is within each head, without a weight

    q and k turn with the frequencies of the authors' code, rope_base^(-2 i / (head_dim - 2)) for the pairs i = 0 …
    head_dim / 2 - 1, the last of which is 1 / rope_base. They pair neighbouring channels, we those half a head apart,
    which is the same in another order of q's and k's channels. head_dim: by default width / heads. Raises ValueError
    for sizes that do not divide.
    """

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        head_dim: int | None = None,
        gate_normaliser: float = 16.0,
        rope_base: float = 10000.0,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        head_dim = head_size("heads", width, heads, "head_dim") if head_dim is None else head_dim
        if gate_normaliser <= 0:
            raise ValueError(f"gate_normaliser must be positive; got {gate_normaliser}")
        if head_dim < 4 or rope_base <= 0:
            raise ValueError(f"head_dim must be at least 4 and rope_base positive; got {head_dim} and {rope_base}")
        self.heads, self.head_dim, self.gate_normaliser = heads, head_dim, gate_normaliser
        inner = heads * head_dim
        self.rotary = Rotary(head_dim, rope_base ** (head_dim / (head_dim - 2)))
        self.query = nn.Linear(width, inner, bias=False)
        self.key = nn.Linear(width, inner, bias=False)
        self.value = nn.Linear(width, inner, bias=False)
        self.decay = GateLinear(width, heads, bias=False)
        self.gate = nn.Linear(width, inner, bias=False)
        self.norm = RMSNorm(head_dim, norm_eps, weighted=False)
        self.output = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, seq: Sequence) -> Tensor:
        q, k, v = (project(x).unflatten(-1, (self.heads, -1)) for project in (self.query, self.key, self.value))
        q, k = self.rotary(q, seq), self.rotary(k, seq)
        log_decay = F.logsigmoid(self.decay(x)) / self.gate_normaliser
        out = ops.gated_linear_attention(q, k, v, log_decay, seq=seq)
        return self.output(self.norm(out).flatten(-2) * F.silu(self.gate(x)))

    def mixing_flops(self, seq: Sequence) -> int:
        return flops(seq.places, heads=self.heads, key_dim=self.head_dim, value_dim=self.head_dim)
