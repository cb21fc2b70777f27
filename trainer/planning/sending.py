"""Sending: what one rank sends in a step, by op, from the strategies of its ops and from what DeepSpeed's ZeRO does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from ...kernels.documents import Documents
from ...kernels.operation import Tensors
from ...models.language_model import LanguageModel
from ...models.part import cast_parameters, tile
from ...parallel.alone import Sending, alone
from ...parallel.operation import Exchange, Operation, observing
from ...parallel.sequence import Sequence
from ...parallel.traffic import Traffic, traffic
from ..ranks.settings import layout_of, strategy_of, ulysses_ranks
from ..settings import Settings
from ..zero.experts import cut_as_made


class Call(NamedTuple):
    """Calls of one op that send alike: of a mixer by its name in the pattern, in "forward" or "backward".

    Of what is exchanged outside of ops, `mixer` and `op` are what the exchange says of itself.
    """

    mixer: str
    op: str
    kernel: str
    phase: str
    sends: tuple[Sending, ...]
    listed: bool = False

    @property
    def bytes(self) -> int:
        return sum(each.bytes for each in self.sends)


@dataclass(frozen=True)
class _Observed:
    """A call as the rehearsal saw it."""

    phase: str
    op: Operation | Exchange
    inputs: Tensors
    mixer: str


def calls(
    build: Callable[[], LanguageModel], settings: Settings, rank: int = 0, cache: dict[Hashable, Traffic] | None = None
) -> Counter[Call]:
    """What the rank of a row sends for one micro-batch of rows of one document: calls, and how many there are.

    The model runs forward and backward without data, with recomputation as it is set. `cache` spares ops that are met
    again. Routers are taken to give experts even loads: see `to_experts`.
    """
    layout = layout_of(settings.parallel, settings.data.sequence_length)
    documents = Documents.whole(settings.data.rows_per_micro_batch, layout.length)
    strategy, ulysses = strategy_of(settings.parallel), ulysses_ranks(settings.parallel)
    found: list[_Observed] = []
    seq, noted = alone(documents, layout, rank, strategy, ulysses, settings.parallel.experts)
    with torch.device("meta"), cut_as_made(seq.experts):
        model = build().to("meta")
        cast_parameters(model, getattr(torch, settings.trainer.dtype))
        tile([part for _, part in model.leaves()], None)
        model.at_step(0)
        rehearsed = replace(Sequence.rehearsal(documents, layout, strategy, ulysses), experts=seq.experts)
        tokens = torch.zeros(documents.batch, layout.local_length, dtype=torch.int64)
        with observing(lambda phase, op, inputs, seq: found.append(_observed(phase, op, inputs, seq))):
            loss, _, reports = model(tokens, rehearsed, tokens, False, True)
            torch.stack([loss, *(reports[path].to(loss.dtype) for path in model.losses)]).sum().backward()
    cache = {} if cache is None else cache
    counted = Counter[Call]()
    for each in found:
        key = (
            each.op,
            tuple(None if x is None else (x.shape, x.dtype) for x in each.inputs),
            seq.layout,
            rank,
            ulysses,
            settings.parallel.experts if isinstance(each.op, Exchange) else 1,
        )
        if key not in cache:
            cache[key] = traffic(each.op, each.inputs, seq, noted)
        of = cache[key]
        sends = of.forward if each.phase == "forward" else of.backward
        if isinstance(each.op, Exchange):
            told = each.op.where, each.op.what, ""
        else:
            told = each.mixer, each.op.kernel or type(each.op).__name__, kernel_of(each.op, each.inputs)
        counted[Call(*told, each.phase, sends, of.listed)] += 1
    return counted


def _observed(phase: str, op: Operation | Exchange, inputs: Tensors, seq: Sequence) -> _Observed:
    shapes = tuple(None if x is None else torch.empty_like(x, device="meta") for x in inputs)
    return _Observed(phase, op, shapes, seq.mixer)


def kernel_of(op: Any, inputs: Tensors) -> str:
    """The kernel that an operation runs, with the kind of decay or the size of heads where kernels differ by it."""
    while hasattr(op, "inner"):
        op = op.inner
    name = op.kernel or ""
    record = getattr(getattr(op, "op", None), "record", None)
    fields = getattr(record, "_fields", ())
    if name == "softmax_attention" and "q" in fields and (q := inputs[fields.index("q")]) is not None:
        return f"{name}, heads of {q.shape[-1]}"
    if name not in ("gated_linear_attention", "delta_rule") or "log_decay" not in fields:
        return name
    decay = inputs[fields.index("log_decay")]
    kinds = {1: "constant", 3: "scalar", 4: "per channel"}
    return name if decay is None else f"{name}, {kinds.get(decay.dim(), 'per channel')}"
