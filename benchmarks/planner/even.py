"""Even: experts with equal loads, whatever the router has learned, so that what travels can be told to the byte."""

from __future__ import annotations

import torch
from torch import Tensor

from longreach.models.feed_forward.experts import MixtureOfExperts
from longreach.models.feed_forward.router import Router, Routing


class EvenRouter(Router):
    """Chooses experts in turn, whatever the scores; weights are those of the scores."""

    def even(self, tokens: int) -> Tensor:
        turn = torch.arange(tokens, device="cpu").unsqueeze(1)
        return (turn + 3 * torch.arange(self.chosen, device="cpu")) % self.experts

    def forward(self, x: Tensor) -> Routing:
        routing = super().forward(x)
        experts = self.even(len(x)).to(x.device)
        return routing._replace(experts=experts, weights=self.weigh(routing.scores, experts))


class EvenExperts(MixtureOfExperts):
    """A mixture of experts with that router."""

    def __init__(self, *, width: int, hidden: int, experts: int = 8, shared_hidden: int = 0) -> None:
        super().__init__(width=width, hidden=hidden, experts=experts, shared_hidden=shared_hidden, balance=0.1)
        self.router = EvenRouter(width, experts, 2)
