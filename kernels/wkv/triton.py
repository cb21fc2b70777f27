"""WKV as Triton kernels: a program steps through the tokens of a row for a block of channels; deterministic.

Rows are cut into slabs, a launch each, so that backward holds the states of one slab alone: it runs forward to those
that enter the slabs, and then from right to left forward and backward through each. Within a slab `tokens` are loaded
at a time, so that memory is waited for once. The formulas are those of `chunked.py`.
"""

# Kernels are typed by Triton, when they are compiled, and it has no unpacking of tuples.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportReturnType=false
# ruff: noqa: RUF005, SIM108

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..compilation import Compilation
from ..gated_linear import stable
from ..operation import Tensors
from ..problem import Problem
from . import WKVInputs
from .chunked import entering_states, leaving_gradient, with_scale

LOWEST = tl.constexpr(stable.LOWEST)


class Tiles(NamedTuple):
    """Channels of a program, tokens it loads at a time, tokens of a slab, and its warps."""

    channels: int
    tokens: int
    slab: int
    warps: int


FORWARD = Tiles(32, 8, 2048, 1)
BACKWARD = Tiles(32, 4, 2048, 1)  # of the same slabs


@triton.jit
def _keeps(ids, t, T):
    """Whether token t goes on with the document of the token before it; a row's first one with what enters the row."""
    own = tl.load(ids + t, mask=t < T, other=-1)
    before = tl.load(ids + tl.maximum(t, 1) - 1, mask=t < T, other=-1)
    return (own >= 0) & ((own == before) | (t == 0))


@triton.jit
def _is_real(ids, t, T):
    return tl.load(ids + t, mask=t < T, other=-1) >= 0


@triton.jit
def _load(x, t, stop, D, d):
    """Token t of a row, in float32; 0 from `stop` on."""
    return tl.load(x + tl.cast(t, tl.int64) * D + d, mask=(d < D) & (t < stop), other=0.0).to(tl.float32)


@triton.jit
def _vector(x, D, d, GIVEN: tl.constexpr):
    if GIVEN:
        return tl.load(x + d, mask=d < D, other=0.0).to(tl.float32)
    else:
        return tl.zeros_like(d).to(tl.float32)


@triton.jit
def _forward(
    k, v, log_decay, bonus, ids, entering, out, states, leaving, T, D, first, stop,
    CONSTANT: tl.constexpr, BY_TOKEN: tl.constexpr, BONUS: tl.constexpr, KEEP: tl.constexpr, WRITE: tl.constexpr,
    BLOCK: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Tokens `first` to `stop` from `entering` to `leaving`, `[3, B, D]`. WRITE: outputs. KEEP: the states before each.

    `states` are `[B, stop - first, 3, D]`.
    """
    row, rows = tl.program_id(0), tl.num_programs(0)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    base, size = tl.cast(row, tl.int64) * T * D, tl.cast(rows, tl.int64) * D
    k, v, out, ids = k + base, v + base, out + base, ids + tl.cast(row, tl.int64) * T
    states += tl.cast(row, tl.int64) * (stop - first) * 3 * D
    at = tl.cast(row, tl.int64) * D + d
    n = tl.load(entering + at, mask=d < D, other=0.0)
    w = tl.load(entering + size + at, mask=d < D, other=0.0)
    m = tl.load(entering + 2 * size + at, mask=d < D, other=LOWEST)
    decay, u = _vector(log_decay, D, d, CONSTANT), _vector(bonus, D, d, BONUS)
    for t0 in range(first, stop, TOKENS):
        keys = ()
        values = ()
        decays = ()
        for i in tl.static_range(TOKENS):
            keys = keys + (_load(k, t0 + i, stop, D, d),)
            values = values + (_load(v, t0 + i, stop, D, d),)
            if BY_TOKEN:
                decays = decays + (_load(log_decay + base, t0 + i, stop, D, d),)
            else:
                decays = decays + (decay,)
        for i in tl.static_range(TOKENS):
            t = t0 + i
            keeps, real = _keeps(ids, t, T), _is_real(ids, t, T)
            m0 = tl.where(keeps, m, LOWEST)
            n0 = tl.where(keeps, n, 0.0)
            w0 = tl.where(keeps, w, 0.0)
            if KEEP:
                here = states + tl.cast(t - first, tl.int64) * 3 * D + d
                inside = (d < D) & (t < stop)
                tl.store(here, n0, mask=inside)
                tl.store(here + D, w0, mask=inside)
                tl.store(here + 2 * D, m0, mask=inside)
            if WRITE:
                own = keys[i] + u
                unit = tl.maximum(m0, own)
                p, q = tl.exp(m0 - unit), tl.exp(own - unit)
                result = tl.where(real, (p * n0 + q * values[i]) / (p * w0 + q), 0.0)
                where = out + tl.cast(t, tl.int64) * D + d
                tl.store(where, result.to(out.dtype.element_ty), mask=(d < D) & (t < stop))
            reach = m0 + decays[i]
            scale = tl.maximum(reach, keys[i])
            a, b = tl.exp(reach - scale), tl.exp(keys[i] - scale)
            n = tl.where(t < stop, tl.where(real, a * n0 + b * values[i], 0.0), n)
            w = tl.where(t < stop, tl.where(real, a * w0 + b, 0.0), w)
            m = tl.where(t < stop, tl.where(real, scale, LOWEST), m)
    tl.store(leaving + at, n, mask=d < D)
    tl.store(leaving + size + at, w, mask=d < D)
    tl.store(leaving + 2 * size + at, m, mask=d < D)


@triton.jit
def _backward(
    k, v, log_decay, bonus, ids, states, dout, after, dk, dv, ddecay, totals, before, T, D, first, stop,
    CONSTANT: tl.constexpr, BY_TOKEN: tl.constexpr, BONUS: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """The same tokens from right to left: from `after` to `before`, gradients of the sums `[2, B, D]`.

    What constants get is added to `totals` `[2, B, D]`: the decay, and the bonus.
    """
    row, rows = tl.program_id(0), tl.num_programs(0)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    base, size = tl.cast(row, tl.int64) * T * D, tl.cast(rows, tl.int64) * D
    k, v, dout, dk, dv, ids = k + base, v + base, dout + base, dk + base, dv + base, ids + tl.cast(row, tl.int64) * T
    states += tl.cast(row, tl.int64) * (stop - first) * 3 * D
    at = tl.cast(row, tl.int64) * D + d
    dn = tl.load(after + at, mask=d < D, other=0.0)
    dw = tl.load(after + size + at, mask=d < D, other=0.0)
    by_decay, by_bonus = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    decay, u = _vector(log_decay, D, d, CONSTANT), _vector(bonus, D, d, BONUS)
    blocks = tl.cdiv(stop - first, TOKENS)
    for block in range(blocks):
        t0 = first + (blocks - 1 - block) * TOKENS
        keys = ()
        values = ()
        decays = ()
        given = ()
        sums = ()
        weights = ()
        scales = ()
        for i in tl.static_range(TOKENS):
            t = t0 + i
            keys = keys + (_load(k, t, stop, D, d),)
            values = values + (_load(v, t, stop, D, d),)
            given = given + (_load(dout, t, stop, D, d),)
            if BY_TOKEN:
                decays = decays + (_load(log_decay + base, t, stop, D, d),)
            else:
                decays = decays + (decay,)
            sums = sums + (_load(states, (t - first) * 3, (stop - first) * 3, D, d),)
            weights = weights + (_load(states, (t - first) * 3 + 1, (stop - first) * 3, D, d),)
            scales = scales + (_load(states, (t - first) * 3 + 2, (stop - first) * 3, D, d),)
        for i in tl.static_range(TOKENS - 1, -1, -1):
            t = t0 + i
            keeps, real, inside = _keeps(ids, t, T), _is_real(ids, t, T), t < stop
            own = keys[i] + u
            unit = tl.maximum(scales[i], own)
            p, q = tl.where(keeps, tl.exp(scales[i] - unit), 0.0), tl.exp(own - unit)
            weight = p * weights[i] + q
            result = (p * sums[i] + q * values[i]) / weight
            reach = scales[i] + decays[i]
            scale = tl.maximum(reach, keys[i])
            a = tl.where(keeps, tl.exp(reach - scale), 0.0)
            b = tl.where(real, tl.exp(keys[i] - scale), 0.0)
            g = tl.where(real, given[i] / weight, 0.0)
            from_bonus = q * g * (values[i] - result)
            from_decay = a * (sums[i] * dn + weights[i] * dw)
            where, mask = tl.cast(t, tl.int64) * D + d, (d < D) & inside
            tl.store(dv + where, (q * g + b * dn).to(dv.dtype.element_ty), mask=mask)
            dkey = from_bonus + b * (values[i] * dn + dw)
            tl.store(dk + where, dkey.to(dk.dtype.element_ty), mask=mask)
            if BY_TOKEN:
                tl.store(ddecay + base + where, from_decay.to(ddecay.dtype.element_ty), mask=mask)
            by_decay += tl.where(inside, from_decay, 0.0)
            by_bonus += tl.where(inside, from_bonus, 0.0)
            dn = tl.where(inside, a * dn + p * g, dn)
            dw = tl.where(inside, a * dw - p * g * result, dw)
    tl.store(before + at, dn, mask=d < D)
    tl.store(before + size + at, dw, mask=d < D)
    tl.store(totals + at, tl.load(totals + at, mask=d < D, other=0.0) + by_decay, mask=d < D)
    tl.store(totals + size + at, tl.load(totals + size + at, mask=d < D, other=0.0) + by_bonus, mask=d < D)


class Call:
    """What the launches of a problem share: contiguous inputs, and a vector where one is left out."""

    def __init__(self, problem: Problem[WKVInputs]) -> None:
        k, v, log_decay, bonus = problem.inputs
        self.k, self.v, self.ids = k.contiguous(), v.contiguous(), problem.documents.ids(k.device)
        self.by_token = log_decay is not None and log_decay.dim() == 3
        self.log_decay = k if log_decay is None else log_decay.contiguous()
        self.bonus = k if bonus is None else bonus.contiguous()
        self.settings = {
            "CONSTANT": log_decay is not None and not self.by_token, "BY_TOKEN": self.by_token,
            "BONUS": bonus is not None,
        }  # fmt: skip
        self.batch, self.length, self.channels = k.shape

    def slabs(self, length: int | None = None) -> list[tuple[int, int]]:
        length = self.length if length is None else length
        return [(start, min(start + FORWARD.slab, length)) for start in range(0, length, FORWARD.slab)]

    def forward(
        self, slab: tuple[int, int], entering: Tensor, out: Tensor | None, states: Tensor | None = None
    ) -> Tensor:
        """The states `[3, B, D]` after a slab; to `out` its outputs, and to `states` those before each token."""
        leaving = torch.empty_like(entering)
        _forward[self.batch, triton.cdiv(self.channels, FORWARD.channels)](
            self.k, self.v, self.log_decay, self.bonus, self.ids, entering, leaving if out is None else out,
            leaving if states is None else states, leaving, self.length, self.channels, *slab, **self.settings,
            KEEP=states is not None, WRITE=out is not None, BLOCK=FORWARD.channels, TOKENS=FORWARD.tokens,
            num_warps=FORWARD.warps,
        )  # fmt: skip
        return leaving

    def backward(
        self, slab: tuple[int, int], states: Tensor, dout: Tensor, after: Tensor, results: tuple[Tensor, ...]
    ) -> Tensor:
        """The gradients of the sums before a slab, `[2, B, D]`; those of its inputs to `results`."""
        before = torch.empty_like(after)
        _backward[self.batch, triton.cdiv(self.channels, BACKWARD.channels)](
            self.k, self.v, self.log_decay, self.bonus, self.ids, states, dout, after, *results, before, self.length,
            self.channels, *slab, **self.settings, BLOCK=BACKWARD.channels, TOKENS=BACKWARD.tokens,
            num_warps=BACKWARD.warps,
        )  # fmt: skip
        return before


def _run(problem: Problem[WKVInputs], state: Tensor | None, out: Tensor, length: int | None = None) -> Tensor:
    call, entering = Call(problem), entering_states(problem, state)
    for slab in call.slabs(length):
        entering = call.forward(slab, entering, out)
    return entering


def forward(problem: Problem[WKVInputs], initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
    """(output, final state)."""
    out = problem.new_output()
    return out, _run(problem, initial_state, out).permute(1, 2, 0).contiguous()


def correct(problem: Problem[WKVInputs], out: Tensor, state: Tensor) -> Tensor:
    """Computes the outputs that the entering state reaches again, with it; in place, `out` is contiguous."""
    _run(problem, state, out, problem.reach)
    return out


def summarize_backward(problem: Problem[WKVInputs], dout: Tensor, initial_state: Tensor | None) -> Tensor:
    """The gradient of the initial state that comes from the outputs alone."""
    return backward(problem, dout, None, initial_state)[1]


def backward(
    problem: Problem[WKVInputs], dout: Tensor, dfinal_state: Tensor | None, initial_state: Tensor | None
) -> tuple[Tensors, Tensor]:
    """The gradients of all inputs, in their types, and of the initial state, which says its scale as it does."""
    call, state, entering, dout = Call(problem), entering_states(problem, initial_state), [], dout.contiguous()
    slabs, (k, _, log_decay, bonus) = call.slabs(), problem.inputs
    for slab in slabs:
        entering.append(state)
        state = call.forward(slab, state, None)
    carry = leaving_gradient(problem, dfinal_state, state).contiguous()
    dk, dv, totals = torch.empty_like(call.k), torch.empty_like(call.v), torch.zeros_like(carry)
    ddecay = torch.empty_like(call.log_decay) if call.by_token else totals
    for slab, before in zip(reversed(slabs), reversed(entering), strict=True):
        states = torch.empty(call.batch, slab[1] - slab[0], 3, call.channels, dtype=carry.dtype, device=k.device)
        call.forward(slab, before, None, states)
        carry = call.backward(slab, states, dout, carry, (dk, dv, ddecay, totals))
    by_decay, by_bonus = totals.sum(1, dtype=torch.float64)
    if not call.by_token:
        ddecay = None if log_decay is None else by_decay.to(log_decay.dtype)
    dinitial = with_scale(carry, initial_state)
    return WKVInputs(dk, dv, ddecay, None if bonus is None else by_bonus.to(bonus.dtype)), dinitial


def compilations() -> list[Compilation]:
    """The kernels for bfloat16 keys and values, with the constant float32 decays and bonus of RWKV-4, and without."""
    sizes = dict.fromkeys(("T", "D", "first", "stop"), "i32")
    inputs: dict[str, str] = {"k": "*bf16", "v": "*bf16", "log_decay": "*fp32", "bonus": "*fp32", "ids": "*i32"}
    found = []
    for given in (True, False):
        settings: dict[str, Any] = {"CONSTANT": given, "BY_TOKEN": False, "BONUS": given}
        name = "RWKV-4" if given else "AFT-simple"
        for kept in (False, True):
            types = {**inputs, "entering": "*fp32", "out": "*bf16", "states": "*fp32", "leaving": "*fp32", **sizes}
            constants = {**settings, "KEEP": kept, "WRITE": not kept, "BLOCK": FORWARD.channels}
            constants["TOKENS"] = FORWARD.tokens
            found.append(_compilation(_forward, types, constants, FORWARD, f"{name}{', keeping' if kept else ''}"))
        gradients = {"dout": "*bf16", "dk": "*bf16", "dv": "*bf16"}
        states = dict.fromkeys(("states", "after", "ddecay", "totals", "before"), "*fp32")
        constants = {**settings, "BLOCK": BACKWARD.channels, "TOKENS": BACKWARD.tokens}
        found.append(_compilation(_backward, {**inputs, **gradients, **states, **sizes}, constants, BACKWARD, name))
    return found


def _compilation(kernel: Any, types: dict[str, str], constants: dict[str, Any], tiles: Tiles, name: str) -> Compilation:
    pointers = tuple(each for each, kind in types.items() if kind.startswith("*"))
    return Compilation(kernel, types, constants, (*pointers, "D"), warps=tiles.warps, variant=name)
