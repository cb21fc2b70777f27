"""The diagonal scan as Triton kernels, parallel over chunks of tokens; deterministic.

A row's tokens are cut into chunks. One pass runs every chunk from zero and keeps its last state and the product of its
decays; `carry` goes through those of a row, a short loop over chunks; a second pass runs every chunk from the state
that enters it. Where one chunk holds a row, the second pass is all there is. From right to left likewise.

Within a chunk a program steps token by token, `tokens` of them loaded at a time, so that memory is waited for once.
"""

# Kernels are typed by Triton, when they are compiled, and it has no unpacking of tuples.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportReturnType=false
# ruff: noqa: RUF005, SIM108

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..compilation import Compilation
from ..operation import Tensors
from ..problem import Problem
from . import DiagonalInputs

LOG2_E = tl.constexpr(math.log2(math.e))


class Tiles(NamedTuple):
    """Channels of a program, tokens it loads at a time, tokens of a chunk, and its warps."""

    channels: int
    tokens: int
    chunk: int
    warps: int


# A warp of 128 channels loads 16 bytes a lane in float32. Chunks are short enough to fill a GPU with one row.
FORWARD = Tiles(128, 8, 256, 1)
BACKWARD = Tiles(128, 4, 256, 1)
CARRY = 128  # elements of a state that a program carries from chunk to chunk


@triton.jit
def _keeps(ids, t, T):
    """1.0 where token t goes on with the document of the token before it, and for what lies past the end; else 0.0.

    The row's first token goes on with what enters the row, which is 0 where it does not.
    """
    own = tl.load(ids + t, mask=t < T, other=0)
    before = tl.load(ids + tl.maximum(t, 1) - 1, mask=t < T, other=0)
    return tl.where((t >= T) | ((own >= 0) & ((own == before) | (t == 0))), 1.0, 0.0)


@triton.jit
def _is_real(ids, t, T):
    return tl.load(ids + t, mask=t < T, other=-1) >= 0


@triton.jit
def _decay(log_decay, ids, t, T, D, d, CONSTANT: tl.constexpr):
    """e^a of token t, 0 at a document's start and 1 past the end; `log_decay` points at the row."""
    if CONSTANT:
        a = tl.load(log_decay + d, mask=d < D, other=0.0)
    else:
        a = tl.load(log_decay + tl.cast(t, tl.int64) * D + d, mask=(d < D) & (t < T), other=0.0)
    a = tl.where(t < T, a.to(tl.float32), 0.0)
    return tl.exp2(a * LOG2_E) * _keeps(ids, t, T)


@triton.jit
def _forward(
    x, log_decay, ids, starts, out, ends, decays, final, T, D, CHUNK,
    CONSTANT: tl.constexpr, ALONE: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """One chunk. ALONE: from zero, to its last state and decay. Otherwise from `starts`, to `out` and `final`.

    ADD: of x = 0, added to `out`: what an entering state contributes.
    """
    chunk, row, rows = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    d = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    base = tl.cast(row, tl.int64) * T * D
    x, out, ids = x + base, out + base, ids + tl.cast(row, tl.int64) * T
    if not CONSTANT:
        log_decay = log_decay + base
    here = (tl.cast(chunk, tl.int64) * rows + row) * D + d
    if ALONE:
        h = tl.zeros([BLOCK], tl.float32)
    else:
        h = tl.load(starts + here, mask=d < D, other=0.0)
    product = tl.full([BLOCK], 1.0, tl.float32)
    first = chunk * CHUNK
    for t0 in range(first, tl.minimum(first + CHUNK, T), TOKENS):
        factors = ()
        inputs = ()
        for i in tl.static_range(TOKENS):
            t = t0 + i
            factors = factors + (_decay(log_decay, ids, t, T, D, d, CONSTANT),)
            if not ADD:
                real = _is_real(ids, t, T) & (d < D)
                inputs = inputs + (tl.load(x + tl.cast(t, tl.int64) * D + d, mask=real, other=0.0).to(tl.float32),)
        states = ()
        for i in tl.static_range(TOKENS):
            h = factors[i] * h
            if not ADD:
                h = h + inputs[i]
            if ALONE:
                product = product * factors[i]
            states = states + (h,)
        if not ALONE:
            for i in tl.static_range(TOKENS):
                where = out + tl.cast(t0 + i, tl.int64) * D + d
                mask = (d < D) & (t0 + i < T)
                value = states[i]
                if ADD:
                    value = value + tl.load(where, mask=mask, other=0.0).to(tl.float32)
                tl.store(where, value.to(out.dtype.element_ty), mask=mask)
    if ALONE:
        tl.store(ends + here, h, mask=d < D)
        tl.store(decays + here, product, mask=d < D)
    elif first + CHUNK >= T:
        tl.store(final + tl.cast(row, tl.int64) * D + d, h, mask=d < D)


@triton.jit
def carry(ends, decays, initial, final, N, M, REVERSE: tl.constexpr, BLOCK: tl.constexpr):
    """Through the N chunks of a row: `ends` `[N, rows, M]` become what enters each chunk, `final` what leaves the last.

    In order, or in reverse for gradients of states.
    """
    row, rows = tl.program_id(0), tl.num_programs(0)
    m = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = tl.cast(row, tl.int64) * M + m
    state = tl.load(initial + at, mask=m < M, other=0.0)
    for n in range(N):
        chunk = n
        if REVERSE:
            chunk = N - 1 - n
        here = tl.cast(chunk, tl.int64) * rows * M + at
        end = tl.load(ends + here, mask=m < M, other=0.0)
        decay = tl.load(decays + here, mask=m < M, other=0.0)
        tl.store(ends + here, state, mask=m < M)
        state = decay * state + end
    tl.store(final + at, state, mask=m < M)


@triton.jit
def _backward(
    dout, log_decay, ids, states, initial, afters, dx, ddecay, ends, decays, T, D, CHUNK,
    CONSTANT: tl.constexpr, ALONE: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """One chunk from right to left. ALONE: from zero, to what it asks of the h before it. Otherwise to gradients."""
    chunk, row, rows = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    d = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    base = tl.cast(row, tl.int64) * T * D
    dout, states, dx, ids = dout + base, states + base, dx + base, ids + tl.cast(row, tl.int64) * T
    if not CONSTANT:
        log_decay, ddecay = log_decay + base, ddecay + base
    here = (tl.cast(chunk, tl.int64) * rows + row) * D + d
    if ALONE:
        asked = tl.zeros([BLOCK], tl.float32)  # what a token asks of the h before it
    else:
        asked = tl.load(afters + here, mask=d < D, other=0.0)
        entering = tl.load(initial + tl.cast(row, tl.int64) * D + d, mask=d < D, other=0.0)
    product = tl.full([BLOCK], 1.0, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    first = chunk * CHUNK
    blocks = tl.cdiv(tl.minimum(first + CHUNK, T) - first, TOKENS)
    for n in range(blocks):
        t0 = first + (blocks - 1 - n) * TOKENS
        factors = ()
        given = ()
        earlier = ()
        for i in tl.static_range(TOKENS):
            t = t0 + i
            at = tl.cast(t, tl.int64) * D + d
            factors = factors + (_decay(log_decay, ids, t, T, D, d, CONSTANT),)
            real = _is_real(ids, t, T) & (d < D)
            given = given + (tl.load(dout + at, mask=real, other=0.0).to(tl.float32),)
            if not ALONE:
                h = tl.load(states + at - D, mask=(d < D) & (t > 0) & (t < T), other=0.0)
                earlier = earlier + (tl.where(t > 0, h, entering),)
        for i in tl.static_range(TOKENS - 1, -1, -1):
            t = t0 + i
            dh = given[i] + asked
            asked = factors[i] * dh
            if ALONE:
                product = product * factors[i]
            else:
                at = tl.cast(t, tl.int64) * D + d
                mask = (d < D) & (t < T)
                real = _is_real(ids, t, T)
                tl.store(dx + at, tl.where(real, dh, 0.0).to(dx.dtype.element_ty), mask=mask)
                if CONSTANT:
                    total += tl.where(t < T, asked * earlier[i], 0.0)
                else:
                    tl.store(ddecay + at, (asked * earlier[i]).to(ddecay.dtype.element_ty), mask=mask)
    if ALONE:
        tl.store(ends + here, asked, mask=d < D)
        tl.store(decays + here, product, mask=d < D)
    elif CONSTANT:
        tl.store(ddecay + here, total, mask=d < D)


class Chunks(NamedTuple):
    """What passes over chunks share: contiguous tensors, grid, and states at borders `[chunks, B, D]`."""

    x: Tensor
    log_decay: Tensor
    ids: Tensor
    tiles: Tiles
    ends: Tensor
    decays: Tensor

    @property
    def grid(self) -> tuple[int, int, int]:
        chunks, batch, channels = self.ends.shape
        return chunks, batch, triton.cdiv(channels, self.tiles.channels)

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.x.shape[1], self.x.shape[2], self.tiles.chunk

    @property
    def settings(self) -> dict[str, int | bool]:
        constant = self.log_decay.dim() == 1
        tiles = self.tiles
        return {
            "CONSTANT": constant, "BLOCK": tiles.channels, "TOKENS": tiles.tokens, "num_warps": tiles.warps,
        }  # fmt: skip


def _chunks(problem: Problem[DiagonalInputs], tiles: Tiles, tokens: int | None = None) -> Chunks:
    """Those of the first `tokens`, of all by default."""
    x, log_decay = problem.inputs
    count = triton.cdiv(x.shape[1] if tokens is None else tokens, tiles.chunk)
    ends, decays = torch.empty(2, count, x.shape[0], x.shape[2], dtype=torch.float32, device=x.device)
    return Chunks(x.contiguous(), log_decay.contiguous(), problem.documents.ids(x.device), tiles, ends, decays)


def carried(ends: Tensor, decays: Tensor, initial: Tensor, *, reverse: bool = False) -> Tensor:
    """Turns `ends` `[chunks, B, …]` into what enters each chunk; what leaves the last one, `[B, …]`."""
    final = torch.empty_like(initial)
    size = initial[0].numel()
    grid = (len(initial), triton.cdiv(size, CARRY))
    carry[grid](ends, decays, initial, final, len(ends), size, REVERSE=reverse, BLOCK=CARRY, num_warps=1)
    return final


def _run(chunks: Chunks, initial: Tensor, out: Tensor, *, add: bool = False) -> Tensor:
    """Every h to `out`, or added to it for x = 0; the final state."""
    x, log_decay, ids, ends, decays = chunks.x, chunks.log_decay, chunks.ids, chunks.ends, chunks.decays
    final = torch.empty_like(initial)
    arguments = (out, ends, decays, final, *chunks.sizes)
    starts = initial
    if len(ends) > 1:
        _forward[chunks.grid](x, log_decay, ids, initial, *arguments, ALONE=True, ADD=add, **chunks.settings)
        carried(ends, decays, initial)
        starts = ends
    _forward[chunks.grid](x, log_decay, ids, starts, *arguments, ALONE=False, ADD=add, **chunks.settings)
    return final


def forward(problem: Problem[DiagonalInputs], initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
    """(every h, final state)."""
    out = problem.new_output()
    return out, _run(_chunks(problem, FORWARD), problem.entering(initial_state), out)


def correct(problem: Problem[DiagonalInputs], out: Tensor, state: Tensor) -> Tensor:
    """Adds e^{a_1 + … + a_t} state to the outputs that the entering state reaches; `out` is contiguous."""
    if problem.reach:
        _run(_chunks(problem, FORWARD, problem.reach), problem.entering(state), out, add=True)
    return out


def _asked(chunks: Chunks, dout: Tensor, dfinal: Tensor) -> Tensor:
    """Fills `ends` with what later tokens ask of each chunk's last h; what the row asks of its initial state."""
    x, log_decay, ids, ends, decays = chunks.x, chunks.log_decay, chunks.ids, chunks.ends, chunks.decays
    unused = ends  # the other variant's arguments
    _backward[chunks.grid](
        dout, log_decay, ids, unused, unused, unused, x, unused, ends, decays, *chunks.sizes, ALONE=True,
        **chunks.settings,
    )  # fmt: skip
    return carried(ends, decays, dfinal, reverse=True)


def summarize_backward(problem: Problem[DiagonalInputs], dout: Tensor, initial_state: Tensor | None = None) -> Tensor:
    """Σ_t e^{a_1 + … + a_t} dout_t `[B, D]` over the tokens that an entering state reaches."""
    if not problem.reach:
        return problem.new_states()
    chunks = _chunks(problem, BACKWARD, problem.reach)
    return problem.entering(_asked(chunks, dout.contiguous(), problem.new_states()))


def backward(
    problem: Problem[DiagonalInputs], dout: Tensor, dfinal_state: Tensor | None, initial_state: Tensor | None
) -> tuple[Tensors, Tensor]:
    """The gradients of x and log_decay, in their types, and of the initial state."""
    dout, log_decay, entering = dout.contiguous(), problem.inputs.log_decay, problem.entering(initial_state)
    states = torch.empty(dout.shape, dtype=torch.float32, device=dout.device)
    _run(_chunks(problem, FORWARD), entering, states)
    chunks = _chunks(problem, BACKWARD)
    dfinal = torch.zeros_like(entering) if dfinal_state is None else dfinal_state.to(entering.dtype).contiguous()
    dinitial = _asked(chunks, dout, dfinal)
    dx = torch.empty_like(chunks.x)
    constant = log_decay.dim() == 1
    ddecay = torch.empty_like(chunks.decays) if constant else torch.empty_like(chunks.log_decay)
    _backward[chunks.grid](
        dout, chunks.log_decay, chunks.ids, states, entering, chunks.ends, dx, ddecay, chunks.ends, chunks.decays,
        *chunks.sizes, ALONE=False, **chunks.settings,
    )  # fmt: skip
    if constant:
        ddecay = ddecay.sum((0, 1), dtype=torch.float64).to(log_decay.dtype)
    return (dx, ddecay), problem.entering(dinitial)


def compilations() -> list[Compilation]:
    """The kernels for bfloat16 inputs and float32 decays, a decay per token and a constant one."""
    sizes = {"T": "i32", "D": "i32", "CHUNK": "i32"}
    states = dict.fromkeys(("ends", "decays"), "*fp32")
    found = [_carry_compilation()]
    for constant in (False, True):
        for alone in (True, False):
            variant = f"{'constant' if constant else 'a token'}, {'alone' if alone else 'whole'}"
            shared = {"log_decay": "*fp32", "ids": "*i32", **states, **sizes}
            forward_types = {**shared, "x": "*bf16", "out": "*bf16", "starts": "*fp32", "final": "*fp32"}
            backward_types = {
                **shared, "dout": "*bf16", "states": "*fp32", "initial": "*fp32", "afters": "*fp32", "dx": "*bf16",
                "ddecay": "*fp32",
            }  # fmt: skip
            for kernel, types, tiles in ((_forward, forward_types, FORWARD), (_backward, backward_types, BACKWARD)):
                constants = {"CONSTANT": constant, "ALONE": alone, "BLOCK": tiles.channels, "TOKENS": tiles.tokens}
                if kernel is _forward:
                    constants["ADD"] = False
                pointers = tuple(name for name, kind in types.items() if kind.startswith("*"))
                found.append(
                    Compilation(kernel, types, constants, (*pointers, "D", "CHUNK"), warps=tiles.warps, variant=variant)
                )
    return found


def _carry_compilation() -> Compilation:
    types = {**dict.fromkeys(("ends", "decays", "initial", "final"), "*fp32"), "N": "i32", "M": "i32"}
    pointers = ("ends", "decays", "initial", "final", "M")
    return Compilation(carry, types, {"REVERSE": False, "BLOCK": CARRY}, pointers, warps=1)
