"""Gathering: what DeepSpeed's stage 3 gathers in a step, and holds gathered at once, by the rules of its coordinator.

It knows in which order modules run. Before a module runs it gathers the parameters that the module itself has, and then
those of the next uses until they are a bucket or until too many are held. After it, it lets go of its parameters, but
for those that are used again soon or have been passed over as the next to gather. (DeepSpeed 0.19.8,
runtime/zero/partitioned_param_coordinator.py; a test compares with what it does.)
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Collection
from itertools import accumulate
from typing import NamedTuple

from torch import nn

from ...models.activations.recomputation import mode_of
from ...models.language_model import LanguageModel
from ...models.part import FeedForward
from ..settings import Settings

PERSISTENT = 100_000  # DeepSpeed's stage3_param_persistence_threshold: parameters that stay gathered, in numbers
BUCKET = 50_000_000  # its stage3_prefetch_bucket_size, in numbers
MOST = 1_000_000_000  # its stage3_max_live_parameters: how many are held while others are gathered ahead
NEAR = 1_000_000_000  # its stage3_max_reuse_distance: numbers that are used before a parameter is used again


class Gathered(NamedTuple):
    """Of one forward and backward: bytes that are gathered, in equal parts of the ranks, and held at most."""

    bytes: int
    most: int


def gathered(model: nn.Module, settings: Settings, ranks: int, left_out: Collection[int] = ()) -> Gathered:
    """Without small parameters, which stay whole, and those whose ids are `left_out`."""
    small = persistent(settings)
    trace = _Trace(settings.trainer.tile_tokens is not None, lambda x: id(x) not in left_out and x.numel() > small)
    trace.add_all(model, settings)
    limits = _limit(settings, "prefetch_bucket_size", BUCKET), _limit(settings, "max_live_parameters", MOST)
    return _walked(trace, ranks, *limits, _limit(settings, "max_reuse_distance", NEAR))


def persistent(settings: Settings) -> int:
    """Up to how many numbers a parameter stays whole."""
    return _limit(settings, "param_persistence_threshold", PERSISTENT)


def _limit(settings: Settings, name: str, default: int) -> int:
    return int(float(settings.engine.config.get("zero_optimization", {}).get(f"stage3_{name}", default)))


Own = tuple[nn.Parameter, ...]


class _Trace:
    """Modules as they run, which begins with the parameters that each itself has; modules run in the order of making.

    events: what a module has, and whether it begins or ends. A feed-forward layer in tiles has all at once.
    """

    def __init__(self, tiled: bool, counts: Callable[[nn.Parameter], bool]) -> None:
        self.events: list[tuple[Own, bool]] = []
        self._tiled, self._counts = tiled, counts

    def add_all(self, model: nn.Module, settings: Settings) -> None:
        """Forward, and backward with what is computed again."""
        stages: list[tuple[nn.Module | None, str]] = [(model, "none")]
        if isinstance(model, LanguageModel):
            modes = [mode_of(settings.trainer.activation_checkpointing, name) for name in model.names]
            stages = [(model.embedding, "none"), (model.embedding_norm, "none")]
            stages += zip(model.blocks, modes, strict=True)
            stages += [(model.norm, "none"), (model.head, "none")]
            stages += [(module, modes[-1]) for module in model.multi_token_prediction]
        run = [(module, mode) for module, mode in stages if module is not None]
        for module, _ in run:
            self._add(module, backward=False)
        for module, mode in reversed(run):
            if mode != "none":
                self._add(module, backward=False)
            self._add(module, backward=True)

    def _add(self, module: nn.Module, backward: bool) -> None:
        whole = self._tiled and isinstance(module, FeedForward)
        found = module.parameters() if whole else module._parameters.values()
        own = tuple(x for x in found if x is not None and self._counts(x))
        runs = not isinstance(module, nn.ModuleList | nn.ModuleDict)
        if runs:
            self.events.append((own, True))
        children = [] if whole else list(module.children())
        for child in reversed(children) if backward else children:
            self._add(child, backward)
        if runs:
            self.events.append((own, False))


def _walked(trace: _Trace, ranks: int, bucket: int, most: int, near: int) -> Gathered:
    """What is gathered, and held at most."""
    steps = [own for own, begins in trace.events if begins]
    before = list(accumulate((sum(x.numel() for x in own) for own in steps), initial=0))
    queue = deque((x, step) for step, own in enumerate(steps) for x in own)
    uses = defaultdict[int, list[int]](list)
    for x, step in queue:
        uses[id(x)].append(step)
    held, passed = dict[int, nn.Parameter](), dict[int, int]()
    begun = numbers = total = at_once = largest = 0
    for own, begins in trace.events:
        if not begins:
            for x in own:
                soon = [use for use in uses[id(x)] if use >= begun][:1]
                near_by = soon and before[soon[0]] - before[begun] < near
                if id(x) in held and not near_by and passed[id(x)] <= begun:
                    del held[id(x)]
                    numbers, at_once = numbers - x.numel(), at_once - x.nbytes
            continue
        wanted = {id(x): x for x in own if id(x) not in held}
        room, ahead = min(most - numbers - sum(x.numel() for x in wanted.values()), bucket), 0
        while queue and (queue[0][1] <= begun or ahead < room):
            x, use = queue.popleft()
            passed[id(x)] = use
            if use > begun and id(x) not in held and id(x) not in wanted:
                wanted[id(x)] = x
                ahead += x.numel()
        held |= wanted
        numbers += sum(x.numel() for x in wanted.values())
        total += sum(-(-x.numel() // ranks) * ranks * x.itemsize for x in wanted.values())
        at_once += sum(x.nbytes for x in wanted.values())
        largest = max(largest, at_once)
        begun += 1
    return Gathered(total, largest)
