"""How an op's operation is run: with tokens exchanged for heads, or as they are."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ...kernels.operation import Tensors
from ..operation import Operation, Setting, mix
from ..sequence import Sequence
from ..strategies.ulysses import ulysses


def mix_by(
    build: Callable[..., Operation],
    settings: tuple[Setting, ...],
    inputs: Tensors,
    seq: Sequence,
    slot: str,
    *,
    by_heads: bool,
    common: tuple[int, ...] = (),
) -> Tensor:
    """The operation `build(*settings)`, with tokens exchanged for heads or as they are."""
    if by_heads and seq.heads is not None:
        return mix(ulysses, (seq.heads.ranks, common, build, *settings), inputs, seq, slot)[0]
    return mix(build, settings, inputs, seq, slot)[0]
