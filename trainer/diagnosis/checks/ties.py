"""Ties: lists of blocks that differ where scores differ by rounding alone, which is no error."""

from __future__ import annotations

import inspect
from typing import Any, cast

import torch
from torch import Tensor

from ....parallel import ops
from ....parallel.sequence import Sequence
from .. import selections
from ..bench import Bench
from ..cases import Case
from ..truth import Call, Result, plain, truth_of
from .comparison import EXACT, relative

NOWHERE = -1e30  # for what may not be listed, and for no block: no score is as low


def scores_of(call: Call, case: Case, lists: Tensor) -> Tensor:
    """The scores of the blocks in lists `[B, T, J, count]` that the call of `select_blocks` could have returned, the
    highest first; those of forced blocks are 1e30."""
    bound = inspect.signature(ops.select_blocks).bind(*call.args, **call.kwargs, seq=None).arguments
    given: dict[str, Any] = {name: bound.get(name) for name in ("q", "summaries", "rule", "scale", "lse", "weights")}
    every = selections.block_scores(**given, lengths=case.lengths)  # [B, T, J, blocks]
    every = torch.nn.functional.pad(every.clamp(NOWHERE, -NOWHERE), (0, 1), value=NOWHERE)
    ids, none = lists.long(), every.shape[-1] - 1
    ids = torch.where((ids < 0) | (ids > none), none, ids)
    return every.gather(-1, ids).sort(-1, descending=True).values


def finite_scores(call: Call, case: Case, lists: Tensor) -> Tensor:
    """As `scores_of`, with 0 for forced blocks and for what may not be listed."""
    scores = scores_of(call, case, lists)
    return scores.masked_fill(scores.abs() == -NOWHERE, 0.0)


def difference(call: Call, case: Case, got: Tensor, expected: Tensor) -> float:
    """The largest difference of scores that two lists of one call have, over the largest score."""
    mine, theirs = scores_of(call, case, got), scores_of(call, case, expected)
    plain = theirs.abs() < -NOWHERE
    if not torch.equal(mine[~plain], theirs[~plain]) or not bool((mine.abs()[plain] < -NOWHERE).all()):
        return float("inf")
    return relative(mine[plain], theirs[plain])


def settled(bench: Bench, case: Case, truth: Result, got: Result) -> Result:
    """The truth with what was selected in its place, where that differs by ties alone; else the truth as it is.

    Which of two equal scores is the higher depends on the order of sums: then both selections are right, and what
    follows differs.
    """
    if all(torch.equal(a, b) for a, b in zip(got.lists, truth.lists, strict=True)):
        return truth
    other, select = truth_of(bench.model(torch.float64), case, lists=got.lists), plain("select_blocks")
    calls = [call for call in other.calls if call.op == "select_blocks"]
    for call, lists in zip(calls, got.lists, strict=True):
        expected = select(*call.args, **call.kwargs, seq=Sequence.single(case.documents))
        if not difference(call, case, lists, cast(Tensor, expected)) <= EXACT:
            return truth
    return other
