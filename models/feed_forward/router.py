"""The router of a mixture of experts: which experts each token goes to, and with what weights."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SCORES = ("softmax", "sigmoid")


class Routing(NamedTuple):
    """What a router says of N tokens: the chosen `experts` and their `weights`, and the `logits` of all experts.

    experts: int64 `[N, k]`. weights: `[N, k]`; logits and scores: `[N, E]`; all of these float32, or float64.
    """

    experts: Tensor
    weights: Tensor
    logits: Tensor
    scores: Tensor


class Router(nn.Module):
    """Chooses the `chosen` of `experts` with the highest scores, of a linear layer in float32.

        s = softmax(W x) or sigmoid(W x)        chosen: the highest s + bias        weights: scale * s of the chosen

    renormalise: divides the weights by their sum, before `scale`. logit_bias: W x has a learned bias. `bias`, a buffer
    that the layer updates, takes part in the choice alone, so that it needs no gradient (Wang et al., 2024, arXiv
    2408.15664).
    groups: the experts stand in as many equal groups, and only those of the `chosen_groups` with the highest sums of
    their `group_scores` best can be chosen, as in DeepSeek-V2 (arXiv 2405.04434, with sums of one) and DeepSeek-V3
    (arXiv 2412.19437, with sums of two).

    `[N, width]` to a `Routing`; whatever x's type, products are in float32 at least. Raises ValueError for numbers that
    do not fit.
    """

    bias: Tensor
    in_float32 = ("weight", "logit_bias")

    def __init__(
        self,
        width: int,
        experts: int,
        chosen: int,
        *,
        score: str = "softmax",
        renormalise: bool = True,
        scale: float = 1.0,
        groups: int = 1,
        chosen_groups: int = 1,
        group_scores: int = 2,
        logit_bias: bool = False,
    ) -> None:
        super().__init__()
        _check(experts, chosen, score, renormalise, groups, chosen_groups, group_scores)
        self.experts, self.chosen = experts, chosen
        self.score, self.renormalise, self.scale = score, renormalise, scale
        self.groups, self.chosen_groups, self.group_scores = groups, chosen_groups, group_scores
        self.weight = nn.Parameter(torch.empty(experts, width))
        self.logit_bias = nn.Parameter(torch.empty(experts)) if logit_bias else None
        self.register_buffer("bias", torch.zeros(experts))

    def forward(self, x: Tensor) -> Routing:
        wide = torch.promote_types(x.dtype, torch.float32)
        bias = None if self.logit_bias is None else self.logit_bias.to(wide)
        logits = F.linear(x.to(wide), self.weight.to(wide), bias)
        scores = logits.softmax(-1) if self.score == "softmax" else logits.sigmoid()
        experts = self._allowed(scores.detach() + self.bias).topk(self.chosen, dim=-1).indices
        return Routing(experts, self.weigh(scores, experts), logits, scores)

    def weigh(self, scores: Tensor, experts: Tensor) -> Tensor:
        """The weights `[N, k]` of chosen experts, by the scores `[N, E]`."""
        weights = scores.gather(1, experts)
        if self.renormalise:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * self.scale

    def even(self, tokens: int) -> Tensor:
        """int64 `[tokens, k]`, on the host: the choices of tokens whose scores are drawn, by which no expert is better.

        What tokens choose of experts with even loads, as far as that can be known without any.
        """
        generator = torch.Generator("cpu").manual_seed(0)
        scores = torch.rand(tokens, self.experts, generator=generator, device="cpu")
        return self._allowed(scores).topk(self.chosen, dim=-1).indices

    def initialise_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> bool:
        if name != "logit_bias":
            return False
        tensor.zero_()
        return True

    def _allowed(self, ranked: Tensor) -> Tensor:
        """-inf for experts outside the chosen groups."""
        if self.groups == 1:
            return ranked
        by_group = ranked.unflatten(1, (self.groups, -1))
        best = by_group.topk(self.group_scores, dim=-1).values.sum(-1).topk(self.chosen_groups, dim=-1).indices
        outside = torch.ones(by_group.shape[:2], dtype=torch.bool, device=ranked.device).scatter_(1, best, False)
        return by_group.masked_fill(outside.unsqueeze(2), -torch.inf).flatten(1)


def _check(
    experts: int, chosen: int, score: str, renormalise: bool, groups: int, chosen_groups: int, group_scores: int
) -> None:
    if experts < 1 or not 1 <= chosen <= experts:
        raise ValueError(
            f"feed_forward.experts_per_token must be between 1 and the {experts} of feed_forward.experts; got {chosen}"
        )
    if score not in SCORES:
        raise ValueError(f"feed_forward.score must be one of {', '.join(SCORES)}; got {score!r}")
    if renormalise and chosen == 1:
        raise ValueError(
            "feed_forward.renormalise must be false with feed_forward.experts_per_token=1; got true, by which each "
            "weight is 1 and the router learns nothing"
        )
    if groups < 1 or experts % groups:
        raise ValueError(f"feed_forward.groups must divide the {experts} of feed_forward.experts; got {groups}")
    if not 1 <= chosen_groups <= groups or chosen > chosen_groups * (experts // groups):
        raise ValueError(
            f"feed_forward.chosen_groups must be between 1 and the {groups} of feed_forward.groups, and as many groups "
            f"must hold {chosen} experts; got {chosen_groups} groups of {experts // groups}"
        )
    if groups > 1 and not 1 <= group_scores <= experts // groups:
        raise ValueError(
            f"feed_forward.group_scores must be between 1 and the {experts // groups} experts of a group; got "
            f"{group_scores}"
        )
