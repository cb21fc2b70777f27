"""Cross entropy from hidden states, in chunks of tokens: the logits of a sequence never exist at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..dispatch import by_kernels, by_library, kind_of
from ..operation import Function
from . import library
from .library import NO_TARGET

# Bytes of a chunk's logits. Each chunk reads and writes the whole gradient of the weight, so that fewer chunks are
# better as long as logits stay in a CPU's caches, and are little beside the activations on an accelerator.
CPU_LOGIT_BYTES = 2**23
LOGIT_BYTES = 2**30
LEAST_TOKENS = 512  # of a chunk, however large the vocabulary
LOG2_E = math.log2(math.e)


def cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    chunk: int | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """The sum over tokens of −log softmax(logits)[target], logits = logit_scale (hidden weightᵀ + bias).

    With softcap, logits l become softcap * tanh(l / softcap) (Gemma 2, arXiv 2408.00118).
    hidden `[B, T, D]`, weight `[Vocab, D]`, targets int64 `[B, T]` with −100 for tokens without one, bias `[Vocab]`.
    Returns a scalar, float32 (float64 for float64): a sum, so that the caller divides by the targets of the whole
    global batch. The logits of at most `chunk` tokens exist at a time, by default those of `chunk_tokens`. Forward
    takes the gradients along, so that logits are computed once: until backward it keeps those, in place of its inputs,
    that of the weight in float32. Backward needs no weight, which engines may shard in between. A target outside the
    vocabulary is torch's RuntimeError on a CPU, and a loss of NaN on CUDA. Raises ValueError where shapes do not
    fit.
    """
    size = _chunk(hidden, weight, chunk)
    _check(hidden, weight, targets, bias, size)
    if by_library("cross_entropy", hidden):
        return library.cross_entropy(hidden, weight, targets, bias, chunk, logit_scale, softcap)
    return _CrossEntropy.call(hidden, weight, targets, bias, size, logit_scale, softcap)


@torch.no_grad()
def loss_and_correct(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    chunk: int | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    each: bool = False,
) -> tuple[Tensor, Tensor]:
    """What evaluation counts: (`cross_entropy` of the same, without gradient; targets that have the largest logit).

    Shapes, dtypes and errors as of `cross_entropy`; the second is an int64 scalar, and of equal logits the first is the
    largest. Again the logits of at most `chunk` tokens exist at a time. With `each`, both are of every token, `[B, T]`,
    in place of their sum and number: its loss, 0 where there is no target, and whether its target's logit is largest.
    """
    chunk = _chunk(hidden, weight, chunk)
    _check(hidden, weight, targets, None, chunk)
    rows, ids = hidden.flatten(0, -2), targets.flatten()
    correct = torch.zeros(len(ids), dtype=torch.bool, device=hidden.device)

    def count(part: slice, logits: Tensor) -> None:
        correct[part] = logits.argmax(-1) == ids[part]

    lse, picked = _scan(rows, weight, ids, None, chunk, logit_scale, softcap, count)
    losses = _losses(lse, picked, ids)
    return (losses.view(targets.shape), correct.view(targets.shape)) if each else (losses.sum(), correct.sum())


def chunk_tokens(vocabulary: int, dtype: torch.dtype, device: torch.device) -> int:
    """Tokens of a chunk: the largest power of two whose logits fit 8 MiB on a CPU, 1 GiB elsewhere; at least 512."""
    on_cpu = kind_of(device) == "cpu"
    a_logit = max(4, dtype.itemsize) if on_cpu else dtype.itemsize  # kernels keep them in their own type
    fit = (CPU_LOGIT_BYTES if on_cpu else LOGIT_BYTES) // (vocabulary * a_logit)
    return max(LEAST_TOKENS, 1 << max(0, fit.bit_length() - 1))


def _chunk(hidden: Tensor, weight: Tensor, chunk: int | None) -> int:
    return chunk_tokens(weight.shape[0], hidden.dtype, hidden.device) if chunk is None else chunk


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, chunk: int) -> None:
    if hidden.shape[:-1] != targets.shape or weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            "hidden must be [B, T, D], weight [Vocab, D] and targets [B, T]; "
            f"got {list(hidden.shape)}, {list(weight.shape)} and {list(targets.shape)}"
        )
    if hidden.dtype != weight.dtype:
        raise ValueError(
            f"hidden and weight must have one dtype; got {hidden.dtype} and {weight.dtype}. Cast them alike"
        )
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"bias must be one for each of {weight.shape[0]} tokens; got {list(bias.shape)}")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1; got {chunk}")


class _Sums:
    """The gradients of the summed loss, of those inputs that need one, added up by chunks of rows."""

    def __init__(self, needs: Sequence[bool], rows: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        dtype = torch.promote_types(rows.dtype, torch.float32)
        self.hidden = torch.empty_like(rows) if needs[0] else None
        self.weight = torch.zeros_like(weight, dtype=dtype) if needs[1] else None
        self.bias = torch.zeros_like(bias, dtype=dtype) if needs[3] and bias is not None else None

    def add(self, part: slice, dlogits: Tensor, rows: Tensor, weight: Tensor) -> None:
        if self.bias is not None:
            self.bias += dlogits.sum(0)
        dlogits = dlogits.to(weight.dtype)
        if self.hidden is not None:
            torch.mm(dlogits, weight, out=self.hidden[part])
        if self.weight is not None and dlogits.dtype == self.weight.dtype:
            self.weight.addmm_(dlogits.t(), rows)
        elif self.weight is not None:
            self.weight += dlogits.t() @ rows


def _scan(
    rows: Tensor,
    weight: Tensor,
    ids: Tensor,
    bias: Tensor | None,
    chunk: int,
    scale: float,
    softcap: float | None = None,
    look: Callable[[slice, Tensor], None] | None = None,
    sums: _Sums | None = None,
) -> tuple[Tensor, Tensor]:
    """Of rows `[n, D]` the log-sum-exp of their logits and their target's logit, `[n]`; `look` sees their chunks.

    `sums` gets the gradients: each chunk's logits become theirs in place.
    """
    dtype = torch.promote_types(rows.dtype, torch.float32)
    lse, picked = (torch.empty(rows.shape[0], dtype=dtype, device=rows.device) for _ in range(2))
    kernels = by_kernels("cross_entropy", rows) if bias is None and softcap is None and look is None else None

    def scan(part: slice) -> None:  # lets go of its logits before the next ones are made
        if kernels is not None:
            logits = rows[part] @ weight.t()
            kernels.likelihood(logits, ids[part], scale, lse[part], picked[part])
            if sums is not None:
                kernels.likelihood_gradient(logits, ids[part], lse[part], scale)
                sums.add(part, logits, rows[part], weight)
            return
        logits = _capped(_logits(rows[part], weight, bias, scale, dtype), softcap)
        chosen = _present(ids[part])
        picked[part] = logits.gather(-1, chosen).squeeze(-1)
        if look is not None:
            look(part, logits)
        slope = None if softcap is None or sums is None else 1 - (logits / softcap).square_()  # of the cap
        largest = logits.amax(-1, keepdim=True)
        powers = logits.sub_(largest).mul_(LOG2_E).exp2_()  # a third of exp's time on a CPU
        total = powers.sum(-1, keepdim=True)
        lse[part] = (largest + total.log()).squeeze(-1)
        if sums is not None:
            factor = torch.full_like(total, scale).masked_fill_(ids[part].unsqueeze(-1) == NO_TARGET, 0.0)
            dlogits = powers.mul_(factor / total).scatter_add_(-1, chosen, -factor)
            sums.add(part, dlogits if slope is None else dlogits.mul_(slope), rows[part], weight)

    for start in range(0, rows.shape[0], chunk):
        scan(slice(start, start + chunk))
    return lse, picked


def _losses(lse: Tensor, picked: Tensor, ids: Tensor) -> Tensor:
    return (lse - picked).masked_fill_(ids == NO_TARGET, 0.0)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, dtype: torch.dtype) -> Tensor:
    logits = hidden @ weight.t() if bias is None else torch.addmm(bias, hidden, weight.t())
    logits = logits.to(dtype)
    return logits if scale == 1.0 else logits.mul_(scale)


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


def _present(ids: Tensor) -> Tensor:
    """Targets `[n, 1]` to gather by, with 0 where there is none."""
    return ids.masked_fill(ids == NO_TARGET, 0).unsqueeze(-1)


class _CrossEntropy(Function):
    """Gradients are those of a loss that is differentiated by 1, and are multiplied by what it is differentiated by."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        bias: Tensor | None,
        chunk: int,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        ids, rows = targets.flatten(), hidden.flatten(0, -2)
        needs = ctx.needs_input_grad
        sums = _Sums(needs, rows, weight, bias) if any(needs) else None
        lse, picked = _scan(rows, weight, ids, bias, chunk, scale, softcap, sums=sums)
        if sums is not None:
            ctx.save_for_backward(sums.hidden, sums.weight, sums.bias)
            ctx.like = hidden.shape, weight.dtype
        return _losses(lse, picked, ids).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias = ctx.saved_tensors
        shape, dtype = ctx.like
        return (
            None if hidden is None else (hidden * dloss).to(dtype).view(shape),
            None if weight is None else (weight * dloss).to(dtype),
            None,
            None if bias is None else (bias * dloss).to(dtype),
            None,
            None,
            None,
        )
