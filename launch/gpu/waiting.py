"""Waiting: forward and backward of three models while torch refuses whatever makes the host wait for the device."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...kernels.derived import Recipes
from ...kernels.documents import Documents
from ...models.language_model import LanguageModel
from ...parallel.sequence import Sequence
from .step import Here, Step

MODELS = ("minimax_01_tiny", "gated_deltanet_hybrid_tiny", "nsa_tiny")
VOCABULARY = 512
LENGTH, FEW = 4096, 256
# Shares of a row that its documents take: no two batches are alike, as in training.
BATCHES = ((0.5, 0.3), (0.1, 0.7, 0.15), (0.4, 0.25, 0.2), (0.6, 0.1, 0.3))


def steps(here: Here) -> list[Step]:
    from ..train import to_settings  # noqa: F401 (where Hydra is missing, that is said instead)

    return [Step(name, partial(_check, name)) for name in MODELS]


def _check(name: str, here: Here) -> None:
    """Two batches compile the kernels and teach what is derived; the third must not wait."""
    model, recipes = _model(name, here), Recipes()
    for number in range(2):
        seq, tokens, targets = batch(number, here)
        recipes.prepare(seq)
        step(model, seq, tokens, targets)
        recipes.learn(seq)
    third = batch(2, here)
    recipes.prepare(third[0])
    if not here.on_gpu:
        step(model, *third)
        here.skip(f"whether {name} waits", "no step waits on a CPU; tests/trainer/diagnosis tests it without a device")
        return
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(model, *third)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        here.row("Forward and backward under set_sync_debug_mode('error')", model=name, waits=False)
    except RuntimeError as error:
        here.row("Forward and backward under set_sync_debug_mode('error')", model=name, waits=True)
        here.fail(error, _places(model, recipes, here))


def _places(model: LanguageModel, recipes: Recipes, here: Here) -> list[str]:
    """Every place that waits in a step, and how often."""
    from ...trainer.diagnosis.synchronisation import Synchronisations

    seq, tokens, targets = batch(3, here)
    recipes.prepare(seq)
    with Synchronisations("cuda") as found:
        step(model, seq, tokens, targets)
    return [f"{times} x {place}" for place, times in Counter(map(str, found)).most_common()]


def step(model: LanguageModel, seq: Sequence, tokens: Tensor, targets: Tensor) -> None:
    """Forward and backward, the latter in this thread, so that what it raises is raised here."""
    model.zero_grad(set_to_none=True)
    with torch.autograd.set_multithreading_enabled(False):
        loss: Any = model(tokens, seq, targets)[0]
        loss.backward()


def batch(number: int, here: Here) -> tuple[Sequence, Tensor, Tensor]:
    """Packed documents, tokens and targets, on the device already."""
    length = LENGTH if here.on_gpu else FEW
    documents = Documents.from_lengths([[int(share * length) for share in BATCHES[number]]], length)
    generator = torch.Generator().manual_seed(number)
    tokens = torch.randint(VOCABULARY, (2, 1, length), generator=generator).to(here.device)
    return Sequence.single(documents), tokens[0], tokens[1]


def _model(name: str, here: Here) -> LanguageModel:
    from ..build import build
    from .training import composed

    settings = composed((f"model={name}", f"model.vocabulary={VOCABULARY}"))
    model = build(settings.model).to(here.device, torch.bfloat16 if here.on_gpu else torch.float32)
    model.initialise(0)
    return model
