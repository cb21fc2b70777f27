"""Ulysses: ranks exchange tokens for heads, run an op on whole heads, and exchange back.

Jacobs et al., 2023, "DeepSpeed Ulysses", arXiv 2309.14509; with a ring, or state passing, among the ranks that hold the
same heads it is the two-dimensional scheme of Fang and Zhao, 2024 (USP, arXiv 2405.07719).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...kernels.operation import Tensors
from ..collectives import all_to_all
from ..mesh import Heads
from ..operation import Operation, Setting, is_sequence, present
from ..sequence import Sequence

REMEDY = "Change it, lower parallel.ulysses, or choose another strategy for this mixer in parallel.mixers"
ALIGNMENT = 16  # bytes: so that any type can be read in place from a message


@dataclass(frozen=True)
class Ulysses(Operation):
    """The operation `inner`, run by each rank of `Sequence.heads` on its heads of the tokens of all these ranks.

    An `Operation` with the inputs of `inner`: sequences `[B, T, H, …]`, of which each rank gets H / U heads (channels,
    for ops without heads), and constants `[H, …]`, of which it takes its own. Grouped heads fewer than the U ranks go
    to all ranks whose query heads use them. Inputs at the places `common` have no heads, `[B, T, …]`, and go to every
    rank. Backward exchanges the inputs again rather than keeping a second copy. Every exchange is one message per pair
    of ranks. Raises ValueError, on all ranks alike and before anything is sent, for heads that the ranks do not divide.
    """

    ranks: int
    inner: Operation
    common: tuple[int, ...] = ()

    @property
    def kernel(self) -> str | None:
        return self.inner.kernel

    def forward(self, inputs: Tensors, seq: Sequence) -> tuple[Tensors, Tensors]:
        heads = _heads(seq)
        self._check(inputs)
        outputs, saved = self.inner.forward(self._to_heads(inputs, seq, heads), seq.by_heads)
        return tuple(_to_tokens(list(present(*outputs)), seq, heads)), saved

    def backward(
        self, gradients: Tensors, inputs: Tensors, outputs: tuple[Tensor, ...], saved: Tensors, seq: Sequence
    ) -> Tensors:
        heads = _heads(seq)
        exchanged = self._to_heads((*inputs, *gradients, *outputs), seq, heads)
        count = len(inputs)
        by_heads, dout, out = exchanged[:count], exchanged[count:][:1], present(*exchanged[count + 1 :])
        gradients = self.inner.backward(dout, by_heads, out, saved, seq.by_heads)
        sequences = [i for i, x in enumerate(inputs) if x is not None and is_sequence(x) and gradients[i] is not None]
        back = dict(zip(sequences, _to_tokens([_present(gradients[i]) for i in sequences], seq, heads), strict=True))
        return tuple(self._own_gradient(i, x, back.get(i, gradients[i]), seq, heads) for i, x in enumerate(inputs))

    def like(self, inputs: Tensors, ranks: int, spans: int) -> tuple[tuple[Tensor, ...], Tensors]:
        self._check(inputs)

        def by_heads(place: int, x: Tensor | None) -> Tensor | None:
            if x is None:
                return None
            if not is_sequence(x):
                return x.new_empty(x.shape[0] // self.ranks, *x.shape[1:])
            shape = list(x.shape)
            shape[1] *= self.ranks
            if place not in self.common:
                shape[2] = max(1, shape[2] // self.ranks)
            return x.new_empty(shape)

        ring = ranks // self.ranks
        (out,), saved = self.inner.like(
            tuple(by_heads(place, x) for place, x in enumerate(inputs)), ring, spans if ring > 1 else 1
        )
        shape = [out.shape[0], out.shape[1] // self.ranks, out.shape[2] * self.ranks, *out.shape[3:]]
        return (out.new_empty(shape),), saved

    def _check(self, inputs: Tensors) -> None:
        """Raises ValueError for heads that ranks do not divide; sequences with fewer heads than others are grouped."""
        shared = [x for i, x in enumerate(inputs) if x is not None and is_sequence(x) and i not in self.common]
        constants = [x.shape[0] for x in inputs if x is not None and not is_sequence(x)]
        counts = [x.shape[2] for x in shared]
        if wrong := [count for count in (max(counts), *constants) if count % self.ranks]:
            what = "heads" if any(x.dim() > 3 for x in shared) else "channels"
            raise ValueError(
                f"{what} must be a multiple of the {self.ranks} ranks that exchange tokens for heads; got {wrong[0]}. "
                f"{REMEDY}"
            )
        if wrong := [count for count in counts if count % self.ranks and self.ranks % count]:
            raise ValueError(
                f"key/value heads and groups must be a multiple or a divisor of the {self.ranks} ranks that exchange "
                f"tokens for heads; got {wrong[0]}. {REMEDY}"
            )

    def _to_heads(self, inputs: Tensors, seq: Sequence, heads: Heads) -> Tensors:
        """The inputs of `inner`: this rank's heads, of the tokens of all ranks of the group."""
        places = [i for i, x in enumerate(inputs) if x is not None and is_sequence(x)]
        shares = [_shares(_present(inputs[i]), heads.ranks, common=i in self.common) for i in places]
        received = _exchange([[share[u] for share in shares] for u in range(heads.ranks)], heads)
        joined = [_join([parts[j] for parts in received], seq) for j in range(len(places))]
        result: list[Tensor | None] = [None if x is None else _own(x, seq, heads) for x in inputs]
        for place, x in zip(places, joined, strict=True):
            result[place] = x
        return tuple(result)

    def _own_gradient(
        self, place: int, x: Tensor | None, gradient: Tensor | None, seq: Sequence, heads: Heads
    ) -> Tensor | None:
        if x is None or gradient is None:
            return None
        if not is_sequence(x):  # zero for the heads of others: the sum over ranks is the whole gradient
            whole = torch.zeros_like(x)
            _own(whole, seq, heads).copy_(gradient)
            return whole
        if place in self.common:
            return gradient.unflatten(2, (heads.ranks, -1)).sum(2)
        copies = gradient.shape[2] // x.shape[2]
        return gradient if copies == 1 else gradient.unflatten(2, (-1, copies)).sum(3)


def ulysses(ranks: int, common: tuple[int, ...], build: Callable[..., Operation], *settings: Setting) -> Ulysses:
    """The operation `build(*settings)` by heads over `ranks` ranks; plain values, as `mix` wants them."""
    return Ulysses(ranks, build(*settings), common)


def _heads(seq: Sequence) -> Heads:
    assert seq.heads is not None
    return seq.heads


def _present(x: Tensor | None) -> Tensor:
    assert x is not None
    return x


def _place(seq: Sequence, heads: Heads) -> int:
    """This rank's place in its group."""
    return seq.rank % heads.ranks


def _own(x: Tensor, seq: Sequence, heads: Heads) -> Tensor:
    """The heads of a constant `[H, …]` that are this rank's, a view; a sequence as it is."""
    if is_sequence(x):
        return x
    share = x.shape[0] // heads.ranks
    return x[_place(seq, heads) * share :][:share]


def _shares(x: Tensor, ranks: int, *, common: bool) -> list[Tensor]:
    """What each rank gets of `[B, T, H, …]`."""
    if common:
        return [x] * ranks
    count = x.shape[2]
    if count >= ranks:
        return list(x.chunk(ranks, dim=2))
    return [x[:, :, rank * count // ranks :][:, :, :1] for rank in range(ranks)]


def _exchange(parts: list[list[Tensor]], heads: Heads) -> list[list[Tensor]]:
    """Sends the tensors `parts[u]` to rank u of the group, packed; returns those received, of the same shapes, by
    rank.
    """
    shapes = [(part.shape, part.dtype) for part in parts[0]]
    received = all_to_all(torch.stack([_packed(tensors) for tensors in parts]), heads.group)
    return [_unpacked(message, shapes) for message in received]


def _packed(tensors: list[Tensor]) -> Tensor:
    """One message of bytes."""
    pieces = []
    for x in tensors:
        piece = x.contiguous().view(-1).view(torch.uint8)
        pieces += [piece, piece.new_zeros(-piece.numel() % ALIGNMENT)]
    return torch.cat(pieces)


def _unpacked(message: Tensor, shapes: list[tuple[torch.Size, Any]]) -> list[Tensor]:
    tensors, start = [], 0
    for shape, dtype in shapes:
        size = math.prod(shape) * dtype.itemsize
        tensors.append(message[start : start + size].view(dtype).view(shape))
        start += size + -size % ALIGNMENT
    return tensors


def _join(parts: list[Tensor], seq: Sequence) -> Tensor:
    """The `[B, T, …]` of every rank of the group to `[B, U * T, …]` in the order of the row."""
    turns = [part.chunk(seq.layout.spans, dim=1) for part in parts]
    return torch.cat([part[turn] for turn in range(seq.layout.spans) for part in _ordered(turns, turn)], dim=1)


def _part(x: Tensor, count: int, seq: Sequence) -> list[Tensor]:
    """The inverse of `_join`."""
    pieces = x.chunk(seq.layout.spans * count, dim=1)
    turns = [_ordered(list(pieces[t * count : (t + 1) * count]), t) for t in range(seq.layout.spans)]
    return [torch.cat([turn[rank] for turn in turns], dim=1) for rank in range(count)]


def _ordered(parts: list[Any], turn: int) -> list[Any]:
    """Spans are dealt back and forth."""
    return parts if turn % 2 == 0 else parts[::-1]


def _to_tokens(tensors: list[Tensor], seq: Sequence, heads: Heads) -> list[Tensor]:
    """`[B, U * T, H / U, …]` of this rank's heads back to `[B, T, H, …]` of its tokens."""
    shares = [_part(x, heads.ranks, seq) for x in tensors]
    received = _exchange([[share[u] for share in shares] for u in range(heads.ranks)], heads)
    return [torch.cat([parts[j] for parts in received], dim=2) for j in range(len(tensors))]
