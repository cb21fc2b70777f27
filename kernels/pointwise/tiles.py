"""Tiles: what is computed of each token by itself, for so many tokens at a time, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..dispatch import starts
from ..operation import Function

Compute = Callable[..., Tensor | tuple[Tensor, ...]]
TILE = 1 << 17  # numbers of a tile; of half as many, operations take too long to start


def on_cpu(x: Tensor) -> bool:
    """Whether x is computed by a CPU, operation by operation, so that tiles pay; on `meta` as there."""
    return x.device.type in ("cpu", "meta") and not torch.compiler.is_compiling()


def in_cache(compute: Callable[..., tuple[Tensor, ...]], rows: tuple[Tensor, ...], outputs: int) -> tuple[Tensor, ...]:
    """compute(*rows), on a CPU some rows at a time, so that no result between two operations leaves its caches.

    rows: `[R, …]` each; `compute` must treat each by itself, and returns `outputs` tensors `[n, …]` of n rows and then
    what is summed over rows. Not differentiable. On `meta` two tiles stand for all; see `starts`.
    """
    if not on_cpu(rows[0]):
        return compute(*rows)
    count, device = rows[0].shape[0], rows[0].device
    size = max(1, TILE // max(1, rows[0].shape[1:].numel()))
    if count <= size:
        return compute(*rows)
    results: tuple[Tensor, ...] = ()
    for start in starts(count, size, device):
        found = compute(*(x[start : start + size] for x in rows))
        if not results:
            results = (
                *(x.new_empty(count, *x.shape[1:]) for x in found[:outputs]),
                *map(torch.zeros_like, found[outputs:]),
            )
        for place, (whole, part) in enumerate(zip(results, found, strict=True)):
            if place < outputs:
                whole[start : start + size] = part
            else:
                whole.add_(part)
    return results


def tiled(compute: Compute, tokens: tuple[Tensor, ...], weights: Iterable[Tensor], size: int) -> tuple[Tensor, ...]:
    """(out, *sums) = compute(*tokens), computed for at most `size` tokens at a time.

    tokens: `[N, …]` each; `compute` must treat each token by itself, and returns out `[n, …]` of n tokens, or a tuple
    of it and of what is summed over tokens. weights: the parameters that `compute` reads, which get their gradients.
    Nothing is kept for backward but `tokens`: it computes each tile again, adds up the gradients of the weights in
    float32 at least, and gives each weight its own once. The peak beside inputs, output and gradients is that of one
    tile, whatever N. What `compute` raises is passed on.
    """
    return _Tiled.call(compute, size, len(tokens), *tokens, *weights)


class _Tiled(Function):
    @staticmethod
    def forward(ctx: Any, compute: Compute, size: int, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        tokens = tensors[:count]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tokens)
        # Parameters are the modules' own, and none of what a layer keeps: ZeRO-3 takes their values away and back.
        ctx.compute, ctx.size, ctx.weights = compute, size, tensors[count:]
        out: Tensor | None = None
        sums: list[Tensor] = []
        for start in starts(tokens[0].shape[0], size, tokens[0].device):
            part, *rest = _as_tuple(compute(*(x[start : start + size] for x in tokens)))
            if out is None:
                out = part.new_empty(tokens[0].shape[0], *part.shape[1:])
                sums = [torch.zeros_like(each) for each in rest]
            out[start : start + len(part)] = part
            for total, each in zip(sums, rest, strict=True):
                total.add_(each)
        assert out is not None
        return out, *sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor | None, *dsums: Tensor | None) -> tuple[Tensor | None, ...]:
        tokens, weights = ctx.saved_tensors, ctx.weights
        needed = ctx.needs_input_grad[3:]
        dtokens = [torch.empty_like(x) if need else None for x, need in zip(tokens, needed, strict=False)]
        dweights = [
            torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float32)) if need else None
            for w, need in zip(weights, needed[len(tokens) :], strict=True)
        ]
        wanted = [w for w, dw in zip(weights, dweights, strict=True) if dw is not None]
        for start in starts(tokens[0].shape[0], ctx.size, tokens[0].device):
            part = slice(start, start + ctx.size)
            tile = [x[part].detach().requires_grad_(dx is not None) for x, dx in zip(tokens, dtokens, strict=True)]
            with torch.enable_grad():
                results = _as_tuple(ctx.compute(*tile))
            gradients = (None if dout is None else dout[part], *dsums)
            pairs = [(y, dy) for y, dy in zip(results, gradients, strict=True) if dy is not None and y.requires_grad]
            inputs = [x for x in tile if x.requires_grad]
            if not pairs:
                grads: list[Tensor | None] = [None] * (len(inputs) + len(wanted))
            else:
                ys, dys = zip(*pairs, strict=True)
                grads = list(torch.autograd.grad(ys, [*inputs, *wanted], dys, allow_unused=True))
            rest = iter(grads)
            for dx in (dx for dx in dtokens if dx is not None):
                _set(dx[part], next(rest))
            for dw, grad in zip((dw for dw in dweights if dw is not None), rest, strict=True):
                if grad is not None:
                    dw.add_(grad)
        typed = (None if dw is None else dw.to(w.dtype) for w, dw in zip(weights, dweights, strict=True))
        return None, None, None, *dtokens, *typed


def _as_tuple(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else result


def _set(place: Tensor, value: Tensor | None) -> None:
    place.zero_() if value is None else place.copy_(value)
