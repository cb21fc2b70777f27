"""Softmax attention as Triton kernels: any mask, any packing, grouped heads, unequal dims; deterministic.

Blocks of queries meet blocks of keys by the lists of `blocks.py`: first those in which every pair is visible, without
any mask, then the rest by (document, position). Scores are in units of log 2, so that exp is exp2.
"""

# Kernels are typed by Triton, when they are compiled.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportReturnType=false

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..attend import Gradient
from ..compilation import Compilation
from ..masks import Mask, Pattern, Tile
from ..masks.block_ranges import key_ranges, query_ranges
from ..masks.triton import flat_bands, visible
from .reference import Levels

LOG2_E = math.log2(math.e)
LN_2 = tl.constexpr(math.log(2))
HIDDEN = tl.constexpr(-1.0e30)  # a score without weight, which keeps arithmetic finite


class Blocks(NamedTuple):
    """Queries and keys per block, and how Triton compiles the kernel."""

    queries: int
    keys: int
    warps: int
    stages: int


class Blockings(NamedTuple):
    """What each of the three kernels uses."""

    forward: Blocks
    dq: Blocks
    dkv: Blocks


# By the dims of a key and a value together, as padded: the products and the registers of all three kernels follow them.
# Half precision multiplies on tensor cores. Chosen so that no register spills on sm_90 (`make kernels`).
HALF = {
    128: Blockings(Blocks(128, 64, 8, 3), Blocks(64, 64, 4, 3), Blocks(64, 64, 4, 2)),
    256: Blockings(Blocks(128, 64, 8, 3), Blocks(128, 64, 8, 2), Blocks(32, 128, 8, 2)),
    320: Blockings(Blocks(128, 64, 8, 2), Blocks(128, 32, 8, 2), Blocks(16, 128, 8, 2)),
    512: Blockings(Blocks(64, 32, 4, 2), Blocks(64, 32, 8, 1), Blocks(16, 64, 8, 1)),
    1024: Blockings(Blocks(64, 32, 8, 1), Blocks(32, 32, 8, 1), Blocks(16, 32, 8, 1)),
}
SINGLE = {
    128: Blockings(Blocks(32, 32, 4, 1), Blocks(32, 32, 4, 1), Blocks(32, 32, 4, 1)),
    256: Blockings(Blocks(32, 32, 8, 1), Blocks(32, 32, 8, 1), Blocks(16, 32, 8, 1)),
    512: Blockings(Blocks(32, 16, 4, 1), Blocks(16, 16, 4, 1), Blocks(16, 16, 4, 1)),
    1024: Blockings(Blocks(16, 16, 8, 1), Blocks(16, 16, 8, 1), Blocks(16, 16, 8, 1)),
}
DELTA_ROWS = 32


def blockings(dtype: torch.dtype, key_dim: int, value_dim: int) -> Blockings:
    """The blocks for these dims, by the table. Raises ValueError for heads wider than any GPU's shared memory."""
    if max(key_dim, value_dim) > 512:
        raise ValueError(
            f"key and value dims must be at most 512 with backend 'triton'; got {key_dim} and {value_dim}. "
            "Use more heads, or backend='chunked'"
        )
    needed = sum(split_dim(key_dim)) + padded(value_dim)
    return next(blocks for dims, blocks in (SINGLE if dtype == torch.float32 else HALF).items() if needed <= dims)


def split_dim(dim: int) -> tuple[int, int]:
    """Two powers of two (the second may be 0) that cover `dim` with the fewest dims that do not exist."""
    below = max(16, 1 << (dim.bit_length() - 1))
    rest = max(0, dim - below)
    above = max(16, 1 << (rest - 1).bit_length()) if rest else 0
    return (2 * below, 0) if below == above else (below, above)


def padded(dim: int) -> int:
    """The power of two that holds `dim`, at least what a tensor core takes."""
    return max(16, triton.next_power_of_2(dim))


@triton.jit
def _rows(at, first, stride, keep, N: tl.constexpr, FROM: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """[N, WIDTH]: rows first..first+N and dims FROM..FROM+WIDTH of a matrix; 0 where not `keep` [N] or beyond DIM."""
    n = tl.arange(0, N)
    d = FROM + tl.arange(0, WIDTH)
    base = at + tl.cast(first, tl.int64) * stride
    mask = keep[:, None]
    if FROM + WIDTH > DIM:
        mask = mask & (d < DIM)[None, :]
    return tl.load(base + n[:, None] * stride + d[None, :], mask=mask, other=0.0)


@triton.jit
def _whole_rows(at, first, stride, N: tl.constexpr, FROM: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """The same where every row exists and is wanted."""
    n = tl.arange(0, N)
    d = FROM + tl.arange(0, WIDTH)
    base = at + tl.cast(first, tl.int64) * stride
    if FROM + WIDTH > DIM:
        return tl.load(base + n[:, None] * stride + d[None, :], mask=(d < DIM)[None, :], other=0.0)
    else:
        return tl.load(base + n[:, None] * stride + d[None, :])


@triton.jit
def _store_rows(
    at, x, first, stride, keep, N: tl.constexpr, FROM: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr
):
    n = tl.arange(0, N)
    d = FROM + tl.arange(0, WIDTH)
    base = at + tl.cast(first, tl.int64) * stride
    tl.store(base + n[:, None] * stride + d[None, :], x, mask=keep[:, None] & (d < DIM)[None, :])


@triton.jit
def _places(ids, positions, first, count, nobody, N: tl.constexpr):
    """Document and position of tokens first..first+N of a row; `nobody` for padding and for what is not held."""
    n = first + tl.arange(0, N)
    document = tl.load(ids + n, mask=n < count, other=-1)
    position = tl.load(positions + n, mask=n < count, other=0)
    return tl.where(document < 0, nobody, document), position


@triton.jit
def _product(a0, a1, b0, b1, SPLIT: tl.constexpr):
    """a bᵀ over dims in two parts, of which the second may be empty."""
    s = tl.dot(a0, tl.trans(b0), input_precision="ieee")
    if SPLIT:
        s = tl.dot(a1, tl.trans(b1), s, input_precision="ieee")
    return s


@triton.jit
def _levels_of(levels, first, count, N: tl.constexpr, LEVELS: tl.constexpr):
    """Levels of tokens first..first+N of a row of `count`; zeros where there are none."""
    n = first + tl.arange(0, N)
    level = tl.zeros([N], tl.float32)
    if LEVELS:
        level = tl.load(levels + n, mask=n < count, other=0.0)
    return level


@triton.jit
def _tanh(x):
    return 1.0 - 2.0 / (tl.exp2(x * (2.0 / LN_2)) + 1.0)


@triton.jit
def _logits(product, scale, softcap, q_level, k_level, SOFTCAP: tl.constexpr, LEVELS: tl.constexpr):
    """(logits, derivative of the cap) in units of log 2; levels are subtracted first, since they are large.

    With a cap, `scale` leads to what tanh takes, and `softcap` is in units of log 2.
    """
    s = product * scale
    slope = 1.0
    if SOFTCAP:
        capped = _tanh(s)
        slope = 1.0 - capped * capped
        s = capped * softcap
    if LEVELS:
        s += (q_level - k_level) / LN_2
    return s, slope


@triton.jit
def _forward_range(
    acc, m, weight, q0, q1, q_id, q_at, q_level, k_base, v_base, k_ids, k_positions, k_levels, first, last, keys,
    scale, softcap, k_stride, v_stride, MASKED: tl.constexpr, BANDS: tl.constexpr,
    SOFTCAP: tl.constexpr, LEVELS: tl.constexpr, N: tl.constexpr,
    K: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, V: tl.constexpr, V0: tl.constexpr,
):  # fmt: skip
    """The online softmax over blocks first..last of keys."""
    for block in range(first, last):
        start = block * N
        k_level = _levels_of(k_levels, start, keys, N, LEVELS)
        if MASKED:
            k_id, k_at = _places(k_ids, k_positions, start, keys, -2, N)
            keep = k_id >= 0
            k0 = _rows(k_base, start, k_stride, keep, N, 0, K, K0)
            k1 = k0
            if K1 > 0:
                k1 = _rows(k_base, start, k_stride, keep, N, K0, K, K1)
            s = _product(q0, q1, k0, k1, K1 > 0)
            s, _ = _logits(s, scale, softcap, q_level[:, None], k_level[None, :], SOFTCAP, LEVELS)
            seen = (q_id[:, None] == k_id[None, :]) & visible(q_at[:, None], k_at[None, :], BANDS)
            s = tl.where(seen, s, HIDDEN)
            m_new = tl.maximum(m, tl.max(s, 1))
            p = tl.exp2(s - m_new[:, None])
            v = _rows(v_base, start, v_stride, keep, N, 0, V, V0)
        else:
            k0 = _whole_rows(k_base, start, k_stride, N, 0, K, K0)
            k1 = k0
            if K1 > 0:
                k1 = _whole_rows(k_base, start, k_stride, N, K0, K, K1)
            s = _product(q0, q1, k0, k1, K1 > 0)
            if SOFTCAP or LEVELS:
                s, _ = _logits(s, scale, softcap, q_level[:, None], k_level[None, :], SOFTCAP, LEVELS)
                m_new = tl.maximum(m, tl.max(s, 1))
                p = tl.exp2(s - m_new[:, None])
            else:
                m_new = tl.maximum(m, tl.max(s, 1) * scale)
                p = tl.exp2(s * scale - m_new[:, None])
            v = _whole_rows(v_base, start, v_stride, N, 0, V, V0)
        fade = tl.exp2(m - m_new)
        weight = weight * fade + tl.sum(p, 1)
        acc = acc * fade[:, None]
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
        m = m_new
    return acc, m, weight


@triton.jit
def _forward(
    q, k, v, q_levels, k_levels, out, lse, q_ids, q_positions, k_ids, k_positions, offsets, bounds,
    queries, keys, blocks, heads, group, level_heads, scale, softcap,
    q_row, q_stride, q_head, k_row, k_stride, k_head, v_row, v_stride, v_head,
    BANDS: tl.constexpr, SOFTCAP: tl.constexpr, LEVELS: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    K: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, V: tl.constexpr, V0: tl.constexpr,
):  # fmt: skip
    """out and lse of one block of queries of one head; `group` heads read one head of keys and values."""
    block = blocks - 1 - tl.program_id(0) % blocks  # under a causal mask the late blocks have the most work
    pair = tl.program_id(0) // blocks
    row, head = tl.cast(pair // heads, tl.int64), pair % heads
    first = block * M
    q_base = q + row * q_row + head * q_head
    k_base = k + row * k_row + (head // group) * k_head
    v_base = v + row * v_row + (head // group) * v_head
    q_id, q_at = _places(q_ids + row * queries, q_positions + row * queries, first, queries, -1, M)
    q0 = _rows(q_base, first, q_stride, q_id >= 0, M, 0, K, K0)
    q1 = q0
    if K1 > 0:
        q1 = _rows(q_base, first, q_stride, q_id >= 0, M, K0, K, K1)
    shared = row * level_heads + head * level_heads // heads
    q_level = _levels_of(q_levels + shared * queries, first, queries, M, LEVELS)
    level_base = k_levels + shared * keys
    acc = tl.zeros([M, V0], tl.float32)
    m = tl.full([M], HIDDEN, tl.float32)
    weight = tl.zeros([M], tl.float32)
    listed = offsets + 2 * (row * blocks + block)
    whole, masked, end = tl.load(listed), tl.load(listed + 1), tl.load(listed + 2)
    for n in range(whole, masked):
        acc, m, weight = _forward_range(
            acc, m, weight, q0, q1, q_id, q_at, q_level, k_base, v_base, k_ids, k_positions, level_base,
            tl.load(bounds + 2 * n), tl.load(bounds + 2 * n + 1), keys, scale, softcap,
            k_stride, v_stride, False, BANDS, SOFTCAP, LEVELS, N, K, K0, K1, V, V0,
        )  # fmt: skip
    for n in range(masked, end):
        acc, m, weight = _forward_range(
            acc, m, weight, q0, q1, q_id, q_at, q_level, k_base, v_base, k_ids + row * keys, k_positions + row * keys,
            level_base, tl.load(bounds + 2 * n), tl.load(bounds + 2 * n + 1), keys, scale, softcap,
            k_stride, v_stride, True, BANDS, SOFTCAP, LEVELS, N, K, K0, K1, V, V0,
        )  # fmt: skip
    seen = m > HIDDEN / 2  # else `weight` counts hidden keys, each as if it were visible
    weight = tl.where(seen, weight, 1.0)
    held = first + tl.arange(0, M) < queries
    acc = tl.where(seen[:, None], acc / weight[:, None], 0.0)
    _store_rows(out + (row * queries * heads + head) * V, acc, first, heads * V, held, M, 0, V, V0)
    at = lse + (row * queries + first) * heads + head
    value = tl.where(seen, (m + tl.log2(weight)) * LN_2, float("-inf"))
    tl.store(at + tl.arange(0, M) * heads, value, mask=held)


@triton.jit
def _delta(
    dout, out, lse, dlse, delta, lse2, queries, blocks, heads, d_row, d_stride, d_head, o_row, o_stride, o_head,
    HAS_DLSE: tl.constexpr, M: tl.constexpr, V: tl.constexpr, V0: tl.constexpr,
):  # fmt: skip
    """delta = dout·out − dlse and lse in units of log 2, `[B, H, T]`; queries that see nothing get 0 and a huge lse."""
    block = tl.program_id(0) % blocks
    pair = tl.program_id(0) // blocks
    row, head = tl.cast(pair // heads, tl.int64), pair % heads
    first = block * M
    n = tl.arange(0, M)
    held = first + n < queries
    given = _rows(dout + row * d_row + head * d_head, first, d_stride, held, M, 0, V, V0)
    result = _rows(out + row * o_row + head * o_head, first, o_stride, held, M, 0, V, V0)
    total = tl.sum(given.to(tl.float32) * result.to(tl.float32), 1)
    at = (row * queries + first) * heads + head
    level = tl.load(lse + at + n * heads, mask=held, other=float("-inf"))
    if HAS_DLSE:
        total -= tl.load(dlse + at + n * heads, mask=held, other=0.0)
    seen = level > float("-inf")
    to = tl.cast(pair, tl.int64) * queries + first + n
    tl.store(delta + to, tl.where(seen, total, 0.0), mask=held)
    tl.store(lse2 + to, tl.where(seen, level / LN_2, -HIDDEN), mask=held)


@triton.jit
def _dq_range(
    dq0, dq1, q0, q1, do, level, delta, q_id, q_at, q_level, k_base, v_base, k_ids, k_positions, k_levels, first, last,
    keys, scale, softcap, k_stride, v_stride, MASKED: tl.constexpr, BANDS: tl.constexpr,
    SOFTCAP: tl.constexpr, LEVELS: tl.constexpr,
    N: tl.constexpr, K: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, V: tl.constexpr, V0: tl.constexpr,
):  # fmt: skip
    for block in range(first, last):
        start = block * N
        k_level = _levels_of(k_levels, start, keys, N, LEVELS)
        if MASKED:
            k_id, k_at = _places(k_ids, k_positions, start, keys, -2, N)
            keep = k_id >= 0
            k0 = _rows(k_base, start, k_stride, keep, N, 0, K, K0)
            k1 = k0
            if K1 > 0:
                k1 = _rows(k_base, start, k_stride, keep, N, K0, K, K1)
            v = _rows(v_base, start, v_stride, keep, N, 0, V, V0)
            s = _product(q0, q1, k0, k1, K1 > 0)
            s, slope = _logits(s, scale, softcap, q_level[:, None], k_level[None, :], SOFTCAP, LEVELS)
            p = tl.exp2(s - level[:, None])
            seen = (q_id[:, None] == k_id[None, :]) & visible(q_at[:, None], k_at[None, :], BANDS)
            p = tl.where(seen, p, 0.0)
        else:
            k0 = _whole_rows(k_base, start, k_stride, N, 0, K, K0)
            k1 = k0
            if K1 > 0:
                k1 = _whole_rows(k_base, start, k_stride, N, K0, K, K1)
            v = _whole_rows(v_base, start, v_stride, N, 0, V, V0)
            s = _product(q0, q1, k0, k1, K1 > 0)
            s, slope = _logits(s, scale, softcap, q_level[:, None], k_level[None, :], SOFTCAP, LEVELS)
            p = tl.exp2(s - level[:, None])
        dp = tl.dot(do, tl.trans(v), input_precision="ieee")
        ds = p * (dp - delta[:, None])
        if SOFTCAP:
            ds *= slope
        ds = ds.to(k0.dtype)
        dq0 = tl.dot(ds, k0, dq0, input_precision="ieee")
        if K1 > 0:
            dq1 = tl.dot(ds, k1, dq1, input_precision="ieee")
    return dq0, dq1


@triton.jit
def _dq(
    dq, dout, q, k, v, q_levels, k_levels, lse2, delta, q_ids, q_positions, k_ids, k_positions, offsets, bounds,
    queries, keys, blocks, heads, group, level_heads, scale, softcap, dq_scale, d_row, d_stride, d_head,
    q_row, q_stride, q_head, k_row, k_stride, k_head, v_row, v_stride, v_head,
    BANDS: tl.constexpr, SOFTCAP: tl.constexpr, LEVELS: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    K: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, V: tl.constexpr, V0: tl.constexpr,
):  # fmt: skip
    """dq of one block of queries of one head."""
    block = blocks - 1 - tl.program_id(0) % blocks
    pair = tl.program_id(0) // blocks
    row, head = tl.cast(pair // heads, tl.int64), pair % heads
    first = block * M
    q_base = q + row * q_row + head * q_head
    k_base = k + row * k_row + (head // group) * k_head
    v_base = v + row * v_row + (head // group) * v_head
    q_id, q_at = _places(q_ids + row * queries, q_positions + row * queries, first, queries, -1, M)
    keep = q_id >= 0
    q0 = _rows(q_base, first, q_stride, keep, M, 0, K, K0)
    q1 = q0
    dq0 = tl.zeros([M, K0], tl.float32)
    dq1 = dq0
    if K1 > 0:
        q1 = _rows(q_base, first, q_stride, keep, M, K0, K, K1)
        dq1 = tl.zeros([M, K1], tl.float32)
    do = _rows(dout + row * d_row + head * d_head, first, d_stride, keep, M, 0, V, V0)
    at = tl.cast(pair, tl.int64) * queries + first + tl.arange(0, M)
    level = tl.load(lse2 + at, mask=keep, other=-HIDDEN)
    shift = tl.load(delta + at, mask=keep, other=0.0)
    shared = row * level_heads + head * level_heads // heads
    q_level = _levels_of(q_levels + shared * queries, first, queries, M, LEVELS)
    level_base = k_levels + shared * keys
    listed = offsets + 2 * (row * blocks + block)
    whole, masked, end = tl.load(listed), tl.load(listed + 1), tl.load(listed + 2)
    for n in range(whole, masked):
        dq0, dq1 = _dq_range(
            dq0, dq1, q0, q1, do, level, shift, q_id, q_at, q_level, k_base, v_base, k_ids, k_positions, level_base,
            tl.load(bounds + 2 * n), tl.load(bounds + 2 * n + 1), keys, scale, softcap,
            k_stride, v_stride, False, BANDS, SOFTCAP, LEVELS, N, K, K0, K1, V, V0,
        )  # fmt: skip
    for n in range(masked, end):
        dq0, dq1 = _dq_range(
            dq0, dq1, q0, q1, do, level, shift, q_id, q_at, q_level, k_base, v_base, k_ids + row * keys,
            k_positions + row * keys, level_base, tl.load(bounds + 2 * n), tl.load(bounds + 2 * n + 1), keys, scale,
            softcap, k_stride, v_stride, True, BANDS, SOFTCAP, LEVELS, N, K, K0, K1, V, V0,
        )  # fmt: skip
    held = first + tl.arange(0, M) < queries
    to = dq + (row * queries * heads + head) * K
    _store_rows(to, dq0 * dq_scale, first, heads * K, held, M, 0, K, K0)
    if K1 > 0:
        _store_rows(to, dq1 * dq_scale, first, heads * K, held, M, K0, K, K1)


@triton.jit
def _dkv_range(
    dk0, dk1, dv, dlevel, k0, k1, v, k_id, k_at, k_level, q_base, d_base, level_base, delta_base, q_ids, q_positions,
    q_levels, first, last, queries, scale, softcap, q_stride, d_stride, MASKED: tl.constexpr, BANDS: tl.constexpr,
    SOFTCAP: tl.constexpr, LEVELS: tl.constexpr, M: tl.constexpr,
    K: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, V: tl.constexpr, V0: tl.constexpr,
):  # fmt: skip
    """Scores transposed, keys by queries: both products that follow then take them as their left side."""
    for block in range(first, last):
        start = block * M
        at = start + tl.arange(0, M)
        q_level = _levels_of(q_levels, start, queries, M, LEVELS)
        if MASKED:
            q_id, q_at = _places(q_ids, q_positions, start, queries, -1, M)
            keep = q_id >= 0
            q0 = _rows(q_base, start, q_stride, keep, M, 0, K, K0)
            q1 = q0
            if K1 > 0:
                q1 = _rows(q_base, start, q_stride, keep, M, K0, K, K1)
            do = _rows(d_base, start, d_stride, keep, M, 0, V, V0)
            level = tl.load(level_base + at, mask=keep, other=-HIDDEN)
            shift = tl.load(delta_base + at, mask=keep, other=0.0)
            s = _product(k0, k1, q0, q1, K1 > 0)
            s, slope = _logits(s, scale, softcap, q_level[None, :], k_level[:, None], SOFTCAP, LEVELS)
            p = tl.exp2(s - level[None, :])
            seen = (q_id[None, :] == k_id[:, None]) & visible(q_at[None, :], k_at[:, None], BANDS)
            p = tl.where(seen, p, 0.0)
        else:
            q0 = _whole_rows(q_base, start, q_stride, M, 0, K, K0)
            q1 = q0
            if K1 > 0:
                q1 = _whole_rows(q_base, start, q_stride, M, K0, K, K1)
            do = _whole_rows(d_base, start, d_stride, M, 0, V, V0)
            level = tl.load(level_base + at)
            shift = tl.load(delta_base + at)
            s = _product(k0, k1, q0, q1, K1 > 0)
            s, slope = _logits(s, scale, softcap, q_level[None, :], k_level[:, None], SOFTCAP, LEVELS)
            p = tl.exp2(s - level[None, :])
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
        dp = tl.dot(v, tl.trans(do), input_precision="ieee")
        ds = p * (dp - shift[None, :])
        if LEVELS:
            dlevel -= tl.sum(ds, 1)
        if SOFTCAP:
            ds *= slope
        ds = ds.to(q0.dtype)
        dk0 = tl.dot(ds, q0, dk0, input_precision="ieee")
        if K1 > 0:
            dk1 = tl.dot(ds, q1, dk1, input_precision="ieee")
    return dk0, dk1, dv, dlevel


@triton.jit
def _dkv(
    dk, dv, dlevels, dout, q, k, v, q_levels, k_levels, lse2, delta,
    q_ids, q_positions, k_ids, k_positions, offsets, bounds,
    queries, keys, blocks, groups, group, level_heads, scale, softcap, dk_scale, d_row, d_stride, d_head,
    q_row, q_stride, q_head, k_row, k_stride, k_head, v_row, v_stride, v_head,
    BANDS: tl.constexpr, SOFTCAP: tl.constexpr, LEVELS: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    K: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, V: tl.constexpr, V0: tl.constexpr,
):  # fmt: skip
    """dk and dv of one block of keys of one of `groups` heads, summed over the `group` query heads that read it.

    dlevels `[B, H, S]` is of each query head.
    """
    block = tl.program_id(0) % blocks
    pair = tl.program_id(0) // blocks
    row, shared = tl.cast(pair // groups, tl.int64), pair % groups
    first = block * N
    k_id, k_at = _places(k_ids + row * keys, k_positions + row * keys, first, keys, -2, N)
    keep = k_id >= 0
    k_base = k + row * k_row + shared * k_head
    k0 = _rows(k_base, first, k_stride, keep, N, 0, K, K0)
    k1 = k0
    dk0 = tl.zeros([N, K0], tl.float32)
    dk1 = dk0
    if K1 > 0:
        k1 = _rows(k_base, first, k_stride, keep, N, K0, K, K1)
        dk1 = tl.zeros([N, K1], tl.float32)
    value = _rows(v + row * v_row + shared * v_head, first, v_stride, keep, N, 0, V, V0)
    dvalue = tl.zeros([N, V0], tl.float32)
    listed = offsets + 2 * (row * blocks + block)
    whole, masked, end = tl.load(listed), tl.load(listed + 1), tl.load(listed + 2)
    for member in range(group):
        head = shared * group + member
        q_base = q + row * q_row + head * q_head
        d_base = dout + row * d_row + head * d_head
        at = (row * groups * group + head) * queries
        level_head = row * level_heads + head * level_heads // (groups * group)
        k_level = _levels_of(k_levels + level_head * keys, first, keys, N, LEVELS)
        q_base_levels = q_levels + level_head * queries
        dlevel = tl.zeros([N], tl.float32)
        for n in range(whole, masked):
            dk0, dk1, dvalue, dlevel = _dkv_range(
                dk0, dk1, dvalue, dlevel, k0, k1, value, k_id, k_at, k_level, q_base, d_base, lse2 + at, delta + at,
                q_ids, q_positions, q_base_levels, tl.load(bounds + 2 * n), tl.load(bounds + 2 * n + 1), queries,
                scale, softcap, q_stride, d_stride, False, BANDS, SOFTCAP, LEVELS, M, K, K0, K1, V, V0,
            )  # fmt: skip
        for n in range(masked, end):
            dk0, dk1, dvalue, dlevel = _dkv_range(
                dk0, dk1, dvalue, dlevel, k0, k1, value, k_id, k_at, k_level, q_base, d_base, lse2 + at, delta + at,
                q_ids + row * queries, q_positions + row * queries, q_base_levels, tl.load(bounds + 2 * n),
                tl.load(bounds + 2 * n + 1), queries, scale, softcap, q_stride, d_stride, True, BANDS,
                SOFTCAP, LEVELS, M, K, K0, K1, V, V0,
            )  # fmt: skip
        if LEVELS:
            place = first + tl.arange(0, N)
            tl.store(dlevels + (row * groups * group + head) * keys + place, dlevel, mask=place < keys)
    held = first + tl.arange(0, N) < keys
    to = dk + (row * keys * groups + shared) * K
    _store_rows(to, dk0 * dk_scale, first, groups * K, held, N, 0, K, K0)
    if K1 > 0:
        _store_rows(to, dk1 * dk_scale, first, groups * K, held, N, K0, K, K1)
    _store_rows(dv + (row * keys * groups + shared) * V, dvalue, first, groups * V, held, N, 0, V, V0)


def _ready(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


class _Work:
    """What every kernel of a tile takes: tensors with their strides, documents on the device, the mask, the dims."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, tile: Tile, scale: float, softcap: float | None, levels: Levels | None
    ) -> None:
        # The kernels take the maximum before they scale, which is the maximum of the scaled only if scale >= 0.
        self.sign = -1.0 if scale < 0 else 1.0
        self.q, self.k, self.v = _ready(-q if scale < 0 else q), _ready(k), _ready(v)
        self.tile, self.scale = tile, abs(scale)
        self.batch, self.queries, self.heads, self.key_dim = q.shape
        self.keys, self.groups, self.value_dim = k.shape[1], k.shape[2], v.shape[3]
        self.blocks = blockings(q.dtype, self.key_dim, self.value_dim)
        self.softcap, self.level_heads = softcap, self.heads if levels is None else levels[0].shape[2]
        # By head, so that the levels of a block lie together.
        self.levels = None if levels is None else tuple(x.transpose(1, 2).contiguous() for x in levels)

    def tensors(self) -> tuple[Tensor, ...]:
        """q, k, v and the levels, for which other tensors stand where there are none."""
        return (self.q, self.k, self.v, *(self.levels or (self.q, self.k)))

    def places(self) -> tuple[Tensor, ...]:
        device = self.q.device
        queries, keys = self.tile.queries, self.tile.keys
        return queries.ids(device), queries.positions(device), keys.ids(device), keys.positions(device)

    def factors(self) -> tuple[float, float]:
        """`scale` and `softcap` of `_logits`."""
        if self.softcap is None:
            return self.scale * LOG2_E, 1.0
        return self.scale / self.softcap, self.softcap * LOG2_E

    def constants(self, blocks: Blocks) -> dict[str, Any]:
        has = self.softcap is not None, self.levels is not None
        return _constants(blocks, self.key_dim, self.value_dim, self.tile.mask, *has)


def _constants(
    blocks: Blocks, key_dim: int, value_dim: int, mask: Pattern, softcap: bool = False, levels: bool = False
) -> dict[str, Any]:
    k0, k1 = split_dim(key_dim)
    return {
        "BANDS": flat_bands(mask), "SOFTCAP": softcap, "LEVELS": levels, "M": blocks.queries, "N": blocks.keys,
        "K": key_dim, "K0": k0, "K1": k1, "V": value_dim, "V0": padded(value_dim),
    }  # fmt: skip


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(stride for x in tensors for stride in x.stride()[:3])


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    tile: Tile,
    scale: float,
    softcap: float | None = None,
    levels: Levels | None = None,
) -> tuple[Tensor, Tensor]:
    """See `longreach.kernels.softmax.attend`; results are float32."""
    out = q.new_empty((*q.shape[:3], v.shape[-1]), dtype=torch.float32)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    work = _Work(q, k, v, tile, scale, softcap, levels)
    with torch.cuda.device_of(q):
        blocks = work.blocks.forward
        number = triton.cdiv(work.queries, blocks.queries)
        _forward[(number * work.batch * work.heads,)](
            *work.tensors(), out, lse, *work.places(), *key_ranges(tile, blocks.queries, blocks.keys, q.device),
            work.queries, work.keys, number, work.heads, work.heads // work.groups, work.level_heads, *work.factors(),
            *_strides(work.q, work.k, work.v), **work.constants(blocks),
            num_warps=blocks.warps, num_stages=blocks.stages,
        )  # fmt: skip
    return out, lse


def attend_backward(
    gradient: Gradient,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    tile: Tile,
    scale: float,
    softcap: float | None = None,
    levels: Levels | None = None,
) -> tuple[Tensor, ...]:
    """See `longreach.kernels.softmax.attend_backward`; gradients are float32, dk and dv written once each.

    The gradient of the levels of keys comes last, where there are levels.
    """
    dq, dk, dv = (torch.empty(x.shape, dtype=torch.float32, device=x.device) for x in (q, k, v))
    work = _Work(q, k, v, tile, scale, softcap, levels)
    dlevels = dk if levels is None else dk.new_empty(work.batch, work.heads, work.keys)
    with torch.cuda.device_of(q):
        delta, lse2 = _of_queries(work, gradient)
        dout = _ready(gradient.dout.to(q.dtype))  # as an operand of tensor cores
        strides = _strides(dout, work.q, work.k, work.v)
        blocks = work.blocks.dq
        number = triton.cdiv(work.queries, blocks.queries)
        _dq[(number * work.batch * work.heads,)](
            dq, dout, *work.tensors(), lse2, delta, *work.places(),
            *key_ranges(tile, blocks.queries, blocks.keys, q.device),
            work.queries, work.keys, number, work.heads, work.heads // work.groups, work.level_heads,
            *work.factors(), work.scale * work.sign, *strides, **work.constants(blocks),
            num_warps=blocks.warps, num_stages=blocks.stages,
        )  # fmt: skip
        blocks = work.blocks.dkv
        number = triton.cdiv(work.keys, blocks.keys)
        _dkv[(number * work.batch * work.groups,)](
            dk, dv, dlevels, dout, *work.tensors(), lse2, delta, *work.places(),
            *query_ranges(tile, blocks.keys, blocks.queries, q.device),
            work.queries, work.keys, number, work.groups, work.heads // work.groups, work.level_heads,
            *work.factors(), work.scale, *strides, **work.constants(blocks),
            num_warps=blocks.warps, num_stages=blocks.stages,
        )  # fmt: skip
    if levels is None:
        return dq, dk, dv
    return dq, dk, dv, dlevels.unflatten(1, (work.level_heads, -1)).sum(2).transpose(1, 2)


def _of_queries(work: _Work, gradient: Gradient) -> tuple[Tensor, Tensor]:
    """What the gradient kernels need of each query: (delta, lse in units of log 2), `[B, H, T]`."""
    dout, out, lse = _ready(gradient.dout), _ready(gradient.out), gradient.lse.contiguous()
    dlse = None if gradient.dlse is None else gradient.dlse.contiguous()
    delta = lse.new_empty(work.batch, work.heads, work.queries, dtype=torch.float32)
    lse2 = torch.empty_like(delta)
    number = triton.cdiv(work.queries, DELTA_ROWS)
    _delta[(number * work.batch * work.heads,)](
        dout, out, lse, lse if dlse is None else dlse, delta, lse2, work.queries, number, work.heads,
        *_strides(dout, out), HAS_DLSE=dlse is not None, M=DELTA_ROWS, V=work.value_dim, V0=padded(work.value_dim),
        num_warps=4,
    )  # fmt: skip
    return delta, lse2


_FLOATS = ("q_levels", "k_levels", "out", "lse", "dlse", "delta", "lse2", "dq", "dk", "dv", "dlevels")
_INTEGERS = ("q_ids", "q_positions", "k_ids", "k_positions", "offsets", "bounds")


def compilations() -> list[Compilation]:
    """Every kernel at the dims of production models in bfloat16; at 128 with a window and sinks, and with all that can
    be done to logits, too.
    """
    result = []
    windowed = Mask(window=4096, sink_tokens=4)
    for key_dim, value_dim, mask, capped_with_levels in (
        (64, 64, Mask(), False),
        (128, 128, Mask(), False),
        (128, 128, windowed, False),
        (128, 128, Mask(), True),
        (192, 128, Mask(), False),
    ):
        chosen = blockings(torch.bfloat16, key_dim, value_dim)
        variant = f"{key_dim}/{value_dim}" + (" window" if mask == windowed else "")
        variant += " softcap levels" if capped_with_levels else ""
        for kernel, blocks, rows in (
            (_forward, chosen.forward, chosen.forward.queries),
            (_dq, chosen.dq, chosen.dq.queries),
            (_dkv, chosen.dkv, chosen.dkv.keys),
        ):
            constants = _constants(blocks, key_dim, value_dim, mask, capped_with_levels, capped_with_levels)
            result.append(_compilation(kernel, constants, blocks.warps, blocks.stages, rows, variant))
    for value_dim in (64, 128):
        constants = {"HAS_DLSE": False, "M": DELTA_ROWS, "V": value_dim, "V0": value_dim}
        result.append(_compilation(_delta, constants, 4, 1, 0, str(value_dim)))
    return result


def _compilation(kernel, constants, warps: int, stages: int, rows: int, variant: str) -> Compilation:
    def kind(name: str) -> str:
        if name in _FLOATS:
            return "*fp32"
        if name in _INTEGERS:
            return "*i32"
        if name in ("q", "k", "v", "dout"):
            return "*bf16"
        return "fp32" if name.endswith("scale") or name == "softcap" else "i32"

    signature = {name: kind(name) for name in kernel.arg_names if name not in constants}
    divisible = tuple(
        name
        for name, typed in signature.items()
        if typed.startswith("*") or name in ("queries", "keys") or name.endswith(("_row", "_stride", "_head"))
    )
    return Compilation(kernel, signature, constants, divisible, warps, stages, rows, variant=variant)
