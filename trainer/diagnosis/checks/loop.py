"""The loop: a step of the trainer under the engine compared with the expected one, row by row and number by number."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ....kernels.documents import Documents
from ....parallel.sequence import Sequence
from ...data.packing import Row
from ...engine import EngineSettings
from ...ranks.settings import ulysses_ranks
from ...settings import Settings
from .. import training
from ..bench import Bench
from ..cases import NO_TARGET
from ..training import Place, Step
from ..truth import Result, run
from . import comparison
from .comparison import Difference

RATE = 1e-2  # large enough for float32 to tell what a step changes
FLOAT32 = 1e-3  # of gradients in float32; they are off by 1e-6, and by 1e-4 where a layer normalises what is near 0
ALIKE = 4.0  # where one device's are off by more, how often that much the trainer's may be
SUM = 1e-4  # of gradients in bfloat16 that are added up in float32; one rounded sum is off by 2e-3
SHARED_EXPERTS = 2e-2  # between ranks that share out experts and ranks that have all: they round other partial sums
DATA_RANKS = 3  # of the world that the groups are worked out for


def grid(bench: Bench, settings: Settings) -> None:
    """The groups of the configured ranks in a world of several data ranks, by the (data, sequence) grid."""
    configured, differences = settings.parallel, []
    shapes = {(p.sequence, ulysses_ranks(p)) for p in (configured, bench.topology.parallel)}
    for sequence, by_heads in sorted(shapes):
        world = DATA_RANKS * sequence
        expected = [place_of(rank, sequence, by_heads) for rank in range(world)]
        for places in bench.run(training.places, sequence, by_heads, world):
            pairs = enumerate(zip(places, expected, strict=True))
            wrong = [f"rank {rank}: {a} in place of {b}" for rank, (a, b) in pairs if a != b]
            where = f"{world} ranks, {sequence} a row{f', {by_heads} by heads' if by_heads > 1 else ''}"
            differences.append(Difference(float(len(wrong)), "; ".join([where, *wrong[:1]])))
    bench.add(comparison.row("groups of ranks = the grid", differences, 0.0, "arithmetic", 0, unit="ranks"))


def place_of(rank: int, sequence: int, by_heads: int) -> Place:
    """Rank r is number r mod P of data rank r // P; heads are exchanged by neighbours, and rings join those alike."""
    row = rank - rank % sequence
    if sequence == 1:
        return Place(rank, 0, None, None, None)
    everyone = tuple(range(row, row + sequence))
    if by_heads == 1:
        return Place(rank // sequence, rank % sequence, everyone, None, None)
    heads = tuple(range(rank - rank % by_heads, rank - rank % by_heads + by_heads))
    ring = tuple(r for r in everyone if r % by_heads == rank % by_heads) if by_heads < sequence else None
    return Place(rank // sequence, rank % sequence, everyone, heads, ring)


def training_steps(bench: Bench, settings: Settings) -> None:
    """A step of the trainer on every ZeRO stage, the configuration's first: its rows, sums, clipping and update.

    Rows have very different numbers of targets, so that a mean of means is not the mean.
    """
    length = bench.sequence * bench.spans * 7
    lengths = [length + 5, 1, 1, 2, 1, 1, 3, length // 2, *[1] * (length // 2), 2, 7]
    settings = _of_a_step(settings, bench, length)
    number = settings.data.rows_per_step
    rows = expected_rows(lengths, length, 2 * number, bench.topology.model["vocabulary"])
    truth = _truth(bench, rows[:number], torch.float64)
    single = _truth(bench, rows[:number], torch.float32)
    off = comparison.worst(comparison.of_gradients(single.gradients, truth.gradients, "one device")).error
    limit = max(FLOAT32, ALIKE * max(off, abs(single.norm - truth.norm) / truth.norm))
    own, dtype = settings.engine, settings.trainer.dtype
    for index, stage in enumerate(sorted(range(4), key=lambda stage: stage != own.zero_stage)):
        # Once nothing is clipped; else half of the gradient.
        clip = 0.0 if index == 1 else truth.norm / 2
        engine = own if stage == own.zero_stage else EngineSettings(stage)
        trainer = replace(settings.trainer, clip=clip, dtype="float32")
        chosen = replace(settings, engine=engine, trainer=trainer)
        steps = bench.run(training.train_step, chosen, lengths, truth.targets)
        if index == 0:
            _check_rows(bench, steps, rows, number)
        _check_step(bench, stage, steps, truth, replace(settings, trainer=trainer), limit)
    if dtype != "float32":
        trainer = replace(settings.trainer, clip=truth.norm / 2)
        steps = bench.run(training.train_step, replace(settings, trainer=trainer), lengths, truth.targets)
        _check_sum(bench, own.zero_stage, steps, truth, settings, clip=truth.norm / 2)


class _Truth:
    """Loss, gradient and its norm over the rows of a step."""

    def __init__(self, results: list[Result]) -> None:
        self.targets = sum(result.targets for result in results)
        self.loss = sum(float(result.loss) for result in results) / self.targets
        names = results[0].gradients
        self.gradients = {n: comparison.sum_of([r.gradients[n] for r in results]) / self.targets for n in names}
        self.norm = _norm(self.gradients)


def _norm(gradients: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))


def _of_a_step(settings: Settings, bench: Bench, length: int) -> Settings:
    data = replace(settings.data, sequence_length=length, rows_per_step=4 * bench.data_ranks, rows_per_micro_batch=2)
    return replace(
        settings,
        model={},
        data=data,
        parallel=bench.topology.parallel,
        # The moments of AdamW tell gradients and steps; other rules step what the same engine gives them.
        optimizer=replace(settings.optimizer, kind="adamw", learning_rate=RATE, momentum=None, groups={}, only=[]),
        schedule=replace(settings.schedule, warmup_steps=1),
        trainer=replace(settings.trainer, compile=False, steps=max(settings.trainer.steps, 1000)),
        init_from=None,
    )


def expected_rows(lengths: list[int], length: int, number: int, vocabulary: int) -> list[Row]:
    """The rows that a stream must have, in any order: a token's target is the token after it.

    Told from rows in which every token has an id of its own. Raises ValueError where a piece of a row is not a stretch
    of one document.
    """
    document = {}
    for index, start in enumerate(training.Documents(lengths).starts):
        document |= {int(start) + i: (index, i + 1 == lengths[index]) for i in range(lengths[index])}
    stream, rows = training.stream_of(lengths, length), []
    for row in map(stream.row, range(number)):
        at = 0
        for size in row.lengths:
            piece = [int(token) for token in row.tokens[at : at + size]]
            if piece != list(range(piece[0], piece[0] + size)) or len({document[t][0] for t in piece}) > 1:
                raise ValueError(f"a row must be made of stretches of documents; got tokens {piece} as one")
            at += size
        ends = [document[int(token)][1] for token in row.tokens]
        targets = [NO_TARGET if end else (int(t) + 1) % vocabulary for t, end in zip(row.tokens, ends, strict=True)]
        rows.append(Row(row.tokens % vocabulary, torch.tensor(targets).numpy(), row.lengths))
    return rows


def _truth(bench: Bench, rows: Iterable[Row], dtype: torch.dtype) -> _Truth:
    """On one device, in `dtype`."""
    model, given = bench.model(dtype).cpu(), []
    for row in rows:
        documents = Documents.from_lengths([row.lengths], len(row.tokens))
        tokens, targets = (torch.from_numpy(x).unsqueeze(0) for x in (row.tokens, row.targets))
        given.append((documents, tokens, targets))
    counts = torch.tensor([model.loss_counts(documents, targets) for documents, _, targets in given]).sum(0).tolist()
    total = sum(int((targets != NO_TARGET).sum()) for *_, targets in given)  # by which all are divided in the end
    weights = zip(model.losses.items(), counts, strict=True)
    factors = {path: weight * total / count if count else 0.0 for (path, weight), count in weights}
    results = [run(model, Sequence.single(documents), tokens, targets, factors) for documents, tokens, targets in given]
    return _Truth(results)


def _check_rows(bench: Bench, steps: list[Step], rows: list[Row], number: int) -> None:
    """Every row of this step and of the next is read by one data rank, on all ranks that share it, and by no other."""
    differences = []
    for what, expected, read in (
        ("this step", rows[:number], [step.rows for step in steps]),
        ("the next", rows[number:], [step.next_rows for step in steps]),
    ):
        wanted = sorted(map(_key, expected))
        alike = [read[first : first + bench.sequence] for first in range(0, len(read), bench.sequence)]
        got = sorted(_key(row) for ranks in alike for row in ranks[0])
        same = all([*map(_key, rank)] == [*map(_key, ranks[0])] for ranks in alike for rank in ranks)
        wrong = sum(a != b for a, b in zip(got, wanted, strict=False)) + abs(len(got) - len(wanted))
        place = f"rows of {what}: {wrong} of {len(wanted)} have other tokens, targets or documents, or are not read"
        differences.append(Difference(float(wrong), place if wrong else f"rows of {what}"))
        differences.append(Difference(0.0 if same else 1.0, f"ranks that share a row read other rows of {what}"))
    bench.add(comparison.row("rows and targets that the loop reads", differences, 0.0, "trainer", 0, unit="rows"))


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(row.tokens.tolist()), tuple(row.targets.tolist()), tuple(row.lengths)


def _check_step(bench: Bench, stage: int, steps: list[Step], truth: _Truth, settings: Settings, limit: float) -> None:
    optimizer, clip = settings.optimizer, settings.trainer.clip
    scale = min(1.0, clip / truth.norm) if clip else 1.0
    what = f"{truth.targets} targets, {f'clipped to {scale:.2g}' if clip else 'not clipped'}"
    shapes = {name: g.shape for name, g in truth.gradients.items()}
    after, first, second = (_assembled(steps, shapes, kind) for kind in training.KINDS)
    beta, gamma = optimizer.betas
    clipped = {name: g * scale for name, g in truth.gradients.items()}
    gradients = comparison.of_gradients({name: m / (1 - beta) for name, m in first.items()}, clipped, what)
    squares = {name: v.clamp(min=0).sqrt() / math.sqrt(1 - gamma) for name, v in second.items()}
    differences = [
        *(Difference(abs(step.loss - truth.loss) / truth.loss, f"loss; {what}") for step in steps),
        *(Difference(abs(step.norm - truth.norm) / truth.norm, f"gradient norm; {what}") for step in steps),
        *(d._replace(where=f"gradient of {d.where}") for d in gradients),
        *(
            d._replace(where=f"second moment of {d.where}")
            for d in comparison.of_gradients(squares, {name: g.abs() for name, g in clipped.items()}, what)
        ),
    ]
    ran = f"trainer, DeepSpeed, {bench.ran('float32')}"
    bench.add(comparison.row(f"ZeRO-{stage}: a step of the loop", differences, limit, ran, 5, first=True))
    model, updates = bench.model(torch.float64).cpu(), []
    decays = _decays(model)
    for name, p in model.named_parameters():
        decay = RATE * optimizer.weight_decay if name in decays else 0.0
        moved = first[name].double() / (1 - beta) / (squares[name].double() + optimizer.eps)
        start = p.detach().float().double()
        expected = start * (1 - decay) - RATE * moved
        error = float((after[name].double() - expected).abs().max()) / RATE
        updates.append(Difference(error if error == error else math.inf, f"{name}; {what}"))
    updates += [Difference(abs(step.rate / RATE - 1), f"learning rate; {what}") for step in steps]
    bench.add(
        comparison.row(f"ZeRO-{stage}: parameters after the step", updates, 1e-2, ran, 6, unit="of the learning rate")
    )


def _decays(model: torch.nn.Module) -> set[str]:
    """Names of the parameters that weight decay applies to: matrices that no layer exempts."""
    exempt = {
        f"{prefix}.{name}"
        for prefix, module in model.named_modules()
        for name in getattr(module, "no_weight_decay", ())
    }
    return {name for name, p in model.named_parameters() if p.dim() > 1 and name not in exempt}


def _assembled(steps: list[Step], shapes: dict[str, torch.Size], kind: str) -> dict[str, Tensor]:
    """Whole tensors from the parts on the ranks; NaN where no rank has a part."""
    whole = {}
    for name, shape in shapes.items():
        flat = torch.full((shape.numel(),), math.nan)
        for step in steps:
            start, values = step.state[name][kind]
            flat[start : start + len(values)] = values
        whole[name] = flat.view(shape)
    return whole


def _check_sum(bench: Bench, stage: int, steps: list[Step], truth: _Truth, settings: Settings, *, clip: float) -> None:
    """In bfloat16: the gradient is the sum, in float32, of those of the single micro-batches."""
    summed = _summed([step.alone for step in steps])
    norm = _norm(summed)
    scale = min(1.0, clip / norm)
    shapes = {name: g.shape for name, g in truth.gradients.items()}
    got = {name: m / (1 - settings.optimizer.betas[0]) for name, m in _assembled(steps, shapes, "exp_avg").items()}
    errors = comparison.of_norms(got, {name: g.double() * scale for name, g in summed.items()})
    differences = [Difference(error, f"gradient of {name}") for name, error in errors.items()]
    differences += [Difference(abs(step.norm - norm) / norm, "gradient norm") for step in steps]
    ran, unit = f"trainer, DeepSpeed, {bench.ran('bfloat16')}", "of the gradient's norm"
    row = f"ZeRO-{stage}, bfloat16: sum over micro-batches"
    bench.add(comparison.row(row, differences, SUM, ran, 5, unit=unit))
    if settings.parallel.experts > 1:
        errors = comparison.of_norms(summed, _summed([step.unshared for step in steps]))
        differences = [Difference(error, f"gradient of {name}") for name, error in errors.items()]
        row = "bfloat16: experts that ranks share out = all on every rank"
        bench.add(comparison.row(row, differences, SHARED_EXPERTS, ran, 5, unit=unit))
    losses = [Difference(abs(step.loss - truth.loss) / truth.loss, "loss") for step in steps]
    bench.add(comparison.row(f"ZeRO-{stage}, bfloat16: loss", losses, 5e-2, ran, 5))


def _summed(gradients: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The ranks' gradients of one step."""
    return {name: comparison.sum_of([each[name] for each in gradients]) / len(gradients) for name in gradients[0]}
