"""The diagonal state space model in chunks: products of matrices, and one step of the states per chunk.

Every document begins a chunk, so that all chunks share one set of matrices per head. With λ = e^{a + iθ}, a chunk of C
tokens x_j and the state h before it,

    y_i = Σ_{j ≤ i} K_{i−j} x_j + Σ_n Re(c λ^{i+1} h)          K_s = Σ_n Re(c λ^s)
    h' = λ^C h + Σ_j λ^{C−1−j} x_j

The end of a document leaves the rest of its chunk empty. The state after a row's last token, which may be in the middle
of a chunk, is computed from that chunk moved to the right. All is differentiable: backward is autograd's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..documents import Documents, expanded
from ..operation import recording
from ..problem import Problem
from . import CHUNK, StateSpaceInputs, as_pairs, powers


class Places(NamedTuple):
    """Where the tokens of rows lie in chunks. Tokens are numbered in their row; T stands for an empty place.

    take: int64 `[B, N + 1, C]`, the tokens of each chunk, and last of the row's last one moved to the right.
    place: int64 `[B, T]`, the place of each token in the row's N * C; N * C for padding.
    goes_on: bool `[B, N]`, whether a chunk goes on with the document of the chunk before it.
    last, rest: int64 `[B]`, the row's last chunk and its number of tokens.    ends: bool `[B]`, whether the row's last
        place holds a token.
    """

    take: Tensor
    place: Tensor
    goes_on: Tensor
    last: Tensor
    rest: Tensor
    ends: Tensor


def forward(problem: Problem[StateSpaceInputs], initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
    """(out, final state)."""
    out, final = _run(problem, problem.inputs.x, initial_state)
    return out if problem.exact else out.to(problem.inputs.x.dtype), final


def correct(problem: Problem[StateSpaceInputs], out: Tensor, state: Tensor) -> Tensor:
    """Adds to `out` what the entering state contributes."""
    return out.add_(_run(problem, None, state)[0])


def summarize_backward(problem: Problem[StateSpaceInputs], dout: Tensor, initial_state: Tensor | None) -> Tensor:
    """The gradient of the entering state, of which the outputs are linear."""
    with recording():
        state = problem.new_states().requires_grad_()
        out = _run(problem, None, state)[0]
        return torch.autograd.grad(out, state, dout.to(out.dtype))[0]


def _run(problem: Problem[StateSpaceInputs], x: Tensor | None, initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
    """Outputs in the type of the accumulators, and final states; without x of the entering state alone."""
    dtype, sizes = problem.dtype, problem.sizes
    chunk = min(CHUNK, 1 << (sizes["T"] - 1).bit_length())
    at = Places(*problem.documents.on(problem.device, _places, chunk))
    own = None if x is None else _by_head(x.to(dtype), at)  # [H, C, B, N + 1, P]
    _, log_decay, angle, *coefficients = problem.inputs
    steps = torch.arange(chunk + 1, device=problem.device)
    real, imaginary = powers(log_decay, angle, steps, dtype)  # [H, N, C + 1]
    c_real, c_imaginary = (part.to(dtype).unsqueeze(-1) for part in coefficients)
    read_real = c_real * real - c_imaginary * imaginary  # what is read of a state's real part after so many steps
    read_imaginary = -c_real * imaginary - c_imaginary * real
    local = None
    if own is not None:
        write = torch.cat([real[..., :-1].flip(-1), imaginary[..., :-1].flip(-1)], dim=1)  # [H, 2 N, C]
        local = (write @ own.flatten(2)).view(*write.shape[:2], *own.shape[2:])
    entering, final = _states(problem, at, local, (real[..., -1], imaginary[..., -1]), initial_state)
    read = torch.cat([read_real[..., 1:], read_imaginary[..., 1:]], dim=1).mT  # [H, C, 2 N]
    out = read @ entering.flatten(2)
    if own is not None:
        out = out + _toeplitz(read_real[..., :-1].sum(1)) @ own[:, :, :, :-1].flatten(2)
    out = out.view(*read.shape[:2], *entering.shape[2:])  # [H, C, B, N, P]
    return _by_token(out, at), final


def _by_head(x: Tensor, at: Places) -> Tensor:
    """`[B, T, H, P]` to `[H, C, B, N + 1, P]`, zeros at empty places."""
    batch, length, heads, channels = x.shape
    padded = torch.cat([x, x.new_zeros(batch, 1, heads, channels)], dim=1).flatten(0, 1)
    rows = torch.arange(batch, device=x.device)[:, None, None] * (length + 1)
    taken = padded.index_select(0, (at.take + rows).flatten()).view(*at.take.shape, heads, channels)
    return taken.permute(3, 2, 0, 1, 4).contiguous()


def _by_token(out: Tensor, at: Places) -> Tensor:
    """`[H, C, B, N, P]` to `[B, T, H, P]`, 0 for padding."""
    heads, _, batch, _, channels = out.shape
    rows = out.permute(2, 3, 1, 0, 4).flatten(1, 2)
    padded = torch.cat([rows, rows.new_zeros(batch, 1, heads, channels)], dim=1)
    offsets = torch.arange(batch, device=out.device)[:, None] * padded.shape[1]
    return padded.flatten(0, 1).index_select(0, (at.place + offsets).flatten()).view(*at.place.shape, heads, channels)


def _toeplitz(kernel: Tensor) -> Tensor:
    """`[H, C]` to the matrices `[H, C, C]` of the causal convolution with it."""
    size = kernel.shape[1]
    place = torch.arange(size, device=kernel.device)
    padded = torch.cat([kernel.new_zeros(kernel.shape[0], size - 1), kernel], dim=1)
    return padded[:, place[:, None] - place + size - 1]


def _states(
    problem: Problem[StateSpaceInputs],
    at: Places,
    local: Tensor | None,
    step: tuple[Tensor, Tensor],
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The states before chunks `[H, 2 N, B, chunks, P]`, and those after rows' last tokens `[B, H, N, P, 2]`.

    local: `[H, 2 N, B, chunks + 1, P]`, what each chunk adds to the state by its end. step: λ^C.
    """
    step_real, step_imaginary = (part[..., None, None] for part in step)  # [H, N, 1, 1]
    h_real, h_imaginary = problem.entering(initial_state).permute(4, 1, 2, 0, 3)  # [H, N, B, P]
    added = None if local is None else local.unflatten(1, (2, -1)).permute(4, 1, 0, 2, 3, 5)  # [chunks, 2, H, N, B, P]
    goes_on = at.goes_on.to(problem.dtype).mT[:, None, None, :, None]
    before = []
    for number in range(at.goes_on.shape[1]):
        if number:
            h_real, h_imaginary = (
                step_real * h_real - step_imaginary * h_imaginary,
                step_real * h_imaginary + step_imaginary * h_real,
            )
            if added is not None:
                h_real, h_imaginary = h_real + added[number - 1, 0], h_imaginary + added[number - 1, 1]
            h_real, h_imaginary = h_real * goes_on[number], h_imaginary * goes_on[number]
        before.append(torch.cat([h_real, h_imaginary], dim=1))
    entering = torch.stack(before, dim=3)  # [H, 2 N, B, chunks, P]
    last = entering.gather(3, at.last[None, None, :, None, None].expand(*entering.shape[:3], 1, entering.shape[4]))
    h_real, h_imaginary = last.squeeze(3).chunk(2, dim=1)
    rest_real, rest_imaginary = (
        part.unsqueeze(-1) for part in powers(*problem.inputs[1:3], at.rest, problem.dtype)
    )  # [H, N, B, 1]
    final_real = rest_real * h_real - rest_imaginary * h_imaginary
    final_imaginary = rest_real * h_imaginary + rest_imaginary * h_real
    if added is not None:
        final_real, final_imaginary = final_real + added[-1, 0], final_imaginary + added[-1, 1]
    final = as_pairs(final_real, final_imaginary).permute(2, 0, 1, 3, 4)
    return entering, torch.where(at.ends[:, None, None, None, None], final, 0.0).contiguous()


def _places(documents: Documents, chunk: int) -> Places:
    """See `Places`; `N` is the most chunks of a row."""
    batch, length = documents.batch, documents.length
    runs = documents.columns.at(documents.columns.real)
    owner, number = expanded((runs.length + chunk - 1) // chunk)  # the run of each chunk, and its place in the run
    row, start = runs.row[owner], runs.start[owner] + number * chunk
    tokens = (runs.length[owner] - number * chunk).clamp(max=chunk)
    counts = torch.bincount(row, minlength=batch)
    index = torch.arange(len(row)) - (counts.cumsum(0) - counts)[row]  # of each chunk in its row
    chunks = max(1, int(counts.max()) if batch else 1)
    within = torch.arange(chunk)
    take = torch.full((batch, chunks + 1, chunk), length)
    take[row, index] = torch.where(within < tokens[:, None], start[:, None] + within, length)
    goes_on = torch.zeros(batch, chunks, dtype=torch.bool)
    goes_on[row, index] = number > 0
    last = (counts - 1).clamp(min=0)
    rest = (take[torch.arange(batch), last] < length).sum(1)
    right = take[torch.arange(batch), last].gather(1, (within + rest[:, None]) % chunk)
    take[:, -1] = right
    place = torch.full((batch, length + 1), chunks * chunk)
    flat = torch.arange(chunks * chunk).view(chunks, chunk).expand(batch, -1, -1)
    place.scatter_(1, take[:, :-1].flatten(1), flat.flatten(1))
    place[:, length] = chunks * chunk
    ends = documents.ids()[:, -1] >= 0
    return Places(take, place[:, :length].contiguous(), goes_on, last, rest, ends)
