"""Account: what a step holds on one rank, by part, as its modules allocate it when they run without data.

No module states a second formula: the model runs forward and backward on `meta`, at two lengths, and what it allocates
is counted. For a CPU, ops and what brings tensors from rank to rank run the code that training runs, so that their
temporaries count too; else they give the shapes that they give on as many ranks, and what their kernels need meanwhile
is not counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.dispatch import standing_for
from ...kernels.documents import Documents
from ...kernels.pointwise import chunk_tokens
from ...models.language_model import LanguageModel
from ...models.part import FeedForward, cast_parameters, named_weights, tile
from ...parallel.alone import alone
from ...parallel.layout import Layout
from ...parallel.sequence import Sequence
from ..ranks.settings import layout_of, strategy_of, ulysses_ranks
from ..settings import Settings
from .allocations import Allocations

SHORTEST = 4096  # tokens of a rank: of fewer, the workspaces of ops would grow with the length
SMALL_TILE = 256  # tokens: with tiles of a few, what else a step holds at its peak shows already in short rows
STREAM, LOSS, WORKING = "residual stream and norms", "embedding and loss", "working memory of backward"


@dataclass(frozen=True)
class Share:
    """Of one part, bytes whatever the length, and bytes per token that this rank holds; `host`: not on the device."""

    part: str
    fixed: float
    per_token: float = 0.0
    host: bool = False

    def bytes(self, tokens: int) -> int:
        """Of so many tokens."""
        return round(self.fixed + self.per_token * tokens)


@dataclass(frozen=True)
class Account:
    """What one rank holds at the peak of a step of `tokens` tokens at once.

    states: parameters, gradients and what the optimizer keeps. kept: of the activations, from forward to backward.
    working: what backward holds beside at the peak, as it is where tiles of feed-forward layers make it, and as it is
        elsewhere: the larger counts, which may change with the length. exact: whether the ops' own temporaries are in.
    """

    tokens: int
    states: tuple[Share, ...]
    kept: tuple[Share, ...]
    working: tuple[Share, ...]
    exact: bool

    def shares(self, tokens: int | None = None) -> tuple[Share, ...]:
        """All parts that count, by default at the step's own tokens."""
        number = self.tokens if tokens is None else tokens
        return (*self.states, *self.kept, max(self.working, key=lambda share: share.bytes(number)))

    def activations(self, tokens: int | None = None) -> int:
        """Bytes on the device of what is kept and of the working memory, by default of the step's own tokens."""
        number = self.tokens if tokens is None else tokens
        return sum(share.bytes(number) for share in self.shares(number)[len(self.states) :] if not share.host)

    def peak(self, tokens: int | None = None) -> int:
        """Bytes on the device, by default of the step's own tokens."""
        return self.activations(tokens) + sum(share.bytes(0) for share in self.states if not share.host)

    def lines(self) -> list[str]:
        """A table: a line per part, and the peak."""
        lines = [f"{'part':<44}{'fixed':>12}{'per token':>14}{'at ' + format(self.tokens, ','):>16}"]
        for share in self.shares():
            name = share.part + (" (host)" if share.host else "")
            per_token = f"{share.per_token:,.0f} B" if share.per_token else ""
            lines.append(f"{name:<44}{size(share.fixed):>12}{per_token:>14}{size(share.bytes(self.tokens)):>16}")
        return [*lines, f"{'peak of a rank':<44}{size(self.peak()):>42}"]


def size(number: float) -> str:
    """Bytes as people read them."""
    for unit, digits in (("B", 0), ("KiB", 1), ("MiB", 1)):
        if abs(number) < 1024:
            return f"{number:,.{digits}f} {unit}"
        number /= 1024
    return f"{number:,.2f} GiB"


def account(
    build: Callable[[], LanguageModel],
    settings: Settings,
    world_size: int,
    device: torch.device,
    *,
    shortest: int = SHORTEST,
) -> Account:
    """The account of a step of the trainer on so many ranks.

    build: makes a new model, complete, with the settings of `trainer` in it. shortest: how many tokens of a rank it
    runs on at least, where there are so many. Raises what the model's forward raises.
    """
    layout, rows = layout_of(settings.parallel, settings.data.sequence_length), settings.data.rows_per_micro_batch
    dtype = getattr(torch, settings.trainer.dtype)
    exact = device.type == "cpu"
    with torch.device("meta"):
        model = build()
    own, chunk = settings.trainer.tile_tokens, chunk_tokens(model.vocabulary, dtype, device)
    short = _lengths(layout, max(shortest, 2 * (own or 0), 2 * chunk))
    count = partial(_counted, build, settings, device, dtype)
    tiles = [own] if own is None or own <= SMALL_TILE else [own, SMALL_TILE]
    try:
        counted = [[count(length, each, exact) for length in short] for each in tiles]
    except (NotImplementedError, RuntimeError):  # of an op that reads values
        if not exact:
            raise
        exact = False
        counted = [[count(length, each, exact) for length in short] for each in tiles]
    less, more = (rows * length.local_length for length in short)

    def share(name: str, a: float, b: float, host: bool = False) -> Share:
        slope = (b - a) / (more - less)
        return Share(name, a - slope * less, slope, host)

    (at_less, at_more), *_ = counted
    parts = [name for name in at_more.kept if at_more.kept[name]]
    kept = [share(f"kept: {name}", at_less.kept[name], at_more.kept[name]) for name in parts]
    if at_more.host:
        kept.append(share("kept: offloaded", at_less.host, at_more.host, True))
    working = tuple(share(WORKING, a.working, b.working) for a, b in counted)
    cast_parameters(model, dtype)
    states = states_of(model, settings, world_size)
    return Account(rows * layout.local_length, states, tuple(kept), working, exact)


def states_of(model: nn.Module, settings: Settings, world_size: int) -> tuple[Share, ...]:
    """Parameters, gradients, float32 masters and the optimizer's moments on one rank, by ZeRO stage.

    Two moments per parameter, one with Lion; Muon's matrices have one too, which counts as two here.
    Gradients are as large as DeepSpeed keeps them from one micro-batch to the next: in float32, split from stage 2 on.
    """
    engine, expert_ranks = settings.engine, settings.parallel.experts
    by_expert = {
        id(each) for module in model.modules() for name in getattr(module, "by_expert", ())
        if isinstance(each := getattr(module, name), Tensor)
    }  # fmt: skip
    numbers = bytes_held = 0.0
    for _, parameter in named_weights(model):
        held = parameter.numel() / (expert_ranks if id(parameter) in by_expert else 1)
        numbers, bytes_held = numbers + held, bytes_held + held * parameter.itemsize
    split = [1.0 if engine.zero_stage < stage else 1 / world_size for stage in (1, 2, 3)]
    optimizer_away = engine.offload != "none"
    copies = [] if engine.zero_stage == 0 else [Share("float32 masters", 4 * numbers * split[0], host=optimizer_away)]
    return (
        Share("parameters", bytes_held * split[2], host=engine.offload == "all"),
        Share("gradients", 4 * numbers * split[1], host=optimizer_away and engine.zero_stage > 1),
        *copies,
        Share("moments", (4 if settings.optimizer.kind == "lion" else 8) * numbers * split[0], host=optimizer_away),
    )


def _lengths(layout: Layout, least: int) -> tuple[Layout, Layout]:
    """Two lengths, one twice the other, of at least so many tokens of a rank; or the layout's own, and twice that."""
    span = layout.span_length
    while span % 2 == 0 and span * layout.spans // 2 >= least:
        span //= 2
    return tuple(Layout(n * span * layout.ranks * layout.spans, layout.ranks, layout.spans) for n in (1, 2))  # type: ignore[return-value]


@dataclass(frozen=True)
class _Counted:
    """Bytes of one run: kept by part after forward, on the host, and beside what is kept at the peak of backward."""

    kept: Counter[str]
    host: int
    working: int


def _counted(
    build: Callable[[], LanguageModel],
    settings: Settings,
    device: torch.device,
    dtype: torch.dtype,
    layout: Layout,
    tile_tokens: int | None,
    exact: bool,
) -> _Counted:
    with torch.device("meta"):
        model = build().to("meta")
        cast_parameters(model, dtype)
        tile([part for _, part in model.leaves()], tile_tokens)
        model.at_step(0)
        documents = Documents.whole(settings.data.rows_per_micro_batch, layout.length)
        strategy, ulysses = strategy_of(settings.parallel), ulysses_ranks(settings.parallel)
        if exact:  # the last rank, which sees the most keys
            seq, _ = alone(documents, layout, layout.ranks - 1, strategy, ulysses)
        else:
            seq = Sequence.rehearsal(documents, layout, strategy, ulysses)
        away = model.copies = _Away()
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)  # as from an earlier micro-batch: counted with the states
        tokens = torch.zeros(documents.batch, layout.local_length, dtype=torch.int64)
        allocations = Allocations("meta")
        allocations.leave_out([*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters()), tokens])
        with standing_for(device.type), allocations, allocations.labelled(STREAM):
            _label(model, allocations)
            loss, _, reports = model(tokens, seq, tokens, False, True)
            kept, before = Counter(allocations.live_by), allocations.live
            allocations.peak = before
            torch.stack([loss, *(reports[path].to(loss.dtype) for path in model.losses)]).sum().backward()
    return _Counted(kept, away.bytes, allocations.peak - before)


def _label(model: LanguageModel, allocations: Allocations) -> None:
    """Has what each kind of layer makes counted under its name."""
    named: list[tuple[str, nn.Module]] = [(LOSS, model.embedding), (LOSS, model.head)]
    for _, part in model.leaves():
        named.append(("feed-forward" if isinstance(part, FeedForward) else part.setting.rpartition(".")[2], part))
    for name, module in named:
        module.forward = partial(_within, allocations, name, module.forward)  # type: ignore[method-assign]


def _within(allocations: Allocations, name: str, forward: Callable[..., Any], *arguments: Any) -> Any:
    with allocations.labelled(name):
        return forward(*arguments)


class _Away:
    """Copies of tensors without data that leave the device: see `Copies`."""

    def __init__(self) -> None:
        self.bytes = 0

    def send(self, x: Tensor) -> tuple[torch.Size, torch.dtype]:
        self.bytes += x.nbytes
        return x.shape, x.dtype

    def bring(self, sent: tuple[torch.Size, torch.dtype]) -> Tensor:
        return torch.empty(sent[0], dtype=sent[1], device="meta")

    def arrive(self, coming: Tensor) -> Tensor:
        return coming
