"""How mixers are held against oracles, and the notes of it from which the table of docs/mixers.md is made."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from longreach.kernels.documents import Documents
from longreach.parallel.sequence import Sequence

NOTES = "LONGREACH_ORACLE_NOTES"  # the file to which comparisons are noted, if it is set


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers in float64."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def whole(batch: int, length: int) -> Sequence:
    """Rows of one document each, on one device."""
    return Sequence.single(Documents.whole(batch, length))


def with_gradients(
    call: Callable[[Tensor], Tensor], x: Tensor, parameters: Iterable[Tensor] = (), *, seed: int = 9
) -> list[Tensor]:
    """The output, and the gradients of the input and of the parameters for a loss that weighs every element."""
    leaf = x.clone().requires_grad_()
    out = call(leaf)
    dout = draw(*out.shape, seed=seed).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, [leaf, *parameters], dout)]


def assert_agrees(
    mixer: str,
    oracle: str,
    actual: Iterable[Tensor],
    expected: Iterable[Tensor],
    *,
    tolerance: float = 1e-9,
    of_elements: float | None = None,
) -> None:
    """Asserts that each tensor's norm of differences is at most `tolerance` of its norm, and notes the worst.

    No element may be further off either than `of_elements`, by default `tolerance`, of itself and of the tensor's root
    mean square, or of 1 where that is less.

    mixer: its name in conf/mixer. oracle: what it is held against, in a few words that the docs show, such as
    "transformers, Mamba2Mixer", "flash-linear-attention, naive_recurrent_gla" or "plain recurrence of the paper".
    """
    worst = 0.0
    for number, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        assert ours.shape == theirs.shape, (number, ours.shape, theirs.shape)
        error = float((ours.double() - theirs.double()).norm() / theirs.double().norm())
        assert error <= tolerance, f"tensor {number} of {mixer} against {oracle}: relative error {error:.2e}"
        size, most = max(1.0, float(theirs.double().square().mean().sqrt())), of_elements or tolerance
        torch.testing.assert_close(ours.double(), theirs.double(), atol=most * size, rtol=most)
        worst = max(worst, error)
    if NOTES in os.environ:
        with Path(os.environ[NOTES]).open("a") as file:
            file.write(json.dumps({"mixer": mixer, "oracle": oracle, "error": worst}) + "\n")
