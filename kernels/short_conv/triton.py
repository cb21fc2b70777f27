"""The short convolution as Triton kernels: taps read neighbouring rows, sums are float32, and every run is the same.

The gradient of the weights is summed over stretches of a row by one program each, and the stretches by torch.
"""

# Kernels are typed by Triton, when they are compiled.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..compilation import Compilation
from ..documents import Documents
from ..operation import Function

TOKENS, CHANNELS, WARPS = 16, 128, 4
STRETCH = 1024  # tokens whose gradients of the weights one program sums


@triton.jit
def _summed(
    x, history, weight, bias, row, first, c, reach, tokens, channels,
    TAPS: tl.constexpr, SHIFT: tl.constexpr, BIAS: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """float32 [T, channels]: the convolution of tokens first..first+T before the activation; the row one before with
    SHIFT. `reach` is how far back each token sees.
    """
    total = tl.zeros([T, c.shape[0]], tl.float32)
    for back in tl.static_range(TAPS):
        if not SHIFT or back == 1:
            earlier = _earlier(x, history, row, first, back, c, reach, channels, tokens, TAPS, T)
            if SHIFT:
                total += earlier
            else:
                tap = tl.load(weight + c * TAPS + (TAPS - 1 - back), mask=c < channels, other=0.0)
                total += earlier * tap.to(tl.float32)[None, :]
    if BIAS:
        total += tl.load(bias + c, mask=c < channels, other=0.0).to(tl.float32)[None, :]
    return total


@triton.jit
def _earlier(
    x, history, row, first, back: tl.constexpr, c, reach, channels, tokens, TAPS: tl.constexpr, T: tl.constexpr
):
    """float32: the rows `back` before tokens first..first+T, from the history those before the row; 0 out of reach."""
    n = tl.arange(0, T) - back
    wanted = (reach >= back)[:, None] & (c < channels)[None, :]
    here = x + (row * tokens + first) * channels + (n[:, None] * channels + c[None, :])
    value = tl.load(here, mask=wanted & (first + n >= 0)[:, None], other=0.0).to(tl.float32)
    if back > 0:
        before = history + (row * (TAPS - 1) + first + (TAPS - 1)) * channels + (n[:, None] * channels + c[None, :])
        value += tl.load(before, mask=wanted & (first + n < 0)[:, None], other=0.0).to(tl.float32)
    return value


@triton.jit
def _reach(ids, positions, row, first, tokens, T: tl.constexpr):
    """How many tokens before each of first..first+T are of its document; −1 for padding and for what is not held."""
    t = first + tl.arange(0, T)
    held = (t >= 0) & (t < tokens)
    document = tl.load(ids + row * tokens + t, mask=held, other=-1)
    position = tl.load(positions + row * tokens + t, mask=held, other=-1)
    return tl.where(document < 0, -1, position)


@triton.jit
def _forward(
    x, history, weight, bias, ids, positions, out, tokens, channels, blocks,
    TAPS: tl.constexpr, SHIFT: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr,
    T: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    row = tl.cast(tl.program_id(0) // blocks, tl.int64)
    first = tl.cast(tl.program_id(0) % blocks, tl.int64) * T
    c = tl.program_id(1) * C + tl.arange(0, C)
    reach = _reach(ids, positions, row, first, tokens, T)
    total = _summed(x, history, weight, bias, row, first, c, reach, tokens, channels, TAPS, SHIFT, BIAS, T)
    if SILU:
        total = total * tl.sigmoid(total)
    total = tl.where((reach >= 0)[:, None], total, 0.0)
    n = tl.arange(0, T)
    to = out + (row * tokens + first) * channels + (n[:, None] * channels + c[None, :])
    tl.store(to, total, mask=(first + n < tokens)[:, None] & (c < channels)[None, :])


@triton.jit
def _weights(
    dout, x, history, weight, bias, ids, positions, dsum, dweight, dbias, tokens, channels, blocks,
    TAPS: tl.constexpr, PADDED: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr,
    T: tl.constexpr, C: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """What one stretch of STEPS·T tokens gives to dweight `[TAPS, D]` and dbias; dsum, where SILU has to be undone."""
    part = tl.cast(tl.program_id(0), tl.int64)
    row = part // blocks
    c = tl.program_id(1) * C + tl.arange(0, C)
    inside = c < channels
    n = tl.arange(0, T)
    tap = tl.arange(0, PADDED)
    taps_total = tl.zeros([PADDED, C], tl.float32)
    bias_total = tl.zeros([C], tl.float32)
    stretch = (part % blocks) * (STEPS * T)
    for start in range(stretch, tl.minimum(stretch + STEPS * T, tokens), T):
        first = tl.cast(start, tl.int64)
        reach = _reach(ids, positions, row, first, tokens, T)
        at = n[:, None] * channels + c[None, :]
        base = (row * tokens + first) * channels
        given = tl.load(dout + base + at, mask=(reach >= 0)[:, None] & inside[None, :], other=0.0).to(tl.float32)
        if SILU:
            total = _summed(x, history, weight, bias, row, first, c, reach, tokens, channels, TAPS, False, BIAS, T)
            gate = tl.sigmoid(total)
            given = given * gate * (1.0 + total * (1.0 - gate))
            tl.store(dsum + base + at, given, mask=(first + n < tokens)[:, None] & inside[None, :])
        bias_total += tl.sum(given, 0)
        for back in tl.static_range(TAPS):
            earlier = _earlier(x, history, row, first, back, c, reach, channels, tokens, TAPS, T)
            found = tl.sum(given * earlier, 0)
            taps_total += tl.where((tap == TAPS - 1 - back)[:, None], found[None, :], 0.0)
    to = dweight + part * TAPS * channels + (tap[:, None] * channels + c[None, :])
    tl.store(to, taps_total, mask=(tap < TAPS)[:, None] & inside[None, :])
    tl.store(dbias + part * channels + c, bias_total, mask=inside)


@triton.jit
def _rows(
    dsum, weight, ids, positions, dx, dhistory, tokens, channels, blocks,
    TAPS: tl.constexpr, SHIFT: tl.constexpr, T: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """dx, and dhistory as the rows before it: each row from the tokens that its taps reach."""
    row = tl.cast(tl.program_id(0) // blocks, tl.int64)
    first = tl.cast(tl.program_id(0) % blocks, tl.int64) * T - (TAPS - 1)
    n = tl.arange(0, T)
    c = tl.program_id(1) * C + tl.arange(0, C)
    total = tl.zeros([T, C], tl.float32)
    for back in tl.static_range(TAPS):
        if not SHIFT or back == 1:
            wanted = (_reach(ids, positions, row, first + back, tokens, T) >= back)[:, None] & (c < channels)[None, :]
            at = dsum + (row * tokens + first + back) * channels + (n[:, None] * channels + c[None, :])
            given = tl.load(at, mask=wanted, other=0.0).to(tl.float32)
            if SHIFT:
                total += given
            else:
                tap = tl.load(weight + c * TAPS + (TAPS - 1 - back), mask=c < channels, other=0.0)
                total += given * tap.to(tl.float32)[None, :]
    inside = (c < channels)[None, :]
    t = first + n
    at = n[:, None] * channels + c[None, :]
    tl.store(dx + (row * tokens + first) * channels + at, total, mask=((t >= 0) & (t < tokens))[:, None] & inside)
    if TAPS > 1:
        before = dhistory + (row * (TAPS - 1) + first + (TAPS - 1)) * channels + at
        tl.store(before, total, mask=(t < 0)[:, None] & inside)


def short_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, documents: Documents, history: Tensor, activation: str | None
) -> Tensor:
    """See the package's `short_conv`; `history` is always a tensor, zero where there is none."""
    return _Convolve.call(x, weight, bias, history, documents, activation)


def token_shift(x: Tensor, documents: Documents, history: Tensor) -> Tensor:
    """See the package's `token_shift`."""
    return _Convolve.call(x, None, None, history, documents, None)


class _Convolve(Function):
    """The convolution, or where there is no weight the shift by one token."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        history: Tensor,
        documents: Documents,
        activation: str | None,
    ) -> Tensor:
        x, history = x.contiguous(), history.contiguous()
        weight = None if weight is None else weight.contiguous()
        ctx.save_for_backward(x, weight, bias, history)
        ctx.documents, ctx.silu = documents, activation == "silu"
        batch, tokens, channels = x.shape
        out = torch.empty_like(x)
        blocks = triton.cdiv(tokens, TOKENS)
        with torch.cuda.device_of(x):
            _forward[(batch * blocks, triton.cdiv(channels, CHANNELS))](
                x, history, x if weight is None else weight, x if bias is None else bias.contiguous(),
                documents.ids(x.device), documents.positions(x.device), out, tokens, channels, blocks,
                TAPS=_taps(weight), SHIFT=weight is None, BIAS=bias is not None, SILU=ctx.silu,
                T=TOKENS, C=CHANNELS, num_warps=WARPS,
            )  # fmt: skip
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, history = ctx.saved_tensors
        dout = dout.contiguous()
        with torch.cuda.device_of(x):
            dsum, dweight, dbias = dout, None, None
            if weight is not None and (ctx.silu or ctx.needs_input_grad[1] or ctx.needs_input_grad[2]):
                dsum, dweight, dbias = _of_weights(dout, x, weight, bias, history, ctx.documents, ctx.silu)
            dx, dhistory = _of_rows(dsum, x, weight, history, ctx.documents)
        return dx, dweight, dbias, dhistory, None, None


def _taps(weight: Tensor | None) -> int:
    return 2 if weight is None else weight.shape[1]


def _of_weights(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, history: Tensor, documents: Documents, silu: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of the activation's input, of the weights and of the bias."""
    batch, tokens, channels = x.shape
    parts = -(-tokens // STRETCH)
    dsum = torch.empty_like(x, dtype=torch.float32) if silu else dout
    dweight = torch.empty(batch * parts, weight.shape[1], channels, dtype=torch.float32, device=x.device)
    dbias = torch.empty(batch * parts, channels, dtype=torch.float32, device=x.device)
    _weights[(batch * parts, triton.cdiv(channels, CHANNELS))](
        dout, x, history, weight, x if bias is None else bias.contiguous(),
        documents.ids(x.device), documents.positions(x.device), dsum, dweight, dbias, tokens, channels, parts,
        TAPS=weight.shape[1], PADDED=triton.next_power_of_2(weight.shape[1]), BIAS=bias is not None, SILU=silu,
        T=TOKENS, C=CHANNELS, STEPS=STRETCH // TOKENS, num_warps=2 * WARPS,
    )  # fmt: skip
    return dsum, dweight.sum(0).T.to(weight.dtype), None if bias is None else dbias.sum(0).to(bias.dtype)


def _of_rows(
    dsum: Tensor, x: Tensor, weight: Tensor | None, history: Tensor, documents: Documents
) -> tuple[Tensor, Tensor]:
    batch, tokens, channels = x.shape
    dx, dhistory = torch.empty_like(x), torch.empty_like(history)
    taps = _taps(weight)
    blocks = triton.cdiv(tokens + taps - 1, TOKENS)
    _rows[(batch * blocks, triton.cdiv(channels, CHANNELS))](
        dsum, x if weight is None else weight, documents.ids(x.device), documents.positions(x.device), dx, dhistory,
        tokens, channels, blocks, TAPS=taps, SHIFT=weight is None, T=TOKENS, C=CHANNELS, num_warps=WARPS,
    )  # fmt: skip
    return dx, dhistory


def compilations() -> list[Compilation]:
    """The kernels with four taps in bfloat16, SiLU and a bias, and the shift by one token."""
    result = []
    for kernel, shift in ((_forward, False), (_weights, False), (_rows, False), (_forward, True), (_rows, True)):
        values = {"TAPS": 2 if shift else 4, "SHIFT": shift, "BIAS": not shift, "SILU": not shift}
        values |= {"PADDED": 4, "T": TOKENS, "C": CHANNELS, "STEPS": STRETCH // TOKENS}
        constants = {name: value for name, value in values.items() if name in kernel.arg_names}
        signature = {name: "*bf16" for name in kernel.arg_names if name not in constants}
        signature |= dict.fromkeys(("tokens", "channels", "blocks"), "i32")
        signature |= dict.fromkeys(("ids", "positions"), "*i32")
        if kernel is _weights:
            signature |= dict.fromkeys(("dsum", "dweight", "dbias"), "*fp32")
        elif kernel is _rows and not shift:
            signature["dsum"] = "*fp32"
        divisible = tuple(name for name in signature if name != "blocks")
        warps = 2 * WARPS if kernel is _weights else WARPS
        result.append(
            Compilation(kernel, signature, constants, divisible, warps, 2, variant="shift" if shift else "4 taps")
        )
    return result
