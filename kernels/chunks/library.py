"""Recurrences by flash-linear-attention, whose chunk kernels are trusted after a test against the reference.

The library takes one flat row of sequences and a state for each, which fits documents: a document that a row continues
begins with the state that enters the row. Its signatures and meanings change between versions. So no version is
checked: a call is tried on a small problem of its kind first, once per process and device.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ..dispatch import announce, unrecorded
from ..documents import Documents
from ..problem import Problem

logger = logging.getLogger("longreach")

TOLERANCE = 0.02  # relative, of norms: rounding in bfloat16 gives less, a wrong scale or decay more
LENGTHS = [[70, 3, 57], [101]]  # of the documents that a library is tried on; the second row ends in padding

# (inputs of the op as one flat row `[1, N, …]`, and what every function of the library takes by name) to the outputs
# `[1, N, H, V]` and the states after each sequence.
Call = Callable[[Any, dict[str, Any]], tuple[Tensor, Tensor]]

_verdicts: dict[tuple[object, ...], str | None] = {}


def forward(problem: Problem[Any], initial_state: Tensor | None, call: Call) -> tuple[Tensor, Tensor]:
    """(output, final state) of a recurrence, differentiable, by a call on its documents one after the other."""
    documents, device = problem.documents, problem.device
    places, borders, entered, last = documents.on(device, sequences)
    flat = problem.op.record(
        *(x if x is None or x.dim() < 3 else x.flatten(0, 1)[places].unsqueeze(0) for x in problem.inputs)
    )
    states = problem.entering(initial_state)
    states = torch.cat([states, torch.zeros_like(states[:1])])[entered]  # the zero state for what begins here
    rest = {"scale": problem.scale, "initial_state": states, "output_final_state": True}
    # With the borders on the host too, the library need not wait for the device.
    out, after = call(flat, rest | {"cu_seqlens": borders, "cu_seqlens_cpu": documents.derive(sequences)[1]})
    whole = out.new_zeros(documents.batch * documents.length, *out.shape[2:]).index_copy(0, places, out[0])
    after = torch.cat([after, torch.zeros_like(after[:1])])
    return whole.unflatten(0, (documents.batch, -1)), after[last].to(problem.dtype)


def sequences(documents: Documents) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Int64: the places of all tokens in `[B * T]`; the borders of the documents' runs among them; the row whose state
    enters each run, or −1 for the zero state; the run after which each row ends, or −1 for one that ends in padding.
    """
    runs = documents.columns
    real = runs.at(runs.real)
    lengths = real.length
    borders = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    starts = (real.row * documents.length + real.start - borders[:-1]).repeat_interleave(lengths)
    entered = torch.where((real.start == 0) & (real.position > 0), real.row, -1)
    last = lengths.new_full((documents.batch,), -1)
    ending = (real.stop == documents.length).nonzero().squeeze(1)
    last[real.row[ending]] = ending
    return starts + torch.arange(len(starts)), borders, entered, last


def function(name: str) -> Callable[..., Any]:
    """The library's `chunk_…` of this name."""
    return getattr(import_module(f"fla.ops.{name.removeprefix('chunk_')}"), name)


def by_heads(x: Tensor, heads: int) -> Tensor:
    """`[1, N, G, …]` of groups to `[1, N, heads, …]`."""
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], dim=2)


def refusal(problem: Problem[Any], kind: str) -> str | None:
    """Why the library cannot run a problem of this kind; None where it was right on a small one like it."""
    if problem.dtype == torch.float64:
        return "flash-linear-attention does not take float64"
    if problem.exact:
        return "flash-linear-attention takes whole rows, and ranks share these. Use parallel.sequence=1"
    shapes = tuple(None if x is None else (x.dim(), *x.shape[2:]) for x in problem.inputs)
    key = (problem.op, kind, str(problem.device), problem.inputs[0].dtype, shapes)
    if key not in _verdicts:
        with unrecorded():
            _verdicts[key] = _try(problem)
        name = problem.op.name
        if _verdicts[key] is None:
            announce(name, problem.device.type, f"flash-linear-attention's {kind}", "which agrees with the reference")
        else:
            logger.warning("%s: flash-linear-attention's %s is not used: %s", name, kind, _verdicts[key])
    return _verdicts[key]


def _try(problem: Problem[Any]) -> str | None:
    """What is wrong with the library's results on a small problem like this one."""
    try:
        given, reference = (_results(problem, backend) for backend in ("library", "reference"))
    except ImportError as error:
        return f"flash-linear-attention cannot be imported ({error}). Install it: pip install flash-linear-attention"
    except Exception as error:
        return f"flash-linear-attention fails here: {type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    names = ["output", "final state", *(f"gradient of {name}" for name in problem.op.record._fields)]
    for name, got, expected in zip([*names, "gradient of the initial state"], given, reference, strict=True):
        if expected is None or got is None:
            continue
        error = float((got.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))
        if not error < TOLERANCE:
            return f"the {name} of flash-linear-attention is off by {error:.2g} of its norm"
    return None


def _results(problem: Problem[Any], backend: str) -> list[Tensor | None]:
    """Output, final state and all gradients for drawn inputs of the problem's kind."""
    documents = Documents.from_lengths(LENGTHS, 130)
    table = documents.table.clone()
    table[0, 4] = 5  # the first row continues a document
    documents = Documents(table, documents.batch, documents.length)
    generator = torch.Generator().manual_seed(0)

    def draw(name: str, like: Tensor | None) -> Tensor | None:
        if like is None:
            return None
        shape = (documents.batch, documents.length, *like.shape[2:]) if like.dim() > 2 else like.shape
        x = torch.randn(shape, generator=generator)
        if name == "log_decay":
            x = -torch.nn.functional.softplus(x - 2)
        elif name == "beta":
            x = x.sigmoid()
        elif name in ("q", "k"):
            x = torch.nn.functional.normalize(x, dim=-1)
        return x.to(like.device, like.dtype)

    inputs = [draw(name, x) for name, x in problem.inputs._asdict().items()]
    tried = replace(problem, inputs=problem.op.record(*inputs), documents=documents, backend=backend)
    state = torch.randn(tried.new_states().shape, generator=generator).to(problem.device, problem.dtype)
    out, final = tried.implementation.forward(tried, state)
    dout, dfinal = (torch.randn(x.shape, generator=generator).to(x) for x in (out, final))
    gradients, dstate = tried.op.backward(tried, dout, dfinal, state)
    return [out, final, *gradients, dstate]
