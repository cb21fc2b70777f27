"""Diagnose: a configuration under its topology against one device, check after check."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

import torch

from ..preparation import check_model, configured_model
from ..ranks.settings import ParallelSettings, spans_of, ulysses_ranks
from ..settings import Settings, check
from ..zero.experts import check_experts
from .bench import Bench
from .checks import exact, inexact, loop
from .model import Build, complete, reduced, shrunk
from .ranks import RankFailure
from .report import FAIL, NOT_TESTED, Report, Row
from .work import Topology

MOST_RANKS = 8
MOST_EXPERT_RANKS = 4


def diagnose(
    settings: Settings,
    build: Build,
    *,
    whole: bool = False,
    say: Callable[[str], None] = lambda line: None,
    prepare: str | None = None,
) -> Report:
    """The report on a configuration of training.

    build: makes a model of its configuration; it stands at module level. whole: do not reduce the model. say: gets a
    line for each thing begun. prepare: "module:function" that every rank calls first; tests plant faults with it.
    Raises ValueError for a configuration that training refuses.
    """
    settings = checked(settings)
    configured = configured_model(settings)
    check_model(build, configured, settings, say)
    parallel = at_most(settings.parallel, MOST_RANKS)
    window = max(2, 7 * spans_of(parallel) * 3 // 2)  # of the cases' longest spans: beyond one rank, not over two
    model = complete(configured) if whole else reduced(configured, build, window=window)
    parallel = replace(parallel, experts=_expert_ranks(parallel.experts, model, build))
    data_ranks = max(2 if parallel.sequence <= 2 else 1, _sharing(parallel) // parallel.sequence)
    report = Report(_title(model, parallel, data_ranks), unseen=_unseen(complete(configured), model))
    report.rows += _never_tested(settings, parallel)
    topology = Topology(build, model, parallel)
    _on_host(Bench(topology, data_ranks, report, prepare), settings, say)
    _on_cuda(topology, data_ranks, report, settings, say, prepare)
    # Rows that were not tested come last.
    report.rows.sort(key=lambda row: row.verdict == NOT_TESTED)
    return report


def checked(settings: Settings) -> Settings:
    """The settings as they are examined, on the fewest ranks. Raises ValueError for what can be known before."""
    # These are fewer than those of training: groups of them would say nothing of it.
    settings = replace(settings, engine=replace(settings.engine, hierarchical=None))
    check(settings, _sharing(settings.parallel))
    return settings


def _on_host(bench: Bench, settings: Settings, say: Callable[[str], None]) -> None:
    _attempt(
        bench,
        say,
        {
            "one process": lambda: exact.one_process(bench),
            "functions of a token": lambda: exact.pointwise_functions(bench),
            "differences of losses": lambda: exact.differences(bench),
            "detached losses": lambda: exact.detached(bench),
            "every op in float64": lambda: exact.operations(bench),
            "the model in float64": lambda: exact.model(bench),
            "leaks": lambda: exact.leaks(bench),
            "recomputation": lambda: exact.recomputation(bench, settings.trainer.activation_checkpointing),
            "decoding": lambda: exact.decoding(bench),
            "the grid of ranks": lambda: loop.grid(bench, settings),
            "the training loop": lambda: loop.training_steps(bench, settings),
            "float32": lambda: inexact.rounded(bench, torch.float32),
            "bfloat16": lambda: inexact.rounded(bench, torch.bfloat16),
        },
    )


def _on_cuda(
    topology: Topology,
    data_ranks: int,
    report: Report,
    settings: Settings,
    say: Callable[[str], None],
    prepare: str | None,
) -> None:
    """The production backends, with one GPU per rank: nothing in float64, which they do not take."""
    available, needed = torch.cuda.device_count() if torch.cuda.is_available() else 0, _sharing(topology.parallel)
    if available < needed:
        why = f"{needed} CUDA device(s) are needed; this machine has {available}"
        report.rows += [Row(what, NOT_TESTED, where=why) for what in ("NCCL", "Triton kernels", "flash-attn")]
        return
    data_ranks = min(data_ranks, available // needed * needed // topology.parallel.sequence)
    bench = Bench(replace(topology, cuda=True), data_ranks, report, prepare)
    dtype = settings.trainer.dtype
    _attempt(
        bench,
        say,
        {
            f"CUDA: {dtype}": lambda: inexact.rounded(bench, getattr(torch, dtype)),
            "CUDA: the training loop": lambda: loop.training_steps(bench, settings),
        },
    )


def _attempt(bench: Bench, say: Callable[[str], None], steps: dict[str, Callable[[], None]]) -> None:
    """Each step in turn; an error that a part raises is a finding. Ranks that failed twice, or hung, stay down."""
    broken = 0
    try:
        for title, step in steps.items():
            if broken == 2:
                bench.add(Row(title, NOT_TESTED, where="ranks failed before"))
                continue
            started = time.monotonic()
            try:
                step()
            except RankFailure as failure:
                broken = 2 if failure.silent else broken + 1
                bench.add(Row(title, FAIL, where=str(failure), precedence=0))
            except Exception as error:
                bench.add(Row(title, FAIL, where=f"{type(error).__name__}: {error}", precedence=7))
            say(f"{title}: {time.monotonic() - started:.1f} s")
    finally:
        bench.close()


def _title(model: dict, parallel: ParallelSettings, data_ranks: int) -> str:
    by_heads, spans = ulysses_ranks(parallel), spans_of(parallel)
    chosen = [f"attention {parallel.attention}", f"recurrent layers {parallel.recurrent}"]
    chosen += [f"{name} {strategy}" for name, strategy in parallel.mixers.items()]
    return (
        f"{model['depth']} layers of width {model['width']}; {data_ranks} data x {parallel.sequence} sequence rank(s)"
        f"{f' of which {by_heads} by heads' if by_heads > 1 else ''}, {spans} span(s) each; {', '.join(chosen)}"
    )


def _unseen(whole: dict, small: dict) -> list[str]:
    """What the model and its rows were reduced to."""
    changed = shrunk(whole, small)
    rows = "rows are short: of many layouts, spans of 1 to 7 tokens; ops alone run on spans over two chunks too"
    if not changed:
        return [rows]
    return [f"what takes larger sizes to show: {', '.join(changed)} (doctor.whole=true keeps them)", rows]


def _never_tested(settings: Settings, parallel: ParallelSettings) -> list[Row]:
    rows = []
    if parallel.sequence == 1:
        why = "parallel.sequence=1: nothing is shared along the sequence, two data-parallel ranks ran"
        rows.append(Row("sequence parallelism", NOT_TESTED, where=why))
    if settings.parallel.sequence != parallel.sequence:
        why = f"{parallel.sequence} ran in their place"
        rows.append(Row(f"{settings.parallel.sequence} sequence ranks", NOT_TESTED, where=why))
    if settings.parallel.experts != parallel.experts:
        why = f"{parallel.experts} ran in their place"
        rows.append(Row(f"{settings.parallel.experts} ranks that share out experts", NOT_TESTED, where=why))
    if settings.trainer.compile:
        rows.append(Row("trainer.compile=true", NOT_TESTED, where="the doctor compiles nothing"))
    return rows


def _sharing(parallel: ParallelSettings) -> int:
    """The fewest ranks that share rows and experts as these settings say; any number of ranks is a multiple of it."""
    return math.lcm(parallel.sequence, parallel.experts)


def _expert_ranks(ranks: int, model: dict, build: Build) -> int:
    """How many ranks share out the experts of the model in place of so many."""
    with torch.device("meta"):
        made = build(model)
    for fewer in range(min(ranks, MOST_EXPERT_RANKS), 1, -1):
        with suppress(ValueError):
            check_experts(made, fewer)
            if ranks % fewer == 0:
                return fewer
    return 1


def at_most(parallel: ParallelSettings, ranks: int) -> ParallelSettings:
    """The same kind of topology on at most so many ranks: by heads and by tokens, where it was both."""
    if parallel.sequence <= ranks:
        return parallel
    by_heads = ulysses_ranks(parallel)
    ring = parallel.sequence // by_heads
    fitting = [
        (u, r)
        for u in range(1, ranks + 1)
        for r in range(1, ranks // u + 1)
        if by_heads % u == 0 and (r > 1) == (ring > 1)  # heads that `by_heads` ranks divide can be divided by u too
    ]
    u, r = max(fitting, key=lambda pair: ((pair[0] > 1) == (by_heads > 1), pair[0] * pair[1]))
    return replace(parallel, sequence=u * r, ulysses=u if parallel.ulysses is not None else None)
