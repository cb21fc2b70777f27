"""Grouped matrix products as Triton kernels: the groups' borders stay on the device, sums are float32.

The host knows no group, so that it launches as many tiles of rows as there can be: each group has at most one that is
not full. Every program finds its group from the ends; the rows after the last are one more group, of zeros.
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

# Tiles of a program: rows (of a gradient: what it sums over), columns, what it sums over (of a gradient: rows of the
# matrix), warps, stages; by bytes of an element.
PRODUCT = {2: (128, 128, 64, 8, 3), 4: (64, 64, 32, 4, 2)}
GRADIENT = {2: (64, 128, 128, 8, 3), 4: (32, 64, 64, 4, 2)}


@triton.jit
def _tile(ends, tile, M, E, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """(group, first row, end of the group's rows) of one of the tiles; group E is what comes after the last end."""
    e = tl.arange(0, GROUPS)
    end = tl.load(ends + e, mask=e < E, other=M)
    start = tl.load(ends + e - 1, mask=(e > 0) & (e <= E), other=0)
    start = tl.where(e > E, M, start)
    tiles = (end - start + ROWS - 1) // ROWS
    upto = tl.cumsum(tiles, 0)
    group = tl.sum((upto <= tile).to(tl.int32), 0)
    mine = e == group
    before = tl.sum(tl.where(mine, upto - tiles, 0), 0)
    first = tl.sum(tl.where(mine, start, 0), 0) + (tile - before) * ROWS
    return group, first, tl.sum(tl.where(mine, end, 0), 0)


@triton.jit
def _product(
    x, weight, ends, y, M, E, K, N, stride_k, stride_n, EXACT: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """y `[M, N]` = x `[M, K]` times the matrix `[K, N]` of each row's group, whose strides are given."""
    group, first, end = _tile(ends, tl.program_id(0), M, E, ROWS, GROUPS)
    if first < end:
        m = first + tl.arange(0, ROWS)
        n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        k = tl.arange(0, INNER)
        row = tl.cast(m, tl.int64)[:, None]
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        if group < E:
            matrix = weight + tl.cast(group, tl.int64) * K * N
            for at in range(0, K, INNER):
                inside = at + k < K
                here = tl.load(x + row * K + (at + k)[None, :], mask=(m < end)[:, None] & inside[None, :], other=0.0)
                there = tl.load(
                    matrix + (at + k)[:, None] * stride_k + n[None, :] * stride_n,
                    mask=inside[:, None] & (n < N)[None, :], other=0.0,
                )  # fmt: skip
                total = tl.dot(here, there, total, input_precision="ieee" if EXACT else "tf32")
        tl.store(y + row * N + n[None, :], total.to(y.dtype.element_ty), mask=(m < end)[:, None] & (n < N)[None, :])


@triton.jit
def _gradient(
    dy, x, ends, dweight, K, N, EXACT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr
):
    """dweight `[E, N, K]`: of each group the sum of dy_m x_m^T over its rows."""
    group = tl.program_id(0)
    start = tl.load(ends + group - 1, mask=group > 0, other=0)
    end = tl.load(ends + group)
    n = tl.program_id(1) * INNER + tl.arange(0, INNER)
    k = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([INNER, COLUMNS], tl.float32)
    for first in range(start, end, ROWS):
        m = first + tl.arange(0, ROWS)
        row, inside = tl.cast(m, tl.int64), m < end
        gradient = tl.load(dy + row[None, :] * N + n[:, None], mask=(n < N)[:, None] & inside[None, :], other=0.0)
        here = tl.load(x + row[:, None] * K + k[None, :], mask=inside[:, None] & (k < K)[None, :], other=0.0)
        total = tl.dot(gradient, here, total, input_precision="ieee" if EXACT else "tf32")
    at = (tl.cast(group, tl.int64) * N + n[:, None]) * K + k[None, :]
    tl.store(dweight + at, total.to(dweight.dtype.element_ty), mask=(n < N)[:, None] & (k < K)[None, :])


def product(x: Tensor, weight: Tensor, ends: Tensor, transposed: bool) -> Tensor:
    """See `reference.product`."""
    x, weight, ends = x.contiguous(), weight.contiguous(), ends.contiguous()
    (rows, inner), groups = x.shape, weight.shape[0]
    columns = weight.shape[1 if transposed else 2]
    strides = (1, inner) if transposed else (columns, 1)
    y = x.new_empty(rows, columns)
    constants = _constants(PRODUCT, x.dtype)
    grid = triton.cdiv(rows, constants["ROWS"]) + groups, triton.cdiv(columns, constants["COLUMNS"])
    if rows:
        _product[grid](
            x, weight, ends, y, rows, groups, inner, columns, *strides, GROUPS=_power(groups), **constants
        )  # fmt: skip
    return y


def gradient(dout: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """See `reference.gradient`."""
    dout, x, ends = dout.contiguous(), x.contiguous(), ends.contiguous()
    groups, n, k = ends.shape[0], dout.shape[1], x.shape[1]
    dweight = x.new_empty(groups, n, k)
    constants = _constants(GRADIENT, x.dtype)
    grid = groups, triton.cdiv(n, constants["INNER"]), triton.cdiv(k, constants["COLUMNS"])
    _gradient[grid](dout, x, ends, dweight, k, n, **constants)
    return dweight


def _power(groups: int) -> int:
    return int(triton.next_power_of_2(groups + 1))


def _constants(table: dict[int, tuple[int, int, int, int, int]], dtype: torch.dtype) -> dict[str, Any]:
    names = ("ROWS", "COLUMNS", "INNER", "num_warps", "num_stages")
    return dict(zip(names, table[dtype.itemsize], strict=True)) | {"EXACT": dtype == torch.float32}


def compilations() -> list[Compilation]:
    """Every kernel at production shapes in bfloat16: 8, 64 and 256 experts."""
    result = []
    kinds = {"x": "*bf16", "dy": "*bf16", "weight": "*bf16", "y": "*bf16", "dweight": "*bf16", "ends": "*i32"}
    for kernel, table, variants in (
        (_product, PRODUCT, {"8": 8, "256": 256, "8 transposed": 8}),
        (_gradient, GRADIENT, {"": 1}),
    ):
        for variant, groups in variants.items():
            constants = _constants(table, torch.bfloat16)
            warps, stages = constants.pop("num_warps"), constants.pop("num_stages")
            if kernel is _product:
                constants |= {"GROUPS": _power(groups)}
                constants |= {"stride_k": 1} if variant.endswith("transposed") else {"stride_n": 1}
            names = [name for name in kernel.arg_names if name not in constants]
            signature = {name: kinds.get(name, "i32") for name in names}
            divisible = tuple(name for name in names if name not in ("M", "E"))
            rows = constants["ROWS"] if kernel is _product else constants["INNER"]
            result.append(Compilation(kernel, signature, constants, divisible, warps, stages, rows, variant=variant))
    return result
