"""Short convolutions and shifts on a sequence that ranks share."""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor

from ...kernels import short_conv as kernels
from ..sequence import Sequence
from ..strategies.halo import halo, last_rows


@overload
def short_conv(
    x: Tensor,
    weight: Tensor,
    *,
    seq: Sequence,
    bias: Tensor | None = None,
    activation: str | None = None,
    slot: str = "conv",
) -> Tensor: ...
@overload
def short_conv(
    x: tuple[Tensor, ...],
    weight: Tensor,
    *,
    seq: Sequence,
    bias: Tensor | None = None,
    activation: str | None = None,
    slot: str = "conv",
) -> tuple[Tensor, ...]: ...
def short_conv(
    x: Tensor | tuple[Tensor, ...],
    weight: Tensor,
    *,
    seq: Sequence,
    bias: Tensor | None = None,
    activation: str | None = None,
    slot: str = "conv",
) -> Tensor | tuple[Tensor, ...]:
    """Causal depthwise convolution of `[B, T, D]` with `weight [D, W]`; taps never cross a document's start.

    x may be several `[B, T, D_i]` that share the D channels in this order. They are convolved as one tensor, so that
    ranks exchange one message for all; on a CPU that has whole rows there is no message, and each is where it lies.
    """
    settings: dict[str, Any] = {"seq": seq, "activation": activation}
    if isinstance(x, tuple):
        sizes = [part.shape[-1] for part in x]
        alone = seq.layout.ranks == 1 and seq.cache is None and not torch.compiler.is_compiling()
        if not (alone and x[0].device.type == "cpu"):
            return short_conv(torch.cat(x, dim=-1), weight, bias=bias, slot=slot, **settings).split(sizes, dim=-1)
        biases = [None] * len(sizes) if bias is None else bias.split(sizes)
        return tuple(
            short_conv(part, own, bias=offset, slot=f"{slot} {number}", **settings)
            for number, (part, own, offset) in enumerate(zip(x, weight.split(sizes), biases, strict=True))
        )
    if torch.compiler.is_compiling():
        return _traced_conv(x, weight, bias, slot=slot, **settings)
    width = weight.shape[1] - 1
    folded, history = _with_history(x, seq, width, slot)
    out = kernels.short_conv(
        folded, weight, bias=bias, documents=seq.spans, history=history, activation=activation, backend=seq.backend
    )
    return seq.unfold(out)


def _traced_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, seq: Sequence, activation: str | None, slot: str
) -> Tensor:
    """The convolution as torch.compile fuses it best: a shift for each tap, masked by how far the document reaches."""
    taps, dtype = weight.shape[1], torch.promote_types(x.dtype, torch.float32)
    folded = seq.fold(x)
    before = halo(folded, seq, taps - 1, slot)
    before = folded.new_zeros(folded.shape[0], taps - 1, folded.shape[2]) if before is None else before
    rows = torch.cat([before, folded], dim=1).to(dtype)
    reach = seq.fold(seq.reach(x.device).unsqueeze(-1))
    out = torch.zeros_like(folded, dtype=dtype) if bias is None else (reach >= 0) * bias.to(dtype)
    for back in range(taps):
        shifted = rows[:, taps - 1 - back : rows.shape[1] - back]
        out = out + torch.where(reach >= back, shifted, 0.0) * weight[:, taps - 1 - back].to(dtype)
    out = torch.nn.functional.silu(out) if activation == "silu" else out
    return seq.unfold(out.to(x.dtype))


def token_shift(x: Tensor, *, seq: Sequence, slot: str = "shift") -> Tensor:
    """The previous token of each of `[B, T, D]`, zero at a document's start."""
    if torch.compiler.is_compiling():
        weight = x.new_tensor([[1.0, 0.0]]).expand(x.shape[2], -1)
        return _traced_conv(x, weight, None, seq=seq, activation=None, slot=slot)
    folded, history = _with_history(x, seq, 1, slot)
    return seq.unfold(kernels.token_shift(folded, documents=seq.spans, history=history, backend=seq.backend))


def _with_history(x: Tensor, seq: Sequence, width: int, slot: str) -> tuple[Tensor, Tensor | None]:
    """Folded spans of x, and the `width` rows before each: from other ranks, or from the decoding cache."""
    if not seq.decodes:
        folded = seq.fold(x)
        if seq.layout.ranks == 1:
            seq.claim(slot)  # decoding needs the slot even where there is no halo
        if seq.cache is not None:
            seq.cache.states[seq.layer, slot] = last_rows(folded, seq, width)
        return folded, halo(folded, seq, width, slot)
    assert seq.cache is not None
    history = seq.cache.states.get((seq.layer, slot))
    if history is None:
        history = x.new_zeros(x.shape[0], width, *x.shape[2:])
    new = x.shape[1]
    later = x[:, new - width :].clone() if new >= width else torch.cat([history[:, new:], x], dim=1)
    seq.cache.states[seq.layer, slot] = later
    return x, history
