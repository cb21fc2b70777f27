"""What the mixers of the delta rule share."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ....kernels.delta_rule import flops
from ....kernels.pointwise import l2_norm
from ....parallel import ops
from ....parallel.sequence import Sequence
from ...layers.decay_gate import DecayGate
from ...layers.normalisation import RMSNorm
from ...layers.short_convolution import ShortConvolution
from ...mixer import Mixer, head_size


class DeltaRule(Mixer):
    """A mixer of the delta rule: what comes before its op and after it, and the op with a strength and a decay.

        q, k, v = silu(conv(W x)), then q and k at length 1 in each head
        beta = sigmoid(W_b x)                         twice that with negative_eigenvalues
        y = W_o (activation(gate(x)) * RMSNorm(o))    the norm is within each head, with one weight for all

    A subclass adds its `decay` with its `decay_gate`, and its `gate`; each may be None.

    key_heads (default heads) divides heads: value heads that share queries and keys. key_dim, value_dim: of a head, by
    default width / heads. conv_size: taps of the short convolution, or None for none. steps: how often each token
    changes the state, each time with keys, values and betas of its own. Raises ValueError for sizes that do not divide.
    """

    activation: str = "silu"  # of the output gate
    has_beta: ClassVar[bool] = True
    decay: nn.Module | None
    decay_gate: DecayGate | None
    gate: nn.Module | None

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        key_heads: int | None = None,
        key_dim: int | None = None,
        value_dim: int | None = None,
        conv_size: int | None = 4,
        negative_eigenvalues: bool = False,
        steps: int = 1,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        key_heads = heads if key_heads is None else key_heads
        if key_heads < 1 or heads % key_heads:
            raise ValueError(f"key_heads must divide heads={heads}; got {key_heads}. Change one of them")
        if steps < 1:
            raise ValueError(f"steps must be at least 1; got {steps}")
        self.heads, self.key_heads, self.steps = heads, key_heads, steps
        self.negative_eigenvalues = negative_eigenvalues
        self.key_dim = head_size("heads", width, heads, "key_dim") if key_dim is None else key_dim
        self.value_dim = head_size("heads", width, heads, "value_dim") if value_dim is None else value_dim
        keys, values = key_heads * self.key_dim, heads * self.value_dim
        self.query = nn.Linear(width, keys, bias=False)
        self.key = nn.Linear(width, steps * keys, bias=False)
        self.value = nn.Linear(width, steps * values, bias=False)
        channels = keys + steps * (keys + values)
        self.conv = None if conv_size is None else ShortConvolution(channels, conv_size, activation="silu")
        self.beta = nn.Linear(width, steps * heads, bias=False) if self.has_beta else None
        self.decay = self.decay_gate = self.gate = None
        self.norm = RMSNorm(self.value_dim, norm_eps)
        self.output = nn.Linear(values, width, bias=False)

    def forward(self, x: Tensor, seq: Sequence) -> Tensor:
        parts = self.query(x), self.key(x), self.value(x)
        q, k, v = map(F.silu, parts) if self.conv is None else self.conv.of_parts(parts, seq)
        q, k = (l2_norm(part.unflatten(-1, (-1, self.key_dim))) for part in (q, k))
        out = self.mix(x, q, self.by_step(k.flatten(-2), self.key_dim), self.by_step(v, self.value_dim), seq)
        if self.gate is None:
            return self.output(self.norm(out).flatten(-2))
        gate = self.gate(x).unflatten(-1, (self.heads, self.value_dim))
        return self.output(self.norm(out, gate, self.activation).flatten(-2))

    def mix(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, seq: Sequence) -> Tensor:
        """The op's output `[B, T, H, V]`: queries are `[B, T, G, K]`, keys and values as `by_step` makes them."""
        return ops.delta_rule(q, k, v, self.strength(x), self.log_decay(x), seq=seq)

    def by_step(self, x: Tensor, dim: int) -> Tensor:
        """`[B, T, N heads dim]` as `[B, T, heads, N, dim]`, without N where it is 1."""
        if self.steps == 1:
            return x.unflatten(-1, (-1, dim))
        return x.unflatten(-1, (self.steps, -1, dim)).transpose(2, 3)

    def strength(self, x: Tensor) -> Tensor:
        """beta, `[B, T, H]` or `[B, T, H, N]`."""
        assert self.beta is not None
        return self.bounded(self.by_step(self.beta(x), 1).squeeze(-1))

    def bounded(self, x: Tensor) -> Tensor:
        """How strongly is erased: in (0, 1), or (0, 2)."""
        strength = torch.sigmoid(x)
        return 2 * strength if self.negative_eigenvalues else strength

    def log_decay(self, x: Tensor) -> Tensor | None:
        return None if self.decay is None or self.decay_gate is None else self.decay_gate(self.decay(x))

    def mixing_flops(self, seq: Sequence) -> int:
        return flops(seq.places * self.steps, heads=self.heads, key_dim=self.key_dim, value_dim=self.value_dim)
