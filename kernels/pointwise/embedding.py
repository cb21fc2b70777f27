"""Embedding with a backward that adds up in float32: in bfloat16 torch rounds after every token on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..operation import Function


def embedding(tokens: Tensor, weight: Tensor) -> Tensor:
    """y_t = weight[tokens_t]: the row of each token.

    tokens int64 of any shape `[…]`, weight `[Vocab, D]`; y `[…, D]` in the weight's type. A row's gradient is added up
    over its tokens in float32 (float64 for float64) and rounded once. A token outside the vocabulary is torch's
    IndexError (a device assertion on an accelerator).
    """
    return _Embedding.call(tokens, weight)


class _Embedding(Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.rows, ctx.dtype = weight.shape[0], weight.dtype
        return F.embedding(tokens, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[None, Tensor]:
        (tokens,) = ctx.saved_tensors
        wide = dy.to(torch.promote_types(ctx.dtype, torch.float32))
        return None, torch.ops.aten.embedding_dense_backward(wide, tokens, ctx.rows, -1, False).to(ctx.dtype)
