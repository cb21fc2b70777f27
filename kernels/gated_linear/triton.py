"""The plain gated recurrence as Triton kernels, chunk by chunk; deterministic.

Forward: `_states` goes through a head's chunks in order and keeps the state before each; `_outputs` makes every
chunk's outputs of its state and its own tokens. Backward: `_states` again, `_state_gradients` in reverse order, then
`_keys` (gradients of queries, keys and decays) and `_values`, every chunk by itself. Groups of heads that share queries
and keys are summed within a program.

A decay per channel does not split into factors of query and key without overflow, but it does about a point between
them: `_scores` and `_mix` go by sub-chunks of 16 tokens with their border for that point, token by token within one.
A decay of value channels is the same with values for keys, and gradients of outputs for queries; see `chunked.py`,
of which all formulas and names are. Sums of decays run within a chunk and a document (`cumulate`), base 2.
"""

# Kernels are typed by Triton, when they are compiled.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..chunks.triton import (
    CHANNEL,
    CHUNK,
    LANES,
    NONE,
    TOKEN,
    ceil_div,
    chunk_tokens,
    cumulate,
    cumulate_back,
    dot,
    load_row,
    load_state,
    load_tile,
    power2,
    state_pointers,
    summed,
    tile_pointers,
)
from ..compilation import Compilation
from ..operation import Tensors
from ..problem import Problem
from .parts import GatedLinearInputs

SUB = 16  # tokens whose channels' decays are multiplied step by step; also the least side of a matrix product
BLOCK = 64  # channels of a tile
PROGRAMS = 256  # that go through chunks in order at once: fewer leave a GPU idle, and a row is then cut into segments
LEAST_SEGMENT = 8  # chunks of a segment


@triton.jit
def _states(
    k, v, G, W, ids, initial, starts, final, passed, T, H, GROUPS, K, V, N, LENGTH,
    DECAY: tl.constexpr, VALUE: tl.constexpr, ADD: tl.constexpr, SUMMARY: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """States before the first N chunks, and after them. Without ADD: of k = 0, only what enters goes on.

    Segments of LENGTH chunks run side by side, each from its state of `initial`; `final` are the states after them.
    SUMMARY: from 0, and instead of the states before the chunks the factor by which a segment passes on what enters it.
    """
    kd, vd = tl.program_id(0) * BK + tl.arange(0, BK), tl.program_id(1) * BV + tl.arange(0, BV)
    segments = tl.maximum(tl.cdiv(N, LENGTH), 1)
    at, segment = tl.program_id(2), tl.program_id(2) % segments
    bh = at // segments
    b, h = bh // H, bh % H
    ids += tl.cast(b, tl.int64) * T
    inside = (kd < K)[:, None] & (vd < V)[None, :]
    if SUMMARY:
        S, kept = tl.zeros([BK, BV], tl.float32), tl.full([BK, BV], 1.0, tl.float32)
    else:
        S = load_state(initial, at, kd, vd, K, V)
    for n in range(segment * LENGTH, tl.minimum(segment * LENGTH + LENGTH, N)):
        if not SUMMARY:
            place = tl.cast(bh, tl.int64) * N + n
            tl.store(state_pointers(starts, place, kd, vd, K, V), S.to(starts.dtype.element_ty), mask=inside)
        t, own, before, last = chunk_tokens(ids, n, T, C)
        end = tl.minimum(n * C + C, T) - 1
        leave = (own == last) & (own >= 0)
        goes = tl.where((before == last) & (before >= 0), 1.0, 0.0)
        if ADD:
            keys = load_tile(k, b, t, h // (H // GROUPS), T, GROUPS, K, kd)
            values = load_tile(v, b, t, h, T, H, V, vd)
        if DECAY == 0:
            S *= goes
            if SUMMARY:
                kept *= goes
            if ADD:
                keys = tl.where(leave[:, None], keys, 0.0)
        if DECAY == 1:
            total = tl.load(G + (tl.cast(b, tl.int64) * T + end) * H + h)
            S *= goes * tl.exp2(total)
            if SUMMARY:
                kept *= goes * tl.exp2(total)
            if ADD:
                sums = tl.load(G + (tl.cast(b, tl.int64) * T + t) * H + h, mask=t < T, other=0.0)
                keys = (keys * tl.where(leave, power2(total - sums), 0.0)[:, None]).to(k.dtype.element_ty)
        if DECAY == 2:
            totals = load_row(G, b, end, h, T, H, K, kd)
            S *= (goes * tl.exp2(totals))[:, None]
            if SUMMARY:
                kept *= (goes * tl.exp2(totals))[:, None]
            if ADD:
                fall = power2(totals[None, :] - load_tile(G, b, t, h, T, H, K, kd))
                keys = (keys * tl.where(leave[:, None], fall, 0.0)).to(k.dtype.element_ty)
        if VALUE:
            across = load_row(W, b, end, h, T, H, V, vd)
            S *= tl.exp2(across)[None, :]
            if SUMMARY:
                kept *= tl.exp2(across)[None, :]
            if ADD:
                values = (values * power2(across[None, :] - load_tile(W, b, t, h, T, H, V, vd))).to(v.dtype.element_ty)
        if ADD:
            S += dot(tl.trans(keys), values)
    tl.store(state_pointers(final, at, kd, vd, K, V), S, mask=inside)
    if SUMMARY:
        tl.store(state_pointers(passed, at, kd, vd, K, V), kept, mask=inside)


@triton.jit
def _enter(first, added, passed, entering, size, SEGMENTS, BACK: tl.constexpr, BLOCK: tl.constexpr):
    """entering[s + 1] = entering[s] passed[s] + added[s] from entering[0] = first, or BACK from the last one down.

    `[B H, SEGMENTS, size]`, first `[B H, size]`.
    """
    bh, i = tl.cast(tl.program_id(1), tl.int64), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    S = tl.load(first + bh * size + i, mask=i < size, other=0.0)
    for step in range(SEGMENTS):
        segment = SEGMENTS - 1 - step if BACK else step
        at = (bh * SEGMENTS + segment) * size + i
        tl.store(entering + at, S, mask=i < size)
        S = S * tl.load(passed + at, mask=i < size, other=0.0) + tl.load(added + at, mask=i < size, other=0.0)


@triton.jit
def _state_gradients(
    q, do, G, W, ids, dfinal, afters, dinitial, passed, T, H, GROUPS, K, V, N, LENGTH, scale,
    DECAY: tl.constexpr, VALUE: tl.constexpr, SUMMARY: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Gradients of the states after the first N chunks, and of the state before them; segments as in `_states`."""
    kd, vd = tl.program_id(0) * BK + tl.arange(0, BK), tl.program_id(1) * BV + tl.arange(0, BV)
    segments = tl.maximum(tl.cdiv(N, LENGTH), 1)
    at, segment = tl.program_id(2), tl.program_id(2) % segments
    bh = at // segments
    b, h = bh // H, bh % H
    ids += tl.cast(b, tl.int64) * T
    inside = (kd < K)[:, None] & (vd < V)[None, :]
    if SUMMARY:
        dS, kept = tl.zeros([BK, BV], tl.float32), tl.full([BK, BV], 1.0, tl.float32)
    else:
        dS = load_state(dfinal, at, kd, vd, K, V)
    stop = tl.minimum(segment * LENGTH + LENGTH, N)
    for back in range(stop - segment * LENGTH):
        n = stop - 1 - back
        if not SUMMARY:
            place = tl.cast(bh, tl.int64) * N + n
            tl.store(state_pointers(afters, place, kd, vd, K, V), dS.to(afters.dtype.element_ty), mask=inside)
        t, own, before, last = chunk_tokens(ids, n, T, C)
        end = tl.minimum(n * C + C, T) - 1
        enter = (own == before) & (own >= 0)
        goes = tl.where((before == last) & (before >= 0), 1.0, 0.0)
        queries = load_tile(q, b, t, h // (H // GROUPS), T, GROUPS, K, kd)
        given = load_tile(do, b, t, h, T, H, V, vd)
        if DECAY == 0:
            dS *= goes
            if SUMMARY:
                kept *= goes
            queries = (queries * tl.where(enter, scale, 0.0)[:, None]).to(q.dtype.element_ty)
        if DECAY == 1:
            falls = goes * tl.exp2(tl.load(G + (tl.cast(b, tl.int64) * T + end) * H + h))
            dS *= falls
            if SUMMARY:
                kept *= falls
            sums = tl.load(G + (tl.cast(b, tl.int64) * T + t) * H + h, mask=t < T, other=0.0)
            queries = (queries * tl.where(enter, scale * tl.exp2(sums), 0.0)[:, None]).to(q.dtype.element_ty)
        if DECAY == 2:
            falls = goes * tl.exp2(load_row(G, b, end, h, T, H, K, kd))
            dS *= falls[:, None]
            if SUMMARY:
                kept *= falls[:, None]
            fall = scale * tl.exp2(load_tile(G, b, t, h, T, H, K, kd))
            queries = (queries * tl.where(enter[:, None], fall, 0.0)).to(q.dtype.element_ty)
        if VALUE:
            across = tl.exp2(load_row(W, b, end, h, T, H, V, vd))
            dS *= across[None, :]
            if SUMMARY:
                kept *= across[None, :]
            given = (given * tl.exp2(load_tile(W, b, t, h, T, H, V, vd))).to(do.dtype.element_ty)
        dS += dot(tl.trans(queries), given)
    tl.store(state_pointers(dinitial, at, kd, vd, K, V), dS, mask=inside)
    if SUMMARY:
        tl.store(state_pointers(passed, at, kd, vd, K, V), kept, mask=inside)


@triton.jit
def _pairs(own, C: tl.constexpr):
    """Whether query i and key j <= i are of one document."""
    i = tl.arange(0, C)
    return (own[:, None] == own[None, :]) & (own >= 0)[:, None] & (i[:, None] >= i[None, :])


@triton.jit
def _outputs(
    q, k, v, G, W, ids, starts, scores, out, T, H, GROUPS, K, V, N, stride, scale,
    DECAY: tl.constexpr, VALUE: tl.constexpr, INTRA: tl.constexpr, ADD: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Outputs of a chunk: what its tokens read of its state and, with INTRA, of one another; ADD: added to `out`.

    `stride` is that of out's batch. Scores of a decay per channel are given.
    """
    vd, n, bh = tl.program_id(0) * BV + tl.arange(0, BV), tl.program_id(1), tl.program_id(2)
    b, h = bh // H, bh % H
    ids += tl.cast(b, tl.int64) * T
    t, own, before, _ = chunk_tokens(ids, n, T, C)
    enter = (own == before) & (own >= 0)
    place = tl.cast(bh, tl.int64) * N + n
    o = tl.zeros([C, BV], tl.float32)
    A = tl.zeros([C, C], tl.float32)
    for k0 in range(0, K, BK):
        kd = k0 + tl.arange(0, BK)
        queries = load_tile(q, b, t, h // (H // GROUPS), T, GROUPS, K, kd)
        S = load_state(starts, place, kd, vd, K, V)
        if DECAY == 2:
            o += dot((queries * tl.exp2(load_tile(G, b, t, h, T, H, K, kd))).to(S.dtype), S)
        else:
            o += dot(queries, S)
            if INTRA:
                A += dot(queries, tl.trans(load_tile(k, b, t, h // (H // GROUPS), T, GROUPS, K, kd)))
    if DECAY == 1:
        sums = tl.load(G + (tl.cast(b, tl.int64) * T + t) * H + h, mask=t < T, other=0.0)
        o *= tl.exp2(sums)[:, None]
    o = tl.where(enter[:, None], o * scale, 0.0)
    if VALUE:
        o *= tl.exp2(load_tile(W, b, t, h, T, H, V, vd))
    if INTRA:
        if DECAY == 2:
            i = tl.arange(0, C)
            A = tl.load(scores + place * C * C + i[:, None] * C + i[None, :])
        else:
            A *= scale
            if DECAY == 1:
                A *= power2(sums[:, None] - sums[None, :])
            A = tl.where(_pairs(own, C), A, 0.0)
        o += dot(A.to(v.dtype.element_ty), load_tile(v, b, t, h, T, H, V, vd))
    where = out + tl.cast(b, tl.int64) * stride + (tl.cast(t, tl.int64) * H + h)[:, None] * V + vd[None, :]
    mask = (t < T)[:, None] & (vd < V)[None, :]
    if ADD:
        o += tl.load(where, mask=mask, other=0.0).to(tl.float32)
    tl.store(where, o.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _keys(
    q, k, v, do, G, ids, starts, afters, dq, dk, moments, ends, T, H, GROUPS, K, V, N, B, scale,
    DECAY: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Gradients of a chunk's queries and keys, and what their channels give to those of its decays (no channel's own).

    moments are `[K / BK, B, T, H]`, a part from every program; ends `[B, H, N, K]`.
    """
    kb, n, bg = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    kd = kb * BK + tl.arange(0, BK)
    b, group = bg // GROUPS, bg % GROUPS
    ids += tl.cast(b, tl.int64) * T
    t, own, before, last = chunk_tokens(ids, n, T, C)
    enter, leave = (own == before) & (own >= 0), (own == last) & (own >= 0)
    pairs = _pairs(own, C)
    queries, keys = load_tile(q, b, t, group, T, GROUPS, K, kd), load_tile(k, b, t, group, T, GROUPS, K, kd)
    all_dq, all_dk = tl.zeros([C, BK], tl.float32), tl.zeros([C, BK], tl.float32)
    for repeat in range(H // GROUPS):
        h = group * (H // GROUPS) + repeat
        place = (tl.cast(b, tl.int64) * H + h) * N + n
        P = tl.zeros([C, C], tl.float32)
        own_dq, own_dk = tl.zeros([C, BK], tl.float32), tl.zeros([C, BK], tl.float32)
        through = tl.zeros([BK], tl.float32)
        for v0 in range(0, V, BV):
            vd = v0 + tl.arange(0, BV)
            given, values = load_tile(do, b, t, h, T, H, V, vd), load_tile(v, b, t, h, T, H, V, vd)
            S, dS = load_state(starts, place, kd, vd, K, V), load_state(afters, place, kd, vd, K, V)
            P += dot(given, tl.trans(values))
            own_dq += dot(given, tl.trans(S))
            own_dk += dot(values, tl.trans(dS))
            if DECAY == 1:
                through += tl.sum(S.to(tl.float32) * dS.to(tl.float32), 1)
        if DECAY == 1:
            end = tl.minimum(n * C + C, T) - 1
            total = tl.load(G + (tl.cast(b, tl.int64) * T + end) * H + h)
            sums = tl.load(G + (tl.cast(b, tl.int64) * T + t) * H + h, mask=t < T, other=0.0)
            P *= power2(sums[:, None] - sums[None, :])
            own_dq *= tl.exp2(sums)[:, None]
            own_dk *= power2(total - sums)[:, None]
        P = tl.where(pairs, P * scale, 0.0).to(k.dtype.element_ty)
        own_dq = tl.where(enter[:, None], own_dq * scale, 0.0)
        own_dk = tl.where(leave[:, None], own_dk, 0.0)
        if DECAY == 1:
            goes = tl.where((before == last) & (before >= 0), tl.exp2(total), 0.0)
            place_end = ends + place * K + kd
            tl.store(place_end, goes * through + tl.sum(own_dk * keys, 0), mask=kd < K)
        own_dq += dot(P, keys)
        own_dk += dot(tl.trans(P), queries)
        if DECAY == 1:
            part = (tl.cast(kb, tl.int64) * B + b) * T + t
            tl.store(moments + part * H + h, tl.sum(queries * own_dq - keys * own_dk, 1), mask=t < T)
        all_dq += own_dq
        all_dk += own_dk
    mask = (t < T)[:, None] & (kd < K)[None, :]
    tl.store(tile_pointers(dq, b, t, group, T, GROUPS, K, kd), all_dq.to(dq.dtype.element_ty), mask=mask)
    tl.store(tile_pointers(dk, b, t, group, T, GROUPS, K, kd), all_dk.to(dk.dtype.element_ty), mask=mask)


@triton.jit
def _values(
    q, k, v, do, G, W, ids, starts, afters, scores, dv, ends, T, H, GROUPS, K, V, N, scale,
    DECAY: tl.constexpr, VALUE: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Gradients of a chunk's values; with a decay of their own only what comes from the state after, and its end."""
    vd, n, bh = tl.program_id(0) * BV + tl.arange(0, BV), tl.program_id(1), tl.program_id(2)
    b, h = bh // H, bh % H
    ids += tl.cast(b, tl.int64) * T
    t, own, before, last = chunk_tokens(ids, n, T, C)
    end = tl.minimum(n * C + C, T) - 1
    leave = (own == last) & (own >= 0)
    place = tl.cast(bh, tl.int64) * N + n
    given = tl.zeros([C, BV], tl.float32)
    A = tl.zeros([C, C], tl.float32)
    through = tl.zeros([BV], tl.float32)
    for k0 in range(0, K, BK):
        kd = k0 + tl.arange(0, BK)
        keys = load_tile(k, b, t, h // (H // GROUPS), T, GROUPS, K, kd)
        dS = load_state(afters, place, kd, vd, K, V)
        if DECAY == 2:
            totals = load_row(G, b, end, h, T, H, K, kd)
            given += dot((keys * power2(totals[None, :] - load_tile(G, b, t, h, T, H, K, kd))).to(dS.dtype), dS)
            if VALUE:
                S = load_state(starts, place, kd, vd, K, V)
                through += tl.sum(tl.exp2(totals)[:, None] * S.to(tl.float32) * dS.to(tl.float32), 0)
        else:
            given += dot(keys, dS)
            A += dot(load_tile(q, b, t, h // (H // GROUPS), T, GROUPS, K, kd), tl.trans(keys))
    if DECAY == 1:
        sums = tl.load(G + (tl.cast(b, tl.int64) * T + t) * H + h, mask=t < T, other=0.0)
        total = tl.load(G + (tl.cast(b, tl.int64) * T + end) * H + h)
        given *= power2(total - sums)[:, None]
    given = tl.where(leave[:, None], given, 0.0)
    if VALUE:
        across = load_row(W, b, end, h, T, H, V, vd)
        given *= power2(across[None, :] - load_tile(W, b, t, h, T, H, V, vd))
        goes = tl.where((before == last) & (before >= 0), tl.exp2(across), 0.0)
        at_end = goes * through + tl.sum(given * load_tile(v, b, t, h, T, H, V, vd), 0)
        tl.store(ends + place * V + vd, at_end, mask=vd < V)
    else:
        if DECAY == 2:
            i = tl.arange(0, C)
            A = tl.load(scores + place * C * C + i[:, None] * C + i[None, :])
        else:
            A *= scale
            if DECAY == 1:
                A *= power2(sums[:, None] - sums[None, :])
            A = tl.where(_pairs(own, C), A, 0.0)
        given += dot(tl.trans(A).to(do.dtype.element_ty), load_tile(do, b, t, h, T, H, V, vd))
    mask = (t < T)[:, None] & (vd < V)[None, :]
    tl.store(tile_pointers(dv, b, t, h, T, H, V, vd), given.to(dv.dtype.element_ty), mask=mask)


@triton.jit
def _from_states(
    k, v, do, G, W, ids, starts, afters, dq, dk, ends, T, H, GROUPS, K, V, N,
    VALUE: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """What the states around a chunk give to the gradients of its scaled queries and its keys, decayed by channel.

    dq, dk `[B, T, H, K]` and ends `[B, H, N, K]` in float32.
    """
    kd, n, bh = tl.program_id(0) * BK + tl.arange(0, BK), tl.program_id(1), tl.program_id(2)
    b, h = bh // H, bh % H
    ids += tl.cast(b, tl.int64) * T
    t, own, before, last = chunk_tokens(ids, n, T, C)
    end = tl.minimum(n * C + C, T) - 1
    place = tl.cast(bh, tl.int64) * N + n
    own_dq, own_dk = tl.zeros([C, BK], tl.float32), tl.zeros([C, BK], tl.float32)
    through = tl.zeros([BK], tl.float32)
    for v0 in range(0, V, BV):
        vd = v0 + tl.arange(0, BV)
        given, values = load_tile(do, b, t, h, T, H, V, vd), load_tile(v, b, t, h, T, H, V, vd)
        S, dS = load_state(starts, place, kd, vd, K, V), load_state(afters, place, kd, vd, K, V)
        product = S.to(tl.float32) * dS.to(tl.float32)
        if VALUE:
            across, each = load_row(W, b, end, h, T, H, V, vd), load_tile(W, b, t, h, T, H, V, vd)
            given = (given * tl.exp2(each)).to(S.dtype)
            values = (values * power2(across[None, :] - each)).to(S.dtype)
            product *= tl.exp2(across)[None, :]
        own_dq += dot(given, tl.trans(S))
        own_dk += dot(values, tl.trans(dS))
        through += tl.sum(product, 1)
    sums, totals = load_tile(G, b, t, h, T, H, K, kd), load_row(G, b, end, h, T, H, K, kd)
    own_dq = tl.where(((own == before) & (own >= 0))[:, None], own_dq * tl.exp2(sums), 0.0)
    own_dk = tl.where(((own == last) & (own >= 0))[:, None], own_dk * power2(totals[None, :] - sums), 0.0)
    goes = tl.where((before == last) & (before >= 0), tl.exp2(totals), 0.0)
    keys = load_tile(k, b, t, h // (H // GROUPS), T, GROUPS, K, kd)
    tl.store(ends + place * K + kd, goes * through + tl.sum(own_dk * keys, 0), mask=kd < K)
    mask = (t < T)[:, None] & (kd < K)[None, :]
    tl.store(tile_pointers(dq, b, t, h, T, H, K, kd), own_dq, mask=mask)
    tl.store(tile_pointers(dk, b, t, h, T, H, K, kd), own_dk, mask=mask)


@triton.jit
def _scores(
    x, y, G, ids, scores, T, H, X_GROUPS, Y_GROUPS, D, N, scale,
    DECAY: tl.constexpr, C: tl.constexpr, SUB: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """A_ij = scale Σ_c x_ic y_jc e^{G_ic − G_jc} for j <= i of one document, else 0, for `SUB` rows i of a chunk.

    Without decay G is not read.
    """
    a, n, bh = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, h = bh // H, bh % H
    ids += tl.cast(b, tl.int64) * T
    hx, hy = h // (H // X_GROUPS), h // (H // Y_GROUPS)
    j, i = tl.arange(0, C), a * SUB + tl.arange(0, SUB)
    t, own, _, _ = chunk_tokens(ids, n, T, C)
    mine = tl.load(ids + n * C + i, mask=n * C + i < T, other=-1)
    A = tl.zeros([SUB, C], tl.float32)
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD)
        later, earlier = load_tile(x, b, n * C + i, hx, T, X_GROUPS, D, d), load_tile(y, b, t, hy, T, Y_GROUPS, D, d)
        if DECAY:
            # The point between: the token before these rows. Token 0 has none earlier, whatever is read for it.
            border = load_row(G, b, n * C + tl.maximum(a * SUB, 1) - 1, h, T, H, D, d)
            sums = load_tile(G, b, n * C + i, h, T, H, D, d)
            fall = power2(border[None, :] - load_tile(G, b, t, h, T, H, D, d))
            earlier = tl.where((j < a * SUB)[:, None], earlier * fall, 0.0).to(y.dtype.element_ty)
            A += dot((later * power2(sums - border[None, :])).to(x.dtype.element_ty), tl.trans(earlier))
            for s in range(SUB):
                at = n * C + a * SUB + s
                key, key_sums = load_row(y, b, at, hy, T, Y_GROUPS, D, d), load_row(G, b, at, h, T, H, D, d)
                near = tl.sum(later.to(tl.float32) * key.to(tl.float32)[None, :] * power2(sums - key_sums[None, :]), 1)
                A += tl.where((j == a * SUB + s)[None, :], near[:, None], 0.0)
        else:
            A += dot(later, tl.trans(earlier))
    seen = (mine[:, None] == own[None, :]) & (mine >= 0)[:, None] & (i[:, None] >= j[None, :])
    place = (tl.cast(bh, tl.int64) * N + n) * C * C
    tl.store(scores + place + i[:, None] * C + j[None, :], tl.where(seen, A * scale, 0.0))


@triton.jit
def _mix(
    scores, x, y, G, dx_base, dy_base, dx, dy, moments, T, H, X_GROUPS, Y_GROUPS, D, N, stride, scale,
    BOTH: tl.constexpr, C: tl.constexpr, SUB: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """dx_i = base + Σ_j A_ij y_j ⊙ e^{G_i − G_j} and, BOTH, dy_j = base + Σ_i A_ij x_i ⊙ e^{G_i − G_j} for a chunk.

    Of x scaled; dx is stored times that scale, `stride` that of its batch. moments: x ⊙ dx − y ⊙ dy, unless BOTH is
    False. Results and bases `[B, T, H, D]`.
    """
    d, n, bh = tl.program_id(0) * BD + tl.arange(0, BD), tl.program_id(1), tl.program_id(2)
    b, h = bh // H, bh % H
    hx, hy = h // (H // X_GROUPS), h // (H // Y_GROUPS)
    every = tl.arange(0, C)
    t = n * C + every
    scores += (tl.cast(bh, tl.int64) * N + n) * C * C
    kind = y.dtype.element_ty
    for a in range(C // SUB):
        i = a * SUB + tl.arange(0, SUB)
        ti = n * C + i
        sums = load_tile(G, b, ti, h, T, H, D, d)
        all_sums = load_tile(G, b, t, h, T, H, D, d)
        border = load_row(G, b, n * C + tl.maximum(a * SUB, 1) - 1, h, T, H, D, d)
        earlier = load_tile(y, b, t, hy, T, Y_GROUPS, D, d) * power2(border[None, :] - all_sums)
        earlier = tl.where((every < a * SUB)[:, None], earlier, 0.0).to(kind)
        A = tl.load(scores + i[:, None] * C + every[None, :])
        gx = dot(A.to(kind), earlier) * power2(sums - border[None, :])
        for s in range(SUB):
            at = a * SUB + s
            column = tl.load(scores + i * C + at)
            key, key_sums = load_row(y, b, n * C + at, hy, T, Y_GROUPS, D, d), load_row(G, b, n * C + at, h, T, H, D, d)
            gx += column[:, None] * key.to(tl.float32)[None, :] * power2(sums - key_sums[None, :])
        mask = (ti < T)[:, None] & (d < D)[None, :]
        gx += tl.load(tile_pointers(dx_base, b, ti, h, T, H, D, d), mask=mask, other=0.0)
        if BOTH:
            border = load_row(G, b, n * C + a * SUB + SUB - 1, h, T, H, D, d)
            later = load_tile(x, b, t, hx, T, X_GROUPS, D, d) * scale * power2(all_sums - border[None, :])
            later = tl.where((every >= a * SUB + SUB)[:, None], later, 0.0).to(kind)
            At = tl.load(scores + every[None, :] * C + i[:, None])
            gy = dot(At.to(kind), later) * power2(border[None, :] - sums)
            for s in range(SUB):
                at = a * SUB + s
                row = tl.load(scores + at * C + i)
                query, query_sums = (
                    load_row(x, b, n * C + at, hx, T, X_GROUPS, D, d),
                    load_row(G, b, n * C + at, h, T, H, D, d),
                )
                gy += row[:, None] * (query.to(tl.float32) * scale)[None, :] * power2(query_sums[None, :] - sums)
            gy += tl.load(tile_pointers(dy_base, b, ti, h, T, H, D, d), mask=mask, other=0.0)
            xi, yi = load_tile(x, b, ti, hx, T, X_GROUPS, D, d) * scale, load_tile(y, b, ti, hy, T, Y_GROUPS, D, d)
            tl.store(tile_pointers(moments, b, ti, h, T, H, D, d), xi * gx - yi * gy, mask=mask)
            tl.store(tile_pointers(dy, b, ti, h, T, H, D, d), gy.to(dy.dtype.element_ty), mask=mask)
        where = dx + tl.cast(b, tl.int64) * stride + (tl.cast(ti, tl.int64) * H + h)[:, None] * D + d[None, :]
        tl.store(where, (gx * scale).to(dx.dtype.element_ty), mask=mask)


class _Sizes(NamedTuple):
    """What every kernel is told about its call."""

    batch: int
    length: int
    heads: int
    groups: int
    keys: int
    values: int

    @property
    def key_block(self) -> int:
        return _block(self.keys)

    @property
    def value_block(self) -> int:
        return _block(self.values)

    @property
    def chunks(self) -> int:
        return ceil_div(self.length, CHUNK)


def _block(dim: int) -> int:
    return min(BLOCK, max(16, 1 << max(0, dim - 1).bit_length()))


class _Run:
    """A call: its tensors as the kernels read them, its sums of decays, and the launches."""

    def __init__(self, problem: Problem[GatedLinearInputs]) -> None:
        inputs = problem.inputs
        self.dtype, self.gradients = inputs.q.dtype, problem.gradient_type(inputs.q)
        batch, length, heads, values = inputs.v.shape
        groups = math.lcm(inputs.q.shape[2], inputs.k.shape[2])
        self.q, self.k = (_grouped(x, groups).contiguous() for x in (inputs.q, inputs.k))
        self.k = self.k.to(self.dtype)
        self.v = inputs.v.to(self.dtype).contiguous()
        self.sizes = _Sizes(batch, length, heads, groups, self.k.shape[-1], values)
        self.ids = problem.documents.ids(self.q.device)
        self.scale = float(problem.scale)
        log_decay = inputs.log_decay
        self.decay = CHANNEL if problem.op.by_channel(problem.inputs) else NONE if log_decay is None else TOKEN
        self.by_value = inputs.value_log_decay is not None
        self.G = self.W = self.ids  # what is not read
        if self.decay == CHANNEL:
            self.G = self.cumulated(log_decay, self.sizes.keys)
        elif self.decay == TOKEN:
            self.G = self.cumulated(log_decay, 1)
        if self.by_value:
            self.W = self.cumulated(inputs.value_log_decay, values)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.q.device)

    def per_token(self, dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.empty(self.sizes.batch, self.sizes.length, self.sizes.heads, dim, dtype=dtype)

    def cumulated(self, log_decay: Tensor | None, dim: int) -> Tensor:
        """`[B, T, H, dim]`: sums within chunks and documents."""
        s = self.sizes
        if log_decay is None:
            return torch.zeros(s.batch, s.length, s.heads, dim, device=self.q.device)
        sums, total = self.per_token(dim), s.heads * dim
        cumulate[(s.chunks, s.batch, ceil_div(total, LANES))](
            log_decay.contiguous(), self.ids, sums, s.length, s.heads, dim, total,
            C=CHUNK, BY_TOKEN=log_decay.dim() > 2, BY_CHANNEL=log_decay.dim() in (2, 4) or dim == 1, LANES=LANES,
            num_warps=1,
        )  # fmt: skip
        return sums

    def cumulated_back(self, moments: Tensor, ends: Tensor) -> Tensor:
        """Moments `[B, T, H, D]` as gradients of decays, in place."""
        s, dim = self.sizes, moments.shape[-1]
        cumulate_back[(s.chunks, s.batch, ceil_div(s.heads * dim, LANES))](
            moments, self.ids, ends, s.length, s.chunks, s.heads * dim, s.heads, dim, C=CHUNK, LANES=LANES, num_warps=1
        )
        return moments

    def segments(self, chunks: int) -> int:
        """Into how many segments `chunks` chunks are cut for the passes that go through them in order."""
        s = self.sizes
        programs = ceil_div(s.keys, s.key_block) * ceil_div(s.values, s.value_block) * s.batch * s.heads
        length = max(LEAST_SEGMENT, ceil_div(chunks * programs, PROGRAMS))
        return ceil_div(chunks, length)

    def in_order(self, kernel: Any, tensors: tuple[Tensor, ...], entering: Tensor, into: Tensor, chunks: int,
                 scale: tuple[float, ...], back: bool, **constants: Any) -> Tensor:  # fmt: skip
        """Runs `_states` or `_state_gradients`, in segments where there are few rows and heads; returns the last state.

        What each segment does to a state is found first, then what enters it, and then all run side by side.
        """
        s = self.sizes
        segments = self.segments(chunks)
        length = ceil_div(chunks, max(1, segments))
        rows, square = s.batch * s.heads, s.keys * s.values
        grid = (ceil_div(s.keys, s.key_block), ceil_div(s.values, s.value_block), rows * max(1, segments))
        sizes = (s.length, s.heads, s.groups, s.keys, s.values, chunks, max(1, length), *scale)
        constants = {"DECAY": self.decay, "VALUE": self.by_value} | self.tiles() | constants
        entering = entering.contiguous()
        if segments > 1:
            added, passed, entered = (self.empty(rows, segments, square) for _ in range(3))
            kernel[grid](*tensors, entering, into, added, passed, *sizes, SUMMARY=True, **constants)
            _enter[(ceil_div(square, 1024), rows)](
                entering, added, passed, entered, square, segments, BACK=back, BLOCK=1024, num_warps=4
            )
            entering = entered
        last = self.empty(rows, max(1, segments), s.keys, s.values)
        kernel[grid](*tensors, entering, into, last, last, *sizes, SUMMARY=False, **constants)
        return last[:, 0 if back else -1].unflatten(0, (s.batch, s.heads))

    def tiles(self) -> dict[str, Any]:
        return {"C": CHUNK, "BK": self.sizes.key_block, "BV": self.sizes.value_block, "num_warps": 4}

    def states(self, entering: Tensor, chunks: int | None = None, *, add: bool = True) -> tuple[Tensor, Tensor]:
        """States before each of the chunks `[B H, N, K, V]`, in the inputs' type, and after them in float32."""
        s = self.sizes
        chunks = s.chunks if chunks is None else chunks
        starts = self.empty(s.batch * s.heads, chunks, s.keys, s.values, dtype=self.dtype)
        tensors = (self.k, self.v, self.G, self.W, self.ids)
        warps = 4 if add else 8  # without keys and values, four warps spill
        final = self.in_order(_states, tensors, entering, starts, chunks, (), back=False, ADD=add, num_warps=warps)
        return starts, final

    def state_gradients(self, dout: Tensor, dfinal: Tensor | None, chunks: int | None = None) -> tuple[Tensor, Tensor]:
        """Gradients of the states after each of the chunks, in the inputs' type, and before them in float32."""
        s = self.sizes
        chunks = s.chunks if chunks is None else chunks
        afters = self.empty(s.batch * s.heads, chunks, s.keys, s.values, dtype=self.dtype)
        shape = (s.batch, s.heads, s.keys, s.values)
        dfinal = torch.zeros(shape, device=dout.device) if dfinal is None else dfinal.float()
        tensors = (self.q, dout, self.G, self.W, self.ids)
        dinitial = self.in_order(_state_gradients, tensors, dfinal, afters, chunks, (self.scale,), back=True)
        return afters, dinitial

    def outputs(self, starts: Tensor, out: Tensor, scores: Tensor | None, *, intra: bool, add: bool = False) -> None:
        s = self.sizes
        chunks = starts.shape[1]
        _outputs[(ceil_div(s.values, s.value_block), chunks, s.batch * s.heads)](
            self.q, self.k, self.v, self.G, self.W, self.ids, starts, self.ids if scores is None else scores, out,
            s.length, s.heads, s.groups, s.keys, s.values, chunks, out.stride(0), self.scale,
            DECAY=self.decay, VALUE=self.by_value, INTRA=intra, ADD=add, **self.tiles(),
        )  # fmt: skip

    def scores(self, x: Tensor, y: Tensor, sums: Tensor | None, scale: float) -> Tensor:
        """`[B H, N, C, C]`."""
        s = self.sizes
        scores = self.empty(s.batch * s.heads, s.chunks, CHUNK, CHUNK)
        _scores[(CHUNK // SUB, s.chunks, s.batch * s.heads)](
            x, y, self.ids if sums is None else sums, self.ids, scores,
            s.length, s.heads, x.shape[2], y.shape[2], x.shape[3], s.chunks, scale,
            DECAY=sums is not None, C=CHUNK, SUB=SUB, BD=_block(x.shape[3]), num_warps=4,
        )  # fmt: skip
        return scores

    def mix(
        self, scores: Tensor, x: Tensor, y: Tensor, sums: Tensor, bases: tuple[Tensor, Tensor | None],
        into: tuple[Tensor, Tensor | None], scale: float = 1.0,
    ) -> Tensor:  # fmt: skip
        """Writes `into`; returns the moments where there are two."""
        s, dim, both = self.sizes, y.shape[3], into[1] is not None
        moments = self.per_token(dim) if both else bases[0]
        _mix[(ceil_div(dim, _block(dim)), s.chunks, s.batch * s.heads)](
            scores, x, y, sums, bases[0], bases[1] if both else bases[0], into[0], into[1] if both else bases[0],
            moments, s.length, s.heads, x.shape[2], y.shape[2], dim, s.chunks, into[0].stride(0), scale,
            BOTH=both, C=CHUNK, SUB=SUB, BD=_block(dim), num_warps=4,
        )  # fmt: skip
        return moments

    def values(self, dout: Tensor, starts: Tensor, afters: Tensor, scores: Tensor | None) -> tuple[Tensor, Tensor]:
        """(dv, or with a decay of values what comes from the states, in float32; then also their ends)."""
        s = self.sizes
        dv = self.per_token(s.values, torch.float32 if self.by_value else self.gradients)
        ends = self.empty(s.batch * s.heads, s.chunks, s.values) if self.by_value else dv
        _values[(ceil_div(s.values, s.value_block), s.chunks, s.batch * s.heads)](
            self.q, self.k, self.v, dout, self.G, self.W, self.ids, starts, afters,
            self.ids if scores is None else scores, dv, ends,
            s.length, s.heads, s.groups, s.keys, s.values, s.chunks, self.scale,
            DECAY=self.decay, VALUE=self.by_value, **self.tiles(),
        )  # fmt: skip
        return dv, ends

    def keys(self, dout: Tensor, starts: Tensor, afters: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """(dq, dk, ddecay `[B, T, H]`) where channels do not decay by themselves."""
        s = self.sizes
        dq, dk = (torch.empty_like(x, dtype=self.gradients) for x in (self.q, self.k))
        blocks = ceil_div(s.keys, s.key_block)
        moments = ends = dq  # what is not written
        if self.decay:
            moments = self.empty(blocks, s.batch, s.length, s.heads)
            ends = self.empty(s.batch * s.heads, s.chunks, s.keys)
        _keys[(blocks, s.chunks, s.batch * s.groups)](
            self.q, self.k, self.v, dout, self.G, self.ids, starts, afters, dq, dk, moments, ends,
            s.length, s.heads, s.groups, s.keys, s.values, s.chunks, s.batch, self.scale,
            DECAY=self.decay, **(self.tiles() | {"num_warps": 8}),
        )  # fmt: skip
        if not self.decay:
            return dq, dk, None
        return dq, dk, self.cumulated_back(moments.sum(0).unsqueeze(-1), ends.sum(-1)).squeeze(-1)

    def channel_keys(self, dout: Tensor, starts: Tensor, afters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(dq, dk, ddecay `[B, T, H, K]`) where they do; dq and dk per head."""
        s = self.sizes
        dscores = self.scores(dout, self.v, self.W if self.by_value else None, 1.0)
        bases = self.per_token(s.keys), self.per_token(s.keys)
        ends = self.empty(s.batch * s.heads, s.chunks, s.keys)
        _from_states[(ceil_div(s.keys, s.key_block), s.chunks, s.batch * s.heads)](
            self.k, self.v, dout, self.G, self.W, self.ids, starts, afters, *bases, ends,
            s.length, s.heads, s.groups, s.keys, s.values, s.chunks, VALUE=self.by_value,
            **(self.tiles() | {"num_warps": 8}),
        )  # fmt: skip
        kind = self.dtype if s.groups == s.heads else torch.float32
        into = self.per_token(s.keys, kind), self.per_token(s.keys, kind)
        moments = self.mix(dscores, self.q, self.k, self.G, bases, into, self.scale)
        return *into, self.cumulated_back(moments, ends)


def _grouped(x: Tensor, groups: int) -> Tensor:
    return x if x.shape[2] == groups else x.repeat_interleave(groups // x.shape[2], dim=2)


def _is_rowwise(x: Tensor) -> bool:
    """Whether tokens, heads and channels lie one after the other, as kernels write them."""
    return x[:1].is_contiguous()


def forward(
    problem: Problem[GatedLinearInputs], initial_state: Tensor | None, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(out, written to `out` where it is passed; final state)."""
    run = problem.once(_Run)
    out = problem.new_output() if out is None else out
    assert _is_rowwise(out)
    starts, final = run.states(problem.entering(initial_state))
    scores = run.scores(run.q, run.k, run.G, run.scale) if run.decay == CHANNEL else None
    if scores is not None and run.by_value:
        base = run.per_token(run.sizes.values)
        run.outputs(starts, base, None, intra=False)
        run.mix(scores, base, run.v, run.W, (base, None), (out, None))
    else:
        run.outputs(starts, out, scores, intra=True)
    return out, final


def final_state(problem: Problem[GatedLinearInputs]) -> Tensor:
    """The state after each row's last token, from zero."""
    return problem.once(_Run).states(problem.new_states())[1]


def correct(problem: Problem[GatedLinearInputs], out: Tensor, state: Tensor) -> Tensor:
    """Adds scale (q_t ⊙ e^{G_t}) S to the outputs that the entering state reaches."""
    chunks = ceil_div(problem.reach, CHUNK)
    if chunks == 0:
        return out
    run = problem.once(_Run)
    starts, _ = run.states(problem.entering(state), chunks, add=False)
    target = out if _is_rowwise(out) else out.contiguous()
    run.outputs(starts, target, None, intra=False, add=True)
    return out if target is out else out.copy_(target)


def summarize_backward(
    problem: Problem[GatedLinearInputs], dout: Tensor, initial_state: Tensor | None = None
) -> Tensor:
    """Σ_t scale (q_t ⊙ e^{G_t})ᵀ do_t over the tokens that an entering state reaches."""
    chunks = ceil_div(problem.reach, CHUNK)
    if chunks == 0:
        return problem.new_states()
    run = problem.once(_Run)
    return problem.entering(run.state_gradients(dout.to(run.dtype).contiguous(), None, chunks)[1])


def backward(
    problem: Problem[GatedLinearInputs], dout: Tensor, dfinal_state: Tensor | None, initial_state: Tensor | None
) -> tuple[Tensors, Tensor]:
    """The gradients of the inputs, in their types, and of the initial state."""
    run = problem.once(_Run)
    dout = dout.to(run.dtype).contiguous()
    starts, _ = run.states(problem.entering(initial_state))
    afters, dinitial = run.state_gradients(dout, dfinal_state)
    scores = dvalue_decay = None
    if run.decay == CHANNEL:
        scores = run.scores(run.q, run.k, run.G, run.scale)
        dq, dk, ddecay = run.channel_keys(dout, starts, afters)
    else:
        dq, dk, ddecay = run.keys(dout, starts, afters)
    dv, ends = run.values(dout, starts, afters, scores)
    if run.by_value and scores is not None:
        base = run.per_token(run.sizes.values)
        run.outputs(starts, base, None, intra=False)
        into = run.per_token(run.sizes.values, run.gradients)
        moments = run.mix(scores, dout, run.v, run.W, (base, dv), (base, into))
        dvalue_decay = run.cumulated_back(moments, ends)
        dv = into
    x = problem.inputs
    gradients = (
        summed(dq, x.q, problem.gradient_type(x.q)), summed(dk, x.k, problem.gradient_type(x.k)),
        dv.to(problem.gradient_type(x.v)),
        _of_decay(ddecay, x.log_decay), _of_decay(dvalue_decay, x.value_log_decay), None, None,
    )  # fmt: skip
    return gradients, problem.entering(dinitial)


def _of_decay(gradient: Tensor | None, log_decay: Tensor | None) -> Tensor | None:
    """Summed over what the decay did not have; sums over tokens in float64."""
    if log_decay is None or gradient is None:
        return None
    if log_decay.dim() in (1, 3):
        gradient = gradient.reshape(*gradient.shape[:2], log_decay.shape[-1], -1).sum(-1)
    if log_decay.dim() < 3:
        gradient = gradient.sum((0, 1), dtype=torch.float64)
    return gradient.reshape(log_decay.shape).to(log_decay.dtype)


# How arguments of these names are typed where the tensors are bfloat16: what is not listed is a pointer to float32.
_BY_NAME = (
    dict.fromkeys(("q", "k", "v", "do", "x", "y", "starts", "afters", "out", "dq", "dk", "dv", "dx", "dy"), "*bf16")
    | dict.fromkeys(("T", "H", "GROUPS", "X_GROUPS", "Y_GROUPS", "K", "V", "D", "N", "LENGTH", "B", "stride"), "i32")
    | dict.fromkeys(("SEGMENTS", "size"), "i32")
    | {"ids": "*i32", "scale": "fp32"}
)


def _compilation(
    kernel: Any,
    variant: str,
    rows: int,
    note: str = "",
    float32: tuple[str, ...] = (),
    warps: int = 4,
    **constants: Any,
) -> Compilation:
    sizes = {"C": CHUNK, "BK": BLOCK, "BV": BLOCK, "BD": BLOCK, "SUB": SUB, "LANES": LANES}
    names = kernel.arg_names
    constants |= {name: value for name, value in sizes.items() if name in names and name not in constants}
    signature = {
        name: "*fp32" if name in float32 else _BY_NAME.get(name, "*fp32") for name in names if name not in constants
    }
    pointers = [name for name, kind in signature.items() if kind.startswith("*")]
    divisible = (*pointers, *(name for name in ("K", "V", "D", "stride") if name in signature))
    return Compilation(
        kernel, signature, constants, divisible, warps=warps, stages=2, rows=rows, note=note, variant=variant
    )


def compilations() -> list[Compilation]:
    """Every kernel at its production shapes: bfloat16, tiles of 64 channels, all kinds of decay."""
    kinds = {"undecayed": NONE, "by token": TOKEN, "by channel": CHANNEL}
    narrow = f"matrix products of {SUB} rows: what lies between them is a reference point for the decays"
    found = []
    for variant, decay in kinds.items():
        plain = {"DECAY": decay, "VALUE": False}
        found += [
            _compilation(_states, variant, CHUNK, **plain, ADD=True, SUMMARY=False),
            _compilation(_states, f"{variant}, summary", CHUNK, **plain, ADD=True, SUMMARY=True),
            _compilation(_state_gradients, variant, CHUNK, **plain, SUMMARY=False),
            _compilation(_state_gradients, f"{variant}, summary", CHUNK, **plain, SUMMARY=True),
            _compilation(_outputs, variant, CHUNK, **plain, INTRA=True, ADD=False),
            _compilation(_values, variant, CHUNK, **plain),
        ]
        if decay != CHANNEL:
            found.append(_compilation(_keys, variant, CHUNK, warps=8, DECAY=decay))
    both = {"DECAY": CHANNEL, "VALUE": True}
    entering = {"DECAY": TOKEN, "VALUE": False}
    found += [
        _compilation(_states, "entering", 0, warps=8, **entering, ADD=False, SUMMARY=False),
        _compilation(_states, "entering, summary", 0, warps=8, **entering, ADD=False, SUMMARY=True),
        _compilation(_enter, "", 0, BACK=False, BLOCK=1024),
        _compilation(_outputs, "entering", CHUNK, **entering, INTRA=False, ADD=True),
        _compilation(_from_states, "by channel", CHUNK, warps=8, VALUE=False),
        _compilation(_scores, "by channel", SUB, narrow, DECAY=True),
        _compilation(_scores, "undecayed", SUB, narrow, DECAY=False),
        _compilation(_mix, "by channel", SUB, narrow, BOTH=True),
        _compilation(_states, "of values", CHUNK, **both, ADD=True, SUMMARY=False),
        _compilation(_state_gradients, "of values", CHUNK, **both, SUMMARY=False),
        _compilation(_outputs, "of values", CHUNK, float32=("out",), **both, INTRA=False, ADD=False),
        _compilation(_values, "of values", CHUNK, float32=("dv",), **both),
        _compilation(_from_states, "of values", CHUNK, warps=8, VALUE=True),
        _compilation(_mix, "of values", SUB, narrow, float32=("x",), BOTH=False),
    ]
    return found
