"""States: what a rank holds of each parameter from step to step, and what the optimizer's step needs besides."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.dispatch import standing_for
from ..optimizers.grouped import STATES, Grouped, create_states, make_optimizer
from ..optimizers.groups import frozen_parameters, groups_of
from ..optimizers.muon import Stack
from ..settings import Settings
from ..zero.masters import stack_of
from .allocations import Allocations

BUFFERS, SAVING = "DeepSpeed's buffers", "copy for saving"
STEP = "optimizer's step, without activations"
PARTS = ("parameters", "gradients", "float32 masters", "moments", BUFFERS, SAVING)
# DeepSpeed's defaults of `reduce_bucket_size` and `stage3_param_persistence_threshold`, in elements.
BUCKET, PERSISTENT = 500_000_000, 100_000


@dataclass(frozen=True)
class Share:
    """Of one part, bytes whatever the length, and bytes per token that this rank holds; `host`: not on the device."""

    part: str
    fixed: float
    per_token: float = 0.0
    host: bool = False

    def bytes(self, tokens: int) -> int:
        """Of so many tokens."""
        return round(self.fixed + self.per_token * tokens)


@dataclass(frozen=True)
class _Group:
    """Parameters that an optimizer steps by one rule; `experts`: DeepSpeed does not see them (see `ExpertWeights`).

    `ranks` ranks share out what it keeps of them, of which this rank computes with `held` of the whole.
    """

    rule: dict[str, Any]
    parameters: list[nn.Parameter]
    experts: bool
    ranks: int
    held: float

    @property
    def numbers(self) -> float:
        """That this rank computes with."""
        return self.held * sum(parameter.numel() for parameter in self.parameters)

    @property
    def part(self) -> float:
        """Those of which it has the optimizer's states."""
        return self.numbers / self.ranks

    @property
    def bytes(self) -> float:
        return self.held * sum(parameter.nbytes for parameter in self.parameters)


def states_of(
    model: nn.Module, settings: Settings, world_size: int, device: torch.device | None = None
) -> tuple[Share, ...]:
    """Parameters, gradients, float32 masters, the optimizer's states and buffers, and the copy for saving on one rank.

    model: whole, on any device, in the types of training. device: of training; on a CPU memory counts that is used, of
    other devices what is asked for. Gradients are those that are there when the last backward pass of a step has ended.
    The copy is what `checkpoint.asynchronous` keeps from the first save on.
    """
    saving, held = settings.checkpoint, _Held()
    groups = _groups(model, settings, world_size)
    for group in groups:
        kept = len(STATES[group.rule["kind"]])
        if group.experts:
            held.add("parameters", group.bytes)
            held.add("gradients", 4 * group.numbers)
        else:
            _add_of_deepspeed(held, group, settings)
        away = settings.engine.offload != "none" and not group.experts
        if settings.engine.zero_stage or group.experts:
            held.add("float32 masters", 4 * group.part, host=away)
        held.add("moments", 4 * kept * group.part, host=away)
        if saving.asynchronous and 0 < saving.every < settings.trainer.steps:
            held.add(SAVING, 4 * (1 + kept) * group.numbers / group.held / world_size, host=True)
    others = [group for group in groups if not group.experts]
    _add_buffers(held, others, settings, on_cpu=device is not None and device.type == "cpu")
    return held.shares()


class _Held:
    """Bytes by part, on the device and on the host."""

    def __init__(self) -> None:
        self._bytes: dict[tuple[str, bool], float] = {}

    def add(self, part: str, number: float, *, host: bool = False) -> None:
        self._bytes[part, host] = self._bytes.get((part, host), 0.0) + number

    def shares(self) -> tuple[Share, ...]:
        """In the order of PARTS."""
        ordered = sorted(self._bytes, key=lambda key: (PARTS.index(key[0]), key[1]))
        return tuple(Share(part, self._bytes[part, host], host=host) for part, host in ordered)


def _add_of_deepspeed(held: _Held, group: _Group, settings: Settings) -> None:
    """Parameters and gradients of a group, as ZeRO keeps them, and what it keeps beside them where they are offloaded.

    Stage 1 in bfloat16 adds gradients up in float32 beside those of the last pass; with offloading, as the other stages
    do, in their place.
    """
    engine, stage, part = settings.engine, settings.engine.zero_stage, group.part
    away, ranks = engine.offload != "none", group.ranks
    if stage < 3:
        held.add("parameters", group.bytes)
    else:
        held.add("parameters", group.bytes / ranks, host=engine.offload == "all")
        if ranks > 1:  # small ones are left whole when they have been gathered
            held.add("parameters", _left_whole([group]))
        if engine.hierarchical is not None:
            held.add("parameters", group.bytes / engine.hierarchical)
    if stage > 1:
        held.add("gradients", 4 * part, host=away)
    else:
        doubled = stage == 1 and settings.trainer.dtype != "float32" and not away
        held.add("gradients", 4 * group.numbers + (group.bytes if doubled else 0))
    if away:  # another copy of the gradients and, but for stage 3, of the parameters
        held.add(BUFFERS, 4 * part + (group.bytes / ranks if stage < 3 else 0), host=True)


def _add_buffers(held: _Held, groups: list[_Group], settings: Settings, *, on_cpu: bool) -> None:
    """The bucket in which gradients are reduced, and the buffers through which one at a time is offloaded."""
    engine, stage = settings.engine, settings.engine.zero_stage
    away, in_float32 = engine.offload != "none", settings.trainer.dtype == "float32"
    if stage > 1 or (stage == 1 and (in_float32 or away)):
        if not on_cpu:
            held.add(BUFFERS, 4 * _bucket(settings))
        elif stage > 1 or away:  # without offloading stage 1 writes into it when the activations are gone
            held.add(BUFFERS, 4 * min(_bucket(settings), sum(group.numbers for group in groups)))
    if away and stage < 3:
        largest = max((x for group in groups for x in group.parameters), key=lambda x: x.numel())
        for host in (False, True):
            held.add(BUFFERS, largest.numel() * (4 if stage == 2 else largest.itemsize), host=host)


def _bucket(settings: Settings) -> int:
    """Numbers of the bucket in which gradients are reduced."""
    return settings.engine.config.get("zero_optimization", {}).get("reduce_bucket_size", BUCKET)


def coming_gradients(
    model: nn.Module, settings: Settings, world_size: int, device: torch.device
) -> Callable[[int], float]:
    """From how many numbers' gradients a backward pass has made: bytes of `states_of` that only come in its rest.

    On stages 0 and 1 gradients come where a step has one backward pass, else they are there from the pass before. On
    stage 2 each rank's part comes when the pass ends, and on a CPU the bucket is filled as gradients come. Stage 3 has
    all from the start; of bfloat16 on stage 1, of offloading and of experts that ranks share out all count.
    """
    stage, groups = settings.engine.zero_stage, _groups(model, settings, world_size)
    numbers, part = (sum(map(attrgetter(name), groups)) for name in ("numbers", "part"))
    once = settings.data.micro_batches(max(1, world_size // settings.parallel.sequence)) <= 1
    of_number, at_end = 0.0, 0.0
    if settings.engine.offload == "none" and not any(group.experts for group in groups):
        if stage < 2 and once and settings.trainer.dtype == "float32":
            of_number = 4.0
        elif stage == 2:
            at_end = 4 * part if once else 0.0
            of_number = 4.0 if device.type == "cpu" and numbers <= _bucket(settings) else 0.0
    return lambda there: at_end + of_number * (numbers - there)


def stepping(
    model: nn.Module, settings: Settings, world_size: int, device: torch.device, states: tuple[Share, ...]
) -> Share:
    """What the optimizer's step holds at its peak beyond `states`: Muon's whole matrices, Lion's directions.

    The optimizer itself makes a step on `meta`. What DeepSpeed holds meanwhile, as measured: the gradients of a group
    once more, flat, or the largest of all in float64 for the norm; what it has let go of by then is taken off.
    """
    engine, most = settings.engine, 0.0
    stage, away = engine.zero_stage, engine.offload != "none"
    groups = _groups(model, settings, world_size)
    experts, others = ([group for group in groups if group.experts is those] for those in (True, False))
    at_once = stage == 0 or (stage == 1 and settings.trainer.dtype != "float32" and not away)
    bucket = sum(share.fixed for share in states if share.part == BUFFERS and not share.host) if stage < 3 else 0.0
    whole = _left_whole(others) if stage == 3 and world_size > 1 else 0.0
    for together in [others] if at_once else [[group] for group in others]:
        flat = 0.0 if at_once or away else 4 * sum(group.part for group in together)
        # Gradients of groups that have been stepped before; Muon's own too, of which flat ones are held by then.
        kept_own = away or at_once or settings.optimizer.kind != "muon"
        rest = sum(group.numbers for group in others if not (kept_own and group in together)) if stage < 3 else 0.0
        if stage == 2:
            rest = 0.0 if away else rest / world_size
        most = max(most, flat + _step(together, settings, device, flat=stage > 0) - 4 * rest - bucket - whole)
    numbers, part = (sum(map(attrgetter(name), others)) for name in ("numbers", "part"))
    largest = max((parameter.numel() for group in others for parameter in group.parameters), default=0)
    norm = 8 * largest / (world_size if stage == 3 else 1)
    reduced = 4 * numbers if stage or world_size > 1 else 0.0  # alone on stage 0 there is nobody to reduce with
    own = reduced if at_once else max(0.0 if away else 4 * part, norm) - whole - (bucket if stage == 2 else 0.0)
    most = max(most, own, _step(experts, settings, device, flat=True))
    if stage == 1 and device.type == "cpu" and settings.trainer.dtype == "float32" and not away:
        most = max(most, 4 * min(_bucket(settings), numbers))
    return Share(STEP, most, host=away and settings.optimizer.kind != "muon")


def _left_whole(groups: list[_Group]) -> float:
    """Bytes of the parameters that stage 3 leaves whole when it has gathered them."""
    return sum(x.nbytes for group in groups for x in group.parameters if x.numel() <= PERSISTENT)


def _groups(model: nn.Module, settings: Settings, world_size: int) -> list[_Group]:
    chosen, cut = settings.optimizer, settings.parallel.experts
    by_expert = {
        id(each) for module in model.modules() for name in getattr(module, "by_expert", ())
        if cut > 1 and isinstance(each := getattr(module, name), Tensor)
    }  # fmt: skip
    split = world_size if settings.engine.zero_stage else 1
    made = []
    for rule in groups_of(model, chosen, frozen_parameters(model, chosen.only)):
        experts, others = (
            [each for each in rule["params"] if (id(each) in by_expert) is those] for those in (True, False)
        )
        made.append(_Group(rule, others, False, split, 1.0))
        made.append(_Group(rule, experts, True, world_size // cut, 1 / cut))
    return [group for group in made if group.parameters]


def _step(groups: list[_Group], settings: Settings, device: torch.device, *, flat: bool) -> int:
    """Bytes that a step of these groups has at its peak besides what was there before; AdamW's is fused."""
    if all(group.rule["kind"] == "adamw" for group in groups):
        return 0
    stacks: dict[int, list[Stack]] = {}
    rules = [
        {**group.rule, "params": [_parameter(size, stacks, of_it) for size, of_it in _flats(group, flat)]}
        for group in groups
    ]
    with standing_for(device.type):
        optimizer = make_optimizer(rules, settings.optimizer, torch.device("meta"))
        assert isinstance(optimizer, Grouped)
        optimizer.locate(lambda tensor: stacks[id(tensor)], groups[0].ranks)
        allocations = Allocations("meta")
        for rule in optimizer.param_groups:
            rule["params"] = [each for each in rule["params"] if rule["kind"] != "adamw"]
            for each in rule["params"]:
                create_states(optimizer.state[each], each, rule)
                allocations.leave_out([each, each.grad, *optimizer.state[each].values()])
        with allocations:
            optimizer.step()
    return allocations.peak


def _parameter(size: int, stacks: dict[int, list[Stack]], of_it: list[Stack]) -> nn.Parameter:
    """A flat tensor with a gradient; where its matrices are is noted in `stacks`."""
    made = nn.Parameter(torch.empty(size, device="meta"))
    made.grad = torch.empty(size, device="meta")
    stacks[id(made)] = of_it
    return made


def _flats(group: _Group, flat: bool) -> Iterator[tuple[int, list[Stack]]]:
    """Sizes of the tensors that are stepped for a group on a rank with an equal part of each parameter."""
    size, stacks = 0, list[Stack]()
    for parameter in group.parameters:
        shape = torch.Size([round(group.held * parameter.shape[0]), *parameter.shape[1:]])
        length = -(-shape.numel() // group.ranks)
        if group.rule["kind"] == "muon":
            whole = stack_of(parameter, shape, None)
            stacks.append(whole._replace(offset=size, start=0, length=length))
        size += length
        if not flat or group.experts:
            yield size, stacks
            size, stacks = 0, []
    if size:
        yield size, stacks
