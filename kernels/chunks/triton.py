"""Triton functions that the kernels of chunked linear ops share: tiles of tensors, sums of decays within chunks.

Sums of decays run within a chunk and a document, base 2.
"""

# Kernels are typed by Triton, when they are compiled.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..compilation import Compilation

CHUNK = 64
LANES = 128  # channels of a program that goes token by token
LOG2_E = tl.constexpr(math.log2(math.e))
STRONGEST = tl.constexpr(-40.0)  # nothing is left of what decays more in one step: e^-40 is 4e-18

NONE, TOKEN, CHANNEL = 0, 1, 2  # how keys decay


@triton.jit
def chunk_tokens(ids, n, T, C: tl.constexpr):
    """Of chunk n: its tokens, their documents (−1 past the end), those before it and at its end."""
    t = n * C + tl.arange(0, C)
    own = tl.load(ids + t, mask=t < T, other=-1)
    before = tl.load(ids + tl.maximum(n * C, 1) - 1)
    last = tl.load(ids + tl.minimum(n * C + C, T) - 1)
    return t, own, before, last


@triton.jit
def tile_pointers(x, b, t, h, T, H, D, d):
    """Pointers to `[tokens, channels]` of head h of `[B, T, H, D]`."""
    return x + ((tl.cast(b, tl.int64) * T + t) * H + h)[:, None] * D + d[None, :]


@triton.jit
def load_tile(x, b, t, h, T, H, D, d):
    return tl.load(tile_pointers(x, b, t, h, T, H, D, d), mask=(t < T)[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def load_row(x, b, t, h, T, H, D, d):
    """Channels of one token, 0 past the end."""
    at = x + ((tl.cast(b, tl.int64) * T + t) * H + h) * D + d
    return tl.load(at, mask=(d < D) & (t < T), other=0.0)


@triton.jit
def state_pointers(x, at, k, v, K, V):
    """Pointers to `[keys, values]` of the state number `at`."""
    return x + tl.cast(at, tl.int64) * K * V + k[:, None] * V + v[None, :]


@triton.jit
def load_state(x, at, k, v, K, V):
    return tl.load(state_pointers(x, at, k, v, K, V), mask=(k < K)[:, None] & (v < V)[None, :], other=0.0)


@triton.jit
def power2(exponent):
    """2^exponent for exponents that are at most 0 wherever they count."""
    return tl.exp2(tl.minimum(exponent, 0.0))


@triton.jit
def dot(a, b):
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def cumulate(g, ids, sums, T, H, K, D, C: tl.constexpr, BY_TOKEN: tl.constexpr, BY_CHANNEL: tl.constexpr,
              LANES: tl.constexpr):  # fmt: skip
    """sums `[B, T, D]`, D = H K: log2 decays summed from the start of the chunk or, later, of the document.

    g is `[B, T, H, K]`, BY_TOKEN and BY_CHANNEL; what it is not, it is without that dim.
    """
    n, b, d = tl.program_id(0), tl.program_id(1), tl.program_id(2) * LANES + tl.arange(0, LANES)
    ids += tl.cast(b, tl.int64) * T
    if BY_CHANNEL:
        at, step = d, D
    else:
        at, step = d // K, H
    total = tl.zeros([LANES], tl.float32)
    before = tl.load(ids + tl.maximum(n * C, 1) - 1)
    for t in range(n * C, tl.minimum(n * C + C, T)):
        row = tl.cast(b, tl.int64) * T + t
        own = tl.load(ids + t)
        if BY_TOKEN:
            decay = tl.load(g + row * step + at, mask=d < D, other=0.0).to(tl.float32)
        else:
            decay = tl.load(g + at, mask=d < D, other=0.0).to(tl.float32)
        total = tl.where(own == before, total, 0.0) + tl.maximum(decay, STRONGEST) * LOG2_E
        before = own
        tl.store(sums + row * D + d, total, mask=d < D)


@triton.jit
def cumulate_back(moments, ids, ends, T, N, D, H, K, C: tl.constexpr, LANES: tl.constexpr):
    """moments `[B, T, D]`, D = H K, become Σ of those from each token to the end of its document in the chunk.

    Tokens of the document that the chunk ends in get its `ends` `[B, H, N, K]` besides.
    """
    n, b, d = tl.program_id(0), tl.program_id(1), tl.program_id(2) * LANES + tl.arange(0, LANES)
    ids += tl.cast(b, tl.int64) * T
    stop = tl.minimum(n * C + C, T)
    last = tl.load(ids + stop - 1)
    place = ((tl.cast(b, tl.int64) * H + d // K) * N + n) * K + d % K
    end = tl.load(ends + place, mask=d < D, other=0.0)
    total = tl.where(last >= 0, end, 0.0)
    after = last
    for back in range(stop - n * C):
        t = stop - 1 - back
        row = tl.cast(b, tl.int64) * T + t
        own = tl.load(ids + t)
        moment = tl.load(moments + row * D + d, mask=d < D, other=0.0)
        total = tl.where(own == after, total, 0.0) + moment
        after = own
        tl.store(moments + row * D + d, tl.where(own >= 0, total, 0.0), mask=d < D)


def ceil_div(length: int, size: int) -> int:
    """How many times `size` it takes to cover `length`."""
    return -(-length // size)


def summed(dx: Tensor | None, x: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
    """Gradients of heads or finer groups, in the shape of x; None where there is no x or no gradient.

    In x's type, or in `dtype`.
    """
    if dx is None or x is None:
        return None
    if dx.shape[2] != x.shape[2]:
        dx = dx.unflatten(2, (x.shape[2], -1)).sum(3)
    return dx.to(x.dtype if dtype is None else dtype)


def compilations() -> list[Compilation]:
    """The kernels for float32 decays per token and channel."""
    sizes = dict.fromkeys(("T", "H", "K", "D"), "i32")
    forward = {"g": "*fp32", "ids": "*i32", "sums": "*fp32", **sizes}
    backward = {"moments": "*fp32", "ids": "*i32", "ends": "*fp32", **sizes, "N": "i32"}
    constants = {"C": CHUNK, "LANES": LANES}
    by_channel = {"BY_TOKEN": True, "BY_CHANNEL": True}
    return [
        Compilation(cumulate, forward, constants | by_channel, ("g", "ids", "sums", "K", "D"), warps=1),
        Compilation(cumulate_back, backward, constants, ("moments", "ids", "ends", "K", "D"), warps=1),
    ]
