"""Block-sparse attention on GPUs: by queries where a list serves several rows, else by blocks over gathered queries.

A row is one query of one head. Where a list serves 8 rows or more (a group's heads, a block of queries) of at most 128
dims, a program takes a list and walks its blocks, with scores transposed: blocks are the tall side of the products.
Where it serves fewer (MoBA), a program takes a block and rows that list it, writes a partial result for each slot of
their lists, and a second kernel merges the slots in their order. Gradients of keys and values go by blocks in both
cases, over the inverse of the lists, made by a stable sort. No atomics: the same inputs give the same bits at every
run.
"""

# Kernels are typed by Triton, when they are compiled.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportReturnType=false

from __future__ import annotations

from functools import cached_property
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..attend import Gradient
from ..blocks import BlockTile
from ..compilation import Compilation
from ..masks import Mask, Pattern
from ..masks.triton import flat_bands, visible

LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453

ROWS = 64  # per tile of gathered rows
PARTIAL_BYTES = 1 << 29  # of partial results at a time, where slots are merged
LEAST_SEGMENT = 1024  # rows that one program sums into a block's gradient before the block is shared among programs
SHARED_ROWS = 8  # rows per list from which on programs go by queries
# Dims up to which they do: with 192 in bfloat16 they left their memory on an H200, which nothing here explains. By
# blocks the same dims were right there.
WIDEST_BY_QUERY = 128

# Keys of a tile, warps and stages by the larger of the padded dims.
BY_QUERY = {64: (64, 4, 3), 128: (64, 4, 3)}
BY_QUERY_BACKWARD = {64: (64, 4, 2), 128: (64, 4, 2)}
BY_BLOCK = {64: (64, 4, 3), 128: (64, 4, 2), 256: (64, 8, 2)}
KEY_GRADIENTS = {64: (64, 4, 2), 128: (64, 8, 2), 256: (64, 8, 1)}


FAR = tl.constexpr(1 << 30)  # the position of a missing key


@triton.jit
def _visible(at, key_at, BANDS: tl.constexpr):
    """Of positions: −1 for a query that must see nothing, FAR for a key that is not there."""
    return visible(at, key_at, BANDS) & (at >= 0) & (key_at < FAR)


@triton.jit
def _attend_by_query(
    q, k, v, lists, pieces, places, out, lse, scale, T, S, L, N,
    M: tl.constexpr, J: tl.constexpr, G: tl.constexpr, R: tl.constexpr, QUERIES: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, TILE: tl.constexpr, KEYS: tl.constexpr,
    STEPS: tl.constexpr, BANDS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows of one list over its blocks: out [B, T, H, V] and natural lse [B, T, H]."""
    PARTS: tl.constexpr = (QUERIES * R + TILE - 1) // TILE
    n = tl.program_id(0) // PARTS
    b = tl.program_id(1) // J
    j = tl.program_id(1) % J
    g = j // (J // G)
    i = tl.program_id(0) % PARTS * TILE + tl.arange(0, TILE)
    token = n * QUERIES + i // R
    inside = (i < QUERIES * R) & (token < T)
    row = (b * T + token) * (J * R) + j * R + i % R
    wide = tl.cast(row, tl.int64)
    place = tl.load(places + b * T + token, mask=inside, other=-1)
    kd = tl.arange(0, KP)
    vd = tl.arange(0, VP)
    q_t = tl.load(q + wide[None, :] * K + kd[:, None], mask=inside[None, :] & (kd[:, None] < K), other=0.0)
    most = tl.full([TILE], -1e30, tl.float32)
    total = tl.zeros([TILE], tl.float32)
    acc = tl.zeros([VP, TILE], tl.float32)
    entry = (tl.cast(b, tl.int64) * L + n) * J + j
    for s in range(M * STEPS):
        piece = tl.load(lists + entry * M + s // STEPS)
        listed = (piece >= 0) & (piece < N)
        about = pieces + (b * N + tl.where(listed, piece, 0)) * 5
        start = tl.load(about)
        length = tl.where(listed, tl.load(about + 1), 0)
        first = tl.load(about + 2)
        base = tl.load(about + 3)
        stop = tl.load(about + 4)
        offset = s % STEPS * KEYS + tl.arange(0, KEYS)
        held = offset < length
        key = (tl.cast(b, tl.int64) * S + start + offset) * G + g
        k_here = tl.load(k + key[:, None] * K + kd[None, :], mask=held[:, None] & (kd[None, :] < K), other=0.0)
        v_here = tl.load(v + key[:, None] * V + vd[None, :], mask=held[:, None] & (vd[None, :] < V), other=0.0)
        key_at = tl.where(held, first + offset, FAR)
        at = tl.where((place >= base) & (place < stop), place - base, -1)
        seen = _visible(at[None, :], key_at[:, None], BANDS)
        x = tl.dot(k_here, q_t, input_precision=PRECISION) * (scale * 1.4426950408889634)
        x = tl.where(seen, x, -1e30)
        higher = tl.maximum(most, tl.max(x, 0))
        shrink = tl.exp2(most - higher)
        p = tl.where(seen, tl.exp2(x - higher[None, :]), 0.0)
        total = total * shrink + tl.sum(p, 0)
        acc = acc * shrink[None, :] + tl.dot(tl.trans(v_here), p.to(v_here.dtype), input_precision=PRECISION)
        most = higher
    some = total > 0
    acc = acc / tl.where(some, total, 1.0)[None, :]
    tl.store(out + wide[None, :] * V + vd[:, None], acc, mask=inside[None, :] & (vd[:, None] < V))
    found = (most + tl.log2(tl.where(some, total, 1.0))) * 0.6931471805599453
    tl.store(lse + row, tl.where(some, found, float("-inf")), mask=inside)


@triton.jit
def _query_gradients_by_query(
    q, k, v, dout, lse2, delta, lists, pieces, places, dq, scale, T, S, L, N,
    M: tl.constexpr, J: tl.constexpr, G: tl.constexpr, R: tl.constexpr, QUERIES: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, TILE: tl.constexpr, KEYS: tl.constexpr,
    STEPS: tl.constexpr, BANDS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq [B, T, H, K] of the rows of one list; `lse2` is in base 2."""
    PARTS: tl.constexpr = (QUERIES * R + TILE - 1) // TILE
    n = tl.program_id(0) // PARTS
    b = tl.program_id(1) // J
    j = tl.program_id(1) % J
    g = j // (J // G)
    i = tl.program_id(0) % PARTS * TILE + tl.arange(0, TILE)
    token = n * QUERIES + i // R
    inside = (i < QUERIES * R) & (token < T)
    row = (b * T + token) * (J * R) + j * R + i % R
    wide = tl.cast(row, tl.int64)
    place = tl.load(places + b * T + token, mask=inside, other=-1)
    kd = tl.arange(0, KP)
    vd = tl.arange(0, VP)
    q_t = tl.load(q + wide[None, :] * K + kd[:, None], mask=inside[None, :] & (kd[:, None] < K), other=0.0)
    dout_t = tl.load(dout + wide[None, :] * V + vd[:, None], mask=inside[None, :] & (vd[:, None] < V), other=0.0)
    lse_here = tl.load(lse2 + row, mask=inside, other=1e30)
    delta_here = tl.load(delta + row, mask=inside, other=0.0)
    acc = tl.zeros([KP, TILE], tl.float32)
    entry = (tl.cast(b, tl.int64) * L + n) * J + j
    for s in range(M * STEPS):
        piece = tl.load(lists + entry * M + s // STEPS)
        listed = (piece >= 0) & (piece < N)
        about = pieces + (b * N + tl.where(listed, piece, 0)) * 5
        start = tl.load(about)
        length = tl.where(listed, tl.load(about + 1), 0)
        first = tl.load(about + 2)
        base = tl.load(about + 3)
        stop = tl.load(about + 4)
        offset = s % STEPS * KEYS + tl.arange(0, KEYS)
        held = offset < length
        key = (tl.cast(b, tl.int64) * S + start + offset) * G + g
        k_here = tl.load(k + key[:, None] * K + kd[None, :], mask=held[:, None] & (kd[None, :] < K), other=0.0)
        v_here = tl.load(v + key[:, None] * V + vd[None, :], mask=held[:, None] & (vd[None, :] < V), other=0.0)
        key_at = tl.where(held, first + offset, FAR)
        at = tl.where((place >= base) & (place < stop), place - base, -1)
        seen = _visible(at[None, :], key_at[:, None], BANDS)
        x = tl.dot(k_here, q_t, input_precision=PRECISION) * (scale * 1.4426950408889634)
        p = tl.exp2(tl.where(seen, x - lse_here[None, :], -1e30))
        ds = p * (tl.dot(v_here, dout_t, input_precision=PRECISION) - delta_here[None, :])
        acc += tl.dot(tl.trans(k_here), ds.to(k_here.dtype), input_precision=PRECISION)
    tl.store(dq + wide[None, :] * K + kd[:, None], acc * scale, mask=inside[None, :] & (kd[:, None] < K))


@triton.jit
def _gathered(order, offsets, owner, firsts, tile, unit, TILE: tl.constexpr, M: tl.constexpr, WIDTH: tl.constexpr):
    """Rows `tile` × `unit` … of the key block that `owner` names: (slot, row inside the list, whether there is one)."""
    key = tl.load(owner + tile)
    first = tl.load(offsets + key)
    rows = (tl.load(offsets + key + 1) - first) * WIDTH
    i = (tile - tl.load(firsts + key)) * unit + tl.arange(0, TILE)
    inside = i < rows
    slot = tl.load(order + first + i // WIDTH, mask=inside, other=0)
    return slot, i % WIDTH, inside


@triton.jit
def _attend_by_block(
    q, k, v, order, offsets, owner, firsts, pieces, places, partial, partial_lse, scale, T, S, L, N,
    TOTAL,
    M: tl.constexpr, J: tl.constexpr, G: tl.constexpr, R: tl.constexpr, QUERIES: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, TILE: tl.constexpr, KEYS: tl.constexpr,
    STEPS: tl.constexpr, BANDS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows that list one block, over that block: a partial result for each slot, its lse in base 2 (−1e30 for none)."""
    tile = tl.program_id(0)
    block = tl.load(owner + tile)
    if block < TOTAL:
        slot, i, inside = _gathered(order, offsets, owner, firsts, tile, TILE, TILE, M, QUERIES * R)
        piece = block % N
        g = block // N % G
        b = block // (N * G)
        entry = slot // M
        token = entry // J % L * QUERIES + i // R
        inside = inside & (token < T)
        row = (b * T + token) * (J * R) + entry % J * R + i % R
        wide = tl.cast(row, tl.int64)
        place = tl.load(places + b * T + token, mask=inside, other=-1)
        about = pieces + (b * N + piece) * 5
        start = tl.load(about)
        length = tl.load(about + 1)
        first = tl.load(about + 2)
        base = tl.load(about + 3)
        at = tl.where((place >= base) & (place < tl.load(about + 4)), place - base, -1)
        kd = tl.arange(0, KP)
        vd = tl.arange(0, VP)
        q_here = tl.load(q + wide[:, None] * K + kd[None, :], mask=inside[:, None] & (kd[None, :] < K), other=0.0)
        most = tl.full([TILE], -1e30, tl.float32)
        total = tl.zeros([TILE], tl.float32)
        acc = tl.zeros([TILE, VP], tl.float32)
        for low in range(0, length, KEYS):
            offset = low + tl.arange(0, KEYS)
            held = offset < length
            key = (tl.cast(b, tl.int64) * S + start + offset) * G + g
            k_t = tl.load(k + key[None, :] * K + kd[:, None], mask=held[None, :] & (kd[:, None] < K), other=0.0)
            v_here = tl.load(v + key[:, None] * V + vd[None, :], mask=held[:, None] & (vd[None, :] < V), other=0.0)
            key_at = tl.where(held, first + offset, FAR)
            seen = _visible(at[:, None], key_at[None, :], BANDS)
            x = tl.dot(q_here, k_t, input_precision=PRECISION) * (scale * 1.4426950408889634)
            x = tl.where(seen, x, -1e30)
            higher = tl.maximum(most, tl.max(x, 1))
            shrink = tl.exp2(most - higher)
            p = tl.where(seen, tl.exp2(x - higher[:, None]), 0.0)
            total = total * shrink + tl.sum(p, 1)
            acc = acc * shrink[:, None] + tl.dot(p.to(v_here.dtype), v_here, input_precision=PRECISION)
            most = higher
        some = total > 0
        acc = acc / tl.where(some, total, 1.0)[:, None]
        to = tl.cast(slot, tl.int64) * (QUERIES * R) + i
        tl.store(partial + to[:, None] * V + vd[None, :], acc, mask=inside[:, None] & (vd[None, :] < V))
        found = tl.where(some, most + tl.log2(tl.where(some, total, 1.0)), -1e30)
        tl.store(partial_lse + to, found, mask=inside)


@triton.jit
def _query_gradients_by_block(
    q, k, v, dout, lse2, delta, order, offsets, owner, firsts, pieces, places, partial, scale, T, S, L,
    N, TOTAL,
    M: tl.constexpr, J: tl.constexpr, G: tl.constexpr, R: tl.constexpr, QUERIES: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, TILE: tl.constexpr, KEYS: tl.constexpr,
    STEPS: tl.constexpr, BANDS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What one block gives to dq of the rows that list it, for each slot."""
    tile = tl.program_id(0)
    block = tl.load(owner + tile)
    if block < TOTAL:
        slot, i, inside = _gathered(order, offsets, owner, firsts, tile, TILE, TILE, M, QUERIES * R)
        piece = block % N
        g = block // N % G
        b = block // (N * G)
        entry = slot // M
        token = entry // J % L * QUERIES + i // R
        inside = inside & (token < T)
        row = (b * T + token) * (J * R) + entry % J * R + i % R
        wide = tl.cast(row, tl.int64)
        place = tl.load(places + b * T + token, mask=inside, other=-1)
        about = pieces + (b * N + piece) * 5
        start = tl.load(about)
        length = tl.load(about + 1)
        first = tl.load(about + 2)
        base = tl.load(about + 3)
        at = tl.where((place >= base) & (place < tl.load(about + 4)), place - base, -1)
        kd = tl.arange(0, KP)
        vd = tl.arange(0, VP)
        q_here = tl.load(q + wide[:, None] * K + kd[None, :], mask=inside[:, None] & (kd[None, :] < K), other=0.0)
        dout_here = tl.load(
            dout + wide[:, None] * V + vd[None, :],
            mask=inside[:, None] & (vd[None, :] < V),
            other=0.0,
        )
        lse_here = tl.load(lse2 + row, mask=inside, other=1e30)
        delta_here = tl.load(delta + row, mask=inside, other=0.0)
        acc = tl.zeros([TILE, KP], tl.float32)
        for low in range(0, length, KEYS):
            offset = low + tl.arange(0, KEYS)
            held = offset < length
            key = (tl.cast(b, tl.int64) * S + start + offset) * G + g
            k_here = tl.load(k + key[:, None] * K + kd[None, :], mask=held[:, None] & (kd[None, :] < K), other=0.0)
            v_t = tl.load(v + key[None, :] * V + vd[:, None], mask=held[None, :] & (vd[:, None] < V), other=0.0)
            key_at = tl.where(held, first + offset, FAR)
            seen = _visible(at[:, None], key_at[None, :], BANDS)
            x = tl.dot(q_here, tl.trans(k_here), input_precision=PRECISION) * (scale * 1.4426950408889634)
            p = tl.exp2(tl.where(seen, x - lse_here[:, None], -1e30))
            ds = p * (tl.dot(dout_here, v_t, input_precision=PRECISION) - delta_here[:, None])
            acc += tl.dot(ds.to(k_here.dtype), k_here, input_precision=PRECISION)
        to = tl.cast(slot, tl.int64) * (QUERIES * R) + i
        tl.store(partial + to[:, None] * K + kd[None, :], acc * scale, mask=inside[:, None] & (kd[None, :] < K))


@triton.jit
def _merge_slots(
    partial, partial_lse, lists, out, lse, T, L, N, COUNT,
    M: tl.constexpr, J: tl.constexpr, R: tl.constexpr, QUERIES: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    TILE: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """The slots of each row, in their order: weighted by their lse where they are softmax averages, else added up."""
    w = tl.cast(tl.program_id(0), tl.int64) * TILE + tl.arange(0, TILE)
    entry = w // (QUERIES * R)
    i = w % (QUERIES * R)
    token = entry // J % L * QUERIES + i // R
    inside = (w < COUNT) & (token < T)
    row = (entry // (J * L) * T + token) * (J * R) + entry % J * R + i % R
    d = tl.arange(0, DP)
    most = tl.full([TILE], -1e30, tl.float32)
    total = tl.zeros([TILE], tl.float32)
    acc = tl.zeros([TILE, DP], tl.float32)
    for s in range(M):
        piece = tl.load(lists + entry * M + s, mask=inside, other=-1)
        listed = inside & (piece >= 0) & (piece < N)
        at = (entry * M + s) * (QUERIES * R) + i
        here = tl.load(partial + at[:, None] * D + d[None, :], mask=listed[:, None] & (d[None, :] < D), other=0.0)
        if WEIGHTED:
            lse_here = tl.load(partial_lse + at, mask=listed, other=-1e30)
            higher = tl.maximum(most, lse_here)
            shrink = tl.exp2(most - higher)
            weight = tl.where(lse_here > -1e29, tl.exp2(lse_here - higher), 0.0)
            total = total * shrink + weight
            acc = acc * shrink[:, None] + here * weight[:, None]
            most = higher
        else:
            acc += here
    if WEIGHTED:
        some = total > 0
        acc = acc / tl.where(some, total, 1.0)[:, None]
        found = (most + tl.log2(tl.where(some, total, 1.0))) * 0.6931471805599453
        tl.store(lse + row, tl.where(some, found, float("-inf")), mask=inside)
    tl.store(out + row[:, None] * D + d[None, :], acc, mask=inside[:, None] & (d[None, :] < D))


@triton.jit
def _key_gradients(
    q, k, v, dout, lse2, delta, order, offsets, owner, firsts, shares, pieces, places, dk, dv,
    partial_dk, partial_dv, scale, segment, T, S, L, N, TOTAL,
    M: tl.constexpr, J: tl.constexpr, G: tl.constexpr, R: tl.constexpr, QUERIES: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, TILE: tl.constexpr, KEYS: tl.constexpr,
    STEPS: tl.constexpr, BANDS: tl.constexpr, PRECISION: tl.constexpr,
    GIVE_K: tl.constexpr, GIVE_V: tl.constexpr,
):  # fmt: skip
    """dk and dv of some keys of one block, from a segment of the rows that list it: final, or a share to be summed."""
    tile = tl.program_id(0)
    block = tl.load(owner + tile)
    if block < TOTAL:
        piece = block % N
        g = block // N % G
        b = block // (N * G)
        about = pieces + (b * N + piece) * 5
        start = tl.load(about)
        length = tl.load(about + 1)
        base = tl.load(about + 3)
        stop = tl.load(about + 4)
        offset = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
        held = offset < length
        key_at = tl.where(held, tl.load(about + 2) + offset, FAR)
        key = (tl.cast(b, tl.int64) * S + start + offset) * G + g
        kd = tl.arange(0, KP)
        vd = tl.arange(0, VP)
        k_here = tl.load(k + key[:, None] * K + kd[None, :], mask=held[:, None] & (kd[None, :] < K), other=0.0)
        v_here = tl.load(v + key[:, None] * V + vd[None, :], mask=held[:, None] & (vd[None, :] < V), other=0.0)
        first_entry = tl.load(offsets + block)
        rows = (tl.load(offsets + block + 1) - first_entry) * (QUERIES * R)
        part = tile - tl.load(firsts + block)
        low = part * segment
        high = tl.minimum(low + segment, rows)
        dk_acc = tl.zeros([KEYS, KP], tl.float32)
        dv_acc = tl.zeros([KEYS, VP], tl.float32)
        for at_row in range(low, high, TILE):
            i = at_row + tl.arange(0, TILE)
            inside = i < high
            slot = tl.load(order + first_entry + i // (QUERIES * R), mask=inside, other=0)
            entry = slot // M
            i = i % (QUERIES * R)
            token = entry // J % L * QUERIES + i // R
            inside = inside & (token < T)
            row = (b * T + token) * (J * R) + entry % J * R + i % R
            wide = tl.cast(row, tl.int64)
            place = tl.load(places + b * T + token, mask=inside, other=-1)
            q_here = tl.load(
                q + wide[:, None] * K + kd[None, :],
                mask=inside[:, None] & (kd[None, :] < K),
                other=0.0,
            )
            dout_here = tl.load(
                dout + wide[:, None] * V + vd[None, :],
                mask=inside[:, None] & (vd[None, :] < V),
                other=0.0,
            )
            lse_here = tl.load(lse2 + row, mask=inside, other=1e30)
            delta_here = tl.load(delta + row, mask=inside, other=0.0)
            at = tl.where((place >= base) & (place < stop), place - base, -1)
            seen = _visible(at[:, None], key_at[None, :], BANDS)
            x = tl.dot(q_here, tl.trans(k_here), input_precision=PRECISION) * (scale * 1.4426950408889634)
            p = tl.exp2(tl.where(seen, x - lse_here[:, None], -1e30))
            if GIVE_V:
                dv_acc += tl.dot(tl.trans(p.to(dout_here.dtype)), dout_here, input_precision=PRECISION)
            if GIVE_K:
                ds = p * (tl.dot(dout_here, tl.trans(v_here), input_precision=PRECISION) - delta_here[:, None])
                dk_acc += tl.dot(tl.trans(ds.to(q_here.dtype)), q_here, input_precision=PRECISION)
        dk_acc = dk_acc * scale
        share = tl.load(shares + block)
        to = key
        if share >= 0:
            to = (tl.cast(share + part, tl.int64) * STEPS) * KEYS + offset
            dk = partial_dk
            dv = partial_dv
        if GIVE_K:
            tl.store(dk + to[:, None] * K + kd[None, :], dk_acc, mask=held[:, None] & (kd[None, :] < K))
        if GIVE_V:
            tl.store(dv + to[:, None] * V + vd[None, :], dv_acc, mask=held[:, None] & (vd[None, :] < V))


@triton.jit
def _sum_shares(
    firsts, shares, pieces, dk, dv, partial_dk, partial_dv, S, N,
    G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, KEYS: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    """dk and dv of the blocks that were shared among programs, summed in the order of the shares."""
    block = tl.program_id(0)
    share = tl.load(shares + block)
    if share >= 0:
        count = tl.load(firsts + block + 1) - tl.load(firsts + block)
        g = block // N % G
        b = block // (N * G)
        about = pieces + (b * N + block % N) * 5
        offset = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
        held = offset < tl.load(about + 1)
        key = (tl.cast(b, tl.int64) * S + tl.load(about) + offset) * G + g
        kd = tl.arange(0, KP)
        vd = tl.arange(0, VP)
        dk_acc = tl.zeros([KEYS, KP], tl.float32)
        dv_acc = tl.zeros([KEYS, VP], tl.float32)
        for part in range(count):
            to = (tl.cast(share + part, tl.int64) * STEPS) * KEYS + offset
            dk_acc += tl.load(
                partial_dk + to[:, None] * K + kd[None, :], mask=held[:, None] & (kd[None, :] < K), other=0.0
            )
            dv_acc += tl.load(
                partial_dv + to[:, None] * V + vd[None, :], mask=held[:, None] & (vd[None, :] < V), other=0.0
            )
        tl.store(dk + key[:, None] * K + kd[None, :], dk_acc, mask=held[:, None] & (kd[None, :] < K))
        tl.store(dv + key[:, None] * V + vd[None, :], dv_acc, mask=held[:, None] & (vd[None, :] < V))


class _Tiles(NamedTuple):
    """Programs over the inverse lists: each owner's tiles stand together, `firsts` `[owners + 1]` is where.

    owner: `[bound]`, the block of each program, the number of blocks for those past the last.
    """

    owner: Tensor
    firsts: Tensor
    bound: int


class _Inverse(NamedTuple):
    """Slots of the lists sorted by block: those of block x are `order[offsets[x] : offsets[x + 1]]`."""

    order: Tensor
    offsets: Tensor

    def tiles(self, width: int, unit: int, least: int) -> _Tiles:
        """As many tiles per block as its rows, `width` per slot, fill units of rows, and at least `least`."""
        rows = self.offsets.diff().long() * width
        ends = ((rows + unit - 1) // unit).clamp(min=least).cumsum(0)
        bound = rows.numel() + self.order.numel() * width // unit
        owner = torch.searchsorted(ends, torch.arange(bound, device=ends.device), right=True)
        return _Tiles(owner.int(), torch.nn.functional.pad(ends, (1, 0)).int(), bound)


class _Problem:
    """What every launch of one call shares."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, tile: BlockTile, scale: float) -> None:
        self.q, self.k, self.v = q.contiguous(), k.contiguous(), v.contiguous()
        self.batch, self.length, self.heads, self.key_dim = q.shape
        self.keys, self.groups, self.value_dim = v.shape[1:]
        self.list_heads, self.scale, self.tile = blocks.shape[2], scale, tile
        table, self.places = tile.placed(q.device)
        parts, _, count, _ = table.shape
        self.pieces = table.permute(1, 2, 0, 3).reshape(self.batch, count * parts, 5).contiguous()
        if parts > 1:  # a listed block stands for each of its pieces
            pieces = blocks.unsqueeze(-1) * parts + torch.arange(parts, dtype=torch.int32, device=q.device)
            blocks = torch.where(((blocks >= 0) & (blocks < count)).unsqueeze(-1), pieces, -1).flatten(-2)
        self.lists = blocks.contiguous()
        self.count = count * parts
        self.rows_per_list = tile.query_block * (self.heads // self.list_heads)

    @property
    def slots(self) -> int:
        return self.lists.numel()

    @property
    def by_query(self) -> bool:
        return self.rows_per_list >= SHARED_ROWS and max(self.key_dim, self.value_dim) <= WIDEST_BY_QUERY

    def constants(self, table: dict[int, tuple[int, int, int]], rows: int) -> dict[str, Any]:
        return _constants(
            table, rows, self.tile.mask, block_size=self.tile.layout.block_size, slots=self.lists.shape[3],
            list_heads=self.list_heads, groups=self.groups, heads=self.heads, queries=self.tile.query_block,
            key_dim=self.key_dim, value_dim=self.value_dim, exact=self.q.dtype == torch.float32,
        )  # fmt: skip

    @cached_property
    def inverse(self) -> _Inverse:
        """Slots by (row, group, piece), in the order of the lists within one; empty slots come last."""
        device, lists = self.q.device, self.lists
        row = torch.arange(self.batch, dtype=torch.int32, device=device).view(-1, 1, 1, 1)
        group = torch.arange(self.list_heads, dtype=torch.int32, device=device).view(-1, 1)
        group = group // (self.list_heads // self.groups)
        total = self.batch * self.groups * self.count
        keys = torch.where((lists >= 0) & (lists < self.count), (row * self.groups + group) * self.count + lists, total)
        ordered, order = keys.flatten().sort(stable=True)
        bounds = torch.arange(total + 1, dtype=torch.int32, device=device)
        return _Inverse(order.int(), torch.searchsorted(ordered, bounds).int())


def _constants(
    table: dict[int, tuple[int, int, int]],
    rows: int,
    mask: Pattern,
    *,
    block_size: int,
    slots: int,
    list_heads: int,
    groups: int,
    heads: int,
    queries: int,
    key_dim: int,
    value_dim: int,
    exact: bool,
) -> dict[str, Any]:
    """The constexpr arguments of the kernels, with warps and stages under Triton's names."""
    padded_key, padded_value = (max(16, triton.next_power_of_2(x)) for x in (key_dim, value_dim))
    widest = max(64, padded_key, padded_value)
    if widest not in table:
        raise ValueError(f"key and value dims must be at most 256 for Triton; got {key_dim} and {value_dim}")
    keys, warps, stages = table[widest]
    keys = min(keys, max(16, triton.next_power_of_2(block_size)))
    return {
        "M": slots, "J": list_heads, "G": groups, "R": heads // list_heads, "QUERIES": queries,
        "K": key_dim, "V": value_dim, "KP": padded_key, "VP": padded_value, "TILE": rows, "KEYS": keys,
        "STEPS": -(-block_size // keys), "BANDS": flat_bands(mask),
        "PRECISION": "ieee" if exact else "tf32", "num_warps": warps, "num_stages": stages,
    }  # fmt: skip


def _gradients_at_once(key_dim: int, value_dim: int) -> tuple[dict[str, bool], ...]:
    """dk and dv in one pass where registers hold the sums of both, else in two."""
    if max(key_dim, value_dim) <= 128:
        return ({"GIVE_K": True, "GIVE_V": True},)
    return {"GIVE_K": True, "GIVE_V": False}, {"GIVE_K": False, "GIVE_V": True}


def _rows_of_gradients(key_dim: int, value_dim: int) -> int:
    """Rows of a tile of `_key_gradients`: fewer where its sums already fill the registers."""
    return ROWS if max(key_dim, value_dim) <= 128 else ROWS // 2


def _rows_of(width: int) -> int:
    """Rows of a tile that goes by queries: those of a list, as a power of two, up to ROWS."""
    return min(ROWS, max(16, triton.next_power_of_2(width)))


def attend(q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, *, tile: BlockTile, scale: float) -> tuple[Tensor, Tensor]:
    """See `longreach.kernels.block_sparse.attend`."""
    out = torch.empty((*q.shape[:3], v.shape[3]), dtype=torch.float32, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if not blocks.numel() or not tile.layout.count:
        return out.zero_(), lse.fill_(float("-inf"))
    problem = _Problem(q, k, v, blocks, tile, scale)
    if problem.by_query:
        _attend_lists(problem, out, lse)
        return out, lse
    for first, last, part in _portions(problem, problem.value_dim):
        out_part, lse_part = (x[:, first:last] for x in (out, lse))
        _attend_gathered(part, out_part, lse_part)
    return out, lse


def attend_backward(
    gradient: Gradient, q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, *, tile: BlockTile, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See `longreach.kernels.block_sparse.attend_backward`."""
    dq, dk, dv = (torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (q, k, v))
    if not blocks.numel() or not tile.layout.count:
        return dq, dk, dv
    problem = _Problem(q, k, v, blocks, tile, scale)
    delta, lse = gradient.delta(torch.float32), gradient.lse
    lse2 = torch.where(lse == float("-inf"), 1e30, lse * LOG2_E)
    incoming = gradient.dout.to(q.dtype).contiguous(), lse2.contiguous(), delta.contiguous()
    _sum_key_gradients(problem, incoming, dk, dv)
    if problem.by_query:
        _query_gradients(problem, incoming, dq)
        return dq, dk, dv
    for first, last, part in _portions(problem, problem.key_dim):
        dq_part, *incoming_part = (x[:, first:last] for x in (dq, *incoming))
        _query_gradients_gathered(part, tuple(incoming_part), dq_part)
    return dq, dk, dv


def _portions(problem: _Problem, dim: int) -> list[tuple[int, int, _Problem]]:
    """The queries in portions of which all slots' partial results fit PARTIAL_BYTES: (first token, last, problem)."""
    lists, queries = problem.lists.shape[1], problem.tile.query_block
    bytes_per_list = problem.slots // lists * problem.rows_per_list * (dim + 1) * 4
    step = max(1, PARTIAL_BYTES // bytes_per_list)
    if step >= lists:
        return [(0, problem.length, problem)]
    portions = []
    for at in range(0, lists, step):
        first, last = at * queries, min((at + step) * queries, problem.length)
        portions.append((first, last, _portion(problem, at, min(at + step, lists), first, last)))
    return portions


def _portion(problem: _Problem, low: int, high: int, first: int, last: int) -> _Problem:
    part = object.__new__(_Problem)
    part.__dict__.update(problem.__dict__)
    part.__dict__.pop("inverse", None)
    part.lists = problem.lists[:, low:high].contiguous()
    part.q, part.places = (x[:, first:last].contiguous() for x in (problem.q, problem.places))
    part.length = last - first
    return part


def _attend_lists(problem: _Problem, out: Tensor, lse: Tensor) -> None:
    constants = problem.constants(BY_QUERY, _rows_of(problem.rows_per_list))
    lists = problem.lists.shape[1]
    grid = (lists * triton.cdiv(problem.rows_per_list, constants["TILE"]), problem.batch * problem.list_heads)
    _attend_by_query[grid](
        problem.q, problem.k, problem.v, problem.lists, problem.pieces, problem.places, out, lse,
        problem.scale, problem.length, problem.keys, lists, problem.count, **constants,
    )  # fmt: skip


def _query_gradients(problem: _Problem, incoming: tuple[Tensor, ...], dq: Tensor) -> None:
    constants = problem.constants(BY_QUERY_BACKWARD, _rows_of(problem.rows_per_list))
    lists = problem.lists.shape[1]
    grid = (lists * triton.cdiv(problem.rows_per_list, constants["TILE"]), problem.batch * problem.list_heads)
    _query_gradients_by_query[grid](
        problem.q, problem.k, problem.v, *incoming, problem.lists, problem.pieces, problem.places,
        dq, problem.scale, problem.length, problem.keys, lists, problem.count, **constants,
    )  # fmt: skip


def _attend_gathered(problem: _Problem, out: Tensor, lse: Tensor) -> None:
    constants, lists = problem.constants(BY_BLOCK, ROWS), problem.lists.shape[1]
    inverse = problem.inverse
    tiles = inverse.tiles(problem.rows_per_list, ROWS, least=0)
    partial = out.new_empty(problem.slots * problem.rows_per_list, problem.value_dim)
    partial_lse = lse.new_empty(problem.slots * problem.rows_per_list)
    _attend_by_block[(tiles.bound,)](
        problem.q, problem.k, problem.v, inverse.order, inverse.offsets, tiles.owner, tiles.firsts, problem.pieces,
        problem.places, partial, partial_lse, problem.scale, problem.length, problem.keys, lists,
        problem.count, problem.batch * problem.groups * problem.count, **constants,
    )  # fmt: skip
    _merge(problem, partial, partial_lse, out, lse)


def _query_gradients_gathered(problem: _Problem, incoming: tuple[Tensor, ...], dq: Tensor) -> None:
    constants, lists = problem.constants(BY_BLOCK, ROWS), problem.lists.shape[1]
    inverse = problem.inverse
    tiles = inverse.tiles(problem.rows_per_list, ROWS, least=0)
    partial = dq.new_empty(problem.slots * problem.rows_per_list, problem.key_dim)
    _query_gradients_by_block[(tiles.bound,)](
        problem.q, problem.k, problem.v, *(x.contiguous() for x in incoming), inverse.order, inverse.offsets,
        tiles.owner, tiles.firsts, problem.pieces, problem.places, partial, problem.scale, problem.length,
        problem.keys, lists, problem.count, problem.batch * problem.groups * problem.count, **constants,
    )  # fmt: skip
    _merge(problem, partial, None, dq, None)


def _merge(problem: _Problem, partial: Tensor, partial_lse: Tensor | None, out: Tensor, lse: Tensor | None) -> None:
    """Merges slots into `out` (and `lse`), which may be slices of a batch: through contiguous ones where they are."""
    dim, lists = partial.shape[1], problem.lists.shape[1]
    into = out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format)
    lse_into = into if lse is None else torch.empty_like(lse, memory_format=torch.contiguous_format)
    count = problem.batch * lists * problem.list_heads * problem.rows_per_list
    tile = 16
    _merge_slots[(triton.cdiv(count, tile),)](
        partial, partial if partial_lse is None else partial_lse, problem.lists, into, lse_into, problem.length, lists,
        problem.count, count, M=problem.lists.shape[3], J=problem.list_heads,
        R=problem.heads // problem.list_heads, QUERIES=problem.tile.query_block, D=dim, DP=triton.next_power_of_2(dim),
        TILE=tile, WEIGHTED=partial_lse is not None, num_warps=4,
    )  # fmt: skip
    if into is not out:
        out.copy_(into)
    if lse is not None:
        lse.copy_(lse_into)


def _sum_key_gradients(problem: _Problem, incoming: tuple[Tensor, ...], dk: Tensor, dv: Tensor) -> None:
    constants, lists = (
        problem.constants(KEY_GRADIENTS, _rows_of_gradients(problem.key_dim, problem.value_dim)),
        problem.lists.shape[1],
    )
    inverse, total = problem.inverse, problem.batch * problem.groups * problem.count
    # Four times the rows that a block has on average: what is shared then takes at most half of what dk and dv take.
    average = problem.slots * problem.rows_per_list // total
    segment = max(LEAST_SEGMENT, triton.cdiv(4 * average, ROWS) * ROWS)
    tiles = inverse.tiles(problem.rows_per_list, segment, least=1)
    parts = tiles.firsts.diff()
    split = torch.where(parts > 1, parts, 0)
    shares = torch.where(parts > 1, split.cumsum(0).int() - split, -1).int()
    room = 2 * (problem.slots * problem.rows_per_list // segment) * constants["STEPS"] * constants["KEYS"]
    partial_dk, partial_dv = (x.new_empty(room, x.shape[3]) for x in (dk, dv))
    for give in _gradients_at_once(problem.key_dim, problem.value_dim):
        _key_gradients[(tiles.bound, constants["STEPS"])](
            problem.q, problem.k, problem.v, *incoming, inverse.order, inverse.offsets, tiles.owner, tiles.firsts,
            shares, problem.pieces, problem.places, dk, dv, partial_dk, partial_dv, problem.scale, segment,
            problem.length, problem.keys, lists, problem.count, total, **constants, **give,
        )  # fmt: skip
    if room:
        kept = {x: constants[x] for x in ("G", "K", "V", "KP", "VP", "KEYS", "STEPS")}
        _sum_shares[(total, constants["STEPS"])](
            tiles.firsts, shares, problem.pieces, dk, dv, partial_dk, partial_dv, problem.keys, problem.count, **kept
        )


def compilations() -> list[Compilation]:
    """Every kernel at its production shapes: NSA (16 heads per list, blocks of 64), MoBA (one, blocks of 512)."""
    nsa = {"block_size": 64, "slots": 16, "list_heads": 4, "groups": 4, "heads": 64, "queries": 1}
    moba = {"block_size": 512, "slots": 3, "list_heads": 16, "groups": 4, "heads": 16, "queries": 1}
    queries = {"block_size": 64, "slots": 16, "list_heads": 16, "groups": 4, "heads": 16, "queries": 64}
    wide = {"key_dim": 128, "value_dim": 128}
    result = [
        _compilation(_attend_by_block, BY_BLOCK, ROWS, moba | wide, "MoBA 128x128"),
        _compilation(_query_gradients_by_block, BY_BLOCK, ROWS, moba | wide, "MoBA 128x128"),
        _compilation(_key_gradients, KEY_GRADIENTS, ROWS, moba | wide, "MoBA 128x128", _gradients_at_once(128, 128)[0]),
    ]
    for key_dim, value_dim in ((64, 64), (128, 128), (192, 128)):
        sizes, name = nsa | {"key_dim": key_dim, "value_dim": value_dim}, f"NSA {key_dim}x{value_dim}"
        attending = [(_attend_by_query, BY_QUERY, 16), (_query_gradients_by_query, BY_QUERY_BACKWARD, 16)]
        if max(key_dim, value_dim) > WIDEST_BY_QUERY:
            attending = [(_attend_by_block, BY_BLOCK, ROWS), (_query_gradients_by_block, BY_BLOCK, ROWS)]
        result += [_compilation(kernel, table, tile, sizes, name) for kernel, table, tile in attending]
        rows = _rows_of_gradients(key_dim, value_dim)
        for give in _gradients_at_once(key_dim, value_dim):
            which = " keys" if not give["GIVE_V"] else " values" if not give["GIVE_K"] else ""
            result.append(_compilation(_key_gradients, KEY_GRADIENTS, rows, sizes, name + which, give))
    result += [
        _compilation(_attend_by_query, BY_QUERY, ROWS, queries | wide, "64 queries a list"),
        _compilation(_query_gradients_by_query, BY_QUERY_BACKWARD, ROWS, queries | wide, "64 queries a list"),
        _compilation(_merge_slots, BY_BLOCK, 16, moba | wide, "", {"D": 128, "DP": 128, "WEIGHTED": True}),
        _compilation(_sum_shares, KEY_GRADIENTS, ROWS, nsa | wide, ""),
    ]
    return result


# Types of the arguments that are no constants, for inputs in bf16.
_POINTERS = {
    "q": "*bf16", "k": "*bf16", "v": "*bf16", "dout": "*bf16", "lse2": "*fp32", "delta": "*fp32", "lists": "*i32",
    "pieces": "*i32", "places": "*i32", "out": "*fp32", "lse": "*fp32", "dq": "*fp32",
    "dk": "*fp32", "dv": "*fp32", "order": "*i32", "offsets": "*i32", "owner": "*i32", "firsts": "*i32",
    "shares": "*i32", "partial": "*fp32", "partial_lse": "*fp32", "partial_dk": "*fp32", "partial_dv": "*fp32",
}  # fmt: skip


def _compilation(
    kernel: Any,
    table: dict[int, tuple[int, int, int]],
    rows: int,
    sizes: dict[str, int],
    variant: str,
    others: dict[str, Any] | None = None,
) -> Compilation:
    constants = _constants(table, rows, Mask(), exact=False, **sizes) | (others or {})  # type: ignore[arg-type]
    warps, stages = constants.pop("num_warps"), constants.pop("num_stages")
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    names = [name for name in kernel.arg_names if name not in constants]
    signature = {name: _POINTERS.get(name, "fp32" if name == "scale" else "i32") for name in names}
    products = kernel not in (_merge_slots, _sum_shares)
    return Compilation(
        kernel, signature, constants, tuple(name for name in names if name in _POINTERS), warps, stages,
        rows=rows if products else 0, variant=variant,
    )  # fmt: skip
