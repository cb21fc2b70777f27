"""Ranks as threads: every op shared by four ranks of one process, on this device, beside the same op on one rank."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ...kernels.documents import Documents
from ...parallel.sequence import Sequence
from .cases import DISCONTINUOUS, OF_TESTS, Trial, latent, of_the_tests
from .ops import error, run
from .step import Here, Step

RANKS, SPANS = 4, 2  # a zigzag
WORSE, FLOOR = 1.5, 1e-3  # how much larger than on one rank errors in bfloat16 may be: a wrong token is 1e-2
EXACT = 1e-9  # relative error in float64
OTHERS = (("softmax", "gather"), ("softmax", "ulysses"), ("scalar decay", "ulysses"), ("gated delta", "ulysses"))


def steps(here: Here) -> list[Step]:
    from ...parallel import threads  # noqa: F401 (where it is missing, that is said instead)

    tests = of_the_tests("parallel_cases")
    found = [Step("latent attention", partial(_share, latent(tests), "default", torch.bfloat16))]
    for name in tests.CASES:
        if name in OF_TESTS:
            continue
        jumps = any(name.startswith(part) for part in DISCONTINUOUS)
        dtype = torch.float64 if jumps else torch.bfloat16
        found.append(Step(name, partial(_share, Trial(name, tests.CASES[name]), "default", dtype)))
    for name, strategy in OTHERS:
        trial = Trial(name, tests.CASES[name])
        found.append(Step(f"{name} by {strategy}", partial(_share, trial, strategy, torch.bfloat16)))
    return found


def packed(here: Here) -> Documents:
    """Two rows: documents that cross spans, one that is the whole row, and padding."""
    length = 256 if here.on_gpu else 12
    whole = RANKS * SPANS * length
    return Documents.from_lengths([[length + 3, 1, 3 * length, length], [whole]], whole)


def _share(trial: Trial, strategy: str, dtype: torch.dtype, here: Here) -> None:
    documents = packed(here)
    inputs, dout = trial.draw(documents, dtype, here.device)
    exact = run(trial, [x.double() for x in inputs], dout, Sequence.single(documents))
    one = [error(a, b) for a, b in zip(run(trial, inputs, dout, Sequence.single(documents)), exact, strict=True)]
    found = _on_ranks(trial, inputs, dout, documents, strategy, here)
    four = [error(a, b) for a, b in zip(found, exact, strict=True)]
    allowed = [EXACT if dtype == torch.float64 else WORSE * alone + FLOOR for alone in one]
    right = all(value <= most for value, most in zip(four, allowed, strict=True))
    here.row(
        f"{RANKS} ranks in a zigzag; errors relative to the norm, of the output and of the worst gradient",
        op=trial.name,
        strategy=strategy,
        type=str(dtype).removeprefix("torch."),
        **{"out, one rank": one[0], f"out, {RANKS} ranks": four[0]},
        **{"gradient, one rank": max(one[1:]), f"gradient, {RANKS} ranks": max(four[1:]), "right": right},
    )
    if not right:
        names = ["out", *(f"gradient {n}, {list(x.shape)} in {x.dtype}" for n, x in enumerate(inputs))]
        each = zip(names, one, four, strict=True)
        here.fail(
            f"{RANKS} ranks give something else than one",
            [f"{name}: error {a:.3g} on one rank, {b:.3g} on {RANKS}" for name, a, b in each],
        )


def _on_ranks(
    trial: Trial, inputs: list[Tensor], dout: Tensor, documents: Documents, strategy: str, here: Here
) -> list[Tensor]:
    """Output and gradients of the whole rows, put together from the ranks; constants' gradients are added up."""
    from ...parallel.threads import run_as_threads

    tests = of_the_tests("parallel_cases")

    def of_rank(rank: int) -> list[Tensor]:
        seq = tests.shared(RANKS, SPANS, documents, strategy)
        mine = tests.local(inputs, seq)
        out = trial.case.call(*mine, seq=seq)
        out.backward(seq.shard(dout).to(out.dtype))
        return [out.detach(), *(x.grad for x in mine)]

    parts = run_as_threads(RANKS, of_rank, timeout=max(here.left, 1.0))
    layout = tests.Layout(documents.length, RANKS, SPANS)
    split = [True, *(tests.is_rows(x) for x in inputs)]
    return [
        _whole(list(of_ranks), layout) if rows else torch.stack([x.double() for x in of_ranks]).sum(0)
        for rows, of_ranks in zip(split, zip(*parts, strict=True), strict=True)
    ]


def _whole(parts: list[Tensor], layout: object) -> Tensor:
    """`[B, N, …]` of the rows from the `[B, T, …]` of each rank."""
    places = torch.arange(layout.length).view(1, -1)  # type: ignore[attr-defined]
    order = torch.cat([layout.shard(places, rank)[0] for rank in range(len(parts))])  # type: ignore[attr-defined]
    together = torch.cat(parts, dim=1)
    return together.index_select(1, order.argsort().to(together.device))
