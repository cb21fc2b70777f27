"""Inexact checks: rounded types, whose errors may not exceed those of one device, and of rounding once."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import torch
from torch import Tensor

from ....models.language_model import LanguageModel
from ....parallel.sequence import Sequence
from .. import variants, work
from ..bench import Bench
from ..cases import FAR, Case, case_of_many
from ..truth import Call, Result, gradients_of, plain_op, plain_ops, run, truth_of
from . import comparison, ties
from .comparison import Difference

SHARPER = 4.0  # factor on an op's first tensor: a softmax that is nearly flat forgives what its parts lose
# Of errors relative to what is expected; smaller ones may be chance.
FLOORS = {torch.bfloat16: 2**-8, torch.float32: 2**-16}
AS_GOOD = "of the error against float64 that one device allows for"
ROUNDING = "of the error that rounding once and adding two such numbers allow for"
ADDED = 1.5  # errors of two rounded numbers added up, over that of one
AGAIN = 0.2  # of the entries may not be the exact ones rounded once; where partial results are rounded it is over 0.3
# What is rounded once: of these ops the gradients too (True) or neither (False); of all others the output alone.
ROUNDED_ONCE = {
    "softmax_attention": True, "block_sparse_attention": True, "compressed_attention": True, "window_means": True,
    "local_windows": True, "listed_latent_attention": True,
}  # fmt: skip
# These round what they compute on the way, as layers do: ranks are compared with one device in the same type.
ROUNDED_INSIDE = ("latent_attention",)  # the keys and values that a latent is expanded to


def rounded(bench: Bench, dtype: torch.dtype) -> None:
    """Errors of gradients, and of each op, in `dtype` against float64, compared with those of one device in that type.

    With positions far into a document they may not be larger than at its start, on ranks or not.
    """
    model, exact = bench.model(dtype), work.filled(bench.topology, dtype).double()
    name, cases = str(dtype).removeprefix("torch."), bench.cases[:3]
    far = replace(cases[0], far=True)
    truths = [truth_of(exact, case) for case in (*cases, far)]
    jobs = [(case, "none", dtype, truth.choices) for case, truth in zip((*cases, far), truths, strict=True)]
    *near, beyond = bench.share(work.run_cases, jobs)
    differences: list[Difference] = []
    at_start: dict[str, float] = {}
    for case, truth, parts in zip(cases, truths, near, strict=False):
        tokens, targets = case.tokens.to(bench.device), case.targets.to(bench.device)
        with plain_ops([], model.names, "auto"):
            single = work.on_host(run(model, Sequence.single(case.documents), tokens, targets, told=truth.choices))
        theirs = comparison.of_norms(single.gradients, truth.gradients)
        differences += _beside(bench, exact, case, truth, parts, theirs, dtype)
        at_start = at_start or theirs
    ran = bench.ran(name)
    bench.add(comparison.row(f"{name}: gradients beside one device's", differences, 1.0, ran, 5, unit=AS_GOOD))
    differences = _beside(bench, exact, far, truths[-1], beyond, at_start, dtype)
    bench.add(comparison.row(f"{name}: positions from {FAR:,} on", differences, 1.0, ran, 4, unit=AS_GOOD))
    _rounded_ops(bench, model, dtype)


def _beside(
    bench: Bench,
    exact: LanguageModel,
    case: Case,
    truth: Result,
    parts: list[Result],
    theirs: dict[str, float],
    dtype: torch.dtype,
) -> list[Difference]:
    """The ranks' errors compared with those of one device and, where that is not enough, with those of any rounding."""
    ours, floor = comparison.of_norms(comparison.together(parts, case.layout).gradients, truth.gradients), FLOORS[dtype]
    compared = _compared(ours, theirs, floor, case.name)
    if comparison.worst(compared).error > 1.0:
        noise = _noise(exact, case, truth, torch.finfo(dtype).eps / 2)
        compared = _compared(ours, {p: max(theirs[p], noise[p]) for p in theirs}, floor, case.name)
    return compared


def _compared(ours: dict[str, float], theirs: dict[str, float], floor: float, name: str) -> list[Difference]:
    """At most 1 where ranks are as good: of one parameter an error may be small by chance, of all it is not."""
    differences = [Difference(ours[p] / (3.0 * theirs[p] + 8 * floor), f"gradient of {p}; {name}") for p in ours]
    return [
        *differences,
        Difference(_mean(ours) / (1.5 * _mean(theirs) + 3 * floor), f"gradient of all parameters; {name}"),
    ]


def _noise(exact: LanguageModel, case: Case, truth: Result, rounding: float) -> dict[str, float]:
    """Errors of exact gradients where only the parameters are rounded: the effect of any rounding on a case.

    Where a layer normalises something close to 0 that is thousands of roundings, and one device may lose few by chance.
    """
    noise = dict.fromkeys(truth.gradients, 0.0)
    for seed in range(3):
        shaken, generator = copy.deepcopy(exact), torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in shaken.parameters():
                parameter *= 1 + rounding * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        errors = comparison.of_norms(truth_of(shaken, case, truth.choices).gradients, truth.gradients)
        noise = {name: max(noise[name], error) for name, error in errors.items()}
    return noise


def _rounded_ops(bench: Bench, model: LanguageModel, dtype: torch.dtype) -> None:
    """Each op over many spans, compared with its definition in float32 rounded once; on a GPU, with one device."""
    case, noted = case_of_many(bench.sequence, bench.topology.model["vocabulary"]), []
    with torch.no_grad(), plain_ops(noted, model.names, "auto"):
        model(case.tokens.to(bench.device), Sequence.single(case.documents))
    calls = [call.mapped(Tensor.cpu) for call in variants.distinct(noted)]
    calls += [sharper(call) for call in calls if call.op in variants.PAIRED]
    calls_and_douts = [(call, call.dout(dtype)) for call in calls]
    (parts,) = bench.share(work.replay, [(case, calls_and_douts)])
    by_op: dict[str, list[Difference]] = {}
    for index, (call, dout) in enumerate(calls_and_douts):
        mine = [part[index] for part in parts]
        found = of_call(bench, case, call, dout, mine, dtype)
        if comparison.worst(found).error > 1.0 and not all(call.per_token(case.layout.length)):
            (exact,) = bench.share(work.replay, [(case, [(call.mapped(exactly), dout.double())])])
            found = of_call(bench, case, call, dout, mine, dtype, [part[0] for part in exact])
        by_op.setdefault(call.op, []).extend(found)
    name = str(dtype).removeprefix("torch.")
    for op, differences in by_op.items():
        bench.add(comparison.row(f"{name}: op {op}", differences, 1.0, bench.ran(name), 1, unit=ROUNDING))


def of_call(
    bench: Bench,
    case: Case,
    call: Call,
    dout: Tensor,
    parts: list[list[Tensor]],
    dtype: torch.dtype,
    exact: list[list[Tensor]] | None = None,
) -> list[Difference]:
    """How much worse the ranks' parts of a call's results are than rounding once, see `worse`.

    exact: what the ranks gave in float64, where it is to count that each rounds its part of what they add up.
    """
    got, single = comparison.call_results(call, parts, case.layout), Sequence.single(case.documents)
    if bench.device.type == "cuda" or call.op in ROUNDED_INSIDE:
        placed = call.mapped(lambda x: x.to(bench.device))
        own = work.on_host(gradients_of(plain_op(call.op, "auto"), placed, dout.to(bench.device), single))
    else:
        float32 = call.mapped(lambda x: x.float() if x.is_floating_point() else x)
        own = gradients_of(plain_op(call.op), float32, dout.float(), single)
    truth = gradients_of(plain_op(call.op), call.mapped(exactly), dout.double(), single)
    if call.op == "select_blocks":  # of equal scores either may be listed
        mine, theirs, scores = (ties.finite_scores(call.mapped(exactly), case, x[0]) for x in (got, own, truth))
        error = comparison.rms(mine, scores) / (ADDED * comparison.rms(theirs, scores) + FLOORS[dtype])
        return [Difference(error, f"output in {bench.names[call.layer]}; {case.name}")]
    added = [False, *(not split for split in call.per_token(case.layout.length))]
    differences = []
    for index, name in enumerate(["output", *call.names()]):
        a, b, t = got[index], own[index], truth[index]
        if name == "output" and not call.of_the_row:
            a, b, t = (x[case.inside] for x in (a, b, t))
        of_parts = 0.0
        if exact is not None and added[index]:
            rounded = [(p[index].to(q[index].dtype).double() - p[index]) for p, q in zip(exact, parts, strict=True)]
            of_parts = comparison.rms(t + torch.stack(rounded).sum(0), t)
        what = name if name == "output" else f"gradient of {name}"
        error = worse(a, b.to(a.dtype), t, dtype, once=ROUNDED_ONCE.get(call.op, name == "output"), of_parts=of_parts)
        differences.append(Difference(error, f"{what} in {bench.names[call.layer]}; {case.name}"))
    return differences


def _mean(errors: dict[str, float]) -> float:
    """Root mean square of the parameters' errors."""
    return math.sqrt(sum(error**2 for error in errors.values()) / len(errors))


def worse(
    got: Tensor, single: Tensor, truth: Tensor, dtype: torch.dtype, *, once: bool, of_parts: float = 0.0
) -> float:
    """How much worse ranks are than `single`, and than rounding `truth` once: at most 1 where they are as good.

    once: nothing may be rounded twice, however many ranks give a part; others may add two rounded numbers. of_parts:
    the relative error of rounding each rank's part of a sum once, which no size of the sum bounds: parts may cancel.
    """
    best = max(comparison.rms(single, truth), comparison.rms(truth.to(dtype), truth), of_parts)
    least = FLOORS[dtype] if dtype == torch.float32 or not best else 0.0  # of sums that are none of the ranks' doing
    error = comparison.rms(got, truth) / (ADDED * best + least)
    if not once or got.dtype != torch.bfloat16:
        return error
    mine, theirs = (comparison.not_rounded_right(x, truth) for x in (got, single))
    return max(error, mine / (1.5 * theirs + AGAIN))


def exactly(x: Tensor) -> Tensor:
    """Numbers in float64; indices as they are."""
    return x.double() if x.is_floating_point() else x


def sharper(call: Call) -> Call:
    """The call with a larger first tensor, the queries of an attention."""
    return replace(call, args=(call.args[0] * SHARPER, *call.args[1:]))
