"""Choices: the experts that routers choose, noted, or told so that rounding alone changes none of them; and the blocks
that selectors list."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any

from torch import Tensor

from ...models.feed_forward.router import Router, Routing
from ...models.language_model import LanguageModel
from ...parallel import ops
from ...parallel.sequence import Sequence


@contextmanager
def choices(
    model: LanguageModel, seq: Sequence, told: Mapping[str, Tensor] | None = None
) -> Iterator[dict[str, Tensor]]:
    """Inside, the choices `[B, T, k]` of this rank's tokens by router join the yielded mapping.

    told: those of whole rows, `[B, N, k]`, that routers make in place of their own: two experts of nearly one score
    change places by rounding alone, which is no error.
    """
    found: dict[str, Tensor] = {}
    hooks = []
    for path, module in model.named_modules():
        if isinstance(module, Router):

            def follow(router: Any, arguments: Any, routing: Routing, path: str = path) -> Routing | None:
                shape = seq.local.batch, seq.local.length, routing.experts.shape[1]
                if told is None:
                    found[path] = routing.experts.view(shape)
                    return None
                experts = seq.shard(told[path].to(routing.experts.device)).flatten(0, 1)
                return routing._replace(experts=experts, weights=router.weigh(routing.scores, experts))

            hooks.append(module.register_forward_hook(follow))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def noted_lists() -> Iterator[list[Tensor]]:
    """Inside, what `select_blocks` returns is recorded."""
    original: Any = ops.select_blocks
    lists: list[Tensor] = []

    @wraps(original)
    def noting(*args: Any, **kwargs: Any) -> Any:
        lists.append(original(*args, **kwargs))
        return lists[-1]

    try:
        ops.select_blocks = noting  # type: ignore[assignment]
        yield lists
    finally:
        ops.select_blocks = original  # type: ignore[assignment]
