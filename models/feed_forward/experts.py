"""Mixture of experts: a feed-forward layer of many small ones, of which each token runs few."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels.grouped_matmul import Grouping, collect, flops, grouped_matmul, routed_swiglu, runs_routed, spread
from ...parallel.ops.experts import to_experts
from ...parallel.sequence import Sequence
from ..part import FeedForward, is_sharded, named_weights, shape_of
from .mlp import ACTIVATIONS, MLP
from .router import Router, Routing
from .swiglu import SwiGLU, check_limit, gated

GATED = "swiglu"


class ExpertLinear(nn.Module):
    """A linear layer of each expert: rows `[M, inputs]`, sorted by expert, to `[M, outputs]`; see `grouped_matmul`.

    The weight `[experts, outputs, inputs]` and the bias `[experts, outputs]` hold the experts of this rank alone where
    ranks share them. Rows after the last expert's give 0.
    """

    bias: nn.Parameter | None
    by_expert = ("weight", "bias")
    no_weight_decay = ("bias",)
    matrices = ("weight",)

    def __init__(self, experts: int, inputs: int, outputs: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, outputs, inputs))
        self.register_parameter("bias", nn.Parameter(torch.empty(experts, outputs)) if bias else None)

    def forward(self, x: Tensor, ends: Tensor, backend: str) -> Tensor:
        out = grouped_matmul(x, self.weight, ends, backend=backend)
        if self.bias is None:
            return out
        # As a product with ones, it has a gradient without atomic additions. Libraries want rows of 16 bytes.
        ones, columns = x.new_ones(x.shape[0], 8), F.pad(self.bias.unsqueeze(2), (0, 7))
        return out + grouped_matmul(ones, columns, ends, backend=backend)


class Experts(nn.Module):
    """Feed-forward layers of which each row runs the chosen ones: y = sum_c weights_c * expert_c(x).

    x `[N, width]`, chosen int64 `[N, k]` (−1 for none), weights `[N, k]`; `[N, width]` in the type of the weights. No
    row is dropped or padded, whatever the experts' loads. choices: how many of `chosen` are not −1, where the host
    knows it; else there is room for all. With weigh_inputs y = sum_c expert_c(weights_c * x).
    activation: "swiglu", or one of those of `MLP`, with which experts have two matrices. bias, limit: as in `SwiGLU`.
    """

    def __init__(
        self,
        experts: int,
        width: int,
        hidden: int,
        *,
        bias: bool = False,
        limit: float | None = None,
        weigh_inputs: bool = False,
        activation: str = GATED,
    ) -> None:
        super().__init__()
        self.gate = ExpertLinear(experts, width, hidden, bias) if activation == GATED else None
        self.activation = ACTIVATIONS.get(activation)
        self.up = ExpertLinear(experts, width, hidden, bias)
        self.down = ExpertLinear(experts, hidden, width, bias)
        self.limit, self.weigh_inputs = limit, weigh_inputs

    def forward(
        self, x: Tensor, chosen: Tensor, weights: Tensor, count: int, backend: str, choices: int | None = None
    ) -> Tensor:
        grouping = Grouping.of(chosen, count)
        grouping = grouping if choices is None else grouping.first(choices)
        if (matrices := self._swiglus()) is not None and runs_routed(x, backend):
            return routed_swiglu(x, weights, grouping, *matrices)
        rows = spread(x, grouping)
        if self.weigh_inputs:
            rows = (rows * weights.flatten().index_select(0, grouping.order).unsqueeze(1)).to(rows.dtype)
            weights = torch.ones_like(weights)
        return collect(self.down(self._hidden(rows, grouping.ends, backend), grouping.ends, backend), weights, grouping)

    def _swiglus(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """The matrices, where they are all that the experts have, and at hand."""
        if self.gate is None or self.gate.bias is not None or self.limit is not None or self.weigh_inputs:
            return None
        matrices = self.gate.weight, self.up.weight, self.down.weight
        return None if any(map(is_sharded, matrices)) else matrices

    def _hidden(self, rows: Tensor, ends: Tensor, backend: str) -> Tensor:
        if self.gate is not None:
            return gated(self.gate(rows, ends, backend), self.up(rows, ends, backend), self.limit)
        assert self.activation is not None
        return self.activation(self.up(rows, ends, backend))


class MixtureOfExperts(FeedForward):
    """Mixture of experts (Shazeer et al., 2017, arXiv 1701.06538): a router sends each token to few of many experts.

        y = sum over the chosen experts e of weight_e * expert_e(x)  +  gate * expert_shared(x)

    experts, experts_per_token, hidden: how many there are, how many a token runs, and the hidden size of each.
    activation: "swiglu" for experts that are SwiGLUs; one of those of `MLP` for experts of two matrices, such as
        "squared_relu" in Nemotron 3.
    expert_width: the size of what the experts read and return, between two linear layers that all share (LatentMoE of
        Nemotron 3 Super); None for that of the residual stream. What every token runs besides reads the latter.
    shared_hidden: the hidden size of what every token runs besides, 0 for nothing (DeepSeekMoE, arXiv 2401.06066);
        shared_gate multiplies it by sigmoid of a linear function of the token, as in Qwen2-MoE; else gate is 1.
    score, renormalise, scale, groups, chosen_groups, group_scores: see `Router`; router_bias is its logit_bias.
    weigh_inputs: weights multiply what experts read rather than what they return, as in Llama 4.
    bias: of the experts and of what every token runs besides. limit: of SwiGLUs, see there; both are those of gpt-oss
        (arXiv 2508.10925).
    balance: the weight of the load-balancing loss (Switch Transformer, arXiv 2101.03961), a mean over tokens of
        E * sum_e share_e p_e, where p is the scores, divided by their sum, and share_e expert e's part of all choices,
        1 where these are even. The shares are those of the last step's whole batch, so that the loss is the same on any
        ranks and micro-batches. In the first step they are even, and the loss has no gradient.
    z: the weight of the router z-loss, the mean of logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906).
    bias_rate: after each step, a bias that takes part in the choice alone rises by so much for experts with less than
        the mean load, and falls for the others (Wang et al., 2024, arXiv 2408.15664); 0 leaves it at 0.

    `[B, T, width]` to the same. Padding goes to no expert and counts nowhere; no token is dropped. Raises ValueError
    for sizes that do not fit.
    """

    shares: Tensor
    stateless = True
    outputs = ("experts.down", "shared.down")
    small = MappingProxyType(
        {"experts": 16, "experts_per_token": 2, "hidden": 24, "shared_hidden": 16, "expert_width": 8}
    )
    sums = ("load",)

    def __init__(
        self,
        *,
        width: int,
        hidden: int,
        experts: int,
        experts_per_token: int = 2,
        shared_hidden: int = 0,
        shared_gate: bool = False,
        score: str = "softmax",
        renormalise: bool = True,
        scale: float = 1.0,
        groups: int = 1,
        chosen_groups: int = 1,
        group_scores: int = 2,
        router_bias: bool = False,
        weigh_inputs: bool = False,
        activation: str = GATED,
        expert_width: int | None = None,
        bias: bool = False,
        limit: float | None = None,
        balance: float = 0.0,
        z: float = 0.0,
        bias_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if hidden < 1:
            raise ValueError(f"feed_forward.hidden must be at least 1; got {hidden}. It is the size of one expert")
        if shared_hidden < 0 or (shared_gate and not shared_hidden):
            raise ValueError(
                f"feed_forward.shared_hidden must be at least {int(shared_gate)} with shared_gate="
                f"{str(shared_gate).lower()}; got {shared_hidden}"
            )
        check_limit(limit)
        if activation != GATED and activation not in ACTIVATIONS:
            known = ", ".join((GATED, *ACTIVATIONS))
            raise ValueError(f"feed_forward.activation must be one of {known}; got {activation!r}. Choose one")
        if activation != GATED and limit is not None:
            raise ValueError(f"feed_forward.limit must be null with activation={activation}; got {limit}. Leave it out")
        if expert_width is not None and expert_width < 1:
            raise ValueError(f"feed_forward.expert_width must be at least 1; got {expert_width}. null is the width")
        for name, value in (("balance", balance), ("z", z), ("bias_rate", bias_rate)):
            if value < 0:
                raise ValueError(f"feed_forward.{name} must be at least 0; got {value}. 0 leaves it out")
        self.router = Router(
            width, experts, experts_per_token, score=score, renormalise=renormalise, scale=scale, groups=groups,
            chosen_groups=chosen_groups, group_scores=group_scores, logit_bias=router_bias,
        )  # fmt: skip
        self.narrow = self.widen = None
        if expert_width is not None:
            self.narrow = nn.Linear(width, expert_width, bias=False)
            self.widen = nn.Linear(expert_width, width, bias=False)
            self.outputs = ("widen", "shared.down")
        self.expert_width = width if expert_width is None else expert_width
        self.experts = Experts(
            experts, self.expert_width, hidden, bias=bias, limit=limit, weigh_inputs=weigh_inputs, activation=activation
        )
        self.shared: FeedForward | None = None
        if shared_hidden and activation == GATED:
            self.shared = SwiGLU(width=width, hidden=shared_hidden, bias=bias, limit=limit)
        elif shared_hidden:
            self.shared = MLP(width=width, hidden=shared_hidden, bias=bias, activation=activation)
        self.shared_gate = nn.Linear(width, 1, bias=False) if shared_gate else None
        self.losses = {name: weight for name, weight in (("balance", balance), ("z", z)) if weight}
        self.width, self.hidden, self.bias_rate = width, hidden, bias_rate
        if balance:
            self.register_buffer("shares", torch.full((experts,), 1 / experts))

    def forward(self, x: Tensor, seq: Sequence) -> tuple[Tensor, ...]:
        compute = partial(self._of_tokens, seq)
        *results, load = self.by_tiles(compute, x, seq.reach(x.device) >= 0)
        return *results, load.detach()

    def _of_tokens(self, seq: Sequence, x: Tensor, real: Tensor) -> tuple[Tensor, ...]:
        """The output for tokens `[…, D]`, and what is summed over them; `real`: which are no padding."""
        rows, real, count = x.flatten(0, -2), real.flatten(), self.router.experts
        routing = self.router(rows)
        chosen = torch.where(real.unsqueeze(1), routing.experts, -1)
        travel = to_experts(
            chosen, count, seq=seq, even=self.router.even
        )  # where ranks share the experts; what is shared runs meanwhile
        shared = self._shared(x, seq)
        out = travel(rows if self.narrow is None else self.narrow(rows), routing.weights, self.experts).to(x.dtype)
        out = (out if self.widen is None else self.widen(out)).view(x.shape)
        out = out if shared is None else out + shared
        return out, *self._losses(routing, real), _load(chosen, count)

    def _shared(self, x: Tensor, seq: Sequence) -> Tensor | None:
        if self.shared is None:
            return None
        out = self.shared(x, seq)
        return out if self.shared_gate is None else torch.sigmoid(self.shared_gate(x)) * out

    def _losses(self, routing: Routing, real: Tensor) -> list[Tensor]:
        """Of each of `losses` the sum over this rank's tokens."""
        values = []
        if "balance" in self.losses:
            likely = routing.scores / (routing.scores.sum(-1, keepdim=True) + 1e-20)
            values.append(self.router.experts * (likely @ self.shares.to(likely.dtype)))
        if "z" in self.losses:
            values.append(routing.logits.logsumexp(-1).square())
        return [torch.where(real, value, 0.0).sum() for value in values]

    def update(self, sums: Mapping[str, Tensor]) -> None:
        load = sums["load"]
        if self.bias_rate:
            self.router.bias += (self.bias_rate * torch.sign(load.mean() - load)).to(self.router.bias.dtype)
        if "balance" in self.losses:
            self.shares.copy_(load / load.sum())

    def statistics(self, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The busiest and the idlest expert's part of all choices, and their entropy over that of an even load."""
        load = sums["load"]
        shares = load / load.sum()
        entropy = torch.special.entr(shares).sum() / math.log(max(2, len(load)))
        return {"busiest_expert": shares.max(), "idlest_expert": shares.min(), "expert_entropy": entropy}

    def mixing_flops(self, seq: Sequence) -> int:
        """Of the router, and of the experts that tokens run: padding runs none."""
        router = flops(seq.places, inputs=self.width, outputs=self.router.experts)
        matrices = 2 if self.experts.gate is None else 3
        rows = seq.tokens * self.router.chosen
        return router + matrices * flops(rows, inputs=self.expert_width, outputs=self.hidden)

    def idle_parameters(self) -> int:
        """Those of the experts that a token does not run."""
        expert = sum(shape_of(weight)[1:].numel() for _, weight in named_weights(self.experts))
        return expert * (self.router.experts - self.router.chosen)


def _load(chosen: Tensor, count: int) -> Tensor:
    """`[E]`, float32: how many tokens go to each expert."""
    flat = torch.where(chosen < 0, count, chosen).flatten()
    ones = torch.ones(flat.shape, device=flat.device)
    return ones.new_zeros(count + 1).scatter_add_(0, flat, ones)[:count]
