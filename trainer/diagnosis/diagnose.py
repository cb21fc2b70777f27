"""Diagnose: a configuration under its topology against one device, check after check."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...kernels.documents import Documents
from ...models.decoding import next_logits
from ...parallel.sequence import DecodingCache, Sequence
from ..engine import EngineSettings
from ..preparation import check_model
from ..settings import ParallelSettings, Settings, check, spans_of, ulysses_ranks
from . import checks, work
from .cases import Case, make_cases, variants
from .checks import EXACT, Difference
from .model import Build, complete, layer_names, reduced
from .ranks import RankFailure, Ranks
from .report import FAIL, NOT_TESTED, Report, Row
from .truth import Call, Result, alone, merges, plain, plain_ops, run, truth_of
from .work import Topology, gradients_of

MOST_RANKS = 8
LIMIT_SECONDS = 120.0  # for one function on the ranks
MODES = ("none", "mixing", "full")
SHARPER = 4.0  # factor on an op's first tensor: a softmax that is nearly flat forgives what its parts lose


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
    Raises ValueError for a configuration that no model can be made of.
    """
    return _Diagnosis(settings, build, whole, say, prepare).run()


class _Diagnosis:
    def __init__(
        self, settings: Settings, build: Build, whole: bool, say: Callable[[str], None], prepare: str | None
    ) -> None:
        check(settings, settings.parallel.sequence)
        check_model(build, complete(settings.model), settings.parallel.mixers)
        self.settings, self.say, self.prepare = settings, say, prepare
        self.parallel = at_most(settings.parallel, MOST_RANKS)
        self.sequence, self.spans = self.parallel.sequence, spans_of(self.parallel)
        self.data_ranks = 2 if self.sequence <= 2 else 1
        self.world = self.data_ranks * self.sequence
        window = max(2, 7 * self.spans * 3 // 2)
        model = complete(settings.model) if whole else reduced(settings.model, build, window=window)
        self.topology = Topology(build, model, self.parallel)
        self.models = {torch.float64: work.filled(self.topology, torch.float64)}
        self.names = layer_names(self.models[torch.float64])
        self.cases = make_cases(self.sequence, self.spans, model["vocabulary"])
        self.truths: list[Result] = []
        self.ranks: Ranks | None = None
        self.broken = 0
        by_heads = ulysses_ranks(self.parallel)
        chosen = [f"attention {self.parallel.attention}", f"recurrent layers {self.parallel.recurrent}"]
        chosen += [f"{name} {strategy}" for name, strategy in self.parallel.mixers.items()]
        self.report = Report(
            f"{len(self.names)} layers of width {model['width']}; {self.data_ranks} data x {self.sequence} sequence "
            f"rank(s){f' of which {by_heads} by heads' if by_heads > 1 else ''}, {self.spans} span(s) each; "
            f"{', '.join(chosen)}"
        )

    def run(self) -> Report:
        try:
            for title, step in (
                ("truth: one process, the kernels' references", self._truth),
                ("float64: model", self._model),
                ("float64: every op by itself", self._ops),
                ("leaks between documents and from the future", self._leaks),
                ("recomputation", self._checkpointing),
                ("decoding", self._decoding),
                ("ZeRO stages", self._engine),
                ("bfloat16", self._low_precision),
            ):
                self._attempt(title, step)
        finally:
            if self.ranks is not None:
                self.ranks.close()
        self._not_tested()
        return self.report

    def _attempt(self, title: str, step: Callable[[], None]) -> None:
        if self.broken > 1:
            self._add(Row(title, NOT_TESTED, where="ranks failed twice before"))
            return
        started = time.monotonic()
        try:
            step()
        except RankFailure as failure:
            self.ranks, self.broken = None, self.broken + 1
            self._add(Row(title, FAIL, where=str(failure), precedence=8))
        except Exception as error:  # whatever a broken part raises here is a finding, not a crash of the doctor
            self._add(Row(title, FAIL, where=f"{type(error).__name__}: {error}", precedence=7))
        self.say(f"{title}: {time.monotonic() - started:.1f} s")

    def _add(self, row: Row) -> None:
        self.report.rows.append(row)

    def _on_ranks(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        if self.ranks is None:
            self.ranks = Ranks(self.world, prepare=self.prepare)
            self.ranks.run(work.configure, self.topology, timeout=LIMIT_SECONDS)
        return self.ranks.run(function, *args, timeout=LIMIT_SECONDS)

    def _jobs(self, function: Callable[..., dict[int, Any]], jobs: list[Any]) -> list[list[Any]]:
        """For each job what the ranks that shared it gave, in their order."""
        answers = self._on_ranks(function, jobs)
        shared = []
        for number in range(len(jobs)):
            first = number % self.data_ranks * self.sequence
            shared.append([answers[first + rank][number] for rank in range(self.sequence)])
        return shared

    def _ran(self, dtype: str) -> str:
        chosen: dict[str, str] = {}
        for answer in self._on_ranks(work.backends):
            chosen.update(answer)
        return f"{', '.join(sorted(set(chosen.values()))) or 'torch'}, {dtype}"

    def _model_of(self, dtype: torch.dtype) -> Any:
        if dtype not in self.models:
            self.models[dtype] = work.filled(self.topology, dtype)
        return self.models[dtype]

    def _truth(self) -> None:
        model = self._model_of(torch.float64)
        self.truths = [truth_of(model, case) for case in self.cases]
        packed, single = [], []
        for case, truth in zip(self.cases, self.truths, strict=True):
            error = checks.relative(truth.hidden[case.inside], alone(model, case)[case.inside])
            packed.append(Difference(error, f"hidden states; {case.name}"))
            own = run(model, Sequence.single(case.documents), case.tokens, case.targets)
            single += checks.of_layers(own, truth, self.names, case)
            single += checks.of_gradients(own.gradients, truth.gradients, case.name)
        self._add(checks.row("packed documents = each alone", checks.worst(packed), EXACT, "reference, float64", 3))
        self._add(checks.row("one device = references", checks.first_over(single, EXACT), EXACT, "auto, float64", 2))

    def _model(self) -> None:
        jobs = [(case, "none", torch.float64) for case in self.cases]
        shared = self._jobs(work.run_cases, jobs)
        losses, layers, gradients = [], [], []
        for case, truth, parts in zip(self.cases, self.truths, shared, strict=True):
            got = checks.together(parts, case.layout)
            losses.append(checks.of_loss(got, truth, case))
            layers += checks.of_layers(got, truth, self.names, case)
            gradients += checks.of_gradients(got.gradients, truth.gradients, case.name)
        ran = self._ran("float64")
        self._add(checks.row("loss and number of targets", checks.worst(losses), EXACT, ran, 5))
        self._add(checks.row("output of every mixer", checks.first_over(layers, EXACT), EXACT, ran, 1))
        self._add(checks.row("gradient of every parameter", checks.worst(gradients), EXACT, ran, 4))

    def _ops(self) -> None:
        """The ops with the very inputs that they have in the model, so that an error is theirs alone."""
        jobs = [(case, [(call, self._dout(call)) for call in truth.calls]) for case, truth in self._with_truths()]
        shared = self._jobs(work.replay, jobs)
        found: dict[str, list[Difference]] = {}
        for (case, calls), parts in zip(jobs, shared, strict=True):
            for index, (call, dout) in enumerate(calls):
                got = checks.call_results(call, [part[index] for part in parts], case.layout)
                expected = gradients_of(plain(call.op), call, dout, Sequence.single(case.documents))
                found.setdefault(call.op, []).extend(self._of_call(call, case, got, expected))
        for op, differences in found.items():
            where = checks.first_over(differences, EXACT)
            self._add(checks.row(f"op {op}", where, EXACT, self._ran("float64"), 0))

    def _with_truths(self) -> list[tuple[Case, Result]]:
        return list(zip(self.cases, self.truths, strict=True))

    def _of_call(self, call: Call, case: Case, got: list[Tensor], expected: list[Tensor]) -> list[Difference]:
        inside, place = case.inside, f"{self.names[call.layer]}; {case.name}"
        outputs = Difference(checks.relative(got[0][inside], expected[0][inside]), f"output in {place}")
        floor = 1e-6 * max((float(g.abs().max()) for g in expected[1:]), default=0.0)
        return [
            outputs,
            *(
                Difference(checks.relative(a, b, floor), f"gradient of {name} in {place}")
                for name, a, b in zip(call.names(), got[1:], expected[1:], strict=True)
            ),
        ]

    def _dout(self, call: Call) -> Tensor:
        """A gradient for the output of a call: random, of the output's shape."""
        shape = self._shape(call)
        return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(call.layer), dtype=torch.float64)

    def _shape(self, call: Call) -> torch.Size:
        documents = Documents.whole(*call.tensors()[0].shape[:2])
        with torch.no_grad():
            return plain(call.op)(*call.args, **call.kwargs, seq=Sequence.single(documents)).shape

    def _leaks(self) -> None:
        jobs, changes = [], []
        for case in self.cases:
            listed = [(row, *change) for row in range(len(case.lengths)) for change in variants(case, row)]
            changes.append(listed)
            jobs.append((case, [case.tokens, *(tokens for *_, tokens in listed)]))
        shared = self._jobs(work.probe, jobs)
        leaks, reached = [], []
        for (case, _), listed, parts in zip(jobs, changes, shared, strict=True):
            base, *others = [case.layout.unshard(list(hidden)) for hidden in zip(*parts, strict=True)]
            for (row, place, stop, _), hidden in zip(listed, others, strict=True):
                moved = (hidden - base).abs().amax(-1)
                must = moved[row, place:stop].clone()
                moved[row, place:stop] = 0.0
                moved[~case.inside] = 0.0
                token = int(moved.flatten().argmax())
                where = f"row {row}: token {token % case.layout.length} changes with token {place}; {case.name}"
                leaks.append(Difference(float(moved.max() / base.abs().max()), where))
                stays = int((must[:2] == 0).sum())
                reached.append(Difference(float(stays), f"row {row}: token {place} moves nothing; {case.name}"))
        ran = self._ran("float64")
        self._add(checks.row("no leak between documents or from the future", checks.worst(leaks), 0.0, ran, 3))
        self._add(checks.row("a token reaches the next", checks.worst(reached), 0.0, ran, 6))

    def _checkpointing(self) -> None:
        own = self.settings.trainer.activation_checkpointing
        case = self.cases[0]
        modes = sorted(MODES, key=lambda mode: mode != own)
        shared = self._jobs(work.run_cases, [(case, mode, torch.float64) for mode in modes])
        for mode, parts in zip(modes, shared, strict=True):
            got = checks.together(parts, case.layout)
            found = checks.worst(checks.of_gradients(got.gradients, self.truths[0].gradients, case.name))
            self._add(checks.row(f"activation_checkpointing={mode}", found, EXACT, self._ran("float64"), 5))

    def _decoding(self) -> None:
        model, case = self._model_of(torch.float64), self.cases[0]
        tokens, length, begin = case.tokens, case.layout.length, 3
        with torch.no_grad():
            with plain_ops([], model.names):
                logits = model(tokens, Sequence.single(Documents.whole(*tokens.shape)))
            cache, found = DecodingCache(), []
            for start in (0, *range(begin, length)):
                stop = begin if start == 0 else start + 1
                got = next_logits(model, tokens[:, start:stop], cache)
                found.append(Difference(checks.relative(got, logits[:, stop - 1]), f"logits after token {stop - 1}"))
        self._add(checks.row("decoding = forward", checks.first_over(found, EXACT), EXACT, "auto, float64", 3))

    def _engine(self) -> None:
        own = self.settings.engine
        rows = self._engine_rows()
        model = self._model_of(torch.float64)
        truths = [run(model, Sequence.single(c.documents), c.tokens, c.targets) for c in rows]
        targets = sum(truth.targets for truth in truths)
        loss = sum(float(truth.loss) for truth in truths) / targets
        gradients = {name: sum(t.gradients[name] for t in truths) / targets for name in truths[0].gradients}
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
        shapes = {name: g.shape for name, g in gradients.items()}
        for stage in sorted(range(4), key=lambda stage: stage != own.zero_stage):
            chosen = own if stage == own.zero_stage else EngineSettings(stage)
            parts = self._on_ranks(work.engine_step, rows, chosen, "float32")
            total = sum(part.loss for part in parts)
            what = f"rows with {', '.join(str(t.targets) for t in truths)} targets"
            got = checks.assembled(parts, shapes)
            found = [
                Difference(abs(total - loss) / loss, f"loss; {what}"),
                *(Difference(abs(part.norm - norm) / norm, f"gradient norm; {what}") for part in parts),
                *checks.of_gradients(got, gradients, what),
            ]
            ran = f"DeepSpeed, {self._ran('float32')}"
            self._add(checks.row(f"ZeRO-{stage}: loss and gradient over all ranks", checks.worst(found), 1e-3, ran, 5))

    def _engine_rows(self) -> list[Case]:
        """Rows of one batch, with very different numbers of targets: two micro-batches a data rank."""
        rows = []
        for index in range(2 * self.data_ranks):
            case = self.cases[index % 3]
            targets = case.targets.clone()
            keep = case.layout.length // (index + 1)
            targets[:, keep:] = -100
            rows.append(replace(case, targets=targets))
        return rows

    def _low_precision(self) -> None:
        dtype = torch.bfloat16
        model = self._model_of(dtype)
        exact = work.filled(self.topology, dtype).double()
        cases = self.cases[:3]
        shared = self._jobs(work.run_cases, [(case, "none", dtype) for case in cases])
        found = []
        replays: list[tuple[Case, list[tuple[Call, Tensor]]]] = []
        for case, parts in zip(cases, shared, strict=True):
            calls: list[Call] = []
            with plain_ops(calls, model.names, "auto"):
                single = run(model, Sequence.single(case.documents), case.tokens, case.targets)
            truth = truth_of(exact, case)
            got = checks.together(parts, case.layout)
            ours = checks.of_norms(got.gradients, truth.gradients)
            theirs = checks.of_norms(single.gradients, truth.gradients)
            found += [
                Difference(ours[name] / (3.0 * theirs[name] + 0.03), f"gradient of {name}; {case.name}")
                for name in ours
            ]
            found.append(
                Difference(norm(ours) / (1.5 * norm(theirs) + 0.01), f"gradient of all parameters; {case.name}")
            )
            replays.append((case, [(c, self._dout(c)) for call in calls for c in (call, sharper(call))]))
        ran = self._ran("bfloat16")
        limit = 1.0
        self._add(checks.row("bfloat16: error of gradients beside one device's", checks.worst(found), limit, ran, 5))
        self._low_precision_ops(replays, ran)

    def _low_precision_ops(self, replays: list[tuple[Case, list[tuple[Call, Tensor]]]], ran: str) -> None:
        shared = self._jobs(work.replay, replays)
        found: dict[str, list[Difference]] = {}
        for (case, calls), parts in zip(replays, shared, strict=True):
            single = Sequence.single(case.documents)
            for index, (call, dout) in enumerate(calls):
                got = checks.call_results(call, [part[index] for part in parts], case.layout)
                own = gradients_of(plain(call.op, "auto"), call, dout.to(torch.bfloat16), single)
                truth = gradients_of(
                    plain(call.op), call.mapped(lambda x: x.double()), dout.to(torch.bfloat16).double(), single
                )
                place = f"{self.names[call.layer]}; {case.name}"
                for name, a, b, t in zip(["output", *call.names()], got, own, truth, strict=True):
                    a, b, t = (x[case.inside] if name == "output" else x for x in (a, b, t))
                    error = worse(a, b, t, once=merges(call.op))
                    found.setdefault(call.op, []).append(Difference(error, f"{name} in {place}"))
        for op, differences in found.items():
            self._add(checks.row(f"bfloat16: op {op} beside one device", checks.worst(differences), 1.0, ran, 1))

    def _not_tested(self) -> None:
        gpu = "no CUDA device here"
        for what, why in (("Triton kernels", gpu), ("NCCL", gpu), ("flash-attn", gpu)):
            self._add(Row(what, NOT_TESTED, where=why))
        if self.settings.trainer.compile:
            self._add(Row("trainer.compile=true", NOT_TESTED, where="the doctor compiles nothing"))


def norm(errors: dict[str, float]) -> float:
    """Root mean square of the parameters' errors."""
    return math.sqrt(sum(error**2 for error in errors.values()) / len(errors))


def worse(got: Tensor, single: Tensor, truth: Tensor, *, once: bool) -> float:
    """How much worse than one device ranks are: at most 1 where they are as good.

    once: the op is to round once, however many ranks give a part; others may add two rounded numbers.
    """
    error = checks.rms(got, truth) / (1.5 * checks.rms(single, truth) + 2**-8)
    if not once or got.dtype != torch.bfloat16:
        return error
    mine, theirs = (checks.not_rounded_right(x, truth) for x in (got, single))
    return max(error, mine / (1.5 * theirs + 0.03))


def sharper(call: Call) -> Call:
    """The call with a larger first tensor, the queries of an attention."""
    first, *rest = call.args
    return Call(call.layer, call.mixer, call.op, (first * SHARPER, *rest), call.kwargs)


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
