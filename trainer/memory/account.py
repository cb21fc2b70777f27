"""Account: what a step holds on one rank, by part, as its modules allocate it when they run without data.

No module states a second formula: the model runs forward and backward on `meta`, at two lengths, and what it allocates
is counted. For a CPU, ops and what brings tensors from rank to rank run the code that training runs, so that their
temporaries count too; else they give the shapes that they give on as many ranks, and what their kernels need meanwhile
is not counted.
"""

from __future__ import annotations

import math
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.dispatch import standing_for
from ...kernels.documents import Documents
from ...kernels.pointwise import chunk_tokens
from ...models.language_model import LanguageModel
from ...models.part import FeedForward, cast_parameters, tile
from ...parallel.alone import alone
from ...parallel.layout import Layout
from ...parallel.sequence import Sequence
from ..ranks.settings import layout_of, strategy_of, ulysses_ranks
from ..settings import Settings
from ..zero.experts import cut_as_made
from .allocations import Allocations, size
from .states import STEP, Share, coming_gradients, states_of, stepping

SHORTEST = 4096  # tokens of a rank: of fewer, the workspaces of ops would grow with the length
SMALL_TILE = 256  # tokens: with tiles of a few, what else a step holds at its peak shows already in short rows
FEW, SECONDS = 1024, 60.0  # tokens of a rank, and the time, that suffice for the account of a run that starts
PEAK = "peak of a rank"
NO_STEP = Share(STEP, 0.0)
STREAM, LOSS, WORKING = "residual stream and norms", "embedding and loss", "working memory of backward"


@dataclass(frozen=True)
class Account:
    """What one rank holds at the peak of a step of `tokens` tokens at once.

    states: parameters, gradients, what the optimizer keeps and the copy that is being saved. kept: of the activations,
        from forward to backward.
    working: what backward holds beside at its peak, less the gradients that only come later: one share for each moment
        at which that may be; the largest counts, which may change with the length.
    missing: what is not counted; "" where the ops' own temporaries are in.
    stepping: what the optimizer's step holds when no activation is there any more.
    """

    tokens: int
    states: tuple[Share, ...]
    kept: tuple[Share, ...]
    working: tuple[Share, ...]
    missing: str
    stepping: Share = NO_STEP

    @property
    def exact(self) -> bool:
        """Whether the ops' own temporaries are in."""
        return not self.missing

    def shares(self, tokens: int | None = None) -> tuple[Share, ...]:
        """All parts that count, by default at the step's own tokens; `stepping` is not held beside the activations."""
        return (*self.states, *self._activations(tokens), *([self.stepping] if self.stepping.fixed else []))

    def _activations(self, tokens: int | None) -> tuple[Share, ...]:
        number = self.tokens if tokens is None else tokens
        return (*self.kept, max(self.working, key=lambda share: share.bytes(number)))

    def activations(self, tokens: int | None = None) -> int:
        """Bytes on the device of what is kept and of the working memory, by default of the step's own tokens."""
        number = self.tokens if tokens is None else tokens
        return sum(share.bytes(number) for share in self._activations(tokens) if not share.host)

    def peak(self, tokens: int | None = None) -> int:
        """Bytes on the device, by default of the step's own tokens."""
        stepping = 0 if self.stepping.host else self.stepping.bytes(0)
        return max(self.activations(tokens), stepping) + sum(x.bytes(0) for x in self.states if not x.host)

    def on_host(self, tokens: int | None = None) -> int:
        """Bytes that are on the host meanwhile, by default of the step's own tokens."""
        number = self.tokens if tokens is None else tokens
        return sum(share.bytes(number) for share in self.shares(tokens) if share.host)

    def summary(self) -> str:
        """One line: the peak, what of it are states, and what is on the host."""
        states = sum(share.bytes(0) for share in self.states if not share.host)
        host = f", {size(held)} on the host" if (held := self.on_host()) else ""
        missing = f", without {self.missing}" if self.missing else ""
        return f"{size(self.peak())} per rank at the peak, {size(states)} of them states{host}{missing}"

    def figures(self) -> dict[str, int]:
        """Bytes by part, and the peak: what a line of metrics says."""
        return {_named(share): share.bytes(self.tokens) for share in self.shares()} | {PEAK: self.peak()}

    def lines(self) -> list[str]:
        """A table: a line per part, the peak, and what is not in it."""
        lines = [f"{'part':<44}{'fixed':>12}{'per token':>14}{'at ' + format(self.tokens, ','):>16}"]
        for share in self.shares():
            per_token = f"{share.per_token:,.0f} B" if share.per_token else ""
            values = f"{size(share.fixed):>12}{per_token:>14}{size(share.bytes(self.tokens)):>16}"
            lines.append(f"{_named(share):<44}{values}")
        lines.append(f"{PEAK:<44}{size(self.peak()):>42}")
        if held := self.on_host():
            lines.append(f"{'on the host':<44}{size(held):>42}")
        return lines + ([f"not counted: {self.missing}"] if self.missing else [])


def _named(share: Share) -> str:
    return share.part + (" (host)" if share.host else "")


def account(
    build: Callable[[], LanguageModel],
    settings: Settings,
    world_size: int,
    device: torch.device,
    *,
    shortest: int = SHORTEST,
    temporaries: bool = True,
    backward: bool = True,
    seconds: float = math.inf,
) -> Account:
    """The account of a step of the trainer on so many ranks.

    build: makes a new model, complete, with the settings of `trainer` in it. shortest: how many tokens of a rank it
    runs on at least, where there are so many. temporaries: those of ops are counted where they can be, which may take
    minutes. backward: without it only what is kept is counted, in a fraction of the time. Raises what the model's
    forward raises, and TimeoutError after so many seconds.
    """
    until = time.monotonic() + seconds
    layout, rows = layout_of(settings.parallel, settings.data.sequence_length), settings.data.rows_per_micro_batch
    dtype = getattr(torch, settings.trainer.dtype)
    exact = temporaries and device.type == "cpu"
    missing = "" if exact else "what kernels and libraries need meanwhile"
    with torch.device("meta"):
        model = build()
    own, chunk = settings.trainer.tile_tokens, chunk_tokens(model.vocabulary, dtype, device)
    short = _lengths(layout, max(shortest, 2 * (own or 0), 2 * chunk))
    count = partial(_counted, build, settings, device, dtype, until, backward)
    tiles = [own] if own is None or own <= SMALL_TILE or not backward else [own, SMALL_TILE]
    try:
        counted = [[count(length, each, exact) for length in short] for each in tiles]
    except (NotImplementedError, RuntimeError) as error:  # of an op that reads values
        if not exact:
            raise
        exact, missing = False, f"what ops need meanwhile, as {_reads_values(error)}"
        counted = [[count(length, each, exact) for length in short] for each in tiles]
    less, more = (rows * length.local_length for length in short)

    def share(name: str, a: float, b: float, host: bool = False, less_fixed: float = 0.0) -> Share:
        slope = (b - a) / (more - less)
        return Share(name, a - slope * less - less_fixed, slope, host)

    (at_less, at_more), *_ = counted
    parts = [name for name in at_more.kept if at_more.kept[name]]
    kept = [share(f"kept: {name}", at_less.kept[name], at_more.kept[name]) for name in parts]
    if at_more.host:
        kept.append(share("kept: offloaded", at_less.host, at_more.host, True))
    cast_parameters(model, dtype)
    coming = coming_gradients(model, settings, world_size, device)
    working = [
        share(WORKING, at_a, at_b, less_fixed=coming(there))
        for a, b in counted
        for (there, at_a), (_, at_b) in zip(a.working, b.working, strict=True)
    ]
    states = states_of(model, settings, world_size, device)
    step = stepping(model, settings, world_size, device, states)
    if device.type == "cpu":  # which is the host
        states, step = tuple(replace(share, host=False) for share in states), replace(step, host=False)
    return Account(rows * layout.local_length, states, tuple(kept), _largest(working), missing, step)


def _largest(shares: list[Share]) -> tuple[Share, ...]:
    """Those of which each is the largest at some length."""
    found = list[Share]()
    for share in sorted(shares, key=lambda each: (each.per_token, each.fixed), reverse=True):
        if not found or share.fixed > max(each.fixed for each in found):
            found.append(share)
    return tuple(found)


def account_of_run(
    build: Callable[[], LanguageModel], settings: Settings, world_size: int, device: torch.device
) -> Account | str:
    """The account that a run logs when it starts, in little time and whatever the model is; or why there is none."""
    try:
        return account(build, settings, world_size, device, shortest=FEW, temporaries=False, seconds=SECONDS)
    except Exception as error:  # a run does not end for it
        return str(error).partition("\n")[0] or type(error).__name__


def _reads_values(error: Exception) -> str:
    """Which op or part has failed for want of values: as its notes say, else by the module that asked."""
    modules = (frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__))
    asked = [name for name in modules if name.startswith(__name__.partition(".")[0])]
    where = "; ".join(dict.fromkeys(getattr(error, "__notes__", ()))) or f"something in {asked[-1]}"
    return f"{where} reads values ({str(error).splitlines()[0]})"


def _lengths(layout: Layout, least: int) -> tuple[Layout, Layout]:
    """Two lengths, one twice the other, of at least so many tokens of a rank; or the layout's own, and twice that."""
    span = layout.span_length
    while span % 2 == 0 and span * layout.spans // 2 >= least:
        span //= 2
    return tuple(Layout(n * span * layout.ranks * layout.spans, layout.ranks, layout.spans) for n in (1, 2))  # type: ignore[return-value]


@dataclass(frozen=True)
class _Counted:
    """Bytes of one run: kept by part after forward, on the host, and beside what is kept at the peaks.

    working: of each stretch, up to the next parameter that gets its gradient: the numbers of the parameters that have
        theirs, and the bytes at the peak; the first is forward too, which takes the loss's gradients.
    """

    kept: Counter[str]
    host: int
    working: tuple[tuple[int, int], ...]


def _counted(
    build: Callable[[], LanguageModel],
    settings: Settings,
    device: torch.device,
    dtype: torch.dtype,
    until: float,
    backward: bool,
    layout: Layout,
    tile_tokens: int | None,
    exact: bool,
) -> _Counted:
    documents = Documents.whole(settings.data.rows_per_micro_batch, layout.length)
    strategy, ulysses = strategy_of(settings.parallel), ulysses_ranks(settings.parallel)
    # The last rank, which sees the most keys.
    seq, _ = alone(documents, layout, layout.ranks - 1, strategy, ulysses, settings.parallel.experts)
    with torch.device("meta"), cut_as_made(seq.experts):
        model = build().to("meta")
        cast_parameters(model, dtype)
        tile([part for _, part in model.leaves()], tile_tokens)
        model.at_step(0)
        if not exact:
            seq = replace(Sequence.rehearsal(documents, layout, strategy, ulysses), experts=seq.experts)
        away = model.copies = _Away()
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)  # as from an earlier micro-batch: counted with the states
        tokens = torch.zeros(documents.batch, layout.local_length, dtype=torch.int64)
        allocations = Allocations("meta", until)
        allocations.leave_out([*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters()), tokens])
        with standing_for(device.type), allocations, allocations.labelled(STREAM):
            _label(model, allocations)
            loss, _, reports = model(tokens, seq, tokens, False, True)
            kept, before = Counter(allocations.live_by), allocations.live
            peaks = _Peaks(model, allocations)
            if backward:
                torch.stack([loss, *(reports[path].to(loss.dtype) for path in model.losses)]).sum().backward()
            working = tuple((numbers, peak - before) for numbers, peak in peaks.found())
    return _Counted(kept, away.bytes, working)


class _Peaks:
    """The peaks so far and of a backward pass that begins, between gradients that parameters get."""

    def __init__(self, model: LanguageModel, allocations: Allocations) -> None:
        self._allocations, self._there = allocations, dict[int, int]()
        self._found = list[tuple[int, int]]()
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(self._has_gradient)

    def _has_gradient(self, parameter: Tensor) -> None:
        if id(parameter) not in self._there:
            self._found.append((sum(self._there.values()), self._allocations.peak))
            self._there[id(parameter)], self._allocations.peak = parameter.numel(), self._allocations.live

    def found(self) -> list[tuple[int, int]]:
        """The numbers of the parameters that had their gradients before, and the bytes at the peak, of each stretch."""
        return [*self._found, (sum(self._there.values()), self._allocations.peak)]


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
