"""Exact checks: in float64 ranks must compute the same as one device, except for the order of sums."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ....kernels import pointwise
from ....kernels.documents import Documents
from ....kernels.pointwise import rope_frequencies
from ....models.activations.recomputation import Modes, used_modes
from ....models.decoding import next_logits
from ....models.feed_forward.router import Router
from ....models.layers.selectors.selector import Selector
from ....parallel.sequence import DecodingCache, Sequence
from .. import definitions, variants, work
from ..bench import Bench
from ..cases import NO_TARGET, Case, Change, changes
from ..truth import Call, alone, gradients_of, plain_op, plain_ops, run, truth_of
from . import comparison, ties
from .comparison import EXACT, Difference

# Of parameters, along a direction of length 1. Where gradients are small, rounding of the loss asks for a longer one.
STEPS = (2e-6, 2e-5, 2e-4, 2e-7)  # the last for losses of large third derivatives, such as steep gates make
SLOPE = 1e-5  # of differences: the third derivative and the rounding of losses make less than a tenth of it
ALL_LAYERS = 3  # cases in which the ops of all layers run; in the others, one of those that differ by layer alone
MODES = ("none", "mixing", "full")  # of trainer.activation_checkpointing


def one_process(bench: Bench) -> None:
    """Computes the truths, and compares them with documents by themselves and with one device without ranks."""
    model = bench.model(torch.float64)
    bench.truths = [truth_of(model, case) for case in bench.cases]
    packed, single = [], []
    for case, truth in bench.in_pairs():
        error = comparison.relative(truth.hidden[case.inside], alone(model, case)[case.inside])
        packed.append(Difference(error, f"hidden states; {case.name}"))
        own = run(model, Sequence.single(case.documents), case.tokens, case.targets)
        truth = ties.settled(bench, case, truth, own)
        single += comparison.of_layers(own, truth, bench.names, case)
        single.append(comparison.of_loss(own, truth, case))
        single += comparison.of_gradients(own.gradients, truth.gradients, case.name)
    bench.add(comparison.row("packed documents = each alone", packed, EXACT, "definitions, float64", 3))
    bench.add(comparison.row("one device = definitions", single, EXACT, "chunked, float64", 2, first=True))


def pointwise_functions(bench: Bench) -> None:
    """Rotation, norm, SwiGLU and loss as they are defined, with their gradients; in bfloat16, rounded once."""
    for name, (tensors, rest, settings) in _pointwise_inputs().items():
        differences = []
        for dtype in (torch.float64, torch.bfloat16):
            given = [x.to(dtype) for x in tensors]
            # In float32 a sum over a vocabulary, or over tokens, is not exact: twice the rounding is not told from it.
            got, expected = (
                _with_gradients(function, [x.to(kind) for x in given], rest, settings)
                for function, kind in ((getattr(pointwise, name), dtype), (getattr(definitions, name), torch.float64))
            )
            for what, a, b in zip(["output", "gradient of 1st", "gradient of 2nd"], got, expected, strict=False):
                error = comparison.relative(a, b) if dtype == torch.float64 else EXACT * _rounding_errors(a, b)
                differences.append(Difference(error, f"{what} in {str(dtype).removeprefix('torch.')}"))
        bench.add(comparison.row(f"function {name}", differences, EXACT, "float64, bfloat16", 0))


def _pointwise_inputs() -> dict[str, tuple[list[Tensor], list[Tensor], dict[str, Any]]]:
    """For each function: tensors that have gradients, others, and settings."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        # Bfloat16 holds them exactly.
        return torch.randn(shape, generator=generator).bfloat16().double()

    positions = torch.stack([torch.arange(40), 100_000 + torch.arange(40)])  # no float of 16 bits counts so far
    targets = torch.randint(61, (2, 600), generator=generator)
    targets[0, 5:20] = NO_TARGET
    return {
        "rope": ([normal(2, 40, 3, 12)], [positions], {"inverse_frequencies": rope_frequencies(8, 10000.0)[0]}),
        "rms_norm": ([normal(2, 40, 24), normal(24)], [], {"offset": 1.0}),
        "swiglu": ([normal(2, 40, 24), normal(2, 40, 24)], [], {}),
        "cross_entropy": ([normal(2, 600, 24), normal(61, 24) / 4], [targets], {"chunk": 512}),
    }


def _with_gradients(function: Any, tensors: list[Tensor], rest: list[Tensor], settings: dict[str, Any]) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in tensors]
    out = function(*leaves, *rest, **settings)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    out.backward(dout.bfloat16().to(out.dtype))
    return [out.detach(), *(x.grad for x in leaves if x.grad is not None)]


def _rounding_errors(got: Tensor, exact: Tensor) -> float:
    """The error in units of twice that of rounding the exact result to bfloat16."""
    return comparison.rms(got, exact) / (2 * comparison.rms(exact.bfloat16(), exact))


def differences(bench: Bench) -> None:
    """The gradients of one device, compared with the change of the loss along a random direction.

    Truth and ranks run the same mixers: a gradient that one of these gets wrong, a detach too many for instance, agrees
    everywhere but with the loss itself.
    """
    model, case, truth = bench.model(torch.float64), bench.cases[bench.longest], bench.truths[bench.longest]
    seq = Sequence.single(case.documents)

    def loss_at(name: str, parameter: Tensor, change: Tensor) -> float:
        parameter += change
        with torch.enable_grad():  # without it auxiliary losses need not be there
            loss, _, reports = model(case.tokens, seq, case.targets, False, True)
        parameter -= change
        own = [path for path in model.losses if name.startswith(model.detached.get(path, ""))]
        return float(loss) + sum(model.losses[path] * float(reports[path]) for path in own)

    differences, generator = [], torch.Generator().manual_seed(0)
    floor = 1e-4 * max(float(g.norm()) for g in truth.gradients.values())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            direction /= direction.norm()
            gradient, errors = truth.gradients[name], [math.inf]
            # Both are of the size of the gradient's norm over the root of its numbers, and small only by chance.
            scale = max(float(gradient.norm()), floor) / math.sqrt(parameter.numel())
            for length in STEPS:
                if min(errors) > SLOPE:
                    step = length * direction
                    slope = (loss_at(name, parameter, step) - loss_at(name, parameter, -step)) / (2 * length)
                    errors.append(abs(slope - float((gradient * direction).sum())) / scale)
            differences.append(Difference(min(errors), f"{name}; {case.name}"))
    unit = "of a slope as steep as the gradient is long"
    bench.add(comparison.row("gradient = difference of losses", differences, SLOPE, "chunked, float64", 2, unit=unit))


def detached(bench: Bench) -> None:
    """A loss that is to train one layer alone has no gradient elsewhere."""
    model, case = bench.model(torch.float64), bench.cases[bench.longest]
    if not model.detached:
        return
    _, _, reports = model(case.tokens, Sequence.single(case.documents), case.targets, False, True)
    differences = []
    for path, layer in model.detached.items():
        named = [(name, p) for name, p in model.named_parameters() if not name.startswith(layer)]
        gradients = torch.autograd.grad(reports[path], [p for _, p in named], retain_graph=True, allow_unused=True)
        for (name, _), gradient in zip(named, gradients, strict=True):
            error = 0.0 if gradient is None else float(gradient.abs().max())
            differences.append(Difference(error, f"loss {path} reaches {name}" if error else f"loss {path}"))
    row = "a detached loss reaches its layer alone"
    bench.add(comparison.row(row, differences, 0.0, "chunked, float64", 2, unit="of gradient"))


def model(bench: Bench) -> None:
    """Loss, outputs of the mixers, what layers report, and gradients of the whole model."""
    shared = bench.share(work.run_cases, [(case, "none", torch.float64, None) for case in bench.cases])
    losses, layers, gradients, reports = [], [], [], []
    for (case, truth), parts in zip(bench.in_pairs(), shared, strict=True):
        got = comparison.together(parts, case.layout)
        truth = ties.settled(bench, case, truth, got)
        losses.append(comparison.of_loss(got, truth, case))
        layers += comparison.of_layers(got, truth, bench.names, case)
        gradients += comparison.of_gradients(got.gradients, truth.gradients, case.name)
        for path, value in truth.reports.items():
            error = comparison.relative(got.reports[path], value)
            reports.append(Difference(error, f"{path}; {case.name}"))
    ran = bench.ran("float64")
    if reports:
        bench.add(comparison.row("auxiliary losses and sums", reports, EXACT, ran, 2))
    bench.add(comparison.row("loss and number of targets", losses, EXACT, ran, 5))
    bench.add(comparison.row("output of every mixer", layers, EXACT, ran, 1, first=True))
    bench.add(comparison.row("gradient of every parameter", gradients, EXACT, ran, 4))


def operations(bench: Bench) -> None:
    """The ops with the same inputs as in the model, so that an error is theirs alone.

    And with windows, blocks and taps at the edges of spans, and on rows whose spans hold several chunks.
    """
    jobs = []
    for number, (case, truth) in enumerate(bench.in_pairs()):
        own = truth.calls if number < ALL_LAYERS else variants.distinct(truth.calls)
        jobs.append((case, [*own, *variants.edge_calls(case, truth.calls)]))
    jobs += [(case, [call]) for case, call in variants.long_jobs(bench.truths[0].calls, bench.sequence)]
    calls_of_cases = [(case, [(call, call.dout(torch.float64)) for call in calls]) for case, calls in jobs]
    shared = bench.share(work.replay, calls_of_cases)
    by_op: dict[str, list[Difference]] = {}
    for (case, calls), parts in zip(calls_of_cases, shared, strict=True):
        for index, (call, dout) in enumerate(calls):
            got = comparison.call_results(call, [part[index] for part in parts], case.layout)
            expected = gradients_of(plain_op(call.op), call, dout, Sequence.single(case.documents))
            by_op.setdefault(call.op, []).extend(_of_call(bench, call, case, got, expected))
    for op, differences in by_op.items():
        bench.add(comparison.row(f"op {op}", differences, EXACT, bench.ran("float64"), 0, first=True))


def _of_call(bench: Bench, call: Call, case: Case, got: list[Tensor], expected: list[Tensor]) -> list[Difference]:
    place = f"{bench.names[call.layer]}; {call.variant}{case.name}"
    inside = slice(None) if call.of_the_row else case.inside
    floor = 1e-4 * max((float(g.abs().max()) for g in expected[1:]), default=0.0)
    if call.op == "select_blocks":  # of equal scores either may be listed
        error = ties.difference(call, case, got[0], expected[0])
    else:
        error = comparison.relative(got[0][inside], expected[0][inside])
    differences = [Difference(error, f"output in {place}")]
    for name, a, b in zip(call.names(), got[1:], expected[1:], strict=True):
        differences.append(Difference(comparison.relative(a, b, floor), f"gradient of {name} in {place}"))
    return differences


def leaks(bench: Bench) -> None:
    """One token is changed: nothing before it and no other document may move by a bit, and the next token must."""
    listed = [changes(case) for case in bench.cases]
    jobs = [
        (case, [case.tokens, *(change.tokens for change in made)])
        for case, made in zip(bench.cases, listed, strict=True)
    ]
    shared = bench.share(work.probe, jobs)
    leaked, unmoved = [], []
    for case, made, parts in zip(bench.cases, listed, shared, strict=True):
        base, *others = [case.layout.unshard(list(hidden)) for hidden in zip(*parts, strict=True)]
        for change, hidden in zip(made, others, strict=True):
            moved = (hidden - base).abs().amax(-1).nan_to_num(math.inf)
            moved[~case.inside] = 0.0
            for row, place, stop in change.places:
                still = int((moved[row, place:stop][:2] == 0).sum())
                if still:  # not every token is selected
                    still -= int((_moved_in_truth(bench, case, change)[row, place:stop][:2] == 0).sum())
                unmoved.append(Difference(float(still), f"token {place} of row {row}; {case.name}"))
                moved[row, place:stop] = 0.0
            row, token = divmod(int(moved.flatten().argmax()), case.layout.length)
            where = f"token {token} of row {row} moves with {_tokens(change)}; {case.name}"
            leaked.append(Difference(float(moved.max() / base.abs().max()), where if moved.any() else case.name))
    ran = bench.ran("float64")
    # How many rows an expert has, or queries a block, depends on all tokens: by it a library's product adds up.
    chosen = any(isinstance(module, (Router, Selector)) for module in bench.model(torch.float64).modules())
    limit = EXACT if chosen else 0.0
    bench.add(comparison.row("no leak between documents or from the future", leaked, limit, ran, 3))
    bench.add(comparison.row("a token moves itself and the next", unmoved, 0.0, ran, 6, unit="tokens that stay"))


@torch.no_grad()
def _moved_in_truth(bench: Bench, case: Case, change: Change) -> Tensor:
    """`[B, N]`: how far the hidden states move by definitions."""
    model, seq = bench.model(torch.float64), Sequence.single(case.documents)
    with plain_ops([], model.names):
        base, other = (model.hidden(tokens, seq) for tokens in (case.tokens, change.tokens))
    return (other - base).abs().amax(-1)


def _tokens(change: Change) -> str:
    return " and ".join(f"token {place} of row {row}" for row, place, _ in change.places)


def recomputation(bench: Bench, own: Modes) -> None:
    """The gradient under each mode of activation checkpointing, the configuration's first."""
    modes = sorted(MODES, key=lambda mode: mode not in used_modes(own))
    chosen = range(min(3, len(bench.cases)))
    shared = bench.share(
        work.run_cases, [(bench.cases[n], mode, torch.float64, None) for mode in modes for n in chosen]
    )
    for mode in modes:
        differences = []
        for n in chosen:
            case, truth = bench.cases[n], bench.truths[n]
            got = comparison.together(shared.pop(0), case.layout)
            truth = ties.settled(bench, case, truth, got)
            differences += comparison.of_gradients(got.gradients, truth.gradients, case.name)
        bench.add(comparison.row(f"activation_checkpointing={mode}", differences, EXACT, bench.ran("float64"), 5))


def decoding(bench: Bench) -> None:
    """Three tokens are read at once and then one at a time, compared with one forward."""
    made, tokens = bench.model(torch.float64), bench.cases[0].tokens
    with torch.no_grad():
        with plain_ops([], made.names):
            logits = made(tokens, Sequence.single(Documents.whole(*tokens.shape)))
        cache, differences, length = DecodingCache(), [], tokens.shape[1]
        for start, stop in [(0, 3), *((n, n + 1) for n in range(3, length))]:
            got = next_logits(made, tokens[:, start:stop], cache)
            differences.append(
                Difference(comparison.relative(got, logits[:, stop - 1]), f"logits after token {stop - 1}")
            )
    bench.add(comparison.row("decoding = forward", differences, EXACT, "chunked, float64", 3, first=True))
