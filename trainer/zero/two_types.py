"""Two types: float32 parameters (`Part.in_float32`) beside bfloat16 ones, under each ZeRO stage.

DeepSpeed keeps the groups of an optimizer apart, so that each may have a type of its own. What it does to all
parameters alike is replaced here, by private names of DeepSpeed 0.19.8, which the engine's tests pin.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from ...models.part import cast_own_parameters
from .experts import hide


@contextmanager
def split_as_made(deepspeed: Any, config: dict[str, Any], dtype: torch.dtype) -> Iterator[None]:
    """Within it ZeRO-3 splits the parameters of each module as soon as it is made, cast to `dtype` or kept in float32.

    Of other tensors that constructors make, which DeepSpeed would cast too, nothing changes.
    """

    class Init(deepspeed.zero.Init):
        def _post_init_method(self, module: nn.Module) -> None:
            cast_own_parameters(module, dtype)
            hide(module)
            super()._post_init_method(module)

    with Init(config_dict_or_path=config, dtype=dtype, mem_efficient_linear=False, tensor_overrides=()):
        yield


@contextmanager
def types_kept(deepspeed: Any) -> Iterator[None]:
    """Within it `deepspeed.initialize` leaves every parameter in its type."""
    stage3 = deepspeed.runtime.zero.stage3
    optimizer, make = stage3.DeepSpeedZeroOptimizer_Stage3, "_create_param_groups_fp16_flat_cpu_memory"
    with (
        mock.patch.object(deepspeed.DeepSpeedEngine, "_cast_module_mixed_precision"),
        mock.patch.object(stage3, "defragment", _by_type(stage3.defragment)),
        mock.patch.object(optimizer, make, _of_the_groups(getattr(optimizer, make))),
    ):
        yield


def reduce_in_float32(optimizer: Any) -> None:
    """Makes ZeRO-2 collect the gradients of both types in float32: it would round those of float32 parameters.

    It takes no more memory, since they are reduced in float32 anyway, from a copy otherwise.
    """
    optimizer._gradient_reduction_buffer_dtype = lambda: torch.float32
    for name in ("temp_grad_buffer_for_cpu_offload", "temp_grad_buffer_for_gpu_offload"):
        if hasattr(optimizer, name):
            setattr(optimizer, name, getattr(optimizer, name).float())


class _Buffers:
    """A flat buffer of each type, as one from which ranges are taken that lie in one of them."""

    def __init__(self, buffers: list[Tensor]) -> None:
        self._buffers = buffers

    def narrow(self, dim: int, start: int, length: int) -> Tensor:
        for buffer in self._buffers:
            if start < len(buffer):
                return buffer.narrow(dim, start, length)
            start -= len(buffer)
        raise IndexError(start)


def _by_type(defragment: Callable[[list[Tensor]], Tensor]) -> Callable[[list[Tensor]], Tensor | _Buffers]:
    """ZeRO-3's moving of the parts that this rank holds into one buffer: into one for each type."""

    def apply(parts: list[Tensor]) -> Tensor | _Buffers:
        buffers = [defragment(list(same)) for _, same in groupby(parts, key=lambda part: part.dtype)]
        return buffers[0] if len(buffers) == 1 else _Buffers(buffers)

    return apply


def _of_the_groups(make: Callable[[Any], None]) -> Callable[[Any], None]:
    """ZeRO-3's buffers of parameters that are offloaded: in the type of each group."""

    def apply(optimizer: Any) -> None:
        make(optimizer)
        memory = optimizer.param_groups_fp16_flat_cpu_memory
        for number, group in enumerate(optimizer.trainable_param_groups):
            memory[number] = memory[number].to(group["params"][0].dtype)

    return apply
