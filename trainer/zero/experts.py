"""Experts that ranks share out (`parallel.experts`): their weights, gradients and Adam states, under every ZeRO stage.

DeepSpeed 0.19.8 has experts of its own on stages 0 to 2, whose gradients it scales by rules of its own, and on stage 3
only those of models that it rewrites. So it never sees these weights, and each stage treats them alike: a rank holds
those of its experts whole, and of their float32 values and Adam states the part that it shares with its replicas, the
ranks that hold the same experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from ...models.part import Cut
from ...parallel.collectives import all_gather
from ...parallel.mesh import Experts, Mesh
from ..optimizers.grouped import STATES, Grouped, create_states
from ..optimizers.muon import Stack
from .masters import Fragment, stack_of


@contextmanager
def cut_as_made(ranks: Experts | None) -> Iterator[None]:
    """Within it, of what layers name in `by_expert` this rank keeps its experts' part as soon as it is made."""
    if ranks is None:
        yield
        return

    def cut(module: nn.Module, name: str, parameter: Any) -> nn.Parameter | None:
        if parameter is None or name not in getattr(module, "by_expert", ()) or hasattr(parameter, "cut"):
            return None
        held = ranks.held(parameter.shape[0])
        made = nn.Parameter(parameter.detach()[held.start : held.stop].clone())
        made.cut = Cut(parameter.shape, held)  # type: ignore[attr-defined]
        return made

    handle = register_module_parameter_registration_hook(cut)  # type: ignore[arg-type]  # torch takes what it returns
    try:
        yield
    finally:
        handle.remove()


def hide(module: nn.Module) -> None:
    """Makes the weights of this rank's experts plain attributes of this module, of which DeepSpeed knows nothing.

    `named_weights` finds them still.
    """
    for name in getattr(module, "by_expert", ()):
        parameter = module._parameters.get(name)
        if parameter is not None and hasattr(parameter, "cut"):
            vars(module)[name] = module._parameters.pop(name)


class _Shard(NamedTuple):
    """One weight: of its elements here, those from `start` have their float32 values and states on this rank."""

    parameter: nn.Parameter
    start: int
    master: Tensor
    gradient: Tensor  # float32, of all elements here, summed over the micro-batches of a step


class ExpertWeights:
    """The weights of this rank's experts, their gradients and their optimizer.

    groups: the weights, which are set already, as those of an optimizer. make: makes an optimizer of groups.
    """

    def __init__(
        self,
        mesh: Mesh,
        groups: list[dict[str, Any]],
        make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
    ) -> None:
        assert mesh.experts is not None
        self.ranks, self.mesh = mesh.experts, mesh
        self._replicas = mesh.world_size // self.ranks.ranks
        self._shards: dict[int, _Shard] = {}
        self.norm: Tensor | None = None
        for parameter in (parameter for group in groups for parameter in group["params"]):
            self._shards[id(parameter)] = self._shard(parameter)
            parameter.register_post_accumulate_grad_hook(self._keep)
        masters = [
            {**group, "params": [self._shards[id(parameter)].master for parameter in group["params"]]}
            for group in groups
        ]
        self._optimizer = make(masters)
        self._groups = {id(master): group for group in self._optimizer.param_groups for master in group["params"]}
        if isinstance(self._optimizer, Grouped):
            self._optimizer.locate(self._stacks, self._replicas, self.ranks.replicas)

    def __contains__(self, parameter: nn.Parameter) -> bool:
        return id(parameter) in self._shards

    def _length(self, parameter: nn.Parameter) -> int:
        """Elements of each replica's part; the last one may have fewer."""
        return -(-parameter.numel() // self._replicas)

    def _shard(self, parameter: nn.Parameter) -> _Shard:
        length = self._length(parameter)
        start = min(parameter.numel(), self.mesh.rank // self.ranks.ranks * length)
        part = parameter.detach().flatten()[start : start + length]
        gradient = torch.zeros(parameter.numel(), device=parameter.device)
        return _Shard(parameter, start, nn.Parameter(part.float().clone()), gradient)

    def _keep(self, parameter: Tensor) -> None:
        """Of a gradient of the loss times the number of ranks: see `Engine.backward`."""
        assert parameter.grad is not None
        self._shards[id(parameter)].gradient.add_(parameter.grad.flatten(), alpha=1 / self.mesh.world_size)
        parameter.grad = None

    def reduce(self) -> None:
        """Sums the gradients of the step over the replicas, and finds their `norm` over all ranks, float64."""
        square = torch.zeros((), dtype=torch.float64, device=next(iter(self._shards.values())).gradient.device)
        for shard in self._shards.values():
            if self.ranks.replicas is not None:
                dist.all_reduce(shard.gradient, group=self.ranks.replicas)  # type: ignore[arg-type]
            part = shard.gradient[shard.start : shard.start + len(shard.master)]
            shard.master.grad = part
            square += part.double().square().sum()
        dist.all_reduce(square)
        self.norm = square.sqrt()

    def step(self, learning_rate: float, factor: Tensor | float) -> None:
        """The optimizer's step with the gradients times `factor`; the weights follow."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate * group["factor"]
        for shard in self._shards.values():
            assert shard.master.grad is not None
            shard.master.grad.mul_(factor)
        self._optimizer.step()
        for shard in self._shards.values():
            self._publish(shard)
        self.clear()

    @torch.no_grad()
    def _publish(self, shard: _Shard) -> None:
        """Sets a weight by what each of its replicas holds of it."""
        parameter, length = shard.parameter, self._length(shard.parameter)
        part = parameter.new_zeros(length)
        part[: len(shard.master)] = shard.master
        if self.ranks.replicas is not None:
            whole = part.new_empty(self._replicas * length)
            all_gather(whole, part, group=self.ranks.replicas)
            part = whole
        parameter.copy_(part[: parameter.numel()].view(parameter.shape))

    def clear(self) -> None:
        """Forgets the gradients of the step."""
        for shard in self._shards.values():
            shard.gradient.zero_()
            shard.master.grad = None

    def kinds(self, parameter: nn.Parameter) -> tuple[str, ...]:
        """As `Masters.kinds`."""
        return ("parameter", *STATES[self._groups[id(self._shards[id(parameter)].master)]["kind"]])

    def _stacks(self, flat: Tensor) -> list[Stack]:
        """As `Masters.stacks`, among the replicas."""
        shard = next(shard for shard in self._shards.values() if shard.master is flat)
        return [stack_of(shard.parameter, shard.parameter.shape, (flat, 0, shard.start, len(flat)))]

    def fragment(self, parameter: nn.Parameter, kind: str) -> Fragment:
        """As `Masters.fragment`, of the whole weight of all experts."""
        shard, cut = self._shards[id(parameter)], parameter.cut  # type: ignore[attr-defined]
        values = shard.master.detach() if kind == "parameter" else self._optimizer.state[shard.master][kind]
        before = cut.held.start * (parameter.numel() // len(cut.held))
        return Fragment(before + shard.start, values)

    def create_moments(self, steps: int | None) -> None:
        """As `Masters.create_moments`."""
        for shard in self._shards.values():
            create_states(self._optimizer.state[shard.master], shard.master, self._groups[id(shard.master)], steps)


@contextmanager
def whole(parameters: list[nn.Parameter], ranks: Experts, owner: int | None = None) -> Iterator[None]:
    """Within it each rank has the weights of all experts; what rank `owner` of all ranks then has is kept."""
    own = [parameter.data for parameter in parameters]
    for parameter in parameters:
        everything = parameter.data.new_empty(parameter.cut.shape)  # type: ignore[attr-defined]
        all_gather(everything.view(-1), parameter.data.contiguous().view(-1), group=ranks.group)
        parameter.data = everything
    yield
    for parameter, part in zip(parameters, own, strict=True):
        if owner is not None:
            dist.broadcast(parameter.data, owner)
            held = parameter.cut.held  # type: ignore[attr-defined]
            part.copy_(parameter.data[held.start : held.stop])
        parameter.data = part


def count_norm(optimizer: Any, weights: ExpertWeights) -> None:
    """Makes a ZeRO optimizer of DeepSpeed count the experts' gradients in the norm by which it clips.

    By private names of DeepSpeed 0.19.8, which tests of experts on ranks pin.
    """

    def norm() -> Tensor:
        assert weights.norm is not None
        return weights.norm.float()

    if hasattr(optimizer, "get_grads_for_norm"):  # stage 1 in bfloat16: each rank has the gradients of all
        original = optimizer.get_grads_for_norm

        def get_grads_for_norm(for_clipping: bool = False) -> Any:
            result = original(for_clipping)
            return result if for_clipping else ([*result[0], norm().view(1)], result[1])

        optimizer.get_grads_for_norm = get_grads_for_norm
    elif hasattr(optimizer, "_get_norm_groups"):  # stage 3
        groups = optimizer._get_norm_groups
        optimizer._get_norm_groups = lambda: [*groups(), norm()]
    else:
        scaled = optimizer.scaled_global_norm

        def scaled_global_norm(norm_type: int = 2) -> Any:
            own = torch.as_tensor(scaled(norm_type), device=norm().device)
            return torch.where(own >= 0, torch.hypot(own.float(), norm()), own)  # -1 stands for one that is not finite

        optimizer.scaled_global_norm = scaled_global_norm


def check_experts(model: nn.Module, ranks: int) -> None:
    """Raises ValueError unless the model has experts of which each of `ranks` ranks can hold equally many."""
    if ranks == 1:
        return
    counts = {
        parameter.shape[0]
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if name in getattr(module, "by_expert", ())
    }
    if not counts:
        raise ValueError(f"parallel.experts must be 1 for a model without experts; got {ranks}. Leave it out")
    if odd := [count for count in sorted(counts) if count % ranks]:
        raise ValueError(
            f"parallel.experts must divide feed_forward.experts, {odd[0]}; got {ranks}. Ranks hold equally many experts"
        )
