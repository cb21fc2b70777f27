"""RMS and L2 norms with a backward that keeps its input and one number per row."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..dispatch import by_kernels, by_library
from ..operation import Function
from . import library
from .tiles import in_cache


def rms_norm(x: Tensor, weight: Tensor | None, eps: float = 1e-6, offset: float = 0.0) -> Tensor:
    """Root-mean-square norm over the last dim (Zhang and Sennrich, 2019, arXiv 1910.07467).

        y = x / sqrt(mean(x^2) + eps) * (offset + weight)

    x `[..., D]`, weight `[D]` or None (no weight, and then no offset). Computed in float32 (float64 for float64); y is
    in x's type. Raises ValueError where the weight does not fit.
    """
    if weight is None and offset:
        raise ValueError(f"offset must come with a weight; got offset={offset} and no weight. Leave it at 0")
    if weight is not None and tuple(weight.shape) != (x.shape[-1],):
        raise ValueError(f"weight must be of shape [{x.shape[-1]}], x's last dim; got {tuple(weight.shape)}")
    return _norm(x, weight, eps, 1.0 if weight is None else offset)


def l2_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """y = x / sqrt(sum(x^2) + eps) over the last dim: what keeps keys of a delta rule at length 1.

    `[..., D]`. Computed in float32 (float64 for float64); y is in x's type. A zero vector stays zero, with a finite
    gradient.
    """
    width = x.shape[-1]
    return _norm(x, None, eps / width, width**-0.5)


def _norm(x: Tensor, weight: Tensor | None, eps: float, offset: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) times offset + weight, or times offset alone."""
    if by_library("rms_norm", x):
        return library.rms_norm(x, weight, eps, offset)
    return _RmsNorm.call(x, weight, eps, offset)


class _RmsNorm(Function):
    """x / sqrt(mean(x^2) + eps) times offset + weight, of which either may be all."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float, offset: float) -> Tensor:
        ctx.offset, ctx.kernels = offset, None
        if kernels := _kernels(x):
            y, inverse = kernels.norm(x, weight, eps, offset)
            ctx.save_for_backward(x, weight, inverse)
            ctx.kernels = kernels
            return y
        y, inverse = in_cache(partial(_normed, weight=weight, eps=eps, offset=offset), (_rows(x),), 2)
        ctx.save_for_backward(x, weight, inverse.view(*x.shape[:-1], 1))
        return y.view(x.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """With n = x·inverse and g = dy·(offset + weight):  dx = inverse (g − n mean(g·n)),  dweight = Σ dy·n."""
        x, weight, inverse = ctx.saved_tensors
        if ctx.kernels is not None:
            return *ctx.kernels.norm_backward(dy, x, weight, inverse, ctx.offset), None, None
        of_weight: bool = weight is not None and ctx.needs_input_grad[1]
        compute = partial(_gradients, weight=weight, offset=ctx.offset, of_weight=of_weight)
        dx, *sums = in_cache(compute, (_rows(dy), _rows(x), _rows(inverse)), 1)
        dweight = sums[0].to(weight.dtype) if weight is not None and sums else None
        return dx.view(x.shape), dweight, None, None


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _normed(x: Tensor, *, weight: Tensor | None, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """y and the inverse of each row."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    inverse = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    y = wide * inverse
    if weight is not None:
        y.mul_(weight.to(wide.dtype) + offset if offset else weight)
    elif offset != 1.0:
        y.mul_(offset)
    return y.to(x.dtype), inverse


def _gradients(
    dy: Tensor, x: Tensor, inverse: Tensor, *, weight: Tensor | None, offset: float, of_weight: bool
) -> tuple[Tensor, ...]:
    """dx and, if wanted, that of the weight in the inverse's type."""
    n = x.to(inverse.dtype) * inverse
    g = dy.to(inverse.dtype)
    dweight = (g * n).sum(0) if of_weight else None
    if weight is not None:
        g = g * (weight.to(inverse.dtype) + offset)
    elif offset != 1.0:
        g = g * offset
    along = (g * n).mean(-1, keepdim=True)
    dx = n.mul_(along).neg_().add_(g).mul_(inverse).to(x.dtype)
    return (dx,) if dweight is None else (dx, dweight)


def _kernels(x: Tensor) -> Any:
    """The module of Triton kernels where it serves x, else None."""
    kernels = by_kernels("rms_norm", x)
    return kernels if kernels is not None and kernels.takes_norm(x) else None
