"""Cross entropy from hidden states, in chunks of tokens: the logits of a sequence never exist at once."""

from __future__ import annotations

from collections.abc import Callable
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
    global batch. The logits of at most `chunk` tokens exist at a time, by default those of `chunk_tokens`, in forward
    and again in backward, which recomputes them from the inputs and one number per token.
    `weight` is kept as the parameter itself, for engines that shard it between forward and backward. A target outside
    the vocabulary is torch's RuntimeError on a CPU, and a loss of NaN on CUDA. Raises ValueError where shapes do not
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


def _scan(
    rows: Tensor,
    weight: Tensor,
    ids: Tensor,
    bias: Tensor | None,
    chunk: int,
    scale: float,
    softcap: float | None = None,
    look: Callable[[slice, Tensor], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Of rows `[n, D]` the log-sum-exp of their logits and their target's logit, `[n]`; `look` sees their chunks."""
    dtype = torch.promote_types(rows.dtype, torch.float32)
    lse, picked = (torch.empty(rows.shape[0], dtype=dtype, device=rows.device) for _ in range(2))
    kernels = by_kernels("cross_entropy", rows) if bias is None and softcap is None and look is None else None
    for start in range(0, rows.shape[0], chunk):
        part = slice(start, start + chunk)
        if kernels is not None:
            kernels.likelihood(rows[part] @ weight.t(), ids[part], scale, lse[part], picked[part])
            continue
        logits = _capped(_logits(rows[part], weight, bias, scale, dtype), softcap)
        lse[part] = logits.logsumexp(-1)
        picked[part] = logits.gather(-1, _present(ids[part])).squeeze(-1)
        if look is not None:
            look(part, logits)
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
        ids = targets.flatten()
        lse, picked = _scan(hidden.flatten(0, -2), weight, ids, bias, chunk, scale, softcap)
        ctx.save_for_backward(hidden, weight, targets, bias, lse)
        ctx.chunk, ctx.scale, ctx.softcap = chunk, scale, softcap
        return _losses(lse, picked, ids).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, bias, lse = ctx.saved_tensors
        needs_hidden, needs_weight, _, needs_bias = ctx.needs_input_grad[:4]
        dtype = lse.dtype
        rows, ids = hidden.flatten(0, -2), targets.flatten()
        dhidden = torch.empty_like(rows) if needs_hidden else None
        dweight = torch.zeros_like(weight, dtype=dtype) if needs_weight else None
        dbias = torch.zeros_like(bias, dtype=dtype) if needs_bias else None
        kernels = by_kernels("cross_entropy", rows) if bias is None and ctx.softcap is None else None
        for start in range(0, rows.shape[0], ctx.chunk):
            part = slice(start, start + ctx.chunk)
            if kernels is not None:
                logits = rows[part] @ weight.t()
                dlogits = kernels.likelihood_gradient(logits, ids[part], lse[part], dloss, ctx.scale)
            else:
                dlogits = _dlogits(rows[part], weight, bias, ids[part], lse[part], dloss, ctx.scale, ctx.softcap)
            if dbias is not None:
                dbias += dlogits.sum(0)
            dlogits = dlogits.to(weight.dtype)
            if dhidden is not None:
                dhidden[part] = dlogits @ weight
            if dweight is not None:
                _accumulate(dweight, dlogits, rows[part])
        return (
            None if dhidden is None else dhidden.view_as(hidden),
            None if dweight is None else dweight.to(weight.dtype),
            None,
            None if dbias is None or bias is None else dbias.to(bias.dtype),
            None,
            None,
            None,
        )


def _dlogits(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    lse: Tensor,
    dloss: Tensor,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """The gradient of the summed loss by the products of these rows and the weight, in the type of lse."""
    logits = _capped(_logits(rows, weight, bias, scale, lse.dtype), softcap)
    slope = None if softcap is None else 1 - (logits / softcap).square_()  # of the cap
    dlogits = logits.sub_(lse.unsqueeze(-1)).exp_()
    chosen = _present(ids)
    dlogits.scatter_add_(-1, chosen, torch.full_like(chosen, -1, dtype=lse.dtype))
    factor = (dloss * scale).expand(dlogits.shape[0]).masked_fill(ids == NO_TARGET, 0.0)
    dlogits.mul_(factor.unsqueeze(-1))
    return dlogits if slope is None else dlogits.mul_(slope)


def _accumulate(dweight: Tensor, dlogits: Tensor, rows: Tensor) -> None:
    if dlogits.dtype == dweight.dtype:
        dweight.addmm_(dlogits.t(), rows)
    else:
        dweight += dlogits.t() @ rows
