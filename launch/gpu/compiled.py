"""Compiled parts of a model: whose gradients torch.compile changes by more than rounding."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from ...kernels.documents import Documents
from ...models.language_model import LanguageModel
from ...models.mixer import Mixer
from ...models.part import FeedForward
from ...parallel.sequence import Sequence
from ..build import build
from .step import Here

LENGTH, FEW = 8192, 64
DEPTH = 8  # one period of the pattern
WORSE, FLOOR = 2.0, 0.01  # an error so much larger than without the compiler, and this large, is not rounding
LEAST_SECONDS = 25.0  # a variant is not begun with less
SHOWN = 5

Gradients = dict[str, torch.Tensor]


def blocks(model: LanguageModel) -> Iterator[nn.Module]:
    yield from model.layers


def mixers(model: LanguageModel) -> Iterator[nn.Module]:
    yield from (part for part in model.modules() if isinstance(part, Mixer))


def feed_forward(model: LanguageModel) -> Iterator[nn.Module]:
    yield from (part for part in model.modules() if isinstance(part, FeedForward))


def norms(model: LanguageModel) -> Iterator[nn.Module]:
    yield from (child for block in model.layers for name, child in block.named_children() if name.endswith("norm"))


VARIANTS: tuple[tuple[str, Callable[[LanguageModel], Iterator[nn.Module]], str], ...] = (
    ("whole blocks, traced", blocks, "aot_eager"),
    ("whole blocks", blocks, "inductor"),
    ("feed-forward layers", feed_forward, "inductor"),
    ("norms", norms, "inductor"),
    ("mixers", mixers, "inductor"),
)


def compare_gradients(settings: dict[str, Any], here: Here) -> None:
    """A row for each way of compiling: which gradient is furthest from float64, and how far it is without compiling.

    "Traced" is the compiler's graph, run by torch's own kernels: what differs there is not the compiler's kernels.
    """
    torch.manual_seed(0)
    rounded = build({**settings, "depth": DEPTH}).to(here.device)
    rounded.initialise(0)
    rounded.bfloat16()
    length = LENGTH if here.on_gpu else FEW
    tokens = torch.randint(rounded.vocabulary, (1, length + 1)).to(here.device)
    batch = tokens[:, :-1], tokens[:, 1:]
    exact = gradients(copy.deepcopy(rounded).double(), batch)[1]
    plain_loss, plain = gradients(rounded, batch)
    _row("not compiled", plain_loss, errors(plain, exact), None, 0.0, here)
    alone = errors(plain, exact)
    for name, parts, backend in VARIANTS:
        if backend == "inductor" and not here.on_gpu:
            here.skip(f"compiled {name}", "the compiler takes minutes on a CPU")
            continue
        if here.on_gpu and here.left < LEAST_SECONDS:
            here.skip(f"compiled {name}", "the part's time was over")
            continue
        torch._dynamo.reset()
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 4 * DEPTH)
        started, changed = time.perf_counter(), copy.deepcopy(rounded)
        for part in parts(changed):
            part.compile(backend=backend)
        loss, found = gradients(changed, batch)
        _row(name, loss, errors(found, exact), alone, time.perf_counter() - started, here)


def gradients(model: LanguageModel, batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[float, Gradients]:
    """The mean loss, and the gradient of every parameter in float64."""
    tokens, targets = batch
    model.zero_grad(set_to_none=True)
    loss = model(tokens, Sequence.single(Documents.whole(*tokens.shape)), targets)[0] / targets.numel()
    loss.backward()
    return float(loss), {name: x.grad.double() for name, x in model.named_parameters() if x.grad is not None}


def errors(found: Gradients, exact: Gradients) -> dict[str, float]:
    """Of each parameter's gradient, relative to its norm; infinite where there is none."""
    return {
        name: float((found[name] - x).norm() / x.norm().clamp(min=1e-30)) if name in found else float("inf")
        for name, x in exact.items()
    }


def _row(
    name: str, loss: float, found: dict[str, float], alone: dict[str, float] | None, seconds: float, here: Here
) -> None:
    worst = sorted(found, key=lambda each: found[each], reverse=True)
    if alone is not None:  # by how much the compiler adds
        worst.sort(key=lambda each: found[each] / max(alone[each], FLOOR), reverse=True)
    wrong = [each for each in worst if alone is not None and found[each] > max(WORSE * alone[each], FLOOR)]
    here.row(
        "Gradients in bfloat16, compiled, against float64 without; errors relative to the norm",
        compiled=name,
        loss=f"{loss:.5f}",
        furthest=worst[0],
        error=found[worst[0]],
        **{"error, not compiled": None if alone is None else alone[worst[0]], "beyond rounding": len(wrong)},
        seconds=seconds or None,
    )
    if wrong and alone is not None:
        shown = [f"{each}: {found[each]:.3g}, not compiled {alone[each]:.3g}" for each in wrong[:SHOWN]]
        here.fail(f"{len(wrong)} gradients change by more than rounding where {name} are compiled", shown)
