"""Mamba-2."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ....kernels.gated_linear import flops
from ....kernels.pointwise import add_skip, gated_norm, scale_heads, swiglu
from ....parallel import ops
from ....parallel.sequence import Sequence
from ...layers.decay_gate import GateLinear, check_steps, fill_with_steps
from ...layers.short_convolution import ShortConvolution
from ...mixer import Mixer, head_size

OUTPUT_NORMS = ("gate_first", "norm_first", None)
MULTIPLIED = ("gate", "value", "key", "query", "step")


class Mamba2(Mixer):
    """A state space with one decay a head (Mamba-2, Dao and Gu, 2024, arXiv 2405.21060).

        x, B, C = silu(conv(W u))        delta = clamp(softplus(W_delta u + dt_bias), step_limit)        u the input
        S_t = exp(-delta_t exp(A_log)) S_(t-1) + B_t^T (delta_t x_t)        y_t = C_t S_t + D x_t
        out = W_o RMSNorm(y * silu(W_z u))            over each group of heads at once

    expansion: the width inside over the width; head_dim: of a head, so that there are expansion * width / head_dim
    heads. state: channels of B and C, which `groups` of heads share. conv_size: taps of the convolution. step_range,
    step_floor: where steps softplus(dt_bias) start, log-uniformly; step_limit: what steps are clamped to, None for no
    upper bound. initial_skip: where D starts. From 1, as published, D x is a hundred times what is read at first, and
    what the norm divides by; from 0 small models learn recall far sooner (`docs/recall.md`). bias, conv_bias: of the
    linear layers and of the convolution.
    output_norm: "gate_first" as above, "norm_first" for RMSNorm(y) * silu(W_z u), None for no norm (Falcon-H1, arXiv
    2507.22448). multipliers: constants for W_z u, W_x u, W_B u, W_C u and W_delta u by the names of their layers,
    `gate`, `value`, `key`, `query` and `step`, as in Falcon-H1.
    Raises ValueError for sizes that do not divide and for unknown names.
    """

    in_float32 = ("A_log", "dt_bias")

    def __init__(
        self,
        *,
        width: int,
        expansion: float = 2,
        head_dim: int = 64,
        state: int = 128,
        groups: int = 1,
        conv_size: int = 4,
        step_range: tuple[float, float] = (1e-3, 1e-1),
        step_floor: float = 1e-4,
        step_limit: tuple[float, float | None] = (0.0, None),
        initial_skip: float = 1.0,
        bias: bool = False,
        conv_bias: bool = True,
        output_norm: str | None = "gate_first",
        multipliers: dict[str, float] | None = None,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        inner = int(expansion * width)
        heads = head_size("head_dim", inner, head_dim)
        if groups < 1 or heads % groups:
            raise ValueError(f"groups must divide the {heads} heads; got {groups}. Change it, or expansion or head_dim")
        if output_norm not in OUTPUT_NORMS:
            raise ValueError(f"output_norm must be one of {', '.join(map(str, OUTPUT_NORMS))}; got {output_norm!r}")
        if unknown := [name for name in multipliers or {} if name not in MULTIPLIED]:
            raise ValueError(f"multipliers must be of {', '.join(MULTIPLIED)}; got {', '.join(unknown)}. Rename them")
        self.heads, self.head_dim, self.groups, self.state = heads, head_dim, groups, state
        self.multipliers = dict(multipliers or {})
        self.step_range, self.step_floor, self.step_limit = check_steps(step_range), step_floor, tuple(step_limit)
        self.initial_skip = initial_skip
        self.gate = nn.Linear(width, inner, bias=bias)
        self.value = nn.Linear(width, inner, bias=bias)  # x
        self.key = nn.Linear(width, groups * state, bias=bias)  # B
        self.query = nn.Linear(width, groups * state, bias=bias)  # C
        self.step = GateLinear(width, heads, bias=bias)  # delta
        self.conv = ShortConvolution(inner + 2 * groups * state, conv_size, bias=conv_bias, activation="silu")
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.A_log = nn.Parameter(torch.empty(heads))
        self.D = nn.Parameter(torch.empty(heads))
        gate_first = output_norm == "gate_first"
        self.norm = None if output_norm is None else GatedRMSNorm(inner, groups, norm_eps, gate_first)
        self.output = nn.Linear(inner, width, bias=bias)

    def forward(self, x: Tensor, seq: Sequence) -> Tensor:
        parts = self.times("value", self.value(x)), self.times("key", self.key(x)), self.times("query", self.query(x))
        v, k, q = self.conv.of_parts(parts, seq)
        v = v.unflatten(-1, (self.heads, self.head_dim))
        k, q = (part.unflatten(-1, (self.groups, self.state)) for part in (k, q))
        step = self.steps(x)
        log_decay = -self.A_log.to(step.dtype).exp() * step
        out = self.read(x, q, k, scale_heads(v, step), log_decay, seq)
        out, gate = add_skip(out, v, self.D).flatten(-2), self.times("gate", self.gate(x))
        return self.output(swiglu(gate, out) if self.norm is None else self.norm(out, gate))

    def times(self, name: str, x: Tensor) -> Tensor:
        """What the layer `name` gave, times its multiplier."""
        multiplier = self.multipliers.get(name, 1.0)
        return x if multiplier == 1.0 else x * multiplier

    def read(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, seq: Sequence) -> Tensor:
        """C_t S_t `[B, T, H, P]`, of C, B `[B, T, G, N]` and delta x `[B, T, H, P]`."""
        return ops.gated_linear_attention(q, k, v, log_decay, seq=seq, scale=1.0)

    def steps(self, x: Tensor) -> Tensor:
        """delta `[B, T, H]`, in float32 at least: sums of it over many tokens are exponents."""
        raw = self.times("step", self.step(x))
        return F.softplus(raw + self.dt_bias.to(raw.dtype)).clamp(*self.step_limit)

    def mixing_flops(self, seq: Sequence) -> int:
        return flops(seq.places, heads=self.heads, key_dim=self.state, value_dim=self.head_dim)

    def initialise_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> bool:
        if name == "A_log":
            tensor.copy_(torch.arange(1, len(tensor) + 1)).log_()
        elif name == "D":
            tensor.fill_(self.initial_skip)
        elif name == "dt_bias":
            fill_with_steps(tensor, generator, self.step_range, self.step_floor)
        else:
            return False
        return True


class GatedRMSNorm(nn.Module):
    """RMSNorm(x * silu(gate)) within each of `groups` equal parts of the width, with a weight a channel.

    RMSNorm(x) * silu(gate) with gate_first=False.
    """

    def __init__(self, width: int, groups: int, eps: float, gate_first: bool = True) -> None:
        super().__init__()
        self.groups, self.eps, self.gate_first = groups, eps, gate_first
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        x, gate = (part.unflatten(-1, (self.groups, -1)) for part in (x, gate))
        weight = self.weight.unflatten(0, (self.groups, -1))
        return gated_norm(x, gate, weight, eps=self.eps, gate_first=self.gate_first).flatten(-2)

    def initialise_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> bool:
        tensor.fill_(1.0)
        return True
