"""The selective scan as Triton kernels, parallel over chunks of tokens; deterministic.

A program holds the states of a few channels in registers and steps through its chunk token by token. As in the diagonal
scan, one pass runs every chunk from zero and keeps its last state and the product of its decays, `carry` goes through
those of a row, and a second pass runs every chunk from the state that enters it. So states exist for chunks alone.

Backward needs the state before each token, from left to right, and what later tokens ask of it, from right to left: a
chunk is gone through from its left first, keeping the states before every few tokens, then from its right, where those
tokens' states are computed anew and stay in registers. What is kept so, and the parts of the gradients of b and c that
each program has of its channels, is bounded by working through `SPAN` tokens at a time.
"""

# Kernels are typed by Triton, when they are compiled, and it has no unpacking of tuples.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportReturnType=false
# ruff: noqa: RUF005, SIM108

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..compilation import Compilation
from ..diagonal_scan.triton import carried
from ..operation import Tensors
from ..problem import Problem
from . import SelectiveInputs

LOG2_E = tl.constexpr(math.log2(math.e))


class Tiles(NamedTuple):
    """Channels × padded states of a program, tokens it loads or keeps at a time, tokens of a chunk, and its warps."""

    elements: int
    tokens: int
    chunk: int
    warps: int


# A warp holds 8 elements of states a lane, of which backward needs many at once. Chunks fill a GPU even with one row.
FORWARD = Tiles(256, 4, 256, 1)
BACKWARD = Tiles(256, 4, 256, 1)
SPAN = 4096  # tokens whose gradients are computed at once; a multiple of the chunk


@triton.jit
def _keeps(ids, t, T):
    """1.0 where token t goes on with the document of the token before it, and for what lies past the end; else 0.0.

    The row's first token goes on with what enters the row, which is 0 where it does not.
    """
    own = tl.load(ids + t, mask=t < T, other=0)
    before = tl.load(ids + tl.maximum(t, 1) - 1, mask=t < T, other=0)
    return tl.where((t >= T) | ((own >= 0) & ((own == before) | (t == 0))), 1.0, 0.0)


@triton.jit
def _channels(at, ids, t, T, D, d):
    """[BLOCK]: token t of x, delta or dout, 0 for padding and past the end."""
    real = tl.load(ids + t, mask=t < T, other=-1) >= 0
    return tl.load(at + tl.cast(t, tl.int64) * D + d, mask=(d < D) & real, other=0.0).to(tl.float32)


@triton.jit
def _states(at, t, T, N, n):
    """[STATES]: token t of b or c."""
    return tl.load(at + tl.cast(t, tl.int64) * N + n, mask=(n < N) & (t < T), other=0.0).to(tl.float32)


@triton.jit
def _decay(delta, rates, b, LONGHORN: tl.constexpr):
    """[BLOCK, STATES]: e^{delta a} for rates = a log2(e), or 1 − delta b²."""
    if LONGHORN:
        return 1.0 - delta[:, None] * (b * b)[None, :]
    else:
        return tl.exp2(delta[:, None] * rates)


@triton.jit
def _rates(a, d, n, D, N, LONGHORN: tl.constexpr, BLOCK: tl.constexpr, STATES: tl.constexpr):
    """[BLOCK, STATES]: a in units of log 2; zeros for Longhorn."""
    rates = tl.zeros([BLOCK, STATES], tl.float32)
    if not LONGHORN:
        mask = (d < D)[:, None] & (n < N)[None, :]
        rates = tl.load(a + d[:, None] * N + n[None, :], mask=mask, other=0.0).to(tl.float32) * LOG2_E
    return rates


@triton.jit
def _forward(
    x, delta, a, b, c, ids, starts, out, ends, decays, final, T, D, N, CHUNK,
    LONGHORN: tl.constexpr, ALONE: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr, STATES: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    """One chunk. ALONE: from zero, to its last state and decay. Otherwise from `starts`, to `out` and `final`.

    ADD: of x = 0, added to `out`: what an entering state contributes.
    """
    chunk, row, rows = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    d = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    n = tl.arange(0, STATES)
    mask = (d < D)[:, None] & (n < N)[None, :]
    state = tl.cast(row, tl.int64) * D * N + d[:, None] * N + n[None, :]
    here = tl.cast(chunk, tl.int64) * rows * D * N + state
    tokens = tl.cast(row, tl.int64) * T
    x, delta, out, ids = x + tokens * D, delta + tokens * D, out + tokens * D, ids + tokens
    b, c = b + tokens * N, c + tokens * N
    rates = _rates(a, d, n, D, N, LONGHORN, BLOCK, STATES)
    if ALONE:
        h = tl.zeros([BLOCK, STATES], tl.float32)
    else:
        h = tl.load(starts + here, mask=mask, other=0.0)
    product = tl.full([BLOCK, STATES], 1.0, tl.float32)
    first = chunk * CHUNK
    for t0 in range(first, tl.minimum(first + CHUNK, T), TOKENS):
        steps = ()
        inputs = ()
        keys = ()
        reads = ()
        for i in tl.static_range(TOKENS):
            steps = steps + (_channels(delta, ids, t0 + i, T, D, d),)
            keys = keys + (_states(b, t0 + i, T, N, n),)
            if not ADD:
                inputs = inputs + (_channels(x, ids, t0 + i, T, D, d),)
            if not ALONE:
                reads = reads + (_states(c, t0 + i, T, N, n),)
        for i in tl.static_range(TOKENS):
            t = t0 + i
            factor = _decay(steps[i], rates, keys[i], LONGHORN) * _keeps(ids, t, T)
            h = factor * h
            if not ADD:
                h = h + (steps[i] * inputs[i])[:, None] * keys[i][None, :]
            if ALONE:
                product = product * factor
            else:
                y = tl.sum(h * reads[i][None, :], 1)
                where = out + tl.cast(t, tl.int64) * D + d
                if ADD:
                    y = y + tl.load(where, mask=(d < D) & (t < T), other=0.0).to(tl.float32)
                tl.store(where, y.to(out.dtype.element_ty), mask=(d < D) & (t < T))
    if ALONE:
        tl.store(ends + here, h, mask=mask)
        tl.store(decays + here, product, mask=mask)
    elif first + CHUNK >= T:
        tl.store(final + state, h, mask=mask)


@triton.jit
def _ask(
    dout, delta, a, b, c, ids, ends, decays, T, D, N, CHUNK,
    LONGHORN: tl.constexpr, BLOCK: tl.constexpr, STATES: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """What one chunk alone asks of the h before it, and the product of its decays."""
    chunk, row, rows = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    d = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    n = tl.arange(0, STATES)
    mask = (d < D)[:, None] & (n < N)[None, :]
    here = (tl.cast(chunk, tl.int64) * rows + row) * D * N + d[:, None] * N + n[None, :]
    tokens = tl.cast(row, tl.int64) * T
    dout, delta, ids = dout + tokens * D, delta + tokens * D, ids + tokens
    b, c = b + tokens * N, c + tokens * N
    rates = _rates(a, d, n, D, N, LONGHORN, BLOCK, STATES)
    asked = tl.zeros([BLOCK, STATES], tl.float32)
    product = tl.full([BLOCK, STATES], 1.0, tl.float32)
    first = chunk * CHUNK
    blocks = tl.cdiv(tl.minimum(first + CHUNK, T) - first, TOKENS)
    for block in range(blocks):
        t0 = first + (blocks - 1 - block) * TOKENS
        steps = ()
        given = ()
        keys = ()
        reads = ()
        for i in tl.static_range(TOKENS):
            steps = steps + (_channels(delta, ids, t0 + i, T, D, d),)
            given = given + (_channels(dout, ids, t0 + i, T, D, d),)
            keys = keys + (_states(b, t0 + i, T, N, n),)
            reads = reads + (_states(c, t0 + i, T, N, n),)
        for i in tl.static_range(TOKENS - 1, -1, -1):
            factor = _decay(steps[i], rates, keys[i], LONGHORN) * _keeps(ids, t0 + i, T)
            asked = factor * (asked + given[i][:, None] * reads[i][None, :])
            product = product * factor
    tl.store(ends + here, asked, mask=mask)
    tl.store(decays + here, product, mask=mask)


@triton.jit
def _backward(
    x, delta, a, b, c, ids, dout, starts, afters, kept, dx, ddelta, da, db, dc, T, D, N, CHUNK, FIRST, LENGTH,
    LONGHORN: tl.constexpr, BLOCK: tl.constexpr, STATES: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """The gradients of chunk FIRST + program, given the state that enters it and what is asked of its last one.

    `kept` is the program's own, `[CHUNK / TOKENS, BLOCK, STATES]`. db and dc get a part a program, of the LENGTH tokens
    from chunk FIRST on, `[blocks of channels, rows, LENGTH, N]`; da one per chunk, `[chunks, rows, D, N]`.
    """
    local, row, rows = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    part, parts = tl.program_id(2), tl.num_programs(2)
    chunk = FIRST + local
    d = part * BLOCK + tl.arange(0, BLOCK)
    n = tl.arange(0, STATES)
    mask = (d < D)[:, None] & (n < N)[None, :]
    here = (tl.cast(chunk, tl.int64) * rows + row) * D * N + d[:, None] * N + n[None, :]
    tokens = tl.cast(row, tl.int64) * T
    x, delta, dout, ids = x + tokens * D, delta + tokens * D, dout + tokens * D, ids + tokens
    dx, ddelta = dx + tokens * D, ddelta + tokens * D
    b, c = b + tokens * N, c + tokens * N
    # Tokens count from the first of the row; those of db and dc from that of chunk FIRST.
    partial = (tl.cast(part, tl.int64) * rows + row) * LENGTH - FIRST * CHUNK
    db, dc = db + partial * N, dc + partial * N
    own = ((tl.cast(local, tl.int64) * rows + row) * parts + part) * (CHUNK // TOKENS) * BLOCK * STATES
    kept = kept + own + tl.arange(0, BLOCK)[:, None] * STATES + n[None, :]
    rates = _rates(a, d, n, D, N, LONGHORN, BLOCK, STATES)

    first = chunk * CHUNK
    blocks = tl.cdiv(tl.minimum(first + CHUNK, T) - first, TOKENS)
    h = tl.load(starts + here, mask=mask, other=0.0)
    for block in range(blocks):
        tl.store(kept + block * BLOCK * STATES, h)
        for i in tl.static_range(TOKENS):
            t = first + block * TOKENS + i
            step = _channels(delta, ids, t, T, D, d)
            key = _states(b, t, T, N, n)
            h = _decay(step, rates, key, LONGHORN) * _keeps(ids, t, T) * h
            h = h + (step * _channels(x, ids, t, T, D, d))[:, None] * key[None, :]
    tl.debug_barrier()  # what was kept is read by other threads, should its layout differ

    asked = tl.load(afters + here, mask=mask, other=0.0)
    total = tl.zeros([BLOCK, STATES], tl.float32)
    for reverse in range(blocks):
        block = blocks - 1 - reverse
        t0 = first + block * TOKENS
        h = tl.load(kept + block * BLOCK * STATES)
        earlier = ()
        for i in tl.static_range(TOKENS):
            earlier = earlier + (h,)
            step = _channels(delta, ids, t0 + i, T, D, d)
            key = _states(b, t0 + i, T, N, n)
            h = _decay(step, rates, key, LONGHORN) * _keeps(ids, t0 + i, T) * h
            h = h + (step * _channels(x, ids, t0 + i, T, D, d))[:, None] * key[None, :]
        for i in tl.static_range(TOKENS - 1, -1, -1):
            t = t0 + i
            step = _channels(delta, ids, t, T, D, d)
            given = _channels(dout, ids, t, T, D, d)
            value = _channels(x, ids, t, T, D, d)
            key = _states(b, t, T, N, n)
            keeps = _keeps(ids, t, T)
            here_c = tl.cast(t, tl.int64) * N + n
            tl.store(dc + here_c, tl.sum(h * given[:, None], 0), mask=(n < N) & (t < T))
            dh = asked + given[:, None] * _states(c, t, T, N, n)[None, :]
            h = earlier[i]
            decay = _decay(step, rates, key, LONGHORN) * keeps
            dinput = tl.sum(dh * key[None, :], 1)  # of delta x
            dkey = tl.sum(dh * (step * value)[:, None], 0)
            if LONGHORN:
                moment = keeps * h * dh
                dstep = -tl.sum(moment * (key * key)[None, :], 1)
                dkey = dkey - 2.0 * key * tl.sum(moment * step[:, None], 0)
            else:
                moment = decay * h * dh
                dstep = tl.sum(moment * rates, 1) / LOG2_E
                total += moment * step[:, None]
            asked = decay * dh
            at = tl.cast(t, tl.int64) * D + d
            real = (tl.load(ids + t, mask=t < T, other=-1) >= 0) & (d < D)
            dvalue = tl.where(real, dinput * step, 0.0)
            dstep = tl.where(real, dstep + dinput * value, 0.0)
            tl.store(dx + at, dvalue.to(dx.dtype.element_ty), mask=(d < D) & (t < T))
            tl.store(ddelta + at, dstep.to(ddelta.dtype.element_ty), mask=(d < D) & (t < T))
            tl.store(db + here_c, dkey, mask=(n < N) & (t < T))
    if not LONGHORN:
        tl.store(da + here, total, mask=mask)


class Chunks:
    """What passes over chunks share: contiguous tensors, and states at borders `[chunks, B, D, N]`.

    tokens: the passes go over the chunks of so many first tokens, of all by default.
    """

    def __init__(self, problem: Problem[SelectiveInputs], tokens: int | None = None) -> None:
        x, delta, a, b, c = problem.inputs
        self.x, self.delta, self.b, self.c = (tensor.contiguous() for tensor in (x, delta, b, c))
        self.longhorn = a is None
        self.a = self.x if a is None else a.contiguous()  # where there is none it is not read
        self.ids = problem.documents.ids(self.x.device)
        self.batch, self.length, self.channels = self.x.shape
        self.tokens = self.length if tokens is None else tokens
        self.size = self.b.shape[2]
        self.padded = triton.next_power_of_2(self.size)

    def borders(self, tiles: Tiles) -> tuple[Tensor, Tensor]:
        """Two tensors for the states at the borders of chunks."""
        shape = (triton.cdiv(self.tokens, tiles.chunk), self.batch, self.channels, self.size)
        ends, decays = torch.empty(2, *shape, dtype=torch.float32, device=self.x.device)
        return ends, decays

    def block(self, tiles: Tiles) -> int:
        """Channels of a program."""
        return max(1, tiles.elements // self.padded)

    def grid(self, tiles: Tiles, chunks: int) -> tuple[int, int, int]:
        return chunks, self.batch, triton.cdiv(self.channels, self.block(tiles))

    def sizes(self, tiles: Tiles) -> tuple[int, int, int, int]:
        return self.length, self.channels, self.size, tiles.chunk

    def settings(self, tiles: Tiles) -> dict[str, int | bool]:
        return {
            "LONGHORN": self.longhorn, "BLOCK": self.block(tiles), "STATES": self.padded, "TOKENS": tiles.tokens,
            "num_warps": tiles.warps,
        }  # fmt: skip

    def run(self, initial: Tensor, out: Tensor, *, add: bool = False) -> Tensor:
        """Every y to `out`, or added to it for x = 0; the final state."""
        ends, decays = self.borders(FORWARD)
        starts = self.starts(initial, ends, decays, add=add)
        final = torch.empty_like(initial)
        _forward[self.grid(FORWARD, len(ends))](
            self.x, self.delta, self.a, self.b, self.c, self.ids, starts, out, ends, decays, final,
            *self.sizes(FORWARD), ALONE=False, ADD=add, **self.settings(FORWARD),
        )  # fmt: skip
        return final

    def starts(self, initial: Tensor, ends: Tensor, decays: Tensor, *, add: bool = False) -> Tensor:
        """The states before all chunks of `FORWARD`, in `ends` where there are several."""
        if len(ends) == 1:
            return initial
        self.alone(ends, decays, add=add)
        carried(ends, decays, initial)
        return ends

    def alone(self, ends: Tensor, decays: Tensor, *, add: bool) -> None:
        """The last state of each chunk run from zero, and the product of its decays."""
        unused = ends
        _forward[self.grid(FORWARD, len(ends))](
            self.x, self.delta, self.a, self.b, self.c, self.ids, unused, unused, ends, decays, unused,
            *self.sizes(FORWARD), ALONE=True, ADD=add, **self.settings(FORWARD),
        )  # fmt: skip

    def asked(self, dout: Tensor, dfinal: Tensor) -> tuple[Tensor, Tensor]:
        """What later tokens ask of the last state of each chunk of `BACKWARD`, and all tokens of the initial state."""
        ends, decays = self.borders(BACKWARD)
        _ask[self.grid(BACKWARD, len(ends))](
            dout, self.delta, self.a, self.b, self.c, self.ids, ends, decays, *self.sizes(BACKWARD),
            **self.settings(BACKWARD),
        )  # fmt: skip
        return ends, carried(ends, decays, dfinal, reverse=True)


def forward(problem: Problem[SelectiveInputs], initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
    """(y, final state)."""
    out = problem.new_output()
    return out, Chunks(problem).run(problem.entering(initial_state), out)


def correct(problem: Problem[SelectiveInputs], out: Tensor, state: Tensor) -> Tensor:
    """Adds Σ_n e^{g_1 + … + g_t} state c_t to the outputs that the entering state reaches; `out` is contiguous."""
    if problem.reach:
        Chunks(problem, problem.reach).run(problem.entering(state), out, add=True)
    return out


def total_decay(problem: Problem[SelectiveInputs]) -> Tensor:
    """e^{g_1 + … + g_T} `[B, D, N]`."""
    chunks = Chunks(problem)
    ends, decays = chunks.borders(FORWARD)
    chunks.alone(ends, decays, add=True)
    return decays.prod(0)


def summarize_backward(problem: Problem[SelectiveInputs], dout: Tensor, initial_state: Tensor | None = None) -> Tensor:
    """Σ_t e^{g_1 + … + g_t} c_t dy_t `[B, D, N]` over the tokens that an entering state reaches."""
    if not problem.reach:
        return problem.new_states()
    return problem.entering(Chunks(problem, problem.reach).asked(dout.contiguous(), problem.new_states())[1])


def backward(
    problem: Problem[SelectiveInputs], dout: Tensor, dfinal_state: Tensor | None, initial_state: Tensor | None
) -> tuple[Tensors, Tensor]:
    """The gradients of the inputs, in their types, and of the initial state."""
    chunks, dout = Chunks(problem), dout.contiguous()
    dfinal = problem.new_states() if dfinal_state is None else dfinal_state.to(problem.dtype).contiguous()
    starts = chunks.starts(problem.entering(initial_state), *chunks.borders(FORWARD))
    afters, dinitial = chunks.asked(dout, dfinal)
    dx, ddelta, db, dc = (torch.empty_like(given) for given in (chunks.x, chunks.delta, chunks.b, chunks.c))
    da = None if chunks.longhorn else torch.empty_like(afters)
    tiles, device = BACKWARD, dout.device
    each = SPAN // tiles.chunk
    for first in range(0, len(afters), each):
        grid = chunks.grid(tiles, min(each, len(afters) - first))
        start, stop = first * tiles.chunk, min((first + each) * tiles.chunk, chunks.length)
        elements = chunks.block(tiles) * chunks.padded
        kept = torch.empty(math.prod(grid) * (tiles.chunk // tiles.tokens) * elements, device=device)
        parts = torch.empty(2, grid[2], chunks.batch, stop - start, chunks.size, device=device)
        _backward[grid](
            chunks.x, chunks.delta, chunks.a, chunks.b, chunks.c, chunks.ids, dout, starts, afters, kept, dx, ddelta,
            afters if da is None else da, *parts, *chunks.sizes(tiles), first, stop - start, **chunks.settings(tiles),
        )  # fmt: skip
        for gradient, part in zip((db, dc), parts, strict=True):
            gradient[:, start:stop] = part.sum(0)
    if da is not None:
        da = da.sum((0, 1), dtype=torch.float64).to(chunks.a.dtype)
    return (dx, ddelta, da, db, dc), problem.entering(dinitial)


def compilations() -> list[Compilation]:
    """The kernels for bfloat16 inputs and float32 steps, 16 states per channel, of Mamba and of Longhorn."""
    sizes = dict.fromkeys(("T", "D", "N", "CHUNK"), "i32")
    inputs = {
        "x": "*bf16", "delta": "*fp32", "a": "*fp32", "b": "*bf16", "c": "*bf16", "ids": "*i32", **sizes,
    }  # fmt: skip
    borders = dict.fromkeys(("ends", "decays"), "*fp32")
    forward_types = {**inputs, **borders, "starts": "*fp32", "out": "*bf16", "final": "*fp32"}
    ask_types = {name: kind for name, kind in {**inputs, **borders, "dout": "*bf16"}.items() if name != "x"}
    floats = dict.fromkeys(("starts", "afters", "kept", "ddelta", "da", "db", "dc"), "*fp32")
    backward_types = {**inputs, **floats, "dout": "*bf16", "dx": "*bf16", "FIRST": "i32", "LENGTH": "i32"}
    found = []
    for longhorn in (False, True):
        shared = {"LONGHORN": longhorn, "STATES": 16}
        variant = "longhorn" if longhorn else "mamba"
        found += [
            _compilation(
                _forward, forward_types, FORWARD, {**shared, "ALONE": True, "ADD": False}, variant + ", alone"
            ),
            _compilation(_forward, forward_types, FORWARD, {**shared, "ALONE": False, "ADD": False}, variant),
            _compilation(_forward, forward_types, FORWARD, {**shared, "ALONE": False, "ADD": True}, variant + ", add"),
            _compilation(_ask, ask_types, BACKWARD, shared, variant),
            _compilation(_backward, backward_types, BACKWARD, shared, variant),
        ]
    return found


def _compilation(kernel: object, types: dict[str, str], tiles: Tiles, constants: dict, variant: str) -> Compilation:
    constants = {**constants, "BLOCK": tiles.elements // constants["STATES"], "TOKENS": tiles.tokens}
    divisible = [name for name, kind in types.items() if kind.startswith("*")] + ["D", "N", "CHUNK"]
    return Compilation(kernel, types, constants, tuple(divisible), warps=tiles.warps, variant=variant)
