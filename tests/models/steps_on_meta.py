"""A step on tensors without data: the launchers of the Triton kernels are those of a GPU, and launch nothing.

A tensor on the wrong device and a value that is read raise, and `Synchronisations` records what would make the host
wait. What depends on documents may be copied to the device ahead of a step, as training does with the next batch.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from longreach.kernels import dispatch
from longreach.kernels.derived import Recipes
from longreach.kernels.dispatch import best
from longreach.kernels.documents import Documents
from longreach.kernels.pointwise import triton as pointwise
from longreach.models.language_model import LanguageModel
from longreach.parallel.layout import Layout
from longreach.parallel.mesh import Mesh
from longreach.parallel.sequence import Sequence
from longreach.parallel.strategy import Strategy
from longreach.parallel.threads import run_as_threads, this_rank
from longreach.trainer.diagnosis.synchronisation import Synchronisations
from longreach.trainer.zero.experts import cut_as_made

DEVICE = "meta"
LENGTH = 256
FEW = 5
# A batch that shows what is derived, and the one whose step is watched; documents cross ranks, rows end in padding.
BATCHES = [
    Documents.from_lengths([[40, 100, 77], [LENGTH]], LENGTH),
    Documents.from_lengths([[3, 200, 1, 50], [LENGTH - 9]], LENGTH),
]


def watched_steps(
    build: Callable[[], LanguageModel],
    found: list[Synchronisations],
    world: int = 1,
    strategy: Strategy = Strategy(),
    ulysses: int = 1,
    experts: int = 1,
) -> None:
    """A step (forward, loss, backward) of a bfloat16 model on each of `world` ranks; `found` gets a record by rank."""

    def run(rank: int) -> None:
        mesh = Mesh.create(world, ulysses, experts)
        with torch.device(DEVICE), cut_as_made(mesh.experts):
            model = build().to(DEVICE, torch.bfloat16)
        layout, recipes = Layout(LENGTH, world, 1 if world == 1 else 2), Recipes()
        used, fresh = (Sequence.shared(documents, layout, mesh, strategy) for documents in BATCHES)
        _step(model, used)
        recipes.learn(used)
        recipes.prepare(fresh)
        with Synchronisations(DEVICE) as watched:
            found.append(watched)
            _step(model, fresh)

    with _stubbed_launches():
        run_as_threads(world, run)


def _step(model: LanguageModel, seq: Sequence) -> None:
    tokens = torch.zeros(seq.documents.batch, seq.layout.local_length, dtype=torch.int64, device=DEVICE)
    loss, count, reports = model(tokens, seq, tokens, False, True)
    assert isinstance(reports, dict)
    assert isinstance(loss, Tensor)
    (loss / count + sum(reports[path].sum() for path in model.losses)).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@contextmanager
def _stubbed_launches() -> Iterator[None]:
    """Kernels, those of token-local mathematics too, run for tensors on `meta`; they look at their arguments only.

    What has no kernel, or gets float64, runs as on a GPU too: in torch.
    """
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(dispatch, "best", lambda device, dtype: best("cuda" if device == DEVICE else device, dtype))
        monkeypatch.setattr(InterpretedFunction, "run", _launch)
        for name, module in list(sys.modules.items()):
            if name.startswith("longreach.") and hasattr(module, "by_kernels"):
                monkeypatch.setattr(module, "by_kernels", lambda op, x: pointwise)
            if name.startswith("longreach.") and hasattr(module, "Reading"):
                monkeypatch.setattr(module, "Reading", _told(module.Reading))
        yield


def _told(reading: Any) -> type:
    """What a sparse layer on ranks may read: how many tokens go to each rank and come from each, and the most per row.

    Each rank sends FEW to every other.
    """

    class Told(reading):
        def __init__(self, x: Tensor) -> None:
            if x.device.type == DEVICE:
                rank = this_rank()
                assert rank is not None
                counts = [0 if peer == rank.rank else FEW for peer in range(rank.ranks)]
                x = torch.tensor([*counts, *counts, sum(counts), 0])
            super().__init__(x)

    return Told


def _launch(kernel: InterpretedFunction, *args: Any, grid: Any, warmup: bool, **settings: Any) -> None:
    named = {**dict(zip(kernel.arg_names, args, strict=False)), **settings}
    for name, x in named.items():
        if isinstance(x, Tensor) and x.device.type != DEVICE:
            raise RuntimeError(f"{kernel.fn.__name__} must get its tensors on {DEVICE}; got {name} on {x.device}")
    if callable(grid):
        grid(named)
