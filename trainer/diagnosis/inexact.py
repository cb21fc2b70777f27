"""Inexact checks: the engine in float32, and rounded types, whose errors may not exceed those of one device."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import torch
from torch import Tensor

from ...models.language_model import LanguageModel
from ...parallel.sequence import Sequence
from ..engine import EngineSettings
from . import checks, work
from .bench import Bench
from .cases import NO_TARGET, Case
from .checks import Difference
from .truth import Call, gradients_of, merges, plain_op, plain_ops, run, truth_of

SHARPER = 4.0  # factor on an op's first tensor: a softmax that is nearly flat forgives what its parts lose
# Of errors relative to what is expected; below this nothing is told from chance.
FLOORS = {torch.bfloat16: 2**-8, torch.float32: 2**-16}
Replay = tuple[Case, list[tuple[Call, Tensor]]]


def zero_stages(bench: Bench, own: EngineSettings, dtype: str) -> None:
    """A step under the engine on every stage, the configuration's first: loss, gradient norm and gradients.

    Data ranks and micro-batches have very different numbers of targets, so that a mean of means is not the mean.
    """
    rows = _engine_rows(bench)
    model = bench.model(torch.float64).cpu()
    truths = [run(model, Sequence.single(case.documents), case.tokens, case.targets) for case in rows]
    targets = sum(truth.targets for truth in truths)
    loss = sum(float(truth.loss) for truth in truths) / targets
    gradients = {name: checks.sum_of([t.gradients[name] for t in truths]) / targets for name in truths[0].gradients}
    norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
    shapes = {name: g.shape for name, g in gradients.items()}
    what = f"rows of {', '.join(str(truth.targets) for truth in truths)} targets"

    def check(stage: int, dtype: str, limit: float) -> None:
        chosen = own if stage == own.zero_stage else EngineSettings(stage)
        parts = bench.run(work.engine_step, rows, chosen, dtype)
        found = [
            Difference(abs(sum(part.loss for part in parts) - loss) / loss, f"loss; {what}"),
            *(Difference(abs(part.norm - norm) / norm, f"gradient norm; {what}") for part in parts),
        ]
        if dtype == "float32":
            found += checks.of_gradients(checks.assembled(parts, shapes), gradients, what)
        found = [d if d.error == d.error else d._replace(error=math.inf) for d in found]
        ran = f"DeepSpeed, {bench.ran(dtype)}"
        bench.add(checks.row(f"ZeRO-{stage}: one step over all ranks", checks.worst(found), limit, ran, 5))

    for stage in sorted(range(4), key=lambda stage: stage != own.zero_stage):
        check(stage, "float32", 1e-3)
    if dtype != "float32":
        check(own.zero_stage, dtype, 5e-2)


def _engine_rows(bench: Bench) -> list[Case]:
    rows = []
    for index in range(2 * bench.data_ranks):
        case = bench.cases[index % 3]
        targets = case.targets.clone()
        targets[:, case.layout.length // (index + 1) :] = NO_TARGET
        rows.append(replace(case, targets=targets))
    return rows


def rounded(bench: Bench, dtype: torch.dtype) -> None:
    """Errors of gradients, and of each op, in `dtype` against float64: beside those of one device in that type."""
    model, exact = bench.model(dtype), work.filled(bench.topology, dtype).double()
    floor = FLOORS[dtype]
    cases, name = bench.cases[:3], str(dtype).removeprefix("torch.")
    shared = bench.share(work.run_cases, [(case, "none", dtype) for case in cases])
    found: list[Difference] = []
    replays: list[Replay] = []
    for case, parts in zip(cases, shared, strict=True):
        calls: list[Call] = []
        tokens, targets = case.tokens.to(bench.device), case.targets.to(bench.device)
        with plain_ops(calls, model.names, "auto"):
            single = work.on_host(run(model, Sequence.single(case.documents), tokens, targets))
        truth = truth_of(exact, case)
        ours = checks.of_norms(checks.together(parts, case.layout).gradients, truth.gradients)
        theirs = checks.of_norms(single.gradients, truth.gradients)
        compared = _compared(ours, theirs, floor, case.name)
        if checks.worst(compared).error > 1.0:
            noise = _noise(exact, case, truth.gradients, torch.finfo(dtype).eps / 2)
            compared = _compared(ours, {p: max(theirs[p], noise[p]) for p in theirs}, floor, case.name)
        found += compared
        calls = [call.mapped(Tensor.cpu) for call in calls]
        replays.append((case, [(c, c.dout(dtype)) for call in calls for c in (call, sharper(call))]))
    ran = bench.ran(name)
    bench.add(checks.row(f"{name}: gradients beside one device's", checks.worst(found), 1.0, ran, 5))
    _rounded_ops(bench, dtype, replays)


def _compared(ours: dict[str, float], theirs: dict[str, float], floor: float, name: str) -> list[Difference]:
    """At most 1 where ranks are as good: of one parameter an error may be small by chance, of all it is not."""
    found = [Difference(ours[p] / (3.0 * theirs[p] + 8 * floor), f"gradient of {p}; {name}") for p in ours]
    return [*found, Difference(_mean(ours) / (1.5 * _mean(theirs) + 3 * floor), f"gradient of all parameters; {name}")]


def _noise(exact: LanguageModel, case: Case, truth: dict[str, Tensor], rounding: float) -> dict[str, float]:
    """Errors of exact gradients where only the parameters are rounded: what a case makes of any rounding.

    Where a layer normalises something close to 0 that is thousands of roundings, and one device may lose few by chance.
    """
    noise = dict.fromkeys(truth, 0.0)
    for seed in range(3):
        shaken, generator = copy.deepcopy(exact), torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in shaken.parameters():
                parameter *= 1 + rounding * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        errors = checks.of_norms(truth_of(shaken, case).gradients, truth)
        noise = {name: max(noise[name], error) for name, error in errors.items()}
    return noise


def _rounded_ops(bench: Bench, dtype: torch.dtype, replays: list[Replay]) -> None:
    shared = bench.share(work.replay, replays)
    found: dict[str, list[Difference]] = {}
    for (case, calls), parts in zip(replays, shared, strict=True):
        single = Sequence.single(case.documents)
        for index, (call, dout) in enumerate(calls):
            got = checks.call_results(call, [part[index] for part in parts], case.layout)
            here = call.mapped(lambda x: x.to(bench.device))
            own = work.on_host(gradients_of(plain_op(call.op, "auto"), here, dout.to(bench.device), single))
            truth = gradients_of(plain_op(call.op), call.mapped(exactly), dout.double(), single)
            place = f"{bench.names[call.layer]}; {case.name}"
            for name, *values in zip(["output", *call.names()], got, own, truth, strict=True):
                a, b, t = (
                    (x[case.inside] for x in values) if name == "output" and not call.of_the_row else values
                )
                what = name if name == "output" else f"gradient of {name}"
                error = Difference(worse(a, b, t, FLOORS[dtype], once=merges(call.op)), f"{what} in {place}")
                found.setdefault(call.op, []).append(error)
    type_name = str(dtype).removeprefix("torch.")
    for op, differences in found.items():
        row = f"{type_name}: op {op} beside one device's"
        bench.add(checks.row(row, checks.worst(differences), 1.0, bench.ran(type_name), 1))


def _mean(errors: dict[str, float]) -> float:
    """Root mean square of the parameters' errors."""
    return math.sqrt(sum(error**2 for error in errors.values()) / len(errors))


def worse(got: Tensor, single: Tensor, truth: Tensor, floor: float, *, once: bool) -> float:
    """How much worse than one device ranks are: at most 1 where they are as good.

    once: the op is to round once, however many ranks give a part; others may add two rounded numbers.
    """
    error = checks.rms(got, truth) / (1.5 * checks.rms(single, truth) + floor)
    if not once or got.dtype != torch.bfloat16:
        return error
    mine, theirs = (checks.not_rounded_right(x, truth) for x in (got, single))
    return max(error, mine / (1.5 * theirs + 0.03))


def exactly(x: Tensor) -> Tensor:
    """Numbers in float64; indices as they are."""
    return x.double() if x.is_floating_point() else x


def sharper(call: Call) -> Call:
    """The call with a larger first tensor, the queries of an attention."""
    return replace(call, args=(call.args[0] * SHARPER, *call.args[1:]))
