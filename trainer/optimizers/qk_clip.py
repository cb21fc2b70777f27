"""QK-clip (Kimi K2, arXiv 2507.20534): heads whose logits grew too large get smaller queries after a step.

    S_h = max over the tokens i, j of a step of scale q_i . k_j        W_q of head h times tau / S_h where S_h > tau

The queries alone shrink: key heads are shared by groups of them, and in latent attention the whole query stands for
K2's three factors, which have this product.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...kernels.dispatch import note, noting
from ...models.language_model import LanguageModel
from ...models.mixer import name_of
from ...models.part import Clipped, Part
from ...parallel.mesh import Mesh

LOGIT = "qk_largest_logit"
SOFTMAX = {"softmax_attention", "block_sparse_attention"}  # ops with logits that QK-clip is about


class QKClip:
    """The largest logits of a model's heads, over all ranks and micro-batches of a step, and the factors that follow.

    most: tau. Every rank makes one, after the engine, and the model measures from then on.
    """

    def __init__(self, model: LanguageModel, most: float, mesh: Mesh, device: torch.device) -> None:
        self.most, self.mesh = most, mesh
        self._clipped = clipped_parts(model, most)
        for part, clipped in self._clipped:
            part.largest_logits = torch.full((clipped.heads,), float("-inf"), device=device)

    @torch.no_grad()
    def factors(self) -> tuple[dict[nn.Parameter, Tensor], Tensor]:
        """The factors of the heads' rows, for each parameter that has them, and the largest logit of all.

        Every rank calls it after the last backward of a step; the next step is measured by itself. Nothing waits for
        the device.
        """
        measured = [largest for part, _ in self._clipped if (largest := part.largest_logits) is not None]
        flat = torch.cat(measured)
        if self.mesh.world_size > 1:
            dist.all_reduce(flat, op=dist.ReduceOp.MAX)
        for largest in measured:
            largest.fill_(float("-inf"))
        exceeds = (flat > self.most) & flat.isfinite()
        by_part = torch.where(exceeds, self.most / flat, 1.0).split([clipped.heads for _, clipped in self._clipped])
        factors = {
            parameter: factor
            for (_, clipped), factor in zip(self._clipped, by_part, strict=True)
            for parameter in clipped.queries.parameters()
        }
        return factors, flat.max()


def clipped_parts(model: LanguageModel, most: float) -> list[tuple[Part, Clipped]]:
    """The parts with logits, and how each is clipped.

    Raises ValueError where a part's logits cannot be made smaller so, and for a model without logits.
    """
    found: list[tuple[Part, Clipped]] = []
    seen: set[int] = set()
    for _, part in model.leaves():
        clipped = part.clipped()
        if clipped is None:
            continue
        why = clipped if isinstance(clipped, str) else None
        if isinstance(clipped, Clipped):
            if id(clipped.queries.weight) in seen:
                why = "whose queries are shared with other layers (model.shared)"
            seen.add(id(clipped.queries.weight))
            found.append((part, clipped))
        if why is not None:
            raise ValueError(
                f"optimizer.qk_clip must be null with {part.setting} ({name_of(type(part))}), {why}; got {most}. "
                "Leave it out, or change that mixer"
            )
    if not found:
        raise ValueError(
            f"optimizer.qk_clip must be null for a model without softmax attention; got {most}. Leave it out"
        )
    return found


class Tried:
    """Of a model without values that is tried: whether its parts measure the logits that they say they have, and which
    have logits that they say nothing of."""

    def __init__(self, model: LanguageModel) -> None:
        self._measuring: list[tuple[Part, Tensor]] = []
        self._ops: dict[Part, set[str]] = {}
        for _, part in model.leaves():
            clipped = part.clipped()
            if isinstance(clipped, Clipped):
                largest = part.largest_logits = torch.full((clipped.heads,), -math.inf)
                self._measuring.append((part, largest))
            elif clipped is None:
                part.forward = _noted(part.forward, self._ops.setdefault(part, set()))

    def check(self, most: float) -> None:
        """After a forward. Raises ValueError that names a part which QK-clip would pass by in silence."""
        begin = "optimizer.qk_clip must be null with"
        for part, largest in self._measuring:
            if largest._version == 0:  # which counts what has been written into it, without values too
                raise ValueError(
                    f"{begin} {part.setting} ({name_of(type(part))}), which says how it is clipped and does not raise "
                    f"its largest_logits; got {most}. Have it pass largest=self.largest_logits to its op, or leave "
                    "the bound out"
                )
        for part, ops in self._ops.items():
            if own := sorted(ops & SOFTMAX):
                raise ValueError(
                    f"{begin} {part.setting} ({name_of(type(part))}), which runs {own[0]} and does not say how it is "
                    f"clipped; got {most}. Define its `clipped` (models/part.py) and pass largest=self.largest_logits "
                    "to the op, or leave the bound out"
                )


def _noted(forward: Callable[..., Any], found: set[str]) -> Callable[..., Any]:
    """The forward, whose ops join `found` too."""

    def noted(*arguments: Any) -> Any:
        with noting() as own:
            result = forward(*arguments)
        found.update(own)
        for op in own:
            note(op)
        return result

    return noted


def check_clipping(model: LanguageModel, most: float | None, frozen: list[nn.Parameter]) -> None:
    """Raises ValueError as `clipped_parts` does, and for queries that are `frozen`; nothing where `most` is None."""
    if most is None:
        return
    still = set(map(id, frozen))
    for part, clipped in clipped_parts(model, most):
        if any(id(parameter) in still for parameter in clipped.queries.parameters()):
            raise ValueError(
                f"optimizer.qk_clip must be null where optimizer.only leaves out the queries of {part.setting}; got "
                f"{most}. Leave out one of them"
            )
