"""Grouped matrix product: rows in consecutive groups, each group times a matrix of its own; for experts of any load."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..dispatch import IMPLEMENTATIONS, announce, asked, kind_of, resolve
from ..operation import Function
from . import chunked, library, reference
from .grouping import Grouping, collect, spread
from .routed import routed_swiglu

__all__ = ["Grouping", "collect", "flops", "grouped_matmul", "routed_swiglu", "runs_routed", "spread"]


def grouped_matmul(x: Tensor, weight: Tensor, ends: Tensor, *, backend: str = "auto") -> Tensor:
    """The product of each row with the matrix of its group.

        out_m = weight_e x_m        for ends_(e-1) <= m < ends_e, with ends_(-1) = 0; 0 for the rows after the last end

    x `[M, K]`; weight `[E, N, K]`, each matrix as in a linear layer; ends int32 `[E]`, ascending, on the same device,
    at most M. Returns `[M, N]` in x's type, summed in float32 (float64 for float64); x and weight get their gradients.
    On a GPU nothing waits for the ends. backend: "library" is torch's own grouped product, which "auto" takes where
    it is known to be faster. Raises ValueError for shapes
    or types that do not fit, or a backend that cannot run.

    As in MegaBlocks (Gale et al., 2022, arXiv 2211.15841), without blocks that are padded.
    """
    if x.dim() != 2 or weight.dim() != 3 or x.shape[1] != weight.shape[2] or ends.shape != weight.shape[:1]:
        raise ValueError(
            f"weight must be [E, N, K] and ends [E] for x [M, K]; got {list(weight.shape)}, {list(ends.shape)} and "
            f"{list(x.shape)}"
        )
    if x.dtype != weight.dtype or ends.dtype != torch.int32:
        raise ValueError(
            f"x and weight must have one type and ends int32; got {x.dtype}, {weight.dtype} and {ends.dtype}"
        )
    return _GroupedMatmul.call(x, weight, ends, backend)


def runs_routed(x: Tensor, backend: str = "auto") -> bool:
    """Whether `routed_swiglu` takes rows like x, instead of grouped products: torch's on a CPU, not compiled."""
    if torch.compiler.is_compiling() or kind_of(x.device) != "cpu":
        return False
    return _implementation(x, x, backend) is chunked


def flops(rows: int, *, inputs: int, outputs: int) -> int:
    """FLOPs of a forward pass, whatever the groups: a product and a sum per row and weight."""
    return 2 * rows * inputs * outputs


class _GroupedMatmul(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, ends: Tensor, backend: str) -> Tensor:
        ctx.save_for_backward(x, weight, ends)
        ctx.backend = backend
        if torch.compiler.is_compiling():
            return _product(x, weight, ends, True, backend)
        return _implementation(x, weight, backend).product(x, weight, ends, True)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        """dx_m = weight_e^T dout_m,  dweight_e = sum of dout_m x_m^T over the rows m of e."""
        x, weight, ends = ctx.saved_tensors
        dout, (of_x, of_weight) = dout.contiguous(), ctx.needs_input_grad[:2]
        if torch.compiler.is_compiling():
            product, gradient = _product, _gradient
            dx = product(dout, weight, ends, False, ctx.backend) if of_x else None
            return dx, gradient(dout, x, ends, ctx.backend) if of_weight else None, None, None
        dx = _implementation(dout, weight, ctx.backend).product(dout, weight, ends, False) if of_x else None
        return dx, _implementation(x, dout, ctx.backend).gradient(dout, x, ends) if of_weight else None, None, None


def _implementation(x: Tensor, other: Tensor, backend: str) -> ModuleType:
    """Each has `product(x, weight, ends, transposed)`, with each matrix as it is or transposed, and `gradient`."""
    if asked("grouped_matmul", backend) == "auto" and library.is_faster(x, other):
        announce("grouped_matmul", x.device.type, "library", "faster on this device")
        return library
    chosen = resolve("grouped_matmul", backend, x.device, x.dtype, offered=(*IMPLEMENTATIONS, "library"))
    if chosen == "triton":
        from . import triton as kernels

        return kernels
    return {"reference": reference, "chunked": chunked, "library": library}[chosen]


@torch.library.custom_op("longreach::grouped_product", mutates_args=())
def _product(x: Tensor, weight: Tensor, ends: Tensor, transposed: bool, backend: str) -> Tensor:
    """As compiled graphs see it."""
    return _implementation(x, weight, backend).product(x, weight, ends, transposed)


@_product.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor, transposed: bool, backend: str) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1 if transposed else 2])


@torch.library.custom_op("longreach::grouped_gradient", mutates_args=())
def _gradient(dout: Tensor, x: Tensor, ends: Tensor, backend: str) -> Tensor:
    return _implementation(x, dout, backend).gradient(dout, x, ends)


@_gradient.register_fake
def _(dout: Tensor, x: Tensor, ends: Tensor, backend: str) -> Tensor:
    return x.new_empty(ends.shape[0], dout.shape[1], x.shape[1])
