"""sLSTM by a loop over tokens with as few operations as it takes; what is no part of the loop is done in chunks.

Each step is one batched product over heads and a few operations on `[H, B, K]`. Backward runs forward again, keeps what
the gates became and the cells, and then goes back: of a token, only what the gradient of h passes through is a step.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..documents import Documents
from ..gated_linear.stable import LOWEST, going_on
from ..problem import Problem
from . import GATES, SLSTMInputs, usable

CHUNK = 256  # tokens of which backward holds all factors


class _Trace(NamedTuple):
    """What backward needs of a run, `[T, H, B, …]`: raw gates with the recurrence, and h, c, n, m before each token."""

    gates: Tensor
    cells: Tensor  # [T, 4, H, B, K]


def forward(problem: Problem[SLSTMInputs], initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
    """(out, final state)."""
    out_THBK, final = _run(problem, initial_state, None)
    out = out_THBK.permute(2, 0, 1, 3)
    if problem.documents.has_padding:
        real = problem.documents.ids(problem.device) >= 0
        out = out * real[..., None, None]
        final = final * real[:, -1, None, None, None]
    return out.to(problem.dtype if problem.exact else problem.inputs.gates.dtype).contiguous(), final


def backward(
    problem: Problem[SLSTMInputs], dout: Tensor, dfinal_state: Tensor | None, initial_state: Tensor | None
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """The gradients of the inputs and of the initial state."""
    gates, recurrent = problem.inputs
    trace = _empty_trace(problem)
    _run(problem, initial_state, trace)
    weights_HKR = _matrices(problem)
    dout_THBK = dout.to(problem.dtype)
    if problem.documents.has_padding:
        dout_THBK = dout_THBK * (problem.documents.ids(problem.device) >= 0)[..., None, None]
    dout_THBK = dout_THBK.permute(1, 2, 0, 3)
    dh, dc, dn, _ = (x.transpose(0, 1).contiguous() for x in problem.leaving(dfinal_state).unbind(2))
    dgates_THBR = torch.empty_like(trace.gates)
    breaks, keep = problem.documents.derive(_breaks), _goes_on(problem)
    for start in range((len(trace.gates) - 1) // CHUNK * CHUNK, -1, -CHUNK):
        chunk = slice(start, min(start + CHUNK, len(trace.gates)))
        through, entering, leaving, forget = _factors(trace, chunk, keep)
        for t in reversed(range(start, chunk.stop)):
            at = t - start
            dh = dh + dout_THBK[t]
            dc = torch.addcmul(dc, dh, leaving[0, at])
            dn = torch.addcmul(dn, dh, leaving[1, at])
            dgates = dgates_THBR[t].unflatten(-1, (GATES, -1))
            torch.mul(dh, leaving[2, at], out=dgates[..., 3, :])
            torch.mul(dc.unsqueeze(-2), through[at], out=dgates[..., :3, :])
            dgates[..., :2, :].addcmul_(dn.unsqueeze(-2), entering[at])
            dh = torch.bmm(dgates_THBR[t], weights_HKR.mT)
            dc, dn = dc * forget[at], dn * forget[at]
            if breaks[t]:
                dh, dc, dn = (x * keep[t] for x in (dh, dc, dn))
    before = trace.cells[:, 0].permute(1, 0, 2, 3).flatten(1, 2)  # h [H, T B, K]
    dweights = torch.bmm(before.mT, dgates_THBR.permute(1, 0, 2, 3).flatten(1, 2)).flatten(1)
    dinitial = torch.stack([dh, dc, dn, torch.zeros_like(dh)], dim=2).transpose(0, 1)
    dgates = dgates_THBR.permute(2, 0, 1, 3).reshape(gates.shape)
    return (dgates.to(gates.dtype), dweights.to(recurrent.dtype)), dinitial


def _run(problem: Problem[SLSTMInputs], initial_state: Tensor | None, trace: _Trace | None) -> tuple[Tensor, Tensor]:
    """Every h `[T, H, B, K]`, of padding too, and the final state `[B, H, 4, K]`; fills the trace."""
    gates_THBR = problem.inputs.gates.to(problem.dtype).permute(1, 2, 0, 3, 4).flatten(3)
    weights_HKR, breaks, keep = _matrices(problem), problem.documents.derive(_breaks), _goes_on(problem)
    h, c, n, m = (x.transpose(0, 1).contiguous() for x in usable(problem.entering(initial_state)))
    outputs = gates_THBR.new_empty(*gates_THBR.shape[:3], h.shape[-1])
    for t in range(len(gates_THBR)):
        if breaks[t]:
            h, c, n = (x * keep[t] for x in (h, c, n))
            m = torch.where(keep[t] > 0, m, LOWEST)
        raw = torch.baddbmm(gates_THBR[t], h, weights_HKR)
        if trace is not None:
            trace.gates[t] = raw
            torch.stack([h, c, n, m], out=trace.cells[t])
        i, f, z, o = raw.chunk(GATES, dim=-1)
        decayed = F.logsigmoid(f).add_(m)
        m = torch.maximum(decayed, i)
        forget, enter = decayed.sub_(m).exp_(), (i - m).exp_()
        c = torch.addcmul(forget * c, enter, torch.tanh(z))
        n = torch.addcmul(enter, forget, n)
        h = torch.mul(torch.sigmoid(o), c).div_(n)
        outputs[t] = h
    return outputs, torch.stack([h, c, n, m], dim=2).transpose(0, 1).contiguous()


def _factors(trace: _Trace, chunk: slice, keep: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What gradients are multiplied by, for the tokens of a chunk.

    through, entering: dc and dn to the raw input gate, forget gate and cell input, `[t, H, B, 3, K]` and `[…, 2, K]`.
    leaving: dh to dc, dn and the raw output gate, `[3, t, H, B, K]`. forget: dc and dn to those of the token before.
    """
    i, f, z, o = trace.gates[chunk].chunk(GATES, dim=-1)
    _, c, n, m = trace.cells[chunk].unbind(1)
    decayed = m + F.logsigmoid(f)
    scale = torch.maximum(decayed, i)
    forget, enter = (decayed - scale).exp(), (i - scale).exp()
    z, o = torch.tanh(z), torch.sigmoid(o)
    after_c, after_n = forget * c + enter * z, forget * n + enter
    closing = forget * torch.sigmoid(-f)
    through = torch.stack([enter * z, closing * c, enter * (1 - z * z)], dim=-2)
    entering = torch.stack([enter, closing * n], dim=-2)
    ratio = after_c / after_n
    leaving = torch.stack([o / after_n, -o * ratio / after_n, ratio * o * (1 - o)])
    return through, entering, leaving, forget


def _empty_trace(problem: Problem[SLSTMInputs]) -> _Trace:
    batch, length, heads, gates, size = problem.inputs.gates.shape
    shapes = (length, heads, batch, gates * size), (length, GATES, heads, batch, size)
    return _Trace(*(torch.empty(shape, dtype=problem.dtype, device=problem.device) for shape in shapes))


def _matrices(problem: Problem[SLSTMInputs]) -> Tensor:
    """The recurrent matrices `[H, K, 4 K]`."""
    return problem.inputs.recurrent.to(problem.dtype).unflatten(1, (problem.inputs.gates.shape[-1], -1))


def _goes_on(problem: Problem[SLSTMInputs]) -> Tensor:
    """1 where a token continues the document before it, else 0: `[T, B, 1]`, in the type of the accumulators."""
    return problem.documents.on(problem.device, _continuing).to(problem.dtype)


def _continuing(documents: Documents) -> Tensor:
    return documents.derive(going_on).T.unsqueeze(-1)


def _breaks(documents: Documents) -> list[bool]:
    """For each token, whether it does not continue the document before it in some row."""
    return (~_continuing(documents)).flatten(1).any(1).tolist()
