"""Doubly stochastic matrices by Sinkhorn's iterations, with a backward that keeps only the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..operation import Function


def doubly_stochastic(logits: Tensor, iterations: int, eps: float = 1e-6) -> Tensor:
    """exp(logits) with rows and columns divided by their sums in turn (Sinkhorn and Knopp, 1967).

        M = softmax(logits) + eps over each row; columns; then `iterations` − 1 times rows and columns

    `[..., n, n]` to the same, nearly doubly stochastic: columns sum to 1, and rows nearly so after many iterations.
    `eps` is added to every sum. Backward repeats the iterations rather than keep what they made of each token.
    """
    return _DoublyStochastic.call(logits, iterations, eps)


class _DoublyStochastic(Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, iterations: int, eps: float) -> Tensor:
        ctx.save_for_backward(logits)
        ctx.iterations, ctx.eps = iterations, eps
        matrix = logits.softmax(-1) + eps
        for dim in _dims(iterations):
            matrix = matrix / (matrix.sum(dim, keepdim=True) + eps)
        return matrix

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None, None]:
        """Of y = x / (sum(x) + eps):  dx = (dy − sum(dy·y)) / (sum(x) + eps)."""
        (logits,) = ctx.saved_tensors
        first = logits.softmax(-1)
        matrix, made = first + ctx.eps, []
        for dim in _dims(ctx.iterations):
            total = matrix.sum(dim, keepdim=True) + ctx.eps
            matrix = matrix / total
            made.append((dim, total, matrix))
        for dim, total, matrix in reversed(made):
            dout = (dout - (dout * matrix).sum(dim, keepdim=True)) / total
        return first * (dout - (dout * first).sum(-1, keepdim=True)), None, None


def _dims(iterations: int) -> list[int]:
    """Which dim is divided by its sums, in order; the softmax before has done the first rows."""
    return [-2, *[-1, -2] * (iterations - 1)]
