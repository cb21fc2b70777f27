"""Selection on GPUs: scores recomputed tile by tile, and the best blocks so far kept sorted in registers.

A score and its block make one 64-bit key, whose order is that of the scores and, among equals, of lower ids: what is
chosen does not depend on how the blocks fall into tiles.
"""

# Kernels are typed by Triton, when they are compiled.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..compilation import Compilation
from .choices import Choices
from .rule import Rule

ROWS = 64  # queries × heads that a program takes
UNROLLED = tl.constexpr(32)  # windows that start in a block up to which the loop over them is unrolled

# Windows, or blocks, at once, warps and stages by the padded key dim.
CONFIGURATIONS = {64: (64, 4, 2), 128: (32, 4, 2), 256: (32, 8, 1)}


@triton.jit
def _rows(tiles, H: tl.constexpr, HEADS: tl.constexpr, HP: tl.constexpr, QUERIES: tl.constexpr, T):
    """The queries of a tile and their rows in [B, T, H]: (offset of the query, row, whether it is one)."""
    tile = tiles + tl.program_id(0) * 6
    i = tl.arange(0, QUERIES * HP)
    query = i // HP
    inside = (query < tl.load(tile + 2)) & (i % HP < HEADS)
    token = tl.cast(tl.load(tile), tl.int64) * T + tl.load(tile + 1) + query
    return query, token * H + tl.program_id(1) * HEADS + i % HP, inside


@triton.jit
def _normaliser(
    q, summaries, tiles, lse2, scale, T, N,
    H: tl.constexpr, G: tl.constexpr, HEADS: tl.constexpr, HP: tl.constexpr, QUERIES: tl.constexpr, K: tl.constexpr,
    KP: tl.constexpr, WIDTH: tl.constexpr, SPAN: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """lse2 [B, T, H], in base 2, of the scores of all windows seen; 1e30 for none, so that no weight is left."""
    tile = tiles + tl.program_id(0) * 6
    g = tl.program_id(1) * HEADS // (H // G)
    query, row, inside = _rows(tiles, H, HEADS, HP, QUERIES, T)
    position = tl.load(tile + 3)
    first = tl.cast(tl.load(tile), tl.int64) * N + tl.load(tile + 4)
    end = position + tl.load(tile + 2)  # positions below it are of queries here
    kd = tl.arange(0, KP)
    q_here = tl.load(q + row[:, None] * K + kd[None, :], mask=inside[:, None] & (kd[None, :] < K), other=0.0)
    most = tl.full([QUERIES * HP], -1e30, tl.float32)
    total = tl.zeros([QUERIES * HP], tl.float32)
    windows = tl.maximum(end - SPAN + STEP, 0) // STEP
    for low in range(0, windows, WIDTH):
        window = low + tl.arange(0, WIDTH)
        held = window < windows
        at = (first + window) * G + g
        k_t = tl.load(summaries + at[None, :] * K + kd[:, None], mask=held[None, :] & (kd[:, None] < K), other=0.0)
        seen = held[None, :] & ((window * STEP + SPAN - 1)[None, :] <= (position + query)[:, None])
        x = tl.dot(q_here, k_t, input_precision=PRECISION) * (scale * 1.4426950408889634)
        x = tl.where(seen, x, -1e30)
        higher = tl.maximum(most, tl.max(x, 1))
        total = total * tl.exp2(most - higher) + tl.sum(tl.where(seen, tl.exp2(x - higher[:, None]), 0.0), 1)
        most = higher
    some = total > 0
    tl.store(lse2 + row, tl.where(some, most + tl.log2(tl.where(some, total, 1.0)), 1e30), mask=inside)


@triton.jit
def _pooled(
    q_here, lse_here, summaries, at, held, inside, kd, scale, seen,
    QUERIES: tl.constexpr, HP: tl.constexpr, WIDTH: tl.constexpr, K: tl.constexpr, SOFTMAX: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The scores of rows for the windows in rows `at` of the summaries, summed over heads: [QUERIES, WIDTH]."""
    k_t = tl.load(summaries + at[None, :] * K + kd[:, None], mask=held[None, :] & (kd[:, None] < K), other=0.0)
    x = tl.dot(q_here, k_t, input_precision=PRECISION) * scale
    if SOFTMAX:
        x = tl.exp2(x * 1.4426950408889634 - lse_here[:, None])
    x = tl.where(held[None, :] & seen & inside[:, None], x, 0.0)
    return tl.sum(tl.reshape(x, [QUERIES, HP, WIDTH]), 1)


@triton.jit
def _choose(
    q, summaries, tiles, lse2, lists, scale, T, N,
    H: tl.constexpr, G: tl.constexpr, HEADS: tl.constexpr, HP: tl.constexpr, QUERIES: tl.constexpr, K: tl.constexpr,
    KP: tl.constexpr, WIDTH: tl.constexpr, SPAN: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, COUNT: tl.constexpr, BEST: tl.constexpr, INITIAL: tl.constexpr, LOCAL: tl.constexpr,
    SOFTMAX: tl.constexpr, GREATEST: tl.constexpr,
):  # fmt: skip
    """The COUNT best blocks of each query, in no order of ids, −1 for none: lists [B, T, J, COUNT]."""
    PER: tl.constexpr = BLOCK // STEP
    LEAD: tl.constexpr = SPAN // STEP - 1
    tile = tiles + tl.program_id(0) * 6
    g = tl.program_id(1) * HEADS // (H // G)
    query, row, inside = _rows(tiles, H, HEADS, HP, QUERIES, T)
    position = tl.load(tile + 3)
    first = tl.cast(tl.load(tile), tl.int64) * N + tl.load(tile + 4)
    count = tl.load(tile + 2)
    windows = tl.maximum(position + count - SPAN + STEP, 0) // STEP
    kd = tl.arange(0, KP)
    q_here = tl.load(q + row[:, None] * K + kd[None, :], mask=inside[:, None] & (kd[None, :] < K), other=0.0)
    lse_here = tl.zeros([QUERIES * HP], tl.float32)
    if SOFTMAX:
        lse_here = tl.load(lse2 + row, mask=inside, other=1e30)
    at_query = position + tl.arange(0, QUERIES)
    own = at_query // BLOCK
    seen_by_query = tl.where(at_query + 1 >= SPAN, (at_query + 1 - SPAN) // STEP, -1)  # the last window seen
    seen_by_row = tl.where(position + query + 1 >= SPAN, (position + query + 1 - SPAN) // STEP, -1)
    best = tl.full([QUERIES, BEST], -0x7FFFFFFFFFFFFFFF, tl.int64)
    for low in range(0, (position + count - 1) // BLOCK + 1, WIDTH):
        block = low + tl.arange(0, WIDTH)
        score = tl.zeros([QUERIES, WIDTH], tl.float32)
        if GREATEST:
            score = tl.full([QUERIES, WIDTH], float("-inf"), tl.float32)
        if GREATEST and PER > UNROLLED:  # of windows of one token
            for shift in range(LEAD + PER):
                window = block * PER + (shift - LEAD)
                held = (window >= 0) & (window < windows)
                pooled = _pooled(
                    q_here, lse_here, summaries, (first + window) * G + g, held, inside, kd, scale,
                    window[None, :] <= seen_by_row[:, None], QUERIES, HP, WIDTH, K, SOFTMAX, PRECISION,
                )  # fmt: skip
                shown = held[None, :] & (window[None, :] <= seen_by_query[:, None])
                score = tl.maximum(score, tl.where(shown, pooled, float("-inf")))
        else:
            for shift in tl.static_range(0, LEAD + PER):
                window = block * PER + (shift - LEAD)
                held = (window >= 0) & (window < windows)
                pooled = _pooled(
                    q_here, lse_here, summaries, (first + window) * G + g, held, inside, kd, scale,
                    window[None, :] <= seen_by_row[:, None], QUERIES, HP, WIDTH, K, SOFTMAX, PRECISION,
                )  # fmt: skip
                if GREATEST:
                    shown = held[None, :] & (window[None, :] <= seen_by_query[:, None])
                    score = tl.maximum(score, tl.where(shown, pooled, float("-inf")))
                else:
                    # Its overlap with the block, in strides: from the later start to the earlier end.
                    score += pooled * (
                        (shift - LEAD + SPAN // STEP if shift - LEAD + SPAN // STEP < PER else PER)
                        - (shift - LEAD if shift > LEAD else 0)
                    )
        earliest = tl.maximum(block * PER - LEAD, 0)
        eligible = earliest[None, :] <= seen_by_query[:, None]
        forced = (block[None, :] < INITIAL) | (block[None, :] > own[:, None] - LOCAL)
        score = tl.where(forced, float("inf"), score + 0.0)  # −0 is 0
        bits = score.to(tl.int32, bitcast=True)
        bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        packed = (tl.cast(bits, tl.int64) << 32) | (0x7FFFFFFF - block)[None, :].to(tl.int64)
        allowed = (eligible | forced) & (block[None, :] <= own[:, None])
        packed = tl.where(allowed, packed, -0x7FFFFFFFFFFFFFFF)
        # The greatest of each pair, one list read backwards, are the best of both lists.
        best = tl.sort(tl.maximum(best, tl.flip(tl.topk(packed, BEST), 1)), descending=True)
    name = 0x7FFFFFFF - (best & 0x7FFFFFFF).to(tl.int32)
    name = tl.where(best > -0x7FFFFFFFFFFFFFFF, name + tl.load(tile + 5), -1)
    slot = tl.arange(0, BEST)
    token = tl.cast(tl.load(tile), tl.int64) * T + tl.load(tile + 1) + tl.arange(0, QUERIES)
    to = (token * (H // HEADS) + tl.program_id(1)) * COUNT
    within = (tl.arange(0, QUERIES) < count)[:, None] & (slot < COUNT)[None, :]
    tl.store(lists + to[:, None] + slot[None, :], name, mask=within)


def _tiles(choices: Choices, queries: int) -> Tensor:
    """int32 `[tiles, 6]`: queries of one document: row, first token, count, position, first window, first block."""
    runs = choices.queries.columns
    runs = runs.at(runs.real)
    each = (runs.length + queries - 1) // queries
    owner = torch.repeat_interleave(each)
    begins = [layout.first_of(runs)[owner] for layout in (choices.windows, choices.layout)]
    offset = (torch.arange(len(owner)) - (each.cumsum(0) - each)[owner]) * queries
    runs = runs.at(owner)
    count = (runs.length - offset).clamp(max=queries)
    return torch.stack([runs.row, runs.start + offset, count, runs.position + offset, *begins], dim=1).int()


def _constants(*, rule: Rule, heads: int, groups: int, key_dim: int, exact: bool) -> dict[str, Any]:
    """The constexpr arguments of both kernels, with warps and stages under Triton's names."""
    padded = max(16, triton.next_power_of_2(key_dim))
    if max(64, padded) not in CONFIGURATIONS:
        raise ValueError(f"key dim must be at most 256 for Triton; got {key_dim}")
    width, warps, stages = CONFIGURATIONS[max(64, padded)]
    shared = heads // groups if rule.pooled else 1
    together = triton.next_power_of_2(shared)
    best = triton.next_power_of_2(rule.count)
    return {
        "H": heads, "G": groups, "HEADS": shared, "HP": together, "QUERIES": max(1, ROWS // together), "K": key_dim,
        "KP": padded, "WIDTH": max(width, best), "SPAN": rule.span, "STEP": rule.step,
        "PRECISION": "ieee" if exact else "tf32", "BLOCK": rule.block_size, "COUNT": rule.count, "BEST": best,
        "INITIAL": rule.initial, "LOCAL": rule.local, "SOFTMAX": rule.score == "softmax",
        "GREATEST": rule.aggregate == "max", "num_warps": warps, "num_stages": stages,
    }  # fmt: skip


_ONLY_CHOICE = {"BLOCK", "COUNT", "BEST", "INITIAL", "LOCAL", "SOFTMAX", "GREATEST"}


def select(
    q: Tensor,
    summaries: Tensor,
    *,
    rule: Rule,
    choices: Choices,
    scale: float,
    lse: Tensor | None,
) -> Tensor:
    """See `longreach.kernels.select_blocks`; no rule with weights."""
    batch, length, heads, key_dim = q.shape
    groups, number = summaries.shape[2], summaries.shape[1]
    constants = _constants(rule=rule, heads=heads, groups=groups, key_dim=key_dim, exact=q.dtype == torch.float32)
    tiles = choices.on(q.device, _tiles, constants["QUERIES"])
    programs = heads // constants["HEADS"]
    lists = torch.full((batch, length, programs, rule.count), -1, dtype=torch.int32, device=q.device)
    if not tiles.shape[0]:
        return lists
    q, summaries = q.contiguous(), summaries.contiguous()
    tensors = q, summaries, tiles
    lse2 = q.new_empty(0, dtype=torch.float32)
    if lse is not None:
        lse2 = torch.where(lse == float("-inf"), 1e30, lse.float() * 1.4426950408889634).contiguous()
    elif rule.score == "softmax":
        lse2 = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        shared = {name: value for name, value in constants.items() if name not in _ONLY_CHOICE}
        _normaliser[(tiles.shape[0], programs)](*tensors, lse2, scale, length, number, **shared)
    _choose[(tiles.shape[0], programs)](*tensors, lse2, lists, scale, length, number, **constants)
    none = torch.iinfo(torch.int32).max
    ordered = lists.masked_fill(lists < 0, none).sort(dim=-1).values
    return ordered.masked_fill_(ordered == none, -1)


def compilations() -> list[Compilation]:
    """Both kernels with the rules of NSA, InfLLM-v2 and MoBA at production shapes."""
    overlap = Rule(64, 16, window=32, stride=16, initial=1, local=2)
    rules = {
        "NSA": overlap,
        "InfLLM-v2": replace(overlap, aggregate="max"),
        "MoBA": Rule(4096, 12, score="dot", pooled=False),
        "tokens of blocks": Rule(128, 16, window=1, stride=1, score="dot", aggregate="max", pooled=False),
    }
    result = []
    for name, rule in rules.items():
        for key_dim in (64, 128):
            constants = _constants(rule=rule, heads=64, groups=4, key_dim=key_dim, exact=False)
            result.append(_compilation(_choose, constants, f"{name} {key_dim}"))
            if rule.score == "softmax" and name == "NSA":
                shared = {key: value for key, value in constants.items() if key not in _ONLY_CHOICE}
                result.append(_compilation(_normaliser, shared, f"{name} {key_dim}"))
    return result


_POINTERS = {"q": "*bf16", "summaries": "*bf16", "tiles": "*i32", "lse2": "*fp32", "lists": "*i32"}


def _compilation(kernel: Any, constants: dict[str, Any], variant: str) -> Compilation:
    warps, stages = constants["num_warps"], constants["num_stages"]
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    names = [name for name in kernel.arg_names if name not in constants]
    signature = {name: _POINTERS.get(name, "fp32" if name == "scale" else "i32") for name in names}
    pointers = tuple(name for name in names if name in _POINTERS)
    return Compilation(kernel, signature, constants, pointers, warps, stages, rows=ROWS, variant=variant)
