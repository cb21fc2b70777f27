"""Selection of blocks: which blocks of its document each query lists, by its scores against summaries of windows."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import IMPLEMENTATIONS, resolve
from ..documents import Documents
from ..windows import WindowLayout, seen_windows
from . import chunked, reference
from .choices import Choices
from .rule import Rule

__all__ = ["Choices", "Rule", "WindowLayout", "bytes_sent", "choose", "flops", "select_blocks", "state_bytes"]


@torch.no_grad()
def select_blocks(
    q: Tensor,
    summaries: Tensor,
    *,
    rule: Rule,
    documents: Documents | None = None,
    row_documents: Documents | None = None,
    scale: float | None = None,
    lse: Tensor | None = None,
    weights: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The blocks that each query lists: int32 `[B, T, J, n]`, ascending, then −1; J = G if `rule.pooled`, else H.

        s_ti = scale * q_t . summary_i  over the windows i of t's document that end at or before t
        p_ti = softmax_i(s_ti), s_ti or w_t relu(s_ti);   P_ti = sum over the group's heads of p_ti, if pooled
        score_tb = sum_i overlap(i, b) P_ti / stride, or max_i P_ti over the windows that touch block b

    A list has the forced blocks (`rule.initial` first ones, `rule.local` latest up to the query's own) and, up to
    `rule.count` in all, the blocks with the highest scores among those that touch a window that the query sees; of
    equal scores the lower id comes first. q `[B, T, H, K]`; `summaries` `[B, N, G, K]` in the order of
    `WindowLayout(row_documents, rule.span, rule.step)`, G dividing H; what follows the last window of a row is not
    read. `documents` are those of the queries (default: a row is one document), `row_documents` those of the whole
    rows, by which windows and blocks are numbered (default: `documents`): a rank's queries can choose among the blocks
    of the whole row. `scale` is K^(-1/2) by default. `lse` `[B, T, H]` is the log-sum-exp of the scores, if compressed
    attention has computed it; `weights` `[B, T, H]` come with the score "relu", for which there is no Triton kernel.
    Scores are float32 (float64 for float64). No tensor of size T·N exists, and no gradient flows. Raises ValueError for
    shapes that do not fit and for a backend that cannot run.
    """
    documents = Documents.whole(q.shape[0], q.shape[1]) if documents is None else documents
    choices = Choices.of(documents, documents if row_documents is None else row_documents, rule)
    return choose(q, summaries, rule=rule, choices=choices, scale=scale, lse=lse, weights=weights, backend=backend)


@torch.no_grad()
def choose(
    q: Tensor,
    summaries: Tensor,
    *,
    rule: Rule,
    choices: Choices,
    scale: float | None = None,
    lse: Tensor | None = None,
    weights: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """`select_blocks` for `Choices`, which what is called several times for the same tokens makes once."""
    _check(q, summaries, choices, rule, lse, weights)
    summaries = summaries[:, : choices.windows.count]
    factor = q.shape[-1] ** -0.5 if scale is None else float(scale)
    offered = ("chunked", "reference") if rule.score == "relu" else IMPLEMENTATIONS
    chosen = resolve("select_blocks", backend, q.device, q.dtype, offered)
    if chosen == "triton":
        from . import triton as kernels

        return kernels.select(q, summaries, rule=rule, choices=choices, scale=factor, lse=lse)
    implementation = reference if chosen == "reference" else chunked
    return implementation.select(q, summaries, rule=rule, choices=choices, scale=factor, lse=lse, weights=weights)


def _check(
    q: Tensor, summaries: Tensor, choices: Choices, rule: Rule, lse: Tensor | None, weights: Tensor | None
) -> None:
    documents, windows = choices.queries, choices.windows
    if q.dim() != 4 or summaries.dim() != 4 or q.shape[0] != summaries.shape[0] or q.shape[3] != summaries.shape[3]:
        raise ValueError(
            f"summaries must be [B, N, G, K] for q [B, T, H, K]; got {tuple(summaries.shape)} and {tuple(q.shape)}"
        )
    if q.dtype != summaries.dtype:
        raise ValueError(f"q and summaries must have one dtype; got {q.dtype} and {summaries.dtype}. Cast them alike")
    if summaries.shape[2] == 0 or q.shape[2] % summaries.shape[2]:
        raise ValueError(f"heads of summaries must divide the query heads ({q.shape[2]}); got {summaries.shape[2]}")
    if (documents.batch, documents.length) != tuple(q.shape[:2]) or windows.documents.batch != q.shape[0]:
        raise ValueError(
            f"documents must describe {q.shape[0]} rows of {q.shape[1]} queries; got {documents.batch} of "
            f"{documents.length}, and {windows.documents.batch} whole rows"
        )
    if summaries.shape[1] < windows.count:
        raise ValueError(
            f"summaries must be one for each window of {windows.size} tokens at every {windows.stride}th, "
            f"at least {windows.count} per row; got {summaries.shape[1]}. Order them as WindowLayout does"
        )
    if lse is not None and (rule.score != "softmax" or lse.shape != q.shape[:3]):
        raise ValueError(
            f"lse must be [B, T, H] = {tuple(q.shape[:3])} and come with score='softmax'; "
            f"got {tuple(lse.shape)} and {rule.score!r}"
        )
    if (weights is None) == (rule.score == "relu") or (weights is not None and weights.shape != q.shape[:3]):
        raise ValueError(
            f"weights must be [B, T, H] = {tuple(q.shape[:3])} with score='relu', and None with another; "
            f"got {None if weights is None else tuple(weights.shape)} and {rule.score!r}"
        )


def flops(documents: Documents, *, rule: Rule, heads: int, key_dim: int, has_lse: bool = False) -> int:
    """FLOPs of the scores of every query against the windows it sees, twice where the normaliser is computed too."""
    pairs = seen_windows(documents, rule.span, rule.step)
    passes = 2 if rule.score == "softmax" and not has_lse else 1
    return 2 * pairs * heads * key_dim * passes


def state_bytes(tokens: int, *, rule: Rule, kv_heads: int, key_dim: int, element_bytes: int = 2) -> int:
    """Bytes of the summaries that decoding keeps for one row after `tokens` tokens."""
    return max(0, (tokens - rule.span) // rule.step + 1) * kv_heads * key_dim * element_bytes


def bytes_sent(tokens: int, *, rule: Rule, kv_heads: int, key_dim: int, ranks: int, element_bytes: int = 2) -> int:
    """Bytes that a rank with `tokens` tokens sends forward: its summaries to all others."""
    return (ranks - 1) * (tokens // rule.step) * kv_heads * key_dim * element_bytes
