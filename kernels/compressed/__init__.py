"""Compressed attention: softmax attention of every token over summaries of windows that lie in its past.

A token t sees window i of its document if the window's l tokens end at or before it: i·d + l − 1 <= t. So the d tokens
t = l − 1 + m·d + r with 0 <= r < d all see the windows 0 … m. Laid out as d times as many query heads at place m, they
attend to windows as causal attention does to tokens, and the kernels of softmax attention do the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .. import softmax
from ..attend import Attend, Gradient, OnOneDevice
from ..documents import Documents
from ..masks.pattern import Intervals
from ..operation import run
from ..windows import WindowLayout, seen_windows
from .folding import Folding


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
    op = CompressedAttend(size, stride, q.shape[-1] ** -0.5 if scale is None else float(scale))
    out, lse = run(OnOneDevice(op), (q, k, v), (Folding(windows, documents, k.shape[1]), backend))
    return (out, lse.detach()) if return_lse else out


class CompressedInputs(NamedTuple):
    """q `[B, T, H, K]`, and summaries k `[B, N, G, K]` and v `[B, N, G, V]`."""

    q: Tensor
    k: Tensor
    v: Tensor


@dataclass(frozen=True)
class CompressedAttend(Attend):
    """The op as `longreach.kernels.attend` describes it; its log-sum-exp has no gradient."""

    name, record = "softmax_attention", CompressedInputs

    size: int
    stride: int
    scale: float

    def check(self, inputs: CompressedInputs) -> None:
        softmax.check_inputs(*inputs)

    def tile(self, queries: Documents, keys: Documents) -> Folding:
        """The keys are summaries of whole rows, one for every `stride` tokens of `keys`."""
        return Folding(keys.derive(WindowLayout, self.size, self.stride), queries, keys.length // self.stride)

    def kept(self, length: int) -> Intervals:
        return [(0, length)]

    def attend(
        self, inputs: CompressedInputs, received: tuple[Tensor, ...], tile: Folding, backend: str
    ) -> tuple[Tensor, Tensor]:
        k, v = received
        if tile.tile is None:
            return self.zeros(inputs)
        groups = k.shape[2]
        out, lse = softmax.attend(tile.fold(inputs.q, groups), k, v, tile=tile.tile, scale=self.scale, backend=backend)
        return tile.unfold(out, groups, 0.0), tile.unfold(lse, groups, float("-inf"))

    def attend_backward(
        self, gradient: Gradient, inputs: CompressedInputs, received: tuple[Tensor, ...], tile: Folding, backend: str
    ) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        k, v = received
        if tile.tile is None:
            return {"q": torch.zeros_like(inputs.q)}, (torch.zeros_like(k), torch.zeros_like(v))
        groups = k.shape[2]
        folded = Gradient(
            tile.fold(gradient.dout, groups), tile.fold(gradient.out, groups),
            tile.fold(gradient.lse.unsqueeze(-1), groups).squeeze(-1),
        )  # fmt: skip
        dq, *travelled = softmax.attend_backward(
            folded, tile.fold(inputs.q, groups), k, v, tile=tile.tile, scale=self.scale, backend=backend
        )
        return {"q": tile.unfold(dq, groups, 0.0)}, tuple(travelled)


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
            f"{windows.count} per row; got {k.shape[1]}. Order them as WindowLayout does"
        )


def flops(documents: Documents, *, size: int, stride: int, heads: int, key_dim: int, value_dim: int) -> int:
    """Forward FLOPs of every query against the windows that it sees; a backward does 2.5 times as many."""
    pairs = seen_windows(documents, size, stride)
    return softmax.flops(pairs, heads=heads, key_dim=key_dim, value_dim=value_dim)
