"""Variants: calls of ops as the model makes them, on longer rows, and with windows at the edges of spans."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...parallel.layout import Layout
from .cases import Case
from .truth import SUMMARIES, Call

CHUNKS = 2 * 64 + 3  # tokens of a span: over two chunks of every recurrence
TAPS = 2 * 256 + 3  # of a span of short convolutions: over two of their slabs
PAIRS = 512  # the most tokens of a row whose every pair of tokens the truth holds
WINDOWED = ("window_means", "local_windows", "compressed_attention")
LISTED = ("block_sparse_attention", "listed_latent_attention")
PAIRED = (
    "softmax_attention", *LISTED, "select_blocks", "compressed_attention", "index_divergence",
    "gate_divergence",
)  # fmt: skip


def distinct(calls: list[Call]) -> list[Call]:
    """The first of the calls that differ only by their layer and tensors."""
    calls_by_kind: dict[str, Call] = {}
    for call in calls:
        settings = {name: value for name, value in call.kwargs.items() if not isinstance(value, Tensor)}
        calls_by_kind.setdefault(f"{call.mixer} {call.op} {settings} {[x.shape[2:] for x in call.tensors()]}", call)
    return list(calls_by_kind.values())


def long_jobs(calls: list[Call], ranks: int) -> list[tuple[Case, Call]]:
    """Each call on a row whose spans hold more than two chunks: of one document, and of several."""
    jobs = []
    for call in distinct(calls):
        span = TAPS if call.op == "short_conv" else min(CHUNKS, PAIRS // ranks) if call.op in PAIRED else CHUNKS
        layout = Layout(ranks * span, ranks)
        n = layout.length
        middle = span + 2 if ranks > 1 else n // 3
        lengths = [[n], [n // 3, 1, middle, n - n // 3 - 1 - middle - n // 7]]
        empty = torch.zeros(2, n, dtype=torch.int64)
        case = Case(f"long documents; 1 span(s) of {span}", layout, lengths, empty, empty)
        jobs.append((case, _on(call, case, "")))
    return jobs


def edge_calls(case: Case, calls: list[Call]) -> Iterator[Call]:
    """Windows and blocks as long as a span and two tokens longer; taps that reach as far."""
    for call in distinct(calls):
        for size in (case.layout.span_length, case.layout.span_length + 2):
            if (changed := _resized(call, size, case)) is not None:
                yield changed


def _resized(call: Call, size: int, case: Case) -> Call | None:
    kwargs, what = call.kwargs, f"of {size} tokens, "
    mask: Any = kwargs.get("mask")
    for name in ("window", "block"):
        if call.op == "softmax_attention" and getattr(mask, name, None) is not None:
            return replace(call, kwargs={**kwargs, "mask": replace(mask, **{name: size})}, variant=f"{name} {what}")
    if call.op == "short_conv":
        taps = torch.arange(size + 1) % call.args[1].shape[1]
        return replace(call, args=(call.args[0], call.args[1][:, taps]), variant=f"{size + 1} taps, ")
    if case.layout.length < size:
        return None
    if call.op in WINDOWED:
        return _on(replace(call, kwargs={**kwargs, "size": size, "stride": size}), case, f"windows {what}")
    if call.op == "select_blocks":
        rule = replace(kwargs["rule"], block_size=size, window=None, stride=None)
        return _on(replace(call, kwargs={**kwargs, "rule": rule, "lse": None}), case, f"blocks {what}")
    if call.op in LISTED:
        return _on(replace(call, kwargs={**kwargs, "block_size": size}), case, f"blocks {what}")
    return None


def _on(call: Call, case: Case, variant: str) -> Call:
    """The call on the rows of `case`, with tokens drawn from those that it has, each a little different."""
    n, split = case.layout.length, iter(call.per_token(call.tensors()[0].shape[1]))
    generator = torch.Generator().manual_seed(n)
    windows = n // _stride(call) if call.op in SUMMARIES else 0

    def drawn(x: Tensor) -> Tensor:
        rows = next(split)
        if not x.is_floating_point():
            return _lists(call, case, x, generator)
        if not rows and not (windows and x.dim() == 4):
            return x
        count = n if rows else windows
        if not x.shape[1]:  # the model's rows are shorter than a window
            return torch.randn(2, count, *x.shape[2:], generator=generator, dtype=x.dtype)
        chosen = torch.randint(x.shape[1], (count,), generator=generator)
        noise = torch.rand(2, len(chosen), *x.shape[2:], generator=generator, dtype=x.dtype)
        picked = x[torch.arange(2) % x.shape[0]][:, chosen]
        # Queries that saw no window, and had −inf, may see some in these rows.
        return torch.where(picked.isinf(), 0.0, picked) * (1 + 0.02 * noise)

    made = replace(call.mapped(drawn), variant=variant)
    outputs = n // _stride(call) if call.of_the_row else n
    if call.op == "select_blocks":
        return replace(made, shape=torch.Size((2, outputs, call.shape[2], call.kwargs["rule"].count)))
    return replace(made, shape=torch.Size((2, outputs, *call.shape[2:])))


def _stride(call: Call) -> int:
    if call.op == "select_blocks":
        return call.kwargs["rule"].step
    if call.op == "gate_divergence":
        return call.kwargs["block_size"]
    return call.kwargs.get("stride") or call.kwargs.get("size") or 1


def _lists(call: Call, case: Case, blocks: Tensor, generator: torch.Generator) -> Tensor:
    """For every query its own block and others before it in its document, ascending, then −1."""
    heads, count, size = *blocks.shape[2:], call.kwargs["block_size"]
    lists = torch.full((2, case.layout.length, heads, count), -1, dtype=torch.int32)
    for row, lengths in enumerate(case.lengths):
        start = first = 0
        for length in lengths:
            for t in range(length):
                own = t // size
                for head in range(heads):
                    others = torch.randperm(own, generator=generator)[: count - 1]
                    chosen = torch.cat([others, torch.tensor([own])]).sort().values + first
                    lists[row, start + t, head, : len(chosen)] = chosen
            start, first = start + length, first - (-length // size)
    return lists
