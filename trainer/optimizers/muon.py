"""Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/) on flat tensors that ranks hold parts of.

torch's own steps whole matrices alone, which no rank has under ZeRO, and DeepSpeed 0.19.8's clips the step in place of
the gradient and compiles when it is imported. Both orthogonalise in half precision, on a CPU too.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...kernels.dispatch import kind_of
from .exchange import Exchange, Part

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
EPS = 1e-7
AT_ONCE = 1 << 26  # elements of matrices that are orthogonalised together


class Stack(NamedTuple):
    """A parameter that Muon steps: `count` matrices `[rows, columns]`, and where this rank's part of them is.

    The part is elements start .. start + length of the parameter, from `offset` on in the flat tensor.
    """

    count: int
    rows: int
    columns: int
    offset: int
    start: int
    length: int


Locate = Callable[[Tensor], list[Stack]]


class Muon:
    """Steps flat tensors: orthogonal matrices in place of the mean gradients, scaled like AdamW's steps.

        M = m M + (1 - m) G        G' = m M + (1 - m) G        W = (1 - lr wd) W - 0.2 sqrt(max(A, B)) lr O(G')

    O makes the singular values of a matrix `[A, B]` about 1 by Newton-Schulz iterations, in bfloat16 on a GPU and in
    float32 on a CPU; the scale, of Moonlight (Liu et al., 2025, arXiv 2502.16982), gives the step the root mean square
    of AdamW's, so that learning rates and weight decays carry over.

    locate: the stacks of a flat tensor, the same on every rank but for the parts. ranks, group: that hold the parts; 1
    where each holds everything. Each matrix goes to one rank, which orthogonalises it, and comes back: a rank sends and
    receives as much as its part, twice.
    """

    def __init__(self, momentum: float, device: torch.device) -> None:
        self.locate: Locate = lambda flat: []
        self.ranks, self.group = 1, None
        self._momentum, self._device = momentum, device
        self._dtype = torch.float32 if kind_of(device) == "cpu" else torch.bfloat16
        self._exchanges: dict[tuple[int, ...], Exchange] = {}

    def step(self, groups: list[dict[str, Any]], states: Mapping[Tensor, dict[str, Any]]) -> None:
        """Steps the flat tensors of these groups that have a gradient, which changes too; every rank calls it."""
        stepped = [(flat, group) for group in groups for flat in group["params"] if flat.grad is not None]
        if not stepped:
            return
        updates = []
        for flat, _ in stepped:
            momentum = states[flat]["momentum"]
            momentum.lerp_(flat.grad, 1 - self._momentum)
            updates.append(flat.grad.lerp_(momentum, self._momentum).view(-1).to(self._device, self._dtype))
        exchange = self._exchange([flat for flat, _ in stepped], [group["row_blocks"] for _, group in stepped])
        matrices = exchange.gather(updates)
        results = list(matrices)
        for numbers in _alike(matrices):
            made = orthogonal(torch.cat([matrices[number] for number in numbers]))
            for number, part in zip(numbers, made.split([len(matrices[number]) for number in numbers]), strict=True):
                results[number] = part
        for flat, group in stepped:
            flat.mul_(1 - group["lr"] * group["weight_decay"])
        for part, values in exchange.scatter(results, updates[0]):
            flat, group = stepped[part.flat]
            scale = 0.2 * math.sqrt(max(part.rows, part.columns))
            place = flat.view(-1).narrow(0, part.offset, len(values))
            place.add_(values.to(flat.device, flat.dtype), alpha=-group["lr"] * scale)

    def _exchange(self, flats: list[Tensor], blocks: list[int]) -> Exchange:
        """What travels for these flat tensors, which is found out once."""
        key = tuple(map(id, flats))
        if key not in self._exchanges:
            parts = [
                Part(number, stack.count * block, stack.rows // block, *stack[2:])
                for number, (flat, block) in enumerate(zip(flats, blocks, strict=True))
                for stack in self.locate(flat)
            ]
            self._exchanges[key] = Exchange(parts, self.ranks, self.group, self._device)
        return self._exchanges[key]


def _alike(matrices: list[Tensor]) -> list[list[int]]:
    """Numbers of the stacks of matrices of one shape, as many together as AT_ONCE allows."""
    by_shape: dict[tuple[int, ...], list[list[int]]] = defaultdict(list)
    sizes: dict[int, int] = {}
    for number, stack in enumerate(matrices):
        lists = by_shape[tuple(stack.shape[1:])]
        if not lists or sizes[id(lists[-1])] + stack.numel() > AT_ONCE:
            lists.append([])
            sizes[id(lists[-1])] = 0
        lists[-1].append(number)
        sizes[id(lists[-1])] += stack.numel()
    return [numbers for lists in by_shape.values() for numbers in lists]


def orthogonal(matrices: Tensor) -> Tensor:
    """Matrices `[N, A, B]` with the same singular vectors and singular values near 1, in the type that they have."""
    a, b, c = COEFFICIENTS
    x = matrices.mT if matrices.shape[1] > matrices.shape[2] else matrices
    exact = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=exact)
    x = x / norm.clamp(min=EPS).to(x.dtype)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if matrices.shape[1] > matrices.shape[2] else x
