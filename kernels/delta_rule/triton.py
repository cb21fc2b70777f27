"""The delta rule as Triton kernels, chunk by chunk; deterministic. All formulas and names are those of `chunked.py`.

Forward: `_scores` of a chunk's pairs of rows and columns, `_inverse` of (I + L), `_prepare` for W = (I + L)^-1 Ê and
U = (I + L)^-1 R, of every chunk by itself; `_states` goes through a head's chunks in order, Z = U − W S; `_outputs`.
Backward does all but the last again, then `_pull` (Aᵀ dO) of every chunk, `_state_gradients` in reverse order, `_pairs`
(gradients of scores and values) and `_inputs` (of queries, keys, rows and columns, and what they give to the decays).

A decay per channel does not split into factors of row and column without overflow, but it does about a point between
them. Pairs whose places first differ in bit l meet at the border between their blocks of 2^l tokens: six full products
a chunk, each for the pairs of one bit, whose exponents are all sums of decays between the two (`_meet`).

With several steps per token T counts steps (`steps.py`). Queries, outputs and the gradients of both have a row per
token, which is met at the token's last step (`_at_last`).
"""

# Kernels are typed by Triton, when they are compiled.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportReturnType=false

from __future__ import annotations

from functools import reduce
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
from ..problem import Problem, per_row
from . import DeltaInputs
from .steps import by_step, by_token

BITS = 6  # of a place in a chunk
INVERSE_WARPS = 4


@triton.jit
def _seen(own, C: tl.constexpr, STRICT: tl.constexpr):
    """Whether row i and column j, before it or not after, are of one document."""
    i = tl.arange(0, C)
    same = (own[:, None] == own[None, :]) & (own >= 0)[:, None]
    if STRICT:
        return same & (i[:, None] > i[None, :])
    else:
        return same & (i[:, None] >= i[None, :])


@triton.jit
def _at_last(t, T, STEPS: tl.constexpr):
    """The tokens whose last of STEPS steps is row t; T / STEPS, past the end, for rows that are none's."""
    if STEPS == 1:
        return t
    else:
        return tl.where(t % STEPS == STEPS - 1, t // STEPS, T // STEPS)


@triton.jit
def _matrix(x, b, t, h, T, H, C: tl.constexpr):
    """A chunk's `[C, C]` of `[B, T, H, C]`."""
    return load_tile(x, b, t, h, T, H, C, tl.arange(0, C))


@triton.jit
def _put(x, tile, b, t, h, T, H, D, d):
    tl.store(
        tile_pointers(x, b, t, h, T, H, D, d), tile.to(x.dtype.element_ty), mask=(t < T)[:, None] & (d < D)[None, :]
    )


@triton.jit
def _per_token(x, b, t, h, T, H):
    return tl.load(x + (tl.cast(b, tl.int64) * T + t) * H + h, mask=t < T, other=0.0).to(tl.float32)


@triton.jit
def _sums_at_rows(G, b, t, h, T, H, K, kd, C: tl.constexpr, BEFORE: tl.constexpr):
    """Sums of the decays that a row has: its own among them or, with BEFORE, those up to the token before."""
    if BEFORE:
        first = tl.arange(0, C) == 0
        at = tile_pointers(G, b, tl.where(first, t, t - 1), h, T, H, K, kd)
        return tl.load(at, mask=((t < T) & (first == 0))[:, None] & (kd < K)[None, :], other=0.0)
    else:
        return load_tile(G, b, t, h, T, H, K, kd)


@triton.jit
def _sum_at_rows(G, b, t, h, T, H, C: tl.constexpr, BEFORE: tl.constexpr):
    """The same of a decay per token, `[C]`."""
    if BEFORE:
        first = tl.arange(0, C) == 0
        at = G + (tl.cast(b, tl.int64) * T + tl.where(first, t, t - 1)) * H + h
        return tl.load(at, mask=(t < T) & (first == 0), other=0.0)
    else:
        return _per_token(G, b, t, h, T, H)


@triton.jit
def _row_factors(
    G, own, before, b, t, h, T, H, K, kd, DECAY: tl.constexpr, BEFORE: tl.constexpr, C: tl.constexpr
):  # fmt: skip
    """`enter` of rows, `[C, 1]` or `[C, BK]`."""
    enter = ((own == before) & (own >= 0))[:, None]
    if DECAY == 2:
        return tl.where(enter, tl.exp2(_sums_at_rows(G, b, t, h, T, H, K, kd, C, BEFORE)), 0.0)
    if DECAY == 1:
        return tl.where(enter, tl.exp2(_sum_at_rows(G, b, t, h, T, H, C, BEFORE))[:, None], 0.0)
    if DECAY == 0:
        return tl.where(enter, 1.0, 0.0)


@triton.jit
def _column_factors(G, own, last, end, b, t, h, T, H, K, kd, DECAY: tl.constexpr):
    """`leave` of columns, `[C, 1]` or `[C, BK]`."""
    leave = ((own == last) & (own >= 0))[:, None]
    if DECAY == 2:
        totals = load_row(G, b, end, h, T, H, K, kd)
        return tl.where(leave, power2(totals[None, :] - load_tile(G, b, t, h, T, H, K, kd)), 0.0)
    if DECAY == 1:
        total = tl.load(G + (tl.cast(b, tl.int64) * T + end) * H + h)
        return tl.where(leave, power2(total - _per_token(G, b, t, h, T, H))[:, None], 0.0)
    if DECAY == 0:
        return tl.where(leave, 1.0, 0.0)


@triton.jit
def _through(G, before, last, end, b, h, T, H, K, kd, DECAY: tl.constexpr):
    """`through`, `[BK]`."""
    goes = tl.where((before == last) & (before >= 0), 1.0, 0.0)
    if DECAY == 2:
        return goes * tl.exp2(load_row(G, b, end, h, T, H, K, kd))
    if DECAY == 1:
        total = tl.load(G + (tl.cast(b, tl.int64) * T + end) * H + h)
        return tl.where(kd < K, goes * tl.exp2(total), 0.0)
    if DECAY == 0:
        return tl.where(kd < K, goes, 0.0)


@triton.jit
def _meet(at, bit, sums_rows, sums_columns, G, b, n, h, T, H, K, kd, C: tl.constexpr):
    """Factors of rows and of columns up to the borders between blocks of 2^bit tokens."""
    j = tl.arange(0, C)
    border = n * C + (1 << bit) - 1
    of_rows = load_tile(G, b, border + ((at >> (bit + 1)) << (bit + 1)), h, T, H, K, kd)
    of_columns = load_tile(G, b, border + ((j >> (bit + 1)) << (bit + 1)), h, T, H, K, kd)
    return power2(sums_rows - of_rows), power2(of_columns - sums_columns)


@triton.jit
def _meeting(at, bit, C: tl.constexpr):
    """The pairs of a row and a column in two neighbouring blocks of 2^bit tokens; the row's is the later if it sees."""
    return ((at >> bit)[:, None] ^ (tl.arange(0, C) >> bit)[None, :]) == 1


@triton.jit
def _scores(
    rows, columns, G, beta, ids, out, T, H, ROW_GROUPS, COLUMN_GROUPS, K, scale,
    DECAY: tl.constexpr, BEFORE: tl.constexpr, STRICT: tl.constexpr, BETA: tl.constexpr, STEPS: tl.constexpr,
    C: tl.constexpr, BITS: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out `[B, T, H, C]` = scale (beta_i row_i) · column_j under the decays between them, 0 where i does not see j.

    STEPS is 1 but for rows that are queries.
    """
    n, bh = tl.program_id(0), tl.program_id(1)
    b, h = bh // H, bh % H
    ids += tl.cast(b, tl.int64) * T
    t, own, _, _ = chunk_tokens(ids, n, T, C)
    i = tl.arange(0, C)
    at = tl.maximum(i - 1, 0) if BEFORE else i  # the last place whose decay a row has
    A = tl.zeros([C, C], tl.float32)
    for k0 in range(0, K, BK):
        kd = k0 + tl.arange(0, BK)
        r = load_tile(rows, b, _at_last(t, T, STEPS), h // (H // ROW_GROUPS), T // STEPS, ROW_GROUPS, K, kd)
        c = load_tile(columns, b, t, h // (H // COLUMN_GROUPS), T, COLUMN_GROUPS, K, kd)
        if DECAY == 2:
            sums_rows = _sums_at_rows(G, b, t, h, T, H, K, kd, C, BEFORE)
            sums_columns = load_tile(G, b, t, h, T, H, K, kd)
            for bit in range(BITS):
                later, earlier = _meet(at, bit, sums_rows, sums_columns, G, b, n, h, T, H, K, kd, C)
                product = dot((r * later).to(r.dtype), tl.trans((c * earlier).to(c.dtype)))
                A += tl.where(_meeting(at, bit, C), product, 0.0)
            if BEFORE or not STRICT:
                A += tl.where(at[:, None] == i[None, :], dot(r, tl.trans(c)), 0.0)
        else:
            A += dot(r, tl.trans(c))
    if DECAY == 1:
        A *= power2(_sum_at_rows(G, b, t, h, T, H, C, BEFORE)[:, None] - _per_token(G, b, t, h, T, H)[None, :])
    if BETA:
        A *= _per_token(beta, b, t, h, T, H)[:, None]
    A = tl.where(_seen(own, C, STRICT), A * scale, 0.0)
    _put(out, A, b, t, h, T, H, C, i)


@triton.jit
def _corner(system, b, n, h, T, H, i0, j0, C: tl.constexpr):
    """The 16 rows from i0 on and columns from j0 on of a chunk's matrix."""
    d = tl.arange(0, 16)
    return load_tile(system, b, n * C + i0 + d, h, T, H, C, j0 + d)


@triton.jit
def _put_corner(inverse, x, b, n, h, T, H, i0, j0, C: tl.constexpr):
    d = tl.arange(0, 16)
    _put(inverse, x, b, n * C + i0 + d, h, T, H, C, j0 + d)


@triton.jit
def _eliminate(x, system, b, n, h, T, H, i0, row, C: tl.constexpr):
    """Row `row` of the inverse of a diagonal block, given those above it."""
    d = tl.arange(0, 16)
    below = load_row(system, b, n * C + i0 + row, h, T, H, C, i0 + d)
    return tl.where((d == row)[:, None], x - tl.sum(below[:, None] * x, 0)[None, :], x)


@triton.jit
def _inverse(system, inverse, T, H, C: tl.constexpr):
    """(I + L)^-1 of each chunk of 64: blocks of 16 on the diagonal row by row, and from them those below."""
    n, bh = tl.program_id(0), tl.program_id(1)
    b, h = bh // H, bh % H
    d = tl.arange(0, 16)
    one = tl.where(d[:, None] == d[None, :], 1.0, 0.0)
    x00, x11, x22, x33 = one, one, one, one
    for row in range(1, 16):
        x00 = _eliminate(x00, system, b, n, h, T, H, 0, row, C)
        x11 = _eliminate(x11, system, b, n, h, T, H, 16, row, C)
        x22 = _eliminate(x22, system, b, n, h, T, H, 32, row, C)
        x33 = _eliminate(x33, system, b, n, h, T, H, 48, row, C)
    l10, l21 = _corner(system, b, n, h, T, H, 16, 0, C), _corner(system, b, n, h, T, H, 32, 16, C)
    l32, l20 = _corner(system, b, n, h, T, H, 48, 32, C), _corner(system, b, n, h, T, H, 32, 0, C)
    l31, l30 = _corner(system, b, n, h, T, H, 48, 16, C), _corner(system, b, n, h, T, H, 48, 0, C)
    x10 = -dot(x11, dot(l10, x00))
    x21 = -dot(x22, dot(l21, x11))
    x32 = -dot(x33, dot(l32, x22))
    x20 = -dot(x22, dot(l20, x00) + dot(l21, x10))
    x31 = -dot(x33, dot(l31, x11) + dot(l32, x21))
    x30 = -dot(x33, dot(l30, x00) + dot(l31, x10) + dot(l32, x20))
    zero = tl.zeros([16, 16], tl.float32)
    _put_corner(inverse, x00, b, n, h, T, H, 0, 0, C)
    _put_corner(inverse, x11, b, n, h, T, H, 16, 16, C)
    _put_corner(inverse, x22, b, n, h, T, H, 32, 32, C)
    _put_corner(inverse, x33, b, n, h, T, H, 48, 48, C)
    _put_corner(inverse, x10, b, n, h, T, H, 16, 0, C)
    _put_corner(inverse, x21, b, n, h, T, H, 32, 16, C)
    _put_corner(inverse, x32, b, n, h, T, H, 48, 32, C)
    _put_corner(inverse, x20, b, n, h, T, H, 32, 0, C)
    _put_corner(inverse, x31, b, n, h, T, H, 48, 16, C)
    _put_corner(inverse, x30, b, n, h, T, H, 48, 0, C)
    for i0 in range(0, 48, 16):
        for j0 in range(i0 + 16, 64, 16):
            _put_corner(inverse, zero, b, n, h, T, H, i0, j0, C)


@triton.jit
def _prepare(
    q, rows, columns, k, v, beta, erased, inverse, G, ids, W, U, asked, left, kept,
    T, H, Q_GROUPS, ROW_GROUPS, COLUMN_GROUPS, KEY_GROUPS, K, V, scale,
    DECAY: tl.constexpr, BEFORE: tl.constexpr, ERASE: tl.constexpr, BETA: tl.constexpr, STEPS: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """W = X Ê `[B, T, H, K]` and U = X R `[B, T, H, V]` with X the inverse; what states meet, `[B, T, H, K]`.

    asked = scale q ⊙ enter, left = columns ⊙ leave, kept = k ⊙ leave (with ERASE). `rows` are k or what is erased under
    in its place, or a = −e with ERASE.
    """
    n, bh = tl.program_id(0), tl.program_id(1)
    b, h = bh // H, bh % H
    ids += tl.cast(b, tl.int64) * T
    t, own, before, last = chunk_tokens(ids, n, T, C)
    end = tl.minimum(n * C + C, T) - 1
    X = _matrix(inverse, b, t, h, T, H, C)
    sign = -1.0 if ERASE else 1.0
    weight = tl.full([C], sign, tl.float32)
    if BETA:
        weight = _per_token(beta, b, t, h, T, H)
    for k0 in range(0, K, BK):
        kd = k0 + tl.arange(0, BK)
        r = load_tile(rows, b, t, h // (H // ROW_GROUPS), T, ROW_GROUPS, K, kd)
        r = r * (weight[:, None] * _row_factors(G, own, before, b, t, h, T, H, K, kd, DECAY, BEFORE, C))
        _put(W, dot(X, r.to(X.dtype)), b, t, h, T, H, K, kd)
        leave = _column_factors(G, own, last, end, b, t, h, T, H, K, kd, DECAY)
        c = load_tile(columns, b, t, h // (H // COLUMN_GROUPS), T, COLUMN_GROUPS, K, kd)
        _put(left, c * leave, b, t, h, T, H, K, kd)
        if ERASE:
            keys = load_tile(k, b, t, h // (H // KEY_GROUPS), T, KEY_GROUPS, K, kd)
            _put(kept, keys * leave, b, t, h, T, H, K, kd)
        queries = load_tile(q, b, _at_last(t, T, STEPS), h // (H // Q_GROUPS), T // STEPS, Q_GROUPS, K, kd)
        enter = _row_factors(G, own, before, b, t, h, T, H, K, kd, DECAY, False, C)
        _put(asked, queries * (scale * enter), b, t, h, T, H, K, kd)
    for v0 in range(0, V, BV):
        vd = v0 + tl.arange(0, BV)
        values = load_tile(v, b, t, h, T, H, V, vd)
        if ERASE:
            values = (-dot(_matrix(erased, b, t, h, T, H, C), values)).to(X.dtype)
        if BETA:
            values = (values * weight[:, None]).to(X.dtype)
        _put(U, dot(X, values), b, t, h, T, H, V, vd)


@triton.jit
def _states(
    W, U, left, kept, v, G, ids, initial, starts, Z, final, T, H, K, V, N,
    DECAY: tl.constexpr, ERASE: tl.constexpr, TRANSITION: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """States before the chunks, and after them; Z. With TRANSITION, what becomes of `initial` alone."""
    kd, vd, bh = tl.arange(0, BK), tl.program_id(0) * BV + tl.arange(0, BV), tl.program_id(1)
    b, h = bh // H, bh % H
    ids += tl.cast(b, tl.int64) * T
    S = load_state(initial, bh, kd, vd, K, V)
    inside = (kd < K)[:, None] & (vd < V)[None, :]
    for n in range(N):
        t, _, before, last = chunk_tokens(ids, n, T, C)
        z = -dot(load_tile(W, b, t, h, T, H, K, kd), S.to(W.dtype.element_ty))
        place = tl.cast(bh, tl.int64) * N + n
        tl.store(state_pointers(starts, place, kd, vd, K, V), S.to(starts.dtype.element_ty), mask=inside)
        if not TRANSITION:
            z += load_tile(U, b, t, h, T, H, V, vd)
        _put(Z, z, b, t, h, T, H, V, vd)
        S *= _through(G, before, last, tl.minimum(n * C + C, T) - 1, b, h, T, H, K, kd, DECAY)[:, None]
        S += dot(tl.trans(load_tile(left, b, t, h, T, H, K, kd)), z.to(left.dtype.element_ty))
        if ERASE and not TRANSITION:
            S += dot(tl.trans(load_tile(kept, b, t, h, T, H, K, kd)), load_tile(v, b, t, h, T, H, V, vd))
    tl.store(state_pointers(final, bh, kd, vd, K, V), S, mask=inside)


@triton.jit
def _outputs(
    asked, scores, key_scores, Z, v, starts, out, T, H, K, V, N,
    ERASE: tl.constexpr, STEPS: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """O = (Q ⊙ enter) S + A Z, and with ERASE what is read of the written keys."""
    vd, n, bh = tl.program_id(0) * BV + tl.arange(0, BV), tl.program_id(1), tl.program_id(2)
    b, h = bh // H, bh % H
    t = n * C + tl.arange(0, C)
    place = tl.cast(bh, tl.int64) * N + n
    o = dot(_matrix(scores, b, t, h, T, H, C), load_tile(Z, b, t, h, T, H, V, vd))
    if ERASE:
        o += dot(_matrix(key_scores, b, t, h, T, H, C), load_tile(v, b, t, h, T, H, V, vd))
    for k0 in range(0, K, BK):
        kd = k0 + tl.arange(0, BK)
        o += dot(load_tile(asked, b, t, h, T, H, K, kd), load_state(starts, place, kd, vd, K, V))
    _put(out, o, b, _at_last(t, T, STEPS), h, T // STEPS, H, V, vd)


@triton.jit
def _pull(scores, do, dZ, T, H, V, STEPS: tl.constexpr, C: tl.constexpr, BV: tl.constexpr):
    """dZ = Aᵀ dO: the part of it that comes from the chunk's own outputs."""
    vd, n, bh = tl.program_id(0) * BV + tl.arange(0, BV), tl.program_id(1), tl.program_id(2)
    b, h = bh // H, bh % H
    t = n * C + tl.arange(0, C)
    given = load_tile(do, b, _at_last(t, T, STEPS), h, T // STEPS, H, V, vd)
    dz = dot(tl.trans(_matrix(scores, b, t, h, T, H, C)), given)
    _put(dZ, dz, b, t, h, T, H, V, vd)


@triton.jit
def _state_gradients(
    asked, W, left, do, dZ, G, ids, dfinal, afters, dinitial, T, H, K, V, N,
    DECAY: tl.constexpr, STEPS: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Gradients of the states after the first N chunks, and before them; completes dZ."""
    kd, vd, bh = tl.arange(0, BK), tl.program_id(0) * BV + tl.arange(0, BV), tl.program_id(1)
    b, h = bh // H, bh % H
    ids += tl.cast(b, tl.int64) * T
    dS = load_state(dfinal, bh, kd, vd, K, V)
    inside = (kd < K)[:, None] & (vd < V)[None, :]
    for back in range(N):
        n = N - 1 - back
        place = tl.cast(bh, tl.int64) * N + n
        after = dS.to(afters.dtype.element_ty)
        tl.store(state_pointers(afters, place, kd, vd, K, V), after, mask=inside)
        t, _, before, last = chunk_tokens(ids, n, T, C)
        dz = load_tile(dZ, b, t, h, T, H, V, vd) + dot(load_tile(left, b, t, h, T, H, K, kd), after)
        _put(dZ, dz, b, t, h, T, H, V, vd)
        dS *= _through(G, before, last, tl.minimum(n * C + C, T) - 1, b, h, T, H, K, kd, DECAY)[:, None]
        given = load_tile(do, b, _at_last(t, T, STEPS), h, T // STEPS, H, V, vd)
        dS += dot(tl.trans(load_tile(asked, b, t, h, T, H, K, kd)), given)
        dS -= dot(tl.trans(load_tile(W, b, t, h, T, H, K, kd)), dz.to(after.dtype))
    tl.store(state_pointers(dinitial, bh, kd, vd, K, V), dS, mask=inside)


@triton.jit
def _pairs(
    inverse, key_scores, erased, beta, kept, v, Z, dZ, do, afters, ids,
    dR, dscores, dsystem, dkey_scores, derased, dv, dbeta, T, H, K, V, N,
    ERASE: tl.constexpr, BETA: tl.constexpr, STEPS: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """dR = Xᵀ dZ; the gradients of all scores, where pairs see; dv; what the values give to dbeta."""
    n, bh = tl.program_id(0), tl.program_id(1)
    b, h = bh // H, bh % H
    ids += tl.cast(b, tl.int64) * T
    t, own, _, _ = chunk_tokens(ids, n, T, C)
    i = tl.arange(0, C)
    tq, TQ = _at_last(t, T, STEPS), T // STEPS
    place = tl.cast(bh, tl.int64) * N + n
    X = tl.trans(_matrix(inverse, b, t, h, T, H, C))
    dA, dL = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    for v0 in range(0, V, BV):
        vd = v0 + tl.arange(0, BV)
        dr = dot(X, load_tile(dZ, b, t, h, T, H, V, vd)).to(X.dtype)
        z = tl.trans(load_tile(Z, b, t, h, T, H, V, vd))
        dA += dot(load_tile(do, b, tq, h, TQ, H, V, vd), z)
        dL -= dot(dr, z)
        _put(dR, dr, b, t, h, T, H, V, vd)
    _put(dscores, tl.where(_seen(own, C, False), dA, 0.0), b, t, h, T, H, C, i)
    _put(dsystem, tl.where(_seen(own, C, True), dL, 0.0), b, t, h, T, H, C, i)
    if ERASE:
        dA, dL = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
        A = tl.trans(_matrix(key_scores, b, t, h, T, H, C))
        P = tl.trans(_matrix(erased, b, t, h, T, H, C))
    if BETA:
        weight = _per_token(beta, b, t, h, T, H)
        moment = tl.zeros([C], tl.float32)
    for v0 in range(0, V, BV):
        vd = v0 + tl.arange(0, BV)
        dr = dot(X, load_tile(dZ, b, t, h, T, H, V, vd))
        values = load_tile(v, b, t, h, T, H, V, vd)
        if BETA:
            moment += tl.sum(dr * values, 1)
            dr *= weight[:, None]
        if ERASE:
            given = load_tile(do, b, tq, h, TQ, H, V, vd)
            dr = dr.to(X.dtype)
            dA += dot(given, tl.trans(values))
            dL -= dot(dr, tl.trans(values))
            dr = dot(A, given) - dot(P, dr)
            for k0 in range(0, K, BK):
                kd = k0 + tl.arange(0, BK)
                dr += dot(load_tile(kept, b, t, h, T, H, K, kd), load_state(afters, place, kd, vd, K, V))
        _put(dv, dr, b, t, h, T, H, V, vd)
    if BETA:
        tl.store(dbeta + (tl.cast(b, tl.int64) * T + t) * H + h, moment, mask=t < T)
    if ERASE:
        _put(dkey_scores, tl.where(_seen(own, C, False), dA, 0.0), b, t, h, T, H, C, i)
        _put(derased, tl.where(_seen(own, C, True), dL, 0.0), b, t, h, T, H, C, i)


@triton.jit
def _spread(
    dA, r, c, dr, dc, G, b, n, t, h, T, H, K, kd,
    DECAY: tl.constexpr, BEFORE: tl.constexpr, STRICT: tl.constexpr, C: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """dr and dc plus the gradients of rows r and columns c that those of their scores dA give."""
    i = tl.arange(0, C)
    at = tl.maximum(i - 1, 0) if BEFORE else i
    if DECAY == 2:
        sums_rows = _sums_at_rows(G, b, t, h, T, H, K, kd, C, BEFORE)
        sums_columns = load_tile(G, b, t, h, T, H, K, kd)
        for bit in range(BITS):
            later, earlier = _meet(at, bit, sums_rows, sums_columns, G, b, n, h, T, H, K, kd, C)
            P = tl.where(_meeting(at, bit, C), dA, 0.0).to(r.dtype)
            dr += dot(P, (c * earlier).to(r.dtype)) * later
            dc += dot(tl.trans(P), (r * later).to(r.dtype)) * earlier
        if BEFORE or not STRICT:
            P = tl.where(at[:, None] == i[None, :], dA, 0.0).to(r.dtype)
            dr += dot(P, c)
            dc += dot(tl.trans(P), r)
    else:
        if DECAY == 1:
            dA *= power2(_sum_at_rows(G, b, t, h, T, H, C, BEFORE)[:, None] - _per_token(G, b, t, h, T, H)[None, :])
        P = dA.to(r.dtype)
        dr += dot(P, c)
        dc += dot(tl.trans(P), r)
    return dr, dc


@triton.jit
def _inputs(
    q, rows, columns, k, v, beta, Z, do, dR, starts, afters, dscores, dsystem, dkey_scores, derased, G, ids,
    dq, drows, dcolumns, dk, dbeta, moments, row_moments, ends,
    B, T, H, Q_GROUPS, ROW_GROUPS, COLUMN_GROUPS, KEY_GROUPS, K, V, N, scale,
    DECAY: tl.constexpr, BEFORE: tl.constexpr, ERASE: tl.constexpr, BETA: tl.constexpr, OWN: tl.constexpr,
    STEPS: tl.constexpr, C: tl.constexpr, BITS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Gradients of queries, rows, columns and written keys, by head; dbeta's and the decays' parts of these channels.

    Without ERASE columns are k, and so are rows unless they are OWN: dcolumns is the gradient of both then. What
    channels give together, dbeta and for a decay a token `moments`, has a part from every program along the channels.
    """
    kb, n, bh = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, h = bh // H, bh % H
    kd = kb * BK + tl.arange(0, BK)
    ids += tl.cast(b, tl.int64) * T
    t, own, before, last = chunk_tokens(ids, n, T, C)
    end = tl.minimum(n * C + C, T) - 1
    tq, TQ = _at_last(t, T, STEPS), T // STEPS
    place = tl.cast(bh, tl.int64) * N + n
    own_dq, own_dr = tl.zeros([C, BK], tl.float32), tl.zeros([C, BK], tl.float32)
    own_dc, own_dk = tl.zeros([C, BK], tl.float32), tl.zeros([C, BK], tl.float32)
    at_end = tl.zeros([BK], tl.float32)
    for v0 in range(0, V, BV):
        vd = v0 + tl.arange(0, BV)
        S, dS = load_state(starts, place, kd, vd, K, V), load_state(afters, place, kd, vd, K, V)
        own_dq += dot(load_tile(do, b, tq, h, TQ, H, V, vd), tl.trans(S))
        own_dr -= dot(load_tile(dR, b, t, h, T, H, V, vd), tl.trans(S))
        own_dc += dot(load_tile(Z, b, t, h, T, H, V, vd), tl.trans(dS))
        if ERASE:
            own_dk += dot(load_tile(v, b, t, h, T, H, V, vd), tl.trans(dS))
        if DECAY:
            at_end += tl.sum(S.to(tl.float32) * dS.to(tl.float32), 1)
    own_dq *= scale * _row_factors(G, own, before, b, t, h, T, H, K, kd, DECAY, False, C)
    own_dr *= _row_factors(G, own, before, b, t, h, T, H, K, kd, DECAY, BEFORE, C)
    leave = _column_factors(G, own, last, end, b, t, h, T, H, K, kd, DECAY)
    own_dc *= leave
    c = load_tile(columns, b, t, h // (H // COLUMN_GROUPS), T, COLUMN_GROUPS, K, kd)
    r = load_tile(rows, b, t, h // (H // ROW_GROUPS), T, ROW_GROUPS, K, kd)
    queries = load_tile(q, b, tq, h // (H // Q_GROUPS), TQ, Q_GROUPS, K, kd)
    if BETA:
        weight = _per_token(beta, b, t, h, T, H)[:, None]
        erased = r
        r = (r * weight).to(c.dtype)
    if ERASE:
        r = -r
        own_dk *= leave
        keys = load_tile(k, b, t, h // (H // KEY_GROUPS), T, KEY_GROUPS, K, kd)
    if DECAY:
        at_end *= _through(G, before, last, end, b, h, T, H, K, kd, DECAY)
        at_end += tl.sum(own_dc * c, 0)
        if ERASE:
            at_end += tl.sum(own_dk * keys, 0)

    dA = _matrix(dscores, b, t, h, T, H, C).to(tl.float32) * scale
    own_dq, own_dc = _spread(dA, queries, c, own_dq, own_dc, G, b, n, t, h, T, H, K, kd, DECAY, False, False, C, BITS)
    if ERASE:
        dA = _matrix(dkey_scores, b, t, h, T, H, C).to(tl.float32) * scale
        own_dq, own_dk = _spread(
            dA, queries, keys, own_dq, own_dk, G, b, n, t, h, T, H, K, kd, DECAY, False, False, C, BITS
        )
    dA = _matrix(dsystem, b, t, h, T, H, C).to(tl.float32)
    own_dr, own_dc = _spread(dA, r, c, own_dr, own_dc, G, b, n, t, h, T, H, K, kd, DECAY, BEFORE, True, C, BITS)
    if ERASE:
        dA = _matrix(derased, b, t, h, T, H, C).to(tl.float32)
        own_dr, own_dk = _spread(dA, r, keys, own_dr, own_dk, G, b, n, t, h, T, H, K, kd, DECAY, BEFORE, True, C, BITS)

    _put(dq, own_dq, b, tq, h, TQ, H, K, kd)
    part = (tl.cast(kb, tl.int64) * B + b) * T + t
    if DECAY:
        moment = queries * own_dq - c * own_dc
        if ERASE:
            moment -= keys * own_dk
        if BEFORE:
            before_row = tl.where((tl.arange(0, C) > 0)[:, None], r * own_dr, 0.0)
        else:
            moment += r * own_dr
        tl.store(ends + place * K + kd, at_end, mask=kd < K)
        if DECAY == 2:
            _put(moments, moment, b, t, h, T, H, K, kd)
            if BEFORE:
                _put(row_moments, before_row, b, t, h, T, H, K, kd)
        else:
            tl.store(moments + part * H + h, tl.sum(moment, 1), mask=t < T)
            if BEFORE:
                tl.store(row_moments + part * H + h, tl.sum(before_row, 1), mask=t < T)
    if ERASE:
        _put(drows, -own_dr, b, t, h, T, H, K, kd)
        _put(dk, own_dk, b, t, h, T, H, K, kd)
    else:
        if BETA:
            tl.store(dbeta + part * H + h, tl.sum(own_dr * erased, 1), mask=t < T)
            own_dr *= weight
        if OWN:
            _put(drows, own_dr, b, t, h, T, H, K, kd)
        else:
            own_dc += own_dr
    _put(dcolumns, own_dc, b, t, h, T, H, K, kd)


class Tiles(NamedTuple):
    """Channels and values of a tile, and warps, of each kernel that has a choice."""

    key_block: int  # of the kernels that take channels block by block
    value_block: int
    state_values: int  # values of a program that goes through the chunks, with all channels
    input_keys: int  # channels of a program of `_inputs`
    score_warps: int = 4
    state_warps: int = 4
    pair_warps: int = 4
    input_warps: int = 4
    warps: int = 4  # of the others


# By the key dim, as padded: what fits the registers of sm_90 without spilling (`make kernels`).
HALF = {64: Tiles(64, 64, 64, 64), 128: Tiles(64, 64, 32, 64), 256: Tiles(64, 64, 32, 64, state_warps=8)}
SINGLE = {64: Tiles(32, 32, 32, 32), 128: Tiles(32, 32, 16, 32), 256: Tiles(32, 32, 16, 32)}


def tiles(dtype: torch.dtype, key_dim: int, decay: int, erase: bool) -> Tiles:
    """The tiles for this key dim, by the table. Raises ValueError for heads wider than the registers hold.

    Decays per channel keep tiles of their sums in registers, rows and columns of their own the gradients of both.
    """
    table = SINGLE if dtype == torch.float32 else HALF
    if key_dim > max(table):
        raise ValueError(
            f"the key dim must be at most {max(table)} with backend 'triton'; got {key_dim}. "
            "Use more heads, or backend='chunked'"
        )
    found = next(found for dim, found in table.items() if key_dim <= dim)
    if erase:
        return found._replace(score_warps=8, pair_warps=8, input_keys=16, input_warps=8)
    if decay == CHANNEL:
        return found._replace(score_warps=8, input_keys=32, input_warps=8)
    return found if decay == NONE else found._replace(input_keys=32)


def _padded(dim: int) -> int:
    """The power of two that holds `dim`, at least what a tensor core takes."""
    return max(16, 1 << max(0, dim - 1).bit_length())


class _Chunks(NamedTuple):
    """What the forward pass makes of each chunk by itself."""

    scores: Tensor  # A `[B, T, H, C]`
    key_scores: Tensor  # that of the written keys, with erase
    erased: Tensor  # P, with erase
    inverse: Tensor  # (I + L)^-1
    W: Tensor
    U: Tensor
    asked: Tensor  # what meets states: queries
    left: Tensor  # columns
    kept: Tensor  # written keys, with erase


class _Run:
    """A call: its tensors as the kernels read them, its sums of decays, and the launches."""

    def __init__(self, problem: Problem[DeltaInputs]) -> None:
        self.problem = problem = by_step(problem)
        inputs = problem.inputs
        self.erase, self.has_beta = inputs.a is not None, inputs.beta is not None
        self.own_rows, self.before = inputs.erase is not None, self.erase or problem.op.erase_first
        vectors = (inputs.q, inputs.k, inputs.v, inputs.a, inputs.b, inputs.erase)
        wide = [x.dtype for x in vectors if x is not None]
        self.dtype = reduce(torch.promote_types, wide)
        self.q, self.k, self.v = (x.to(self.dtype).contiguous() for x in vectors[:3] if x is not None)
        self.rows = self.columns = self.k
        if inputs.a is not None and inputs.b is not None:
            self.rows, self.columns = (x.to(self.dtype).contiguous() for x in (inputs.a, inputs.b))
        if inputs.erase is not None:
            self.rows = inputs.erase.to(self.dtype).contiguous()
        self.batch, self.length, self.heads, self.values = self.v.shape
        self.keys, self.chunks = self.k.shape[-1], ceil_div(self.length, CHUNK)
        self.steps = self.length // self.q.shape[1]
        self.ids = problem.documents.ids(self.q.device)
        self.beta = self.ids if inputs.beta is None else inputs.beta.contiguous()  # where there is none it is not read
        log_decay = inputs.log_decay
        self.decay = NONE if log_decay is None else TOKEN if log_decay.dim() == 3 else CHANNEL
        self.tiles = tiles(self.dtype, self.keys, self.decay, self.erase)
        self.G = self.ids if log_decay is None else self.cumulated(log_decay)
        self.sizes = self.length, self.heads
        self.groups = tuple(x.shape[2] for x in (self.q, self.rows, self.columns, self.k))

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.q.device)

    def per_token(self, dim: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.empty(self.batch, self.length, self.heads, dim, dtype=self.dtype if dtype is None else dtype)

    def state(self) -> Tensor:
        return self.empty(self.batch, self.heads, self.keys, self.values)

    def by_chunk(self) -> tuple[int, int]:
        return self.chunks, self.batch * self.heads

    def blocks(self, *, keys: bool = True, values: bool = True, warps: int | None = None) -> dict[str, int]:
        found = {"C": CHUNK, "num_warps": warps or self.tiles.warps}
        if keys:
            found["BK"] = min(self.tiles.key_block, _padded(self.keys))
        if values:
            found["BV"] = min(self.tiles.value_block, _padded(self.values))
        return found

    def cumulated(self, log_decay: Tensor) -> Tensor:
        """`[B, T, H]` or `[B, T, H, K]`: sums within chunks and documents, base 2."""
        sums = torch.empty_like(log_decay, dtype=torch.float32, memory_format=torch.contiguous_format)
        dim = 1 if log_decay.dim() == 3 else log_decay.shape[-1]
        total = self.heads * dim
        cumulate[(self.chunks, self.batch, ceil_div(total, LANES))](
            log_decay.contiguous(), self.ids, sums, self.length, self.heads, dim, total,
            C=CHUNK, BY_TOKEN=True, BY_CHANNEL=True, LANES=LANES, num_warps=1,
        )  # fmt: skip
        return sums

    def scores(self, rows: Tensor, columns: Tensor, *, system: bool = False) -> Tensor:
        """`[B, T, H, C]`: of queries, or with `system` of rows, for pairs of different tokens; in float32 for L."""
        out = self.per_token(CHUNK, torch.float32 if system and columns is self.columns else None)
        scale = self.problem.scale if not system else -1.0 if self.erase else 1.0
        _scores[self.by_chunk()](
            rows, columns, self.G, self.beta, self.ids, out, *self.sizes, rows.shape[2], columns.shape[2], self.keys,
            float(scale), DECAY=self.decay, BEFORE=system and self.before, STRICT=system,
            BETA=system and self.has_beta, STEPS=1 if system else self.steps, BITS=BITS,
            **self.blocks(values=False, warps=self.tiles.score_warps),
        )  # fmt: skip
        return out

    def prepare(self) -> _Chunks:
        """All that chunks are by themselves."""
        system = self.scores(self.rows, self.columns, system=True)
        inverse = self.per_token(CHUNK)
        _inverse[self.by_chunk()](system, inverse, *self.sizes, C=CHUNK, num_warps=INVERSE_WARPS)
        scores = self.scores(self.q, self.columns)
        key_scores = erased = inverse
        if self.erase:
            erased = self.scores(self.rows, self.k, system=True)
            key_scores = self.scores(self.q, self.k)
        W, U, left = self.per_token(self.keys), self.per_token(self.values), self.per_token(self.keys)
        asked, kept = self.per_token(self.keys), self.per_token(self.keys) if self.erase else left
        _prepare[self.by_chunk()](
            self.q, self.rows, self.columns, self.k, self.v, self.beta, erased, inverse, self.G, self.ids,
            W, U, asked, left, kept, *self.sizes, *self.groups, self.keys, self.values, float(self.problem.scale),
            DECAY=self.decay, BEFORE=self.before, ERASE=self.erase, BETA=self.has_beta, STEPS=self.steps,
            **self.blocks(),
        )  # fmt: skip
        return _Chunks(scores, key_scores, erased, inverse, W, U, asked, left, kept)

    def states(
        self, chunks: _Chunks, entering: Tensor, count: int | None = None, *, transition: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """States before the first `count` chunks `[B H, N, K, V]` and Z, in the inputs' type, and after them.

        With `transition`, of what enters alone; it may have other columns than values.
        """
        values, count = entering.shape[-1], self.chunks if count is None else count
        final = torch.empty_like(entering, memory_format=torch.contiguous_format)
        starts = self.empty(self.batch * self.heads, count, self.keys, values, dtype=self.dtype)
        Z = self.per_token(values)
        block = min(self.tiles.state_values, _padded(values))
        _states[(ceil_div(values, block), self.batch * self.heads)](
            chunks.W, chunks.U, chunks.left, chunks.kept, self.v, self.G, self.ids, entering.contiguous(),
            starts, Z, final, *self.sizes, self.keys, values, count,
            DECAY=self.decay, ERASE=self.erase, TRANSITION=transition, C=CHUNK, BK=_padded(self.keys), BV=block,
            num_warps=self.tiles.state_warps,
        )  # fmt: skip
        return starts, Z, final

    def outputs(self, chunks: _Chunks, starts: Tensor, Z: Tensor, out: Tensor, *, transition: bool = False) -> None:
        """Writes what queries of the chunks that have a state read; with `transition`, of what entered alone."""
        values, count = Z.shape[-1], starts.shape[1]
        blocks = {**self.blocks(), "BV": min(self.tiles.value_block, _padded(values))}
        _outputs[(ceil_div(values, blocks["BV"]), count, self.batch * self.heads)](
            chunks.asked, chunks.scores, chunks.key_scores, Z, self.v, starts, out,
            *self.sizes, self.keys, values, count, ERASE=self.erase and not transition, STEPS=self.steps, **blocks,
        )  # fmt: skip

    def state_gradients(self, chunks: _Chunks, dout: Tensor, dfinal: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the states after the chunks, of Z, and of the state before them."""
        count = self.chunks
        dZ, dinitial = self.per_token(self.values), self.state()
        blocks = self.blocks(keys=False)
        _pull[(ceil_div(self.values, blocks["BV"]), count, self.batch * self.heads)](
            chunks.scores, dout, dZ, *self.sizes, self.values, STEPS=self.steps, **blocks
        )
        afters = self.empty(self.batch * self.heads, count, self.keys, self.values, dtype=self.dtype)
        dfinal = torch.zeros_like(dinitial) if dfinal is None else dfinal.float().contiguous()
        block = min(self.tiles.state_values, _padded(self.values))
        _state_gradients[(ceil_div(self.values, block), self.batch * self.heads)](
            chunks.asked, chunks.W, chunks.left, dout, dZ, self.G, self.ids, dfinal, afters, dinitial,
            *self.sizes, self.keys, self.values, count, DECAY=self.decay, STEPS=self.steps,
            C=CHUNK, BK=_padded(self.keys), BV=block,
            num_warps=self.tiles.state_warps,
        )  # fmt: skip
        return afters, dZ, dinitial

    def pairs(
        self, chunks: _Chunks, dout: Tensor, Z: Tensor, dZ: Tensor, afters: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...], Tensor, Tensor]:
        """(dR, gradients of the four scores, dv, what the values give to dbeta `[B, T, H]`)."""
        dR, dv = self.per_token(self.values), self.per_token(self.values)
        dscores, dsystem = self.per_token(CHUNK), self.per_token(CHUNK)
        dkey_scores, derased = (self.per_token(CHUNK), self.per_token(CHUNK)) if self.erase else (dscores, dsystem)
        dbeta = self.empty(*self.v.shape[:3])
        _pairs[self.by_chunk()](
            chunks.inverse, chunks.key_scores, chunks.erased, self.beta, chunks.kept, self.v, Z, dZ, dout, afters,
            self.ids, dR, dscores, dsystem, dkey_scores, derased, dv, dbeta,
            *self.sizes, self.keys, self.values, self.chunks, ERASE=self.erase, BETA=self.has_beta, STEPS=self.steps,
            **self.blocks(warps=self.tiles.pair_warps),
        )  # fmt: skip
        return dR, (dscores, dsystem, dkey_scores, derased), dv, dbeta

    def inputs(
        self, dout: Tensor, Z: Tensor, dR: Tensor, starts: Tensor, afters: Tensor, dscores: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """(dq, drows, dcolumns and dk, by head; what channels give to dbeta; the gradient of the decays)."""
        block = min(self.tiles.input_keys, _padded(self.keys))
        parts = ceil_div(self.keys, block)
        kind = (
            torch.float32 if any(x.shape[2] < self.heads for x in (self.q, self.k, self.rows, self.columns)) else None
        )
        dcolumns = self.per_token(self.keys, kind)
        dq = torch.empty(*self.q.shape[:2], self.heads, self.keys, dtype=dcolumns.dtype, device=self.q.device)
        drows = self.per_token(self.keys, kind) if self.erase or self.own_rows else dq
        dk = self.per_token(self.keys, kind) if self.erase else dq
        dbeta = self.empty(parts, *self.v.shape[:3])
        moments = row_moments = ends = dbeta
        if self.decay != NONE:
            ends = self.empty(self.batch * self.heads, self.chunks, self.keys)
        if self.decay == CHANNEL:
            moments = self.per_token(self.keys, torch.float32)
            row_moments = self.per_token(self.keys, torch.float32) if self.before else moments
        elif self.decay == TOKEN:
            moments = self.empty(parts, *self.v.shape[:3])
            row_moments = self.empty(parts, *self.v.shape[:3]) if self.before else moments
        _inputs[(parts, *self.by_chunk())](
            self.q, self.rows, self.columns, self.k, self.v, self.beta, Z, dout, dR, starts, afters, *dscores,
            self.G, self.ids, dq, drows, dcolumns, dk, dbeta, moments, row_moments, ends,
            self.batch, *self.sizes, *self.groups, self.keys, self.values, self.chunks, float(self.problem.scale),
            DECAY=self.decay, BEFORE=self.before, ERASE=self.erase, BETA=self.has_beta, OWN=self.own_rows,
            STEPS=self.steps, BITS=BITS,
            **{**self.blocks(warps=self.tiles.input_warps), "BK": block},
        )  # fmt: skip
        return dq, drows, dcolumns, dk, dbeta.sum(0), self.decay_gradient(moments, row_moments, ends)

    def decay_gradient(self, moments: Tensor, row_moments: Tensor, ends: Tensor) -> Tensor | None:
        if self.decay == NONE:
            return None
        if self.decay == TOKEN:
            moments, row_moments, ends = moments.sum(0), row_moments.sum(0), ends.sum(2)
        if self.before:  # a row meets the state without its own decay: what it says is of those up to the token before
            moments[:, :-1] += row_moments[:, 1:]
        dim = 1 if self.decay == TOKEN else self.keys
        cumulate_back[(self.chunks, self.batch, ceil_div(self.heads * dim, LANES))](
            moments, self.ids, ends, self.length, self.chunks, self.heads * dim, self.heads, dim,
            C=CHUNK, LANES=LANES, num_warps=1,
        )  # fmt: skip
        return moments


def forward(problem: Problem[DeltaInputs], initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
    """(out, final state)."""
    run = _Run(problem)
    chunks = run.prepare()
    starts, Z, final = run.states(chunks, problem.entering(initial_state))
    out = problem.new_output()
    run.outputs(chunks, starts, Z, out)
    return out, final


def begin(problem: Problem[DeltaInputs]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, transition `[B, H, K, K]`, state `[B, H, K, V]`, reads `[B, T, H, K]`): of zero, and of the identity.

    The identity goes no further than the documents that rows continue.
    """
    run = _Run(problem)
    problem = run.problem
    chunks = run.prepare()
    starts, Z, state = run.states(chunks, problem.new_states())
    out = problem.new_output()
    run.outputs(chunks, starts, Z, out)
    one = torch.eye(run.keys, device=state.device).expand(run.batch, run.heads, -1, -1)
    reads = out.new_zeros(*out.shape[:3], run.keys)
    if problem.reach == 0:
        return out, torch.zeros_like(one), state, reads
    reached = ceil_div(problem.reach, CHUNK)
    entering = torch.where(per_row(problem.continues, one), one, 0.0)
    starts, Z, transition = run.states(chunks, entering, reached, transition=True)
    run.outputs(chunks, starts, Z, reads, transition=True)
    return out, torch.where(per_row(problem.through, transition), transition, 0.0), state, reads


def backward(
    problem: Problem[DeltaInputs], dout: Tensor, dfinal_state: Tensor | None, initial_state: Tensor | None
) -> tuple[Tensors, Tensor]:
    """The gradients of the inputs, in their types, and of the initial state."""
    run = _Run(problem)
    dout = dout.to(run.dtype).contiguous()
    chunks = run.prepare()
    starts, Z, _ = run.states(chunks, problem.entering(initial_state))
    afters, dZ, dinitial = run.state_gradients(chunks, dout, dfinal_state)
    dR, dscores, dv, dbeta = run.pairs(chunks, dout, Z, dZ, afters)
    dq, drows, dcolumns, dk, of_channels, ddecay = run.inputs(dout, Z, dR, starts, afters, dscores)
    da, db, dk = (drows, dcolumns, dk) if run.erase else (None, None, dcolumns)
    x = run.problem.inputs
    gradients = (
        summed(dq, x.q), summed(dk, x.k), dv.to(x.v.dtype),
        summed(dbeta + of_channels, x.beta), summed(ddecay, x.log_decay),
        summed(da, x.a), summed(db, x.b), summed(drows, x.erase),
    )  # fmt: skip
    return by_token(gradients, problem), problem.entering(dinitial)


_FLOAT32 = ("G", "beta", "system", "initial", "final", "dfinal", "dinitial", "moments", "row_moments", "ends", "dbeta")


def compilations() -> list[Compilation]:
    """Every kernel at the dims of production models in bfloat16: DeltaNets, Kimi Delta Attention, RWKV-7.

    And those that differ in Gated DeltaNet-2, which erases under keys of its own, in Comba, which does so before the
    state decays, and in DeltaProduct of two steps.
    """
    found = []
    for name, dim, decay, erase in (
        ("delta 128", 128, NONE, False), ("gated 128", 128, TOKEN, False), ("gated 256", 256, TOKEN, False),
        ("channel 128", 128, CHANNEL, False), ("general 64", 64, CHANNEL, True),
    ):  # fmt: skip
        found += _compiled(name, dim, decay, erase=erase)
    own = _compiled("own 128", 128, CHANNEL, own=True)
    first = _compiled("own first 128", 128, TOKEN, own=True, first=True)
    product = _compiled("product 128", 128, TOKEN, steps=2)
    found += [c for c in own if c.constants.get("OWN")] + [c for c in first if c.constants.get("BEFORE")]
    return found + [c for c in product if c.constants.get("STEPS") == 2]


def _compiled(
    name: str, dim: int, decay: int, *, erase: bool = False, own: bool = False, first: bool = False, steps: int = 1
) -> list[Compilation]:
    chosen = tiles(torch.bfloat16, dim, decay, erase)
    kind, asked = {"DECAY": decay, "C": CHUNK}, {"STEPS": steps}
    rule, meets = {"ERASE": erase, "BETA": not erase}, {"BEFORE": erase or first}
    across, along = {"BK": chosen.key_block}, {"BV": chosen.value_block}
    through = {"BK": _padded(dim), "BV": chosen.state_values}
    bits = {"BITS": BITS}
    seen = {"BEFORE": False, "STRICT": False, "BETA": False, **asked}
    before = {**meets, "STRICT": True, "BETA": not erase, "STEPS": 1}
    listed = [
        (_scores, {**kind, **across, **bits, **seen}, chosen.score_warps),
        (_scores, {**kind, **across, **bits, **before}, chosen.score_warps),
        (_inverse, {"C": CHUNK}, INVERSE_WARPS),
        (_prepare, {**kind, **rule, **meets, **asked, **across, **along}, chosen.warps),
        (_states, {**kind, "ERASE": erase, "TRANSITION": False, **through}, chosen.state_warps),
        (_states, {**kind, "ERASE": erase, "TRANSITION": True, **through}, chosen.state_warps),
        (_outputs, {"C": CHUNK, "ERASE": erase, **asked, **across, **along}, chosen.warps),
        (_pull, {"C": CHUNK, **asked, **along}, chosen.warps),
        (_state_gradients, {**kind, **asked, **through}, chosen.state_warps),
        (_pairs, {"C": CHUNK, **rule, **asked, **across, **along}, chosen.pair_warps),
        (
            _inputs,
            {**kind, **rule, **meets, "OWN": own, **asked, **bits, "BK": chosen.input_keys, **along},
            chosen.input_warps,
        ),
    ]
    return [_compilation(kernel, constants, warps, name) for kernel, constants, warps in listed]


def _compilation(kernel: Any, constants: dict[str, Any], warps: int, name: str) -> Compilation:
    strict = constants.get("STRICT", False)

    def kind(argument: str) -> str:
        if argument == "ids":
            return "*i32"
        if argument == "scale":
            return "fp32"
        if argument in ("T", "H", "B", "K", "V", "N") or argument.endswith("GROUPS"):
            return "i32"
        float32 = argument in _FLOAT32 or (kernel is _scores and argument == "out" and strict)
        return "*fp32" if float32 else "*bf16"

    signature = {argument: kind(argument) for argument in kernel.arg_names if argument not in constants}
    divisible = tuple(a for a, typed in signature.items() if typed.startswith("*") or a in ("K", "V"))
    flags = [flag.lower() for flag in ("STRICT", "TRANSITION") if constants.get(flag)]
    variant = " ".join([name, *flags])
    if kernel is _inverse:
        note = "products of 16 rows in float32, which tensor cores would round"
        return Compilation(kernel, signature, constants, divisible, warps, 2, 0, note, variant)
    return Compilation(kernel, signature, constants, divisible, warps, 2, CHUNK, variant=variant)
