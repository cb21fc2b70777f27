"""What every implementation computes of a part of the queries and keys, given their scores."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from . import IndexInputs

LOW = -1e30  # below every score; what a query without keys has for a log-sum-exp, so that exp(−inf − LOW) is 0


class Part(NamedTuple):
    """Scores of queries against keys, in float32 (float64).

    place: the rows and queries. scores `[B, C, H, N]` of attention, scaled. products `[B, C, I, N]`: index_scale *
    index_q . index_k. weights `[B, C, I]` or None. hidden bool `[B, C, J or 1, N]`: what is not seen.
    """

    place: tuple[slice, slice]
    scores: Tensor
    products: Tensor
    weights: Tensor | None
    hidden: Tensor

    @property
    def index(self) -> Tensor:
        """I, `[B, C, J, N]`."""
        if self.weights is None:
            return self.products
        return torch.einsum("bcin,bci->bcn", self.products.relu(), self.weights).unsqueeze(2)

    def lse(self) -> Tensor:
        """`[B, C, H + J]`: of attention's scores, then of the index."""
        index = self.index
        seen = self.scores.unflatten(2, (index.shape[2], -1)).masked_fill(self.hidden.unsqueeze(3), float("-inf"))
        index = index.masked_fill(self.hidden, float("-inf"))
        return torch.cat([seen.flatten(2, 3).logsumexp(-1), index.logsumexp(-1)], dim=-1)

    def attention(self, inputs: IndexInputs) -> Tensor:
        """p, `[B, C, J, N]`: the mean over the heads of a list; 0 where hidden."""
        assert inputs.lse is not None
        weights = (self.scores - inputs.lse[self.place].clamp(min=LOW).unsqueeze(-1)).exp()
        return weights.unflatten(2, (inputs.lists, -1)).mean(3).masked_fill(self.hidden, 0.0)

    def index_logs(self, inputs: IndexInputs) -> Tensor:
        """The logarithm of softmax(I), `[B, C, J, N]`; −inf where hidden."""
        assert inputs.index_lse is not None
        logs = self.index - inputs.index_lse[self.place].clamp(min=LOW).unsqueeze(-1)
        return logs.masked_fill(self.hidden, float("-inf"))

    def divergence(self, inputs: IndexInputs) -> tuple[Tensor, Tensor]:
        """This part's sum of p (log p − log r), and of p: `[B, C, J]` each."""
        p = self.attention(inputs)
        total = torch.xlogy(p, p) - (p * self.index_logs(inputs).masked_fill(self.hidden, 0.0))
        return total.sum(-1), p.sum(-1)

    def backward(self, dout: Tensor, inputs: IndexInputs) -> tuple[Tensor, Tensor | None]:
        """Gradients of products `[B, C, I, N]` and of weights `[B, C, I]`, from that of the output, `[B, T, J]`."""
        dindex = (self.index_logs(inputs).exp() - self.attention(inputs)) * dout[self.place].unsqueeze(-1)
        if self.weights is None:
            return dindex, None
        dweights = (self.products.relu() * dindex).sum(-1)
        return torch.where(self.products > 0, dindex * self.weights.unsqueeze(-1), 0.0), dweights
