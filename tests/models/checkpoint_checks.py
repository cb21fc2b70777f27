"""What holds of every family of checkpoints, whichever library has the class of its model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from checkpoints import (
    LENGTH,
    Imported,
    InFloat64,
    assert_near,
    assert_written_back,
    load,
    logits,
    loss_and_gradients,
    noted,
    saved,
    state_of,
    targets_of,
    their_logits,
    tokens,
)
from distributed import run_threads
from torch import Tensor

from longreach.kernels.documents import Documents
from longreach.models import hf
from longreach.models.decoding import generate
from longreach.parallel.layout import Layout
from longreach.parallel.mesh import Mesh
from longreach.parallel.sequence import Sequence
from longreach.parallel.strategy import Strategy

ROW, PACKED = LENGTH // 2 + 4, [[17, 27], [44]]  # tokens of a row, and lengths of the documents of two


def check_logits_in_float64_and_settings(imported: Imported) -> None:
    with InFloat64():
        expected = their_logits(imported.theirs_in_float64, tokens(ROW))
    assert expected.std() > 0.3
    assert_near(imported.family, "logits in float64", logits(imported.ours_in_float64, tokens(ROW)), expected, 1e-9)
    family = hf.known_families()[imported.family]
    written = family.config(imported.settings)
    assert not written.problems
    assert family.settings(family.written(written.config)) == imported.settings


def check_logits(imported: Imported) -> None:
    expected = their_logits(imported.reference, tokens())
    assert_near(imported.family, "logits in float32", logits(imported.ours, tokens()), expected, 1e-4)


def check_loss_and_gradients(imported: Imported, folder: Path) -> None:
    """In float64. Their gradients are saved in place of their weights, so that ours are compared with what is read of
    them.
    """
    ours, theirs, row = imported.ours_in_float64, copy.deepcopy(imported.theirs_in_float64), tokens(ROW - 1)
    with InFloat64():
        out = theirs(row, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(out[:, :-1].flatten(0, 1), row[:, 1:].flatten(), reduction="sum")
        loss.backward()
    seq, targets = Sequence.single(Documents.whole(*row.shape)), targets_of(row, [[row.shape[1]]] * 2)
    total, gradients = loss_and_gradients(ours, seq, row, targets)
    assert_near(imported.family, "gradients", total, loss.detach(), 1e-9, "of the loss")
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    read = load(saved(theirs, folder / "gradients"), torch.float64)
    for (name, parameter), gradient in zip(read.named_parameters(), gradients, strict=True):
        assert_near(imported.family, "gradients", gradient, parameter.detach(), 1e-8, f"of {name}")
        assert parameter.abs().max() > 0 or ".indexer." in name, name  # which learns by a loss of its own


def check_what_is_written(imported: Imported, model: Any, folder: Path) -> None:
    """It is what was read, and `model.from_pretrained` loads it."""
    reference, out = imported.reference, folder / "ours"
    unread = assert_written_back(imported, imported.ours, out)
    for (name, a), (_, b) in zip(state_of(load(out)), state_of(imported.ours), strict=True):
        assert torch.equal(a, b), name
    theirs, report = model.from_pretrained(out, output_loading_info=True)
    assert not {key: value for key, value in report.items() if value and set(value) != unread}, report
    assert type(theirs) is type(reference)
    for a, (name, b) in zip(theirs.parameters(), reference.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    torch.testing.assert_close(their_logits(theirs, tokens()), their_logits(reference, tokens()), atol=1e-4, rtol=1e-4)
    noted(imported.family, "writes", 0.0)


def check_two_ranks(imported: Imported) -> None:
    """They give what one device gives of packed rows in float64, and what the class does of each document alone."""
    rows, documents, layout = tokens(ROW), Documents.from_lengths(PACKED), Layout(ROW, 2, spans=2)
    ours, near = imported.ours_in_float64, partial(assert_near, imported.family, "two ranks", tolerance=1e-9)

    def run(seq: Sequence) -> tuple[Any, ...]:
        with torch.no_grad():
            out = ours(seq.shard(rows), seq)
        return out, *loss_and_gradients(ours, seq, rows, targets_of(rows, PACKED))

    out, loss, gradients = run(Sequence.single(documents))
    ranks = run_threads(2, lambda rank, world: run(Sequence.shared(documents, layout, Mesh.create(world), Strategy())))
    outs, losses, gradients_of_ranks = zip(*ranks, strict=True)
    both = layout.unshard(list(outs))
    near(both, out, name="of logits")
    near(sum(losses), loss, name="of the loss")
    names = [name for name, _ in ours.named_parameters()]
    for name, expected, *parts in zip(names, gradients, *gradients_of_ranks, strict=True):
        near(sum(parts), expected, name=f"of {name}")
    for row, lengths in enumerate(PACKED):
        for start, length in zip((0, *accumulate(lengths)), lengths, strict=False):
            here = slice(row, row + 1), slice(start, start + length)
            with InFloat64():
                expected = their_logits(imported.theirs_in_float64, rows[here])
            near(both[here], expected, name=f"of the document from {start} of row {row}")


def check_greedy_decoding(imported: Imported, theirs: Callable[[Tensor, list[int]], list[int]], count: int) -> None:
    """So many tokens, decoded after a prompt, are those of `theirs(prompt, ours)`."""
    prompt = tokens()[:1, :11]
    ours = list(generate(imported.ours, prompt[0].tolist(), max_new_tokens=count, temperature=0.0))
    assert ours == theirs(prompt, ours)
    noted(imported.family, "decodes", count)
