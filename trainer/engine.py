"""Engine: one model under DeepSpeed's ZeRO; the only importer of deepspeed."""

from __future__ import annotations

import gc
import io
import logging
import math
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, redirect_stdout
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..models.part import cast_parameters, named_weights
from ..parallel.mesh import Mesh
from .engine_config import EngineSettings, configuration
from .optimizers.grouped import Grouped, make_optimizer
from .optimizers.groups import frozen_parameters as frozen_parameters
from .optimizers.groups import groups_of
from .optimizers.settings import OptimizerSettings as OptimizerSettings
from .ranks.exchange import together
from .ranks.processes import limit_waiting
from .zero.experts import ExpertWeights, count_norm, cut_as_made, hide, whole
from .zero.masters import Fragment, Masters
from .zero.two_types import reduce_in_float32, split_as_made, types_kept

Gather = Callable[[list[nn.Parameter]], AbstractContextManager]
NORM_ROW = 1 << 11  # elements of a vector whose norm a CPU computes in float32
NORM_PART = 1 << 24  # elements that are copied to float64 at once where a device cannot square them without a copy


class Engine:
    """A model whose optimizer states (stage 1), gradients (2) and parameters (3) are split over all ranks of `mesh`.

    model_factory: makes the model; on stage 3 each parameter is split as soon as its layer is made.
    Where ranks share out the experts (`mesh.experts`), each holds the weights of its own; see `ExpertWeights`.
    dtype: "float32", or "bfloat16" with float32 masters, moments and accumulated gradients. What layers name in
        `in_float32` (see `Part`) stays in float32.
    clip: largest norm of the gradient; 0 does not clip.
    load: `load(model, gather)` gives the parameters their values in place of `model.initialise`; to write parameters it
        enters `gather` with them, which on stage 3 makes them whole meanwhile.

    Every rank makes the engine and calls its methods, in the same order. The default process group must exist
    (trainer/ranks/processes.py). Raises ValueError for settings that contradict one another, before the model is made.
    """

    def __init__(
        self,
        model_factory: Callable[[], nn.Module],
        *,
        settings: EngineSettings,
        optimizer: OptimizerSettings,
        dtype: str = "float32",
        clip: float = 0.0,
        mesh: Mesh,
        device: torch.device,
        seed: int = 0,
        load: Callable[[nn.Module, Gather], None] | None = None,
    ) -> None:
        self.zero_stage, self.mesh, self.device = settings.zero_stage, mesh, device
        config = configuration(settings, dtype, clip, mesh.world_size)
        self._deepspeed = _import_deepspeed(device)
        try:
            self._deepspeed.DeepSpeedConfig(config)
        except (ValueError, AssertionError) as error:
            raise ValueError(f"engine.config must be what DeepSpeed understands; it says: {error}") from None
        model = self._make(model_factory, config, getattr(torch, dtype))
        if load is not None:
            load(model, self._gather_to_write)
        else:
            self._initialise(model, seed)
        frozen = frozen_parameters(model, optimizer.only)
        for parameter in frozen:
            parameter.register_hook(torch.zeros_like)  # no rule makes a step of 0, and the norm counts none
        groups = groups_of(model, optimizer, frozen)
        members = [list(group["params"]) for group in groups]  # before DeepSpeed puts flat tensors in their place
        self._optimizer = make_optimizer(groups, optimizer, device)
        self._experts: ExpertWeights | None = None
        if experts := [parameter for _, parameter in named_weights(model) if hasattr(parameter, "cut")]:
            of_experts = groups_of(model, optimizer, frozen, experts)
            self._experts = ExpertWeights(mesh, of_experts, lambda g: make_optimizer(g, optimizer, device))
        two_types = len({parameter.dtype for parameter in model.parameters()}) > 1
        # Stage 1 in bfloat16 prints the machine's memory, asked or not.
        with types_kept(self._deepspeed), redirect_stdout(io.StringIO()):
            self._engine, *_ = self._deepspeed.initialize(model=model, optimizer=self._optimizer, config=config)
        if self.zero_stage == 0 and mesh.world_size == 1:
            # DeepSpeed would copy all gradients to a flat tensor and back, to reduce them with nobody.
            self._engine.enable_backward_allreduce = False
        limit_waiting()
        if two_types and self.zero_stage == 2:
            reduce_in_float32(self._engine.optimizer)
        self.module = model
        self._masters = Masters(self._optimizer, members, self._engine.optimizer, self.zero_stage, mesh.rank)
        if isinstance(self._optimizer, Grouped):
            ranks = mesh.world_size if self.zero_stage else 1  # on stage 0 each rank has everything
            self._optimizer.locate(self._masters.stacks, ranks, dist.group.WORLD)
        self._clip, self._norm = clip, 0.0
        self._factors: dict[nn.Parameter, Tensor] = {}
        self._optimizer.register_step_post_hook(self._scale)
        self.stepped = False  # whether the last step changed the weights
        if self.zero_stage == 0:
            self._optimizer.register_step_pre_hook(self._before_step)
        elif hasattr(self._engine.optimizer, "get_grads_for_norm"):
            _sum_norms_in_float64(self._engine.optimizer)
        if self._experts is not None and self.zero_stage:
            count_norm(self._engine.optimizer, self._experts)

    def close(self) -> None:
        """Gives back the memory of model, gradients and states, for an engine that follows in the same process."""
        on_gpu = self.device.type == "cuda"
        self._engine.destroy()
        vars(self).clear()
        gc.collect()  # hooks and the modules that they are of refer to one another
        if on_gpu:
            torch.cuda.empty_cache()

    def __call__(self, *args: Any) -> Any:
        """The model's forward."""
        return self._engine(*args)

    forward = __call__

    def backward(self, loss_sum: Tensor, normaliser: float, auxiliary: Tensor | None = None) -> None:
        """Adds the gradient of loss_sum / normaliser + auxiliary, summed over the ranks, to that of the step.

        loss_sum: this rank's sum over its tokens (with a graph even if it has no target); normaliser: the number of
        targets over all ranks and micro-batches of the step; auxiliary: losses that are divided already.
        """
        loss = loss_sum / normaliser
        if auxiliary is not None:
            loss = loss + auxiliary
        # DeepSpeed averages over the ranks.
        self._engine.backward(loss * self.mesh.world_size, scale_wrt_gas=False)

    def step(self, learning_rate: float, factors: dict[nn.Parameter, Tensor] | None = None) -> Tensor | float:
        """Clips, steps and clears the gradient; returns its norm over all ranks, before it was clipped.

        factors: after the step the rows of these parameters, in equal blocks, are multiplied by them; not experts'.
        On a GPU the norm is a scalar that is still on the device, unless the optimizer has read it itself. A gradient
        that is not finite steps nothing, and its norm is returned as inf; `stepped` tells, without reading anything.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate * group["factor"]
        if self._experts is not None:
            self._experts.reduce()
        self._factors = factors or {}
        self._engine.step()
        self._factors = {}
        if self.zero_stage == 0:
            self.stepped = math.isfinite(self._norm)
            norm: Tensor | float = self._norm
        else:
            self.stepped = self._engine.was_step_applied()
            norm = self._engine.get_global_grad_norm()
        if not isinstance(norm, Tensor) or norm.device.type == "cpu":
            norm = float(norm)
        if self._experts is not None:
            self._experts.step(learning_rate, self._factor(norm)) if self.stepped else self._experts.clear()
        return norm

    def _factor(self, norm: Tensor | float) -> Tensor | float:
        """By which a gradient of this norm is clipped."""
        if not self._clip:
            return 1.0
        factor = self._clip / (norm + 1e-6)
        return factor.clamp(max=1.0) if isinstance(factor, Tensor) else min(1.0, factor)

    def gather(self, parameters: list[nn.Parameter]) -> AbstractContextManager:
        """A context in which every rank holds these parameters whole, to read them."""
        return self._gathered(parameters, None)

    def _gathered(self, parameters: list[nn.Parameter], owner: int | None) -> AbstractContextManager:
        """Within it they are whole; what the rank `owner` then has is kept, where they are split."""
        ranks, gathering = self.mesh.experts, ExitStack()
        if ranks is not None and (experts := [each for each in parameters if hasattr(each, "cut")]):
            gathering.enter_context(whole(experts, ranks, owner))
        if self.zero_stage == 3 and (others := [each for each in parameters if not hasattr(each, "cut")]):
            gathering.enter_context(self._deepspeed.zero.GatheredParameters(others, modifier_rank=owner))
        return gathering

    def replicated(self, parameter: nn.Parameter) -> bool:
        """Whether each rank holds all of the parameter and of its states."""
        return self.zero_stage == 0 and not hasattr(parameter, "cut")

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every parameter once, by name, in the model's order."""
        return named_weights(self.module)

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]:
        """Every buffer that checkpoints hold, by name, in the model's order: see `saved_buffers`."""
        return iter(saved_buffers(self.module).items())

    def fragment(self, parameter: nn.Parameter, kind: str) -> Fragment:
        """What this rank holds of one of the float32 `kinds`: a view, to read and to write."""
        if self._experts is not None and parameter in self._experts:
            return self._experts.fragment(parameter, kind)
        return self._masters.fragment(parameter, kind)

    def kinds(self, parameter: nn.Parameter) -> tuple[str, ...]:
        """What there is of a parameter in float32: "parameter", and the states that its rule keeps."""
        if self._experts is not None and parameter in self._experts:
            return self._experts.kinds(parameter)
        return self._masters.kinds(parameter)

    def create_moments(self, steps: int | None = None) -> None:
        """Makes the states ahead of the optimizer's first step, and sets the number of steps taken unless None."""
        self._masters.create_moments(steps)
        if self._experts is not None:
            self._experts.create_moments(steps)

    @property
    def adam_steps(self) -> int:
        """Steps that the optimizer has taken."""
        return self._masters.steps

    @torch.no_grad()
    def write(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Sets what the model computes with; the float32 masters are set through `fragment`. Every rank calls it."""
        with self._gather_to_write([parameter]):
            if self.zero_stage < 3 or self.mesh.rank == 0:
                parameter.copy_(value)

    def _make(self, model_factory: Callable[[], nn.Module], config: dict[str, Any], dtype: torch.dtype) -> nn.Module:
        with torch.device(self.device), cut_as_made(self.mesh.experts):
            if self.zero_stage < 3:
                model = model_factory().to(self.device)
                cast_parameters(model, dtype)
                for module in model.modules():
                    hide(module)
                return model
            with split_as_made(self._deepspeed, config, dtype):
                model = model_factory().to(self.device)
            for module in model.modules():
                if getattr(module, "tile", None) is not None:  # its layers run once per tile, and are gathered once
                    self._deepspeed.utils.set_z3_leaf_module(module, True)
            return model

    def _initialise(self, model: nn.Module, seed: int) -> None:
        """Initial values, which the ranks draw in turns and give one another. A ValueError is raised on all of them."""
        sending: list[dist.Work] = []

        @contextmanager
        def write(parameter: nn.Parameter, owner: int) -> Iterator[None]:
            if self.zero_stage == 3 or hasattr(parameter, "cut"):
                with self._gathered([parameter], owner):
                    yield
                return
            yield
            if self.mesh.world_size > 1:
                sending.append(dist.broadcast(parameter.detach(), owner, async_op=True))  # type: ignore[arg-type]

        arguments = seed, write, self.mesh.rank, self.mesh.world_size
        together(self.mesh, lambda: model.initialise(*arguments))  # type: ignore[operator]
        for work in sending:
            work.wait()

    def _gather_to_write(self, parameters: list[nn.Parameter]) -> AbstractContextManager:
        return self._gathered(parameters, 0)

    def _scale(self, *_: Any) -> None:
        """Before DeepSpeed copies the float32 values to what the model computes with, from the tensors just stepped."""
        if self._factors and (self.zero_stage or math.isfinite(self._norm)):
            flats = {id(flat) for group in self._optimizer.param_groups for flat in group["params"]}
            for parameter, factors in self._factors.items():
                self._masters.scale(parameter, factors, flats)

    def _before_step(self, *_: Any) -> None:
        # Stage 0 only: the gradients are reduced by now, and DeepSpeed keeps no norm of them.
        gradients = [p.grad for group in self._optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = norms(gradients).norm()
        if self._experts is not None and self._experts.norm is not None:
            norm = torch.hypot(norm, self._experts.norm)
        self._norm = float(norm)
        if not math.isfinite(self._norm):
            self._norm = math.inf
            for group in self._optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None  # which no rule steps
        elif self._clip:
            torch._foreach_mul_(gradients, self._factor(self._norm))


def saved_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that checkpoints hold: those not registered with persistent=False.

    Raises ValueError for one that is not float32, the type in which checkpoints hold tensors.
    """
    buffers = {
        f"{path}.{name}" if path else name: buffer
        for path, module in model.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    }
    if other := [
        f"{name} in {str(x.dtype).removeprefix('torch.')}" for name, x in buffers.items() if x.dtype != torch.float32
    ]:
        raise ValueError(
            f"buffers must be float32 to be in checkpoints; got {', '.join(other)}. Make them float32, or say "
            "persistent=False where a run can begin with the constructor's values"
        )
    return buffers


def norms(tensors: list[Tensor]) -> Tensor:
    """Norms of parts of the tensors, float64 `[parts]`; their norm is that of all tensors together.

    In float32 the squares of millions of numbers lose the fourth digit on a CPU.
    """
    parts = [part for tensor in tensors for part in tensor.detach().flatten().split(NORM_PART)]
    if all(part.device.type == "cpu" and part.dtype == torch.float32 for part in parts):
        found = torch.cat([_norms_on_cpu(part) for part in parts])
        if found.isfinite().all():
            return found
    return torch.stack(torch._foreach_norm(parts, 2, dtype=torch.float64))


def _norms_on_cpu(part: Tensor) -> Tensor:
    """Norms of rows so short that float32 is exact enough: in float64 torch would copy them all first.

    Squares beyond float32 make them inf, though no number is.
    """
    whole = len(part) // NORM_ROW * NORM_ROW
    rows = torch.linalg.vector_norm(part[:whole].view(-1, NORM_ROW), dim=1).double()
    return torch.cat([rows, torch.linalg.vector_norm(part[whole:], dtype=torch.float64)[None]])


def _sum_norms_in_float64(optimizer: Any) -> None:
    """Makes DeepSpeed's optimizer of stage 1 in bfloat16, the one that adds up squares in float32, see norms alone.

    The others use float64 themselves. By a private name of DeepSpeed 0.19.8, which the engine's tests pin.
    """
    original = optimizer.get_grads_for_norm

    def get_grads_for_norm(for_clipping: bool = False) -> Any:
        result = original(for_clipping)
        if for_clipping:
            return result
        gradients, experts = result
        return [norms(gradients).float()] if gradients else [], experts

    optimizer.get_grads_for_norm = get_grads_for_norm


def _import_deepspeed(device: torch.device) -> Any:
    # Both have to be said before the import: what it runs on, and that it does not compile a shared-memory op, which
    # takes a minute and a compiler.
    os.environ["DS_ACCELERATOR"] = device.type
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # type: ignore[attr-defined]
    deepspeed.init_distributed(verbose=False)
    return deepspeed
