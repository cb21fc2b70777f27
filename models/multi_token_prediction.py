"""Multi-token prediction: modules behind the model that learn to predict tokens further ahead."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import cast

import torch
from torch import Tensor, nn

from ..parallel.ahead import ahead
from ..parallel.sequence import Sequence
from .layers.normalisation import norm_of
from .part import Composite
from .vocabulary import NO_TARGET

DEFAULT_WEIGHT = 0.3  # DeepSeek-V3's for most of its training
Embed = Callable[[Tensor], Tensor]
Head = Callable[[Tensor, Tensor], Tensor]
Call = Callable[[int, Tensor, Tensor], tuple[Tensor, ...]]


class PredictionModule(nn.Module):
    """Module k of multi-token prediction, whose hidden states h^k predict the token k + 1 places ahead.

        h^k_t = norm(block(W [norm(h^(k-1)_t); norm(e_(t+k))]))        h^0: what the model's head reads, e: embeddings

    hidden, following `[B, T, width]` to `[B, T, width]` and what the block gives.
    """

    def __init__(self, *, width: int, block: Composite, norm: str, norm_eps: float) -> None:
        super().__init__()
        self.hidden_norm = norm_of(norm, width, norm_eps)
        self.embedding_norm = norm_of(norm, width, norm_eps)
        self.projection = nn.Linear(2 * width, width, bias=False)
        self.block = block
        self.norm = norm_of(norm, width, norm_eps)

    def forward(self, hidden: Tensor, seq: Sequence, following: Tensor) -> tuple[Tensor, ...]:
        x = self.projection(torch.cat([self.hidden_norm(hidden), self.embedding_norm(following)], dim=-1))
        result = self.block(x, seq)
        x, *given = result if self.block.gives else (result,)
        return self.norm(x), *given


class MultiTokenPrediction(nn.ModuleList):
    """Modules k = 1, 2, ... one behind the other (DeepSeek-V3, arXiv 2412.19437); embedding and head are the model's.

    Module k has a loss of its own: the sum over the tokens whose document has a target k + 1 places ahead in the row,
    divided by their number in the global batch. `weight` is shared equally among the modules. Generation and evaluation
    do without them.
    """

    def __init__(self, modules: Iterable[PredictionModule], weight: float | None) -> None:
        super().__init__(modules)
        if weight is not None and not len(self):
            raise ValueError(
                f"model.multi_token_prediction_weight must be null without modules; got {weight}. Set "
                "model.multi_token_prediction to their number"
            )
        if weight is not None and weight <= 0:
            raise ValueError(
                f"model.multi_token_prediction_weight must be positive; got {weight}. To train without the modules, "
                "set model.multi_token_prediction=0"
            )
        self.weight = DEFAULT_WEIGHT if weight is None else weight
        if reads := [name for module in self.members for name in module.block.reads]:
            raise ValueError(
                "model.multi_token_prediction must repeat a last layer that reads nothing of earlier ones; got one "
                f"that reads {reads[0]}. Let model.pattern end in another mixer, or leave it out"
            )

    @property
    def members(self) -> list[PredictionModule]:
        """The modules, as what they are."""
        return [cast(PredictionModule, module) for module in self]

    @property
    def losses(self) -> dict[str, float]:
        """The weight of each module's loss, by its path in here."""
        return {f"{k}.multi_token_prediction_{k + 1}": self.weight / len(self) for k in range(len(self))}

    def counts(self, targets: Tensor | None, seq: Sequence) -> list[float]:
        """For each module, how many tokens of whole rows have a target for it; targets int64 `[B, N]`, None for all."""
        if not len(self):
            return []
        if targets is None:
            targets = torch.zeros(seq.local.batch, seq.local.length, dtype=torch.int64, device="cpu")
        return [float((wanted != NO_TARGET).sum()) for wanted in ahead(targets, seq, len(self), NO_TARGET)]

    def predict(
        self, hidden: Tensor, tokens: Tensor, targets: Tensor, seq: Sequence, embed: Embed, head: Head, call: Call
    ) -> dict[str, Tensor]:
        """What the modules report, by path: their losses as sums over this rank's tokens, and what their blocks give.

        hidden `[B, T, width]`: what the head reads of the model. `call` runs the module of a number.
        """
        reported: dict[str, Tensor] = {}
        for k, both in enumerate(ahead(torch.stack([tokens, targets], dim=-1), seq, len(self), NO_TARGET)):
            following, wanted = both.unbind(-1)
            # A token without a following one has no target either, whatever stands here.
            hidden, *given = call(k, hidden, embed(following.clamp(min=0)))
            reported[f"{k}.multi_token_prediction_{k + 1}"] = head(hidden, wanted.contiguous())
            block = self.members[k].block
            names = (f"{k}.block.{name}" for name in (*block.losses, *block.sums))
            reported.update(zip(names, given[len(block.publishes) :], strict=True))
        return reported
