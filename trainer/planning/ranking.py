"""Ranking: which layouts fit a cluster, the fastest first; and for others why not, and the nearest that does."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from itertools import product
from typing import Any

import torch

from ..settings import Settings, check
from .cluster import ClusterSettings
from .estimate import Estimate, Estimator
from .report import choices, layout

TILE = 4096
OFTEN = 10.0  # seconds from one line of progress to the next
WAYS = (  # to keep activations: checkpointing, tiles, offloading
    ("none", None, False),
    ("mixing", None, False),
    ("full", None, False),
    ("full", TILE, False),
    ("full", TILE, True),
)
STATES = ((1, "none"), (2, "none"), (3, "none"), (3, "optimizer"))  # ZeRO's stage, what is offloaded


def ranked(estimator: Estimator, settings: Settings, cluster: ClusterSettings, top: int) -> Iterator[str]:
    """A table of the best, then what does not fit; lines of progress meanwhile."""
    fitting: list[Estimate] = []
    failing: list[tuple[Estimate | None, str, str]] = []
    tried, told = list(candidates(estimator, settings, cluster)), time.monotonic()
    for number, chosen in enumerate(tried):
        if time.monotonic() - told > OFTEN:
            told = time.monotonic()
            yield f"… {number} of {len(tried)} layouts tried"
        try:
            check(chosen, cluster.gpus, torch.device("cuda"))
            estimate = estimator.estimate(chosen, cluster)
        except ValueError as error:
            failing.append((None, _name(chosen), str(error)))
            continue
        reason = estimate.refusal()
        if reason is None:
            fitting.append(estimate)
        else:
            failing.append((estimate, layout(estimate), reason))
    fitting.sort(key=lambda each: (each.step, each.memory))
    yield from _best(fitting, len(tried), top)
    yield ""
    yield from _others(fitting, failing)
    yield ""
    yield from _as_given(estimator.estimate(settings, cluster), fitting)


def _best(fitting: list[Estimate], tried: int, top: int) -> Iterator[str]:
    """The fastest of each way to share rows and experts: others of the same keep less than fits."""
    first = {_sharing(each.settings): each for each in reversed(fitting)}
    shown = sorted(first.values(), key=lambda each: each.step)[:top]
    yield f"{len(fitting)} of {tried} layouts fit, as predicted by the shares and links above; of each way to share"
    yield "rows and experts the fastest:"
    yield f"  {'seconds':>9}{'MFU':>7}{'GB':>7}{'tokens a day':>18}   layout"
    for each in shown:
        gb = each.memory / 1e9
        yield f"  {each.step:>9.3g}{each.mfu:>7.1%}{gb:>7.1f}{each.tokens_a_day:>18,.0f}   {layout(each)}"
    if not shown:
        yield "  none"


def _others(fitting: list[Estimate], failing: list[tuple[Estimate | None, str, str]]) -> Iterator[str]:
    """Of each reason and each way to keep activations and states the first, and what the nearest that fits changes."""
    yield "do not fit, or are refused; of each reason the first, and what the nearest that fits has instead:"
    seen = set[Any]()
    for estimate, name, reason in failing:
        kind = re.sub(r"\d+", "", reason) if estimate is None else _way(estimate.settings)
        if kind in seen:
            continue
        seen.add(kind)
        yield f"  {name}"
        yield f"      {reason}{'' if estimate is None else _instead(fitting, estimate)}"
    if not failing:
        yield "  none"


def _as_given(estimate: Estimate, fitting: list[Estimate]) -> Iterator[str]:
    reason = estimate.refusal()
    if reason is None:
        ahead = sum(each.step < estimate.step for each in fitting)
        yield f"as given: fits, {estimate.step:.3g} s a step; {ahead} layouts are faster"
    else:
        yield f"as given: {reason}{_instead(fitting, estimate)}"


def _instead(fitting: list[Estimate], other: Estimate) -> str:
    near = min(fitting, key=lambda each: _distance(each, other), default=None)
    if near is None:
        return "; no layout that was tried fits"
    has, had = choices(near), choices(other)
    changed = [each for each in has if each not in had]
    changed = [f"with {', '.join(changed)}"] if changed else [f"without {each}" for each in had if each not in has]
    return f"; fits {', '.join(changed)}: {near.memory / 1e9:.1f} GB, {near.step:.3g} s"


def candidates(estimator: Estimator, settings: Settings, cluster: ClusterSettings) -> Iterator[Settings]:
    """Layouts that are worth trying: powers of two of the ranks that share a row, each way to keep activations, and
    experts whole or shared out.
    """
    gpus, rows = cluster.gpus, settings.data.rows_per_step
    degrees = [2**n for n in range(gpus.bit_length()) if gpus % 2**n == 0]
    degrees = [n for n in degrees if rows % (gpus // n * settings.data.rows_per_micro_batch) == 0] or [gpus]
    experts = _expert_ranks(estimator, settings, cluster)
    for ranks in degrees:
        heads = sorted({1, min(ranks, cluster.gpus_per_node), ranks}) if ranks > 1 else [1]
        for ulysses, count, way, states in product(heads, experts, WAYS, STATES):
            made = deepcopy(settings)
            parallel = made.parallel
            parallel.sequence, parallel.experts = ranks, count
            parallel.attention, parallel.ulysses = ("ulysses", ulysses) if ulysses > 1 else ("ring", None)
            if ranks > 1 and parallel.layout == "contiguous":
                parallel.layout, parallel.spans = "zigzag", None
            trainer = made.trainer
            trainer.activation_checkpointing, trainer.tile_tokens, trainer.offload_activations = way
            made.engine = replace(made.engine, zero_stage=states[0], offload=states[1], hierarchical=None)
            yield made


def _expert_ranks(estimator: Estimator, settings: Settings, cluster: ClusterSettings) -> list[int]:
    """1, and how many ranks share out experts: those of a node, or as many as can where theirs alone exceed a GPU."""
    modules = list(estimator.whole.modules())
    named = [getattr(module, name) for module in modules for name in getattr(module, "by_expert", ())]
    weights = {id(weight): weight for weight in named if weight is not None}.values()
    if not weights:
        return [1]
    itemsize = getattr(torch, settings.trainer.dtype).itemsize
    held = (itemsize + 4) * sum(weight.numel() for weight in weights)  # with gradients in float32
    node, most = (math.gcd(ranks, *(len(x) for x in weights)) for ranks in (cluster.gpus_per_node, cluster.gpus))
    return sorted({1, node if held / node <= cluster.memory_gb * 1e9 else most})


def _name(settings: Settings) -> str:
    parallel = settings.parallel
    return f"sequence {parallel.sequence} ({parallel.attention} {parallel.ulysses or ''})".replace(" )", ")")


def _sharing(settings: Settings) -> tuple[Any, ...]:
    parallel = settings.parallel
    return parallel.sequence, parallel.attention, parallel.ulysses, parallel.experts


def _way(settings: Settings) -> tuple[Any, ...]:
    trainer, engine = settings.trainer, settings.engine
    return str(trainer.activation_checkpointing), trainer.tile_tokens, trainer.offload_activations, engine.zero_stage


def _distance(fits: Estimate, other: Estimate) -> tuple[int, float]:
    """How many settings differ, then seconds."""
    a, b = fits.settings, other.settings
    pairs = [
        (a.parallel.sequence, b.parallel.sequence), (a.parallel.attention, b.parallel.attention),
        (a.parallel.ulysses, b.parallel.ulysses), (a.parallel.experts, b.parallel.experts),
        (a.engine.offload, b.engine.offload), *zip(_way(a), _way(b), strict=True),
    ]  # fmt: skip
    return sum(x != y for x, y in pairs), fits.step
