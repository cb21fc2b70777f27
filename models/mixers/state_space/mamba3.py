"""Mamba-3."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ....kernels.gated_linear import flops
from ....parallel import ops
from ....parallel.sequence import Sequence
from ...layers.decay_gate import GateLinear, fill_with_steps
from ...layers.normalisation import RMSNorm
from ...layers.phases import cumulative_phases, turned
from ...mixer import Mixer, head_size

STEPS = (1e-3, 1e-1)  # where steps start
LEAST = 1e-4  # of steps at the start, and of rates of decay at any time


class Mamba3(Mixer):
    """A state space that turns, with trapezoidal steps (Mamba-3, Lahoti et al., 2026, arXiv 2603.15569).

        delta = softplus(W_delta u + dt_bias)        lambda = sigmoid(W_lambda u)        u the input
        log a = -delta max(softplus(W_A u), 0.0001)        phi_t = phi_(t-1) + delta_t pi tanh(W_phi u_t)
        B_r = turned(RMSNorm(W_Br u) + b_r, phi)        C_r = turned(RMSNorm(W_Cr u) + c_r, phi)        r = 1 … rank
        U = sum_r B_r^T x_r        S_t = a_t (S_(t-1) + (1 - lambda_t) delta_t U_(t-1)) + lambda_t delta_t U_t
        y_r = (C_r S + D x_r) * silu(z_r)        out = W_o sum_r o_r * y_r

    in each head. x and z are W_x u and W_z u; of several inputs and outputs (MIMO, rank > 1), x_r and z_r are x and z
    times a weight per channel, as o_r is. `turned` rotates pairs of neighbouring channels, of the first rope_fraction
    of them; the authors' MIMO kernels pair other channels, which is the same in another order. There is no convolution.

    expansion: the width inside over the width; head_dim: of a head. state: channels of B and C, which `groups` of heads
    share before the biases. rank: work and states grow with its square. The rate softplus(W_A u) is that of the paper
    and flash-linear-attention; the authors' later code has another positive function there. Raises ValueError for
    sizes that do not divide.
    """

    in_float32 = ("dt_bias",)

    def __init__(
        self,
        *,
        width: int,
        expansion: float = 2,
        head_dim: int = 64,
        state: int = 128,
        groups: int = 1,
        rank: int = 1,
        rope_fraction: float = 0.5,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        inner = int(expansion * width)
        heads = head_size("head_dim", inner, head_dim)
        if groups < 1 or heads % groups:
            raise ValueError(f"groups must divide the {heads} heads; got {groups}. Change it, or expansion or head_dim")
        if rank < 1:
            raise ValueError(f"rank must be at least 1; got {rank}. 1 is one input and output per head")
        turns = int(state * rope_fraction) // 2
        if rope_fraction > 1 or turns < 1:
            raise ValueError(
                f"rope_fraction must be at most 1 and leave a pair of the {state} channels; got {rope_fraction}"
            )
        self.heads, self.head_dim, self.groups, self.state, self.rank = heads, head_dim, groups, state, rank
        self.gate = nn.Linear(width, inner, bias=False)  # z
        self.value = nn.Linear(width, inner, bias=False)  # x
        self.key = nn.Linear(width, rank * groups * state, bias=False)  # B
        self.query = nn.Linear(width, rank * groups * state, bias=False)  # C
        self.step = GateLinear(width, heads, bias=False)  # delta
        self.rate = GateLinear(width, heads, bias=False)  # A
        self.trapezoid = GateLinear(width, heads, bias=False)  # lambda
        self.turn = GateLinear(width, turns, bias=False)  # phi
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.key_norm, self.query_norm = RMSNorm(state, norm_eps), RMSNorm(state, norm_eps)
        self.key_bias = nn.Parameter(torch.empty(rank, heads, state))
        self.query_bias = nn.Parameter(torch.empty(rank, heads, state))
        self.D = nn.Parameter(torch.empty(heads))
        self.inlets = nn.Parameter(torch.empty(rank, heads, head_dim)) if rank > 1 else None
        self.gates = nn.Parameter(torch.empty(rank, heads, head_dim)) if rank > 1 else None
        self.outlets = nn.Parameter(torch.empty(rank, heads, head_dim)) if rank > 1 else None
        self.no_weight_decay = ("key_bias", "query_bias")
        self.output = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, seq: Sequence) -> Tensor:
        gate, v = (project(x).unflatten(-1, (self.heads, -1)) for project in (self.gate, self.value))
        keys = self.key_norm(self.key(x).unflatten(-1, (self.rank, self.groups, self.state)))
        queries = self.query_norm(self.query(x).unflatten(-1, (self.rank, self.groups, self.state)))
        step, share, log_decay = self.steps(x)
        angles = step.unsqueeze(-1) * (math.pi * self.turn(x).tanh()).unsqueeze(-2)
        phases = cumulative_phases(angles, seq)
        own = share * step  # lambda delta
        # Token t - 1 enters the state with all of its weight when t is known: a state of earlier tokens alone.
        parts = keys.flatten(2), v.flatten(2), own.to(v.dtype)
        before = ops.token_shift(torch.cat(parts, dim=-1), seq=seq)
        keys_before, v_before, own_before = before.split([part.shape[-1] for part in parts], dim=-1)
        weight = log_decay.exp() * (own_before.to(step.dtype) + (1 - share) * step)
        b, c = self.by_head(keys, self.key_bias), self.by_head(queries, self.query_bias)  # [B, T, R, H, N]
        b_before = self.by_head(keys_before.unflatten(-1, keys.shape[2:]), self.key_bias)
        q = turned(c, phases.unsqueeze(2))
        k = turned(b_before, (phases - angles).unsqueeze(2))
        v_before = weight.to(v.dtype).unsqueeze(-1) * v_before.view_as(v)
        v, v_before = (self.by_rank(part, self.inlets) for part in (v, v_before))
        out = self.D.to(v.dtype)[:, None] * v
        for number in range(self.rank):
            score = (c * b[:, :, number, None]).sum(-1) * own.to(v.dtype).unsqueeze(2)  # both would be turned alike
            out = out + score.unsqueeze(-1) * v[:, :, number, None]
            out = out + self.read(q, k[:, :, number], v_before[:, :, number], log_decay, seq, f"state {number}")
        out = out * F.silu(self.by_rank(gate, self.gates))
        if self.outlets is not None:
            out = out * self.outlets.to(out.dtype)
        return self.output(out.sum(2).flatten(-2))

    def steps(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """delta, lambda and log a `[B, T, H]`, in float32 at least: sums over many tokens are exponents."""
        raw = self.step(x)
        step = F.softplus(raw + self.dt_bias.to(raw.dtype))
        return step, self.trapezoid(x).sigmoid(), -step * F.softplus(self.rate(x)).clamp(min=LEAST)

    def by_head(self, x: Tensor, bias: Tensor) -> Tensor:
        """`[B, T, R, G, N]` to `[B, T, R, H, N]`, with the biases of heads."""
        return (x.unsqueeze(4) + bias.to(x.dtype).unflatten(1, (self.groups, -1))).flatten(3, 4)

    def by_rank(self, x: Tensor, weight: Tensor | None) -> Tensor:
        """`[B, T, H, P]` to `[B, T, R, H, P]`."""
        return x.unsqueeze(2) if weight is None else x.unsqueeze(2) * weight.to(x.dtype)

    def read(self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, seq: Sequence, slot: str) -> Tensor:
        """What all queries `[B, T, R, H, N]` read of the state of keys `[B, T, H, N]` and values `[B, T, H, P]`."""
        k, v = (part.unsqueeze(2).expand(-1, -1, self.rank, -1, -1).flatten(2, 3) for part in (k, v))
        log_decay = log_decay.repeat(1, 1, self.rank)
        out = ops.gated_linear_attention(q.flatten(2, 3), k, v, log_decay, seq=seq, scale=1.0, slot=slot)
        return out.unflatten(2, (self.rank, -1)).to(v.dtype)

    def mixing_flops(self, seq: Sequence) -> int:
        heads = self.rank**2 * self.heads
        return flops(seq.places, heads=heads, key_dim=self.state, value_dim=self.head_dim)

    def initialise_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> bool:
        if name in ("inlets", "outlets"):
            tensor.fill_(1 / self.rank)
        elif name in ("gates", "key_bias", "query_bias", "D"):
            tensor.fill_(1.0)
        elif name == "dt_bias":
            fill_with_steps(tensor, generator, STEPS, LEAST)
        else:
            return False
        return True
