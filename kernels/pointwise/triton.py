"""Token-local math as Triton kernels: one read and one write of each tensor, sums in float32, every run the same.

Rows are the last dim of a tensor, all else flattened. A program takes ROWS of them at a time, so that narrow rows (the
channels of a head) fill it as wide ones do; gradients of weights are summed by a fixed number of programs, and over
these by torch.
"""

# Kernels are typed by Triton, when they are compiled.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..compilation import Compilation

WIDEST = 8192  # the widest row that a program of rms_norm holds
TILE = 4096  # elements that a program holds at a time, unless a row is wider
SUMS = 512  # programs that sum gradients of a weight
VOCABULARY_BLOCK = 4096  # logits that a program reads at a time


@triton.jit
def _norm(x, weight, y, inverse, rows, D, eps, offset, WEIGHT: tl.constexpr, ROWS: tl.constexpr, W: tl.constexpr):
    """y = x / sqrt(mean x^2 + eps) (offset + weight), without a weight times offset; and the factor of each row."""
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, W)
    inside = (i < rows)[:, None] & (d < D)[None, :]
    at = tl.cast(i, tl.int64)[:, None] * D + d[None, :]
    values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    factor = tl.rsqrt(tl.sum(values * values, 1) / D + eps)
    values *= factor[:, None]
    if WEIGHT:
        values *= (tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32) + offset)[None, :]
    else:
        values *= offset
    tl.store(inverse + i, factor, mask=i < rows)
    tl.store(y + at, values.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _norm_backward(
    x, weight, dy, inverse, dx, sums, rows, D, offset, steps,
    WEIGHT: tl.constexpr, ROWS: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """dx, and the gradient of weight by the rows of each program, which are `steps` tiles: `[programs, D]`."""
    d = tl.arange(0, W)
    total = tl.zeros([W], tl.float32)
    if WEIGHT:
        gain = tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32) + offset
    for step in range(steps):
        i = (tl.program_id(0) * steps + step) * ROWS + tl.arange(0, ROWS)
        inside = (i < rows)[:, None] & (d < D)[None, :]
        at = tl.cast(i, tl.int64)[:, None] * D + d[None, :]
        factor = tl.load(inverse + i, mask=i < rows, other=0.0)[:, None]
        n = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * factor
        g = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        if WEIGHT:
            total += tl.sum(g * n, 0)
            g *= gain[None, :]
        else:
            g *= offset
        along = tl.sum(g * n, 1) / D
        tl.store(dx + at, ((g - n * along[:, None]) * factor).to(dx.dtype.element_ty), mask=inside)
    if WEIGHT:
        tl.store(sums + tl.cast(tl.program_id(0), tl.int64) * D + d, total, mask=d < D)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(-1.4426950408889634 * x))


@triton.jit
def _normed(u, inside, D, eps, CENTRED: tl.constexpr):
    """Rows of u over the root of their mean square, and one over that root; of their differences from the mean."""
    if CENTRED:
        u = tl.where(inside, u - (tl.sum(u, 1) / D)[:, None], 0.0)
    factor = tl.rsqrt(tl.sum(u * u, 1) / D + eps)[:, None]
    return u * factor, factor


@triton.jit
def _gated_norm(
    x, gate, weight, bias, y, rows, H, D, eps, BIAS: tl.constexpr, SILU: tl.constexpr, CENTRED: tl.constexpr,
    FIRST: tl.constexpr, ROWS: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """y = a norm(x), or norm(a x) where FIRST, a being the activated gate: of one of the H heads, that has a weight."""
    head = tl.program_id(1)
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, W)
    inside = (i < rows)[:, None] & (d < D)[None, :]
    at = (tl.cast(i, tl.int64) * H + head)[:, None] * D + d[None, :]
    u = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    active = _sigmoid(g)
    if SILU:
        active *= g
    if FIRST:
        u *= active
    n, _ = _normed(u, inside, D, eps, CENTRED)
    n *= tl.load(weight + head * D + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    if BIAS:
        n += tl.load(bias + head * D + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    if not FIRST:
        n *= active
    tl.store(y + at, n.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _gated_norm_backward(
    x, gate, weight, bias, dy, dx, dgate, sums, bias_sums, rows, H, D, eps, steps, BIAS: tl.constexpr,
    SILU: tl.constexpr, CENTRED: tl.constexpr, FIRST: tl.constexpr, ROWS: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """dx, dgate, and the gradients of weight and bias by the rows of each program: `[programs, H, D]`."""
    head = tl.program_id(1)
    d = tl.arange(0, W)
    gain = tl.load(weight + head * D + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    total, bias_total = tl.zeros([W], tl.float32), tl.zeros([W], tl.float32)
    for step in range(steps):
        i = (tl.program_id(0) * steps + step) * ROWS + tl.arange(0, ROWS)
        inside = (i < rows)[:, None] & (d < D)[None, :]
        at = (tl.cast(i, tl.int64) * H + head)[:, None] * D + d[None, :]
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
        dn = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        s = _sigmoid(g)
        active, slope = s, s * (1.0 - s)
        if SILU:
            active, slope = g * s, s * (1.0 + g * (1.0 - s))
        u = value
        if FIRST:
            u *= active
        n, factor = _normed(u, inside, D, eps, CENTRED)
        if not FIRST:
            result = n * gain
            if BIAS:
                result += tl.load(bias + head * D + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
            tl.store(dgate + at, (dn * result * slope).to(dgate.dtype.element_ty), mask=inside)
            dn *= active
        total += tl.sum(dn * n, 0)
        if BIAS:
            bias_total += tl.sum(dn, 0)
        dn *= gain
        du = dn - n * (tl.sum(dn * n, 1) / D)[:, None]
        if CENTRED:
            du -= (tl.sum(dn, 1) / D)[:, None]
        du *= factor
        if FIRST:
            tl.store(dgate + at, (du * value * slope).to(dgate.dtype.element_ty), mask=inside)
            du *= active
        tl.store(dx + at, du.to(dx.dtype.element_ty), mask=inside)
    to = (tl.cast(tl.program_id(0), tl.int64) * H + head) * D + d
    tl.store(sums + to, total, mask=d < D)
    if BIAS:
        tl.store(bias_sums + to, bias_total, mask=d < D)


@triton.jit
def _gated(gate, up, y, size, BLOCK: tl.constexpr):
    """y = silu(gate) up."""
    i = tl.cast(tl.program_id(0), tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + i, mask=i < size, other=0.0).to(tl.float32)
    u = tl.load(up + i, mask=i < size, other=0.0).to(tl.float32)
    tl.store(y + i, (g * _sigmoid(g) * u).to(y.dtype.element_ty), mask=i < size)


@triton.jit
def _gated_backward(gate, up, dy, dgate, dup, size, BLOCK: tl.constexpr):
    """dup = dy gate s, dgate = dy up s (1 + gate (1 - s)), s = sigmoid(gate)."""
    i = tl.cast(tl.program_id(0), tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + i, mask=i < size, other=0.0).to(tl.float32)
    u = tl.load(up + i, mask=i < size, other=0.0).to(tl.float32)
    d = tl.load(dy + i, mask=i < size, other=0.0).to(tl.float32)
    s = _sigmoid(g)
    tl.store(dup + i, (d * g * s).to(dup.dtype.element_ty), mask=i < size)
    tl.store(dgate + i, (d * u * s * (1.0 + g * (1.0 - s))).to(dgate.dtype.element_ty), mask=i < size)


@triton.jit
def _turned(
    x, cos, sin, y, rows, T, H, D, direction, x_row, x_token, x_head,
    HALF: tl.constexpr, W: tl.constexpr, REST: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Turns the first 2 HALF of the D dims of each (token, head) by the token's angles, and copies the rest."""
    i = tl.cast(tl.program_id(0), tl.int64) * ROWS + tl.arange(0, ROWS)
    token, head = i // H, i % H
    start = (token // T * x_row + token % T * x_token + head * x_head)[:, None]
    d = tl.arange(0, W)[None, :]
    inside = (i < rows)[:, None] & (d < HALF)
    angle = token[:, None] * HALF + d
    c = tl.load(cos + angle, mask=inside, other=0.0)
    s = tl.load(sin + angle, mask=inside, other=0.0) * direction
    first = tl.load(x + start + d, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x + start + HALF + d, mask=inside, other=0.0).to(tl.float32)
    to = y + i[:, None] * D
    tl.store(to + d, (first * c - second * s).to(y.dtype.element_ty), mask=inside)
    tl.store(to + HALF + d, (second * c + first * s).to(y.dtype.element_ty), mask=inside)
    if REST > 0:
        e = 2 * HALF + tl.arange(0, REST)[None, :]
        beyond = (i < rows)[:, None] & (e < D)
        tl.store(to + e, tl.load(x + start + e, mask=beyond, other=0.0), mask=beyond)


@triton.jit
def _likelihood(logits, ids, lse, picked, V, scale, BLOCK: tl.constexpr):
    """Of each row of logits, times scale: the log-sum-exp, and the target's logit: token 0's where there is none, NaN
    where it is outside the vocabulary.
    """
    row = tl.cast(tl.program_id(0), tl.int64)
    logits += row * V
    largest, total = tl.full([], -1e30, tl.float32), tl.zeros([], tl.float32)
    for start in range(0, V, BLOCK):
        j = start + tl.arange(0, BLOCK)
        x = tl.load(logits + j, mask=j < V, other=float("-inf")).to(tl.float32) * scale
        above = tl.maximum(largest, tl.max(x, 0))
        total = total * tl.exp(largest - above) + tl.sum(tl.where(j < V, tl.exp(x - above), 0.0), 0)
        largest = above
    tl.store(lse + row, largest + tl.log(total))
    target = tl.maximum(tl.load(ids + row), 0)
    tl.store(picked + row, tl.load(logits + target, mask=target < V, other=float("nan")).to(tl.float32) * scale)


@triton.jit
def _likelihood_gradient(logits, ids, lse, V, scale, BLOCK: tl.constexpr):
    """Each logit becomes its gradient: scale (softmax - 1 at the target), 0 in rows without a target."""
    row = tl.cast(tl.program_id(0), tl.int64)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = logits + row * V + j
    target, level = tl.load(ids + row), tl.load(lse + row)
    x = tl.load(at, mask=j < V, other=0.0).to(tl.float32) * scale
    gradient = tl.exp(x - level) - tl.where(j == target, 1.0, 0.0)
    gradient *= tl.where(target >= 0, scale, 0.0)
    tl.store(at, gradient.to(logits.dtype.element_ty), mask=j < V)


def _shape(width: int) -> dict[str, Any]:
    padded = triton.next_power_of_2(width)
    return {"ROWS": max(1, TILE // padded), "W": padded, "num_warps": 4 if padded <= TILE else 16}


def takes_norm(x: Tensor) -> bool:
    """Whether `norm` serves these rows."""
    return 0 < x.shape[-1] <= WIDEST and x.numel() > 0


def norm(x: Tensor, weight: Tensor | None, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """(y in x's type, factors of the rows `[..., 1]`) of `rms_norm`."""
    x, width = x.contiguous(), x.shape[-1]
    y, inverse = torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    rows, shape = inverse.numel(), _shape(width)
    _norm[(triton.cdiv(rows, shape["ROWS"]),)](
        x, x if weight is None else weight, y, inverse, rows, width, eps, offset, WEIGHT=weight is not None, **shape
    )
    return y, inverse


def norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, inverse: Tensor, offset: float
) -> tuple[Tensor, Tensor | None]:
    """(dx, gradient of weight) in their types."""
    x, dy, width = x.contiguous(), dy.contiguous(), x.shape[-1]
    dx, rows, shape = torch.empty_like(x), inverse.numel(), _shape(width)
    tiles = triton.cdiv(rows, shape["ROWS"])
    steps = triton.cdiv(tiles, SUMS) if weight is not None else 1
    programs = triton.cdiv(tiles, steps)
    sums = dx if weight is None else x.new_empty((programs, width), dtype=torch.float32)
    _norm_backward[(programs,)](
        x, x if weight is None else weight, dy, inverse, dx, sums, rows, width, offset, steps,
        WEIGHT=weight is not None, **shape,
    )  # fmt: skip
    return dx, None if weight is None else sums.sum(0).to(weight.dtype)


def _gated_shape(width: int) -> dict[str, Any]:
    """As `_shape`; backward holds eight tensors of a tile, and would spill registers of four warps."""
    return {**_shape(width), "num_warps": 8 if width <= TILE else 16}


def _kind(bias: Tensor | None, kind: tuple[bool, bool, bool]) -> dict[str, bool]:
    silu, centred, first = kind
    return {"BIAS": bias is not None, "SILU": silu, "CENTRED": centred, "FIRST": first}


def gated_norm(
    x: Tensor, gate: Tensor, weight: Tensor, bias: Tensor | None, eps: float, kind: tuple[bool, bool, bool]
) -> Tensor:
    """`gated_norm` of `[..., H, D]`; kind: whether by SiLU, centred, gate first."""
    x, gate, weight, width = x.contiguous(), gate.contiguous(), weight.contiguous(), x.shape[-1]
    y, heads, shape = torch.empty_like(x), weight.numel() // width, _gated_shape(width)
    rows = x.numel() // width // heads
    _gated_norm[(triton.cdiv(rows, shape["ROWS"]), heads)](
        x, gate, weight, weight if bias is None else bias.contiguous(), y, rows, heads, width, eps,
        **_kind(bias, kind), **shape,
    )  # fmt: skip
    return y


def gated_norm_backward(
    dy: Tensor, x: Tensor, gate: Tensor, weight: Tensor, bias: Tensor | None, eps: float, kind: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of (x, gate, weight, bias) in their types."""
    x, gate, dy, weight, width = x.contiguous(), gate.contiguous(), dy.contiguous(), weight.contiguous(), x.shape[-1]
    dx, dgate, heads, shape = torch.empty_like(x), torch.empty_like(gate), weight.numel() // width, _gated_shape(width)
    rows = x.numel() // width // heads
    tiles = triton.cdiv(rows, shape["ROWS"])
    steps = triton.cdiv(tiles, max(1, SUMS // heads))
    programs = triton.cdiv(tiles, steps)
    sums = x.new_empty((1 if bias is None else 2, programs, heads, width), dtype=torch.float32)
    _gated_norm_backward[(programs, heads)](
        x, gate, weight, weight if bias is None else bias.contiguous(), dy, dx, dgate, sums[0], sums[-1], rows, heads,
        width, eps, steps, **_kind(bias, kind), **shape,
    )  # fmt: skip
    total = sums.sum(1).view(-1, *weight.shape)
    return dx, dgate, total[0].to(weight.dtype), None if bias is None else total[1].to(bias.dtype)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) up."""
    gate, up = gate.contiguous(), up.contiguous()
    y = torch.empty_like(gate)
    _gated[(triton.cdiv(y.numel(), TILE),)](gate, up, y, y.numel(), BLOCK=TILE, num_warps=8)
    return y


def gated_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of (gate, up)."""
    gate, up, dy = gate.contiguous(), up.contiguous(), dy.contiguous()
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    _gated_backward[(triton.cdiv(dy.numel(), TILE),)](gate, up, dy, dgate, dup, dy.numel(), BLOCK=TILE, num_warps=8)
    return dgate, dup


def _turned_shape(dims: int, half: int) -> dict[str, Any]:
    width, rest = triton.next_power_of_2(half), dims - 2 * half
    padded = triton.next_power_of_2(rest) if rest else 0
    return {"HALF": half, "W": width, "REST": padded, "ROWS": max(1, TILE // (2 * max(width, padded)))}


def turned(x: Tensor, cos: Tensor, sin: Tensor, direction: float) -> Tensor:
    """`rotate` of x `[B, T, H, D]` by cos, sin float32 `[B, T, R/2]`; back, for direction −1."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    rows, shape = x.shape[:3].numel(), _turned_shape(x.shape[-1], cos.shape[-1])
    _turned[(triton.cdiv(rows, shape["ROWS"]),)](
        x, cos.contiguous(), sin.contiguous(), y, rows, *x.shape[1:], direction, *x.stride()[:3], **shape, num_warps=4
    )
    return y


def likelihood(logits: Tensor, ids: Tensor, scale: float, lse: Tensor, picked: Tensor) -> None:
    """Writes the log-sum-exp of logits `[n, Vocab]`, times scale, and the logit of each target to float32 `[n]`."""
    n, vocabulary = logits.shape
    _likelihood[(n,)](logits, ids, lse, picked, vocabulary, scale, BLOCK=VOCABULARY_BLOCK, num_warps=8)


def likelihood_gradient(logits: Tensor, ids: Tensor, lse: Tensor, scale: float) -> Tensor:
    """The gradient of the summed loss by the logits, in their place."""
    n, vocabulary = logits.shape
    _likelihood_gradient[(n, triton.cdiv(vocabulary, VOCABULARY_BLOCK))](
        logits, ids, lse, vocabulary, scale, BLOCK=VOCABULARY_BLOCK, num_warps=8
    )
    return logits


_KINDS = {"rows": "i32", "D": "i32", "V": "i32", "size": "i64", "steps": "i32", "eps": "fp32", "offset": "fp32"}
_KINDS |= {"scale": "fp32", "direction": "fp32", "ids": "*i64"}
_KINDS |= dict.fromkeys(("inverse", "sums", "bias_sums", "lse", "picked", "cos", "sin"), "*fp32")
_KINDS |= dict.fromkeys(("T", "H", "x_row", "x_token", "x_head"), "i32")


def compilations() -> list[Compilation]:
    """Every kernel at its production shapes, in bfloat16."""

    def compilation(kernel: Any, variant: str, warps: int, **constants: Any) -> Compilation:
        names = [name for name in kernel.arg_names if name not in constants]
        signature = {name: _KINDS.get(name, "*bf16") for name in names}
        whole = ("D", "V", "x_row", "x_token", "x_head")
        divisible = tuple(name for name in names if signature[name].startswith("*") or name in whole)
        return Compilation(kernel, signature, constants, divisible, warps=warps, variant=variant)

    items = []
    for width in (64, 2048, WIDEST):
        shape = _shape(width)
        warps = shape.pop("num_warps")
        items += [compilation(kernel, f"of {width}", warps, WEIGHT=True, **shape) for kernel in (_norm, _norm_backward)]
    variants = {"silu 128": (128, (True, False, False)), "sigmoid 2048": (2048, (False, False, False))}
    variants |= {"silu 128 centred": (128, (True, True, False)), "silu 4096 first": (4096, (True, False, True))}
    for variant, (width, kind) in variants.items():
        shape = _gated_shape(width)
        warps, bias = shape.pop("num_warps"), torch.empty(0) if kind[1] else None
        constants = {**_kind(bias, kind), **shape}
        items += [compilation(kernel, variant, warps, **constants) for kernel in (_gated_norm, _gated_norm_backward)]
    for dims, half in ((128, 64), (256, 32)):
        items.append(compilation(_turned, f"{2 * half} of {dims}", 4, **_turned_shape(dims, half)))
    items += [compilation(kernel, "", 8, BLOCK=TILE) for kernel in (_gated, _gated_backward)]
    items += [compilation(kernel, "", 8, BLOCK=VOCABULARY_BLOCK) for kernel in (_likelihood, _likelihood_gradient)]
    return items
