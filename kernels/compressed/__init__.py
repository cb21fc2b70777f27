"""Compressed attention: softmax attention of every token over summaries of windows that lie in its past.

A token sees window i of its document once the last of its l tokens is not after it: i·d + l − 1 <= t. So the tokens
t = l − 1 + m·d + r with 0 <= r < d all see the windows 0 … m, and as d times as many query heads at place m they attend
to windows as causal attention does to tokens. The kernels of softmax attention do the rest, with d times their group.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import softmax
from ..documents import Documents
from ..select_blocks.windows import WindowLayout, seen_windows
from .folding import Folding

__all__ = ["Folding", "attend", "attend_backward", "check_inputs", "compressed_attention", "flops"]


def compressed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    size: int,
    stride: int,
    documents: Documents | None = None,
    row_documents: Documents | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention over the summaries of the windows that end at or before each query, in its document.

        s_ti = scale * q_t . k_i for windows i with i * stride + size - 1 <= t;  lse_t = log sum_i exp(s_ti)
        o_t = sum_i exp(s_ti - lse_t) v_i

    q `[B, T, H, K]`; k `[B, N, G, K]` and v `[B, N, G, V]`, G dividing H, one for each window of `size` tokens at every
    `stride`-th of each document, in the order of `WindowLayout(row_documents, size, stride)`; what follows the last
    window of a row is not read. `documents` are those of the queries (default: a row is one document), `row_documents`
    those of the whole rows (default: `documents`). Returns out `[B, T, H, V]` in q's type and, with `return_lse`, lse
    `[B, T, H]` in float32 (float64 for float64), through which no gradient flows. A query that sees no window has out
    0 and lse −inf. Raises ValueError for shapes that do not fit and for a backend that cannot run.

    The compression branch of Yuan et al., 2025, "Native Sparse Attention", arXiv 2502.11089.
    """
    documents = Documents.whole(q.shape[0], q.shape[1]) if documents is None else documents
    windows = WindowLayout(documents if row_documents is None else row_documents, size, stride)
    check_inputs(q, k, v, windows, documents)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    folding = Folding(windows, documents, k.shape[1])
    out, lse = _CompressedAttention.apply(q, k, v, folding, scale, backend)  # type: ignore[misc]
    return (out, lse) if return_lse else out


class _CompressedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, folding: Folding, scale: float, backend: str
    ) -> tuple[Tensor, Tensor]:
        exact, lse = attend(q, k, v, folding=folding, scale=scale, backend=backend)
        ctx.save_for_backward(q, k, v, exact, lse)
        ctx.folding, ctx.scale, ctx.backend = folding, scale, backend
        ctx.mark_non_differentiable(lse)
        return exact.to(q.dtype), lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        dq, dk, dv = attend_backward(dout, q, k, v, out, lse, folding=ctx.folding, scale=ctx.scale, backend=ctx.backend)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None


def check_inputs(q: Tensor, k: Tensor, v: Tensor, windows: WindowLayout, documents: Documents) -> None:
    """Raises ValueError unless queries, summaries and documents fit."""
    softmax.check_inputs(q, k, v)
    if (documents.batch, documents.length) != tuple(q.shape[:2]) or windows.documents.batch != q.shape[0]:
        raise ValueError(
            f"documents must describe {q.shape[0]} rows of {q.shape[1]} queries; got {documents.batch} of "
            f"{documents.length}, and {windows.documents.batch} whole rows"
        )
    if k.shape[1] < windows.count:
        raise ValueError(
            f"k and v must have one summary for each window of {windows.size} tokens at every {windows.stride}th, "
            f"{windows.count} a row; got {k.shape[1]}. Order them as WindowLayout does"
        )


@torch.no_grad()
def attend(
    q: Tensor, k: Tensor, v: Tensor, *, folding: Folding, scale: float, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """out `[B, T, H, V]` and lse `[B, T, H]`, float32 (float64 for float64)."""
    groups = k.shape[2]
    if folding.tile is None:
        dtype = torch.promote_types(q.dtype, torch.float32)
        out = q.new_zeros((*q.shape[:3], v.shape[3]), dtype=dtype)
        return out, q.new_full(q.shape[:3], float("-inf"), dtype=dtype)
    out, lse = softmax.attend(folding.fold(q, groups), k, v, tile=folding.tile, scale=scale, backend=backend)
    return folding.unfold(out, groups, 0.0), folding.unfold(lse, groups, float("-inf"))


@torch.no_grad()
def attend_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    folding: Folding,
    scale: float,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), float32 (float64 for float64)."""
    groups, exact = k.shape[2], out.dtype
    if folding.tile is None:
        dq, dk, dv = (torch.zeros_like(x, dtype=exact) for x in (q, k, v))
        return dq, dk, dv
    dq, dk, dv = softmax.attend_backward(
        folding.fold(dout.to(exact), groups), folding.fold(q, groups), k, v, folding.fold(out, groups),
        folding.fold(lse.unsqueeze(-1), groups).squeeze(-1), tile=folding.tile, scale=scale, backend=backend,
    )  # fmt: skip
    return folding.unfold(dq, groups, 0.0), dk, dv


def flops(documents: Documents, *, size: int, stride: int, heads: int, key_dim: int, value_dim: int) -> int:
    """Forward FLOPs of every query against the windows that it sees; a backward does 2.5 times as many."""
    pairs = seen_windows(documents, size, stride)
    return softmax.flops(pairs, heads=heads, key_dim=key_dim, value_dim=value_dim)
