"""MesaNet's layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ....kernels.mesa import flops
from ....kernels.pointwise import l2_norm
from ....parallel import ops
from ....parallel.sequence import Sequence
from ...layers.decay_gate import GateLinear, WideLinear
from ...layers.normalisation import RMSNorm
from ...layers.short_convolution import ShortConvolution
from ...mixer import Mixer, head_size

LEAST = 0.25  # of the regulariser


class MesaNet(Mixer):
    """Reads by queries that solve a least-squares problem over all keys so far (MesaNet, von Oswald et al., 2025,
    arXiv 2506.05233; as in flash-linear-attention).

        H_t = a_t H_(t-1) + b_t k_t^T k_t        S_t = a_t S_(t-1) + b_t k_t^T v_t        o_t = q_t (H_t + R)^-1 S_t
        q, k = silu(conv(W x)), then at length 1 in each head        v = W_v x
        a = sigmoid(W_a x + bias)        b = sigmoid(W_b x + bias)        R = diag(1/4 + softplus(regulariser))
        y = W_o RMSNorm(o)                            the norm is within each head, with one weight for all heads

    key_dim, value_dim: of a head, by default width / heads. conv_size: taps of the short convolution, or None for none.
    iterations: of conjugate gradients, in forward and in backward. output_gate: whether the norm's output is multiplied
    by silu(W_g x). R starts as the identity. Queries, keys and what is read stay in float32 up to the norm. Raises
    ValueError for sizes that do not divide.
    """

    no_weight_decay = ("regulariser",)

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        key_dim: int | None = None,
        value_dim: int | None = None,
        conv_size: int | None = 4,
        iterations: int = 30,
        output_gate: bool = False,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if iterations < 1:
            raise ValueError(f"iterations must be at least 1; got {iterations}. 30 is usual")
        self.heads, self.iterations = heads, iterations
        self.key_dim = head_size("heads", width, heads, "key_dim") if key_dim is None else key_dim
        self.value_dim = head_size("heads", width, heads, "value_dim") if value_dim is None else value_dim
        keys, values = heads * self.key_dim, heads * self.value_dim
        self.query = WideLinear(width, keys, bias=False)
        self.key = WideLinear(width, keys, bias=False)
        self.value = nn.Linear(width, values, bias=False)
        self.conv = None if conv_size is None else ShortConvolution(2 * keys, conv_size, activation="silu")
        self.decay = GateLinear(width, heads)
        self.beta = GateLinear(width, heads)
        self.regulariser = nn.Parameter(torch.empty(heads, self.key_dim))
        self.gate = nn.Linear(width, values, bias=False) if output_gate else None
        self.norm = RMSNorm(self.value_dim, norm_eps)
        self.output = nn.Linear(values, width, bias=False)

    def forward(self, x: Tensor, seq: Sequence) -> Tensor:
        parts = self.query(x), self.key(x)
        q, k = map(F.silu, parts) if self.conv is None else self.conv.of_parts(parts, seq)
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in (q, k, self.value(x)))
        log_decay, beta = F.logsigmoid(self.decay(x)), torch.sigmoid(self.beta(x))
        added = LEAST + F.softplus(self.regulariser.to(log_decay.dtype))
        out = ops.mesa(l2_norm(q), l2_norm(k), v, log_decay, beta, added, seq=seq, iterations=self.iterations)
        gate = None if self.gate is None else self.gate(x).unflatten(-1, (self.heads, -1)).to(out.dtype)
        return self.output(self.norm(out, gate).flatten(-2).to(x.dtype))

    def mixing_flops(self, seq: Sequence) -> int:
        sizes = {"heads": self.heads, "key_dim": self.key_dim, "value_dim": self.value_dim}
        return flops(seq.places, **sizes, iterations=self.iterations)

    def initialise_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> bool:
        if name != "regulariser":
            return False
        tensor.fill_(1.0 - LEAST).expm1_().log_()  # the inverse of softplus
        return True
