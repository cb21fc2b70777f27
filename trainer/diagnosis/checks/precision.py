"""Precision: the error of a rounded type, measured by float64 on the same rounded numbers.

Beside one device in the same type nothing shows that both do alike; float64 tells what should come out. An op is to add
up in float32 and to round once, whatever it is made of and however many ranks give parts of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ....kernels.documents import Documents
from ....models.layers.rotary import Rotary
from ....parallel import ops
from ....parallel.sequence import Sequence
from ..truth import Call, gradients_of, output_of
from .comparison import Difference, rms


class Noted(NamedTuple):
    """A call of an op of `parallel.ops` by this rank: with the tokens that it holds, on its sequence."""

    call: Call
    seq: Sequence


@contextmanager
def noted_ops() -> Iterator[list[Noted]]:
    """Inside, the calls of ops with an output that may have a gradient are recorded, in their order."""
    originals = {name: getattr(ops, name) for name in ops.__all__}
    noted: list[Noted] = []

    def noting(name: str) -> Any:
        @wraps(originals[name])
        def op(*args: Any, seq: Sequence, **kwargs: Any) -> Any:
            result = originals[name](*args, seq=seq, **kwargs)
            output = output_of(name, result)
            if output.is_floating_point():
                call = Call(seq.layer, "", name, args, kwargs, output.shape)
                noted.append(Noted(call.mapped(lambda x: x.detach().clone()), seq))
            return result

        return op

    try:
        for name in originals:
            setattr(ops, name, noting(name))
        yield noted
    finally:
        for name, original in originals.items():
            setattr(ops, name, original)


def of_ops(noted: list[Noted], dtype: torch.dtype) -> list[Difference]:
    """The errors of output and gradients of every recorded op on this rank, in roundings; see `roundings`.

    Every rank that shares the sequence calls it with the same ops. The truth is the op itself in float64, on the same
    ranks: that those give what one device gives is for exact checks to say.
    """
    differences = []
    for call, seq in noted:
        op, dout = getattr(ops, call.op), call.dout(dtype)
        got = gradients_of(op, call, dout, seq)
        exact = gradients_of(op, call.mapped(_exactly), dout.double(), seq)
        places = ["output", *(f"gradient of {name}" for name in call.names())]
        for place, a, b in zip(places, got, exact, strict=True):
            differences.append(Difference(roundings(a, b, dtype), f"{call.op}: {place}"))
    return differences


def roundings(got: Tensor, truth: Tensor, dtype: torch.dtype) -> float:
    """The error of `got` over that of the truth rounded once to `dtype`: 1 for one rounding; root mean squares.

    Of a sum of n numbers that is rounded after each it comes to about sqrt(n / 2), or more where the numbers cancel.
    """
    once = rms(truth.to(dtype), truth)
    return rms(got, truth) / max(once, torch.finfo(dtype).eps / 8)


@contextmanager
def plain_rotations(documents: Documents) -> Iterator[None]:
    """Inside, mixers rotate whole rows in float64 by positions counted in this function, whatever theirs are.

    A position or an angle that is rounded in every type alike is wrong in float64 too.
    """
    original = Rotary.__call__
    counted = torch.zeros(documents.batch, documents.length, dtype=torch.float64)
    for row, runs in zip(counted, documents.runs, strict=True):
        for run in runs:
            row[run.start : run.stop] = torch.arange(run.position, run.end_position, dtype=torch.float64)

    def rotate(self: Rotary, x: Tensor, seq: Sequence) -> Tensor:
        inverse_frequencies, factor = self.rotation.frequencies()
        angles = (counted[..., None, None] * inverse_frequencies.double()).to(x.device)
        dims = self.rotation.dims
        first, second, rest = x.tensor_split((dims // 2, dims), dim=-1)
        turned = torch.complex(first.double(), second.double()) * torch.polar(torch.full_like(angles, factor), angles)
        return torch.cat([turned.real.to(x.dtype), turned.imag.to(x.dtype), rest], dim=-1)

    Rotary.__call__ = rotate
    try:
        yield
    finally:
        Rotary.__call__ = original


def _exactly(x: Tensor) -> Tensor:
    """Numbers in float64; indices as they are."""
    return x.double() if x.is_floating_point() else x
