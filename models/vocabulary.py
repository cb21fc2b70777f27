"""The layers between tokens and hidden states: the embedding, and the head that gives logits or their loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.pointwise import cross_entropy, embedding, loss_and_correct

NO_TARGET = -100


class Embedding(nn.Embedding):
    """The input layer: tokens int64 `[B, T]` to `[B, T, D]`."""

    def forward(self, tokens: Tensor) -> Tensor:
        return embedding(tokens, self.weight)


class Head(nn.Linear):
    """The output layer; given targets it returns their loss, so that the logits of a sequence never exist at once.

    hidden `[B, T, D]` to logits `[B, T, Vocab]`; with targets int64 `[B, T]` (−100 = none) to the sum of the token
    losses, a scalar in float32 or, for float64, float64. The loss is computed in here because this is where ZeRO-3
    gathers the weight. With `correct`, for evaluation: without gradient, and also the number of targets that have the
    largest logit; with `each` too, both by token `[B, T]`, in place of sum and number. Logits are multiplied by the
    constant `multiplier`; those l become softcap * tanh(l / softcap) then, where there is a softcap.
    """

    def __init__(self, width: int, vocabulary: int, multiplier: float = 1.0, softcap: float | None = None) -> None:
        super().__init__(width, vocabulary, bias=False)
        self.multiplier, self.softcap = multiplier, softcap

    def forward(
        self, hidden: Tensor, targets: Tensor | None = None, correct: bool = False, each: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        if targets is None:
            logits = super().forward(hidden)
            logits = logits if self.multiplier == 1.0 else logits * self.multiplier
            return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)
        settings: dict[str, Any] = {"logit_scale": self.multiplier, "softcap": self.softcap}
        if correct:
            return loss_and_correct(hidden, self.weight, targets, each=each, **settings)
        return cross_entropy(hidden, self.weight, targets, **settings)
