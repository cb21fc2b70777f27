"""Masters: where each ZeRO stage keeps a parameter's float32 value and optimizer states, in the part this rank holds.

DeepSpeed's own accessors lack the moments of a fresh engine and, on stages 1 and 2, those of the later parameter
groups. So the flat tensors are read directly, by the names of DeepSpeed 0.19.8, which the checkpoint tests pin.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...models.part import shape_of
from ..optimizers.grouped import STATES, create_states
from ..optimizers.muon import Stack

KINDS = ("parameter", *STATES["adamw"])  # with AdamW


class Fragment(NamedTuple):
    """Elements `start ..` of a flattened parameter: a view of the state itself, float32 `[n]`, n possibly 0."""

    start: int
    values: Tensor


class Masters:
    """The float32 parameters and states behind `adam`, which DeepSpeed's `optimizer` (None on stage 0) has split.

    adam: the optimizer that steps them, AdamW or another. members: the parameters of each of its groups.
    """

    def __init__(
        self,
        adam: torch.optim.Optimizer,
        members: list[list[nn.Parameter]],
        optimizer: Any,
        zero_stage: int,
        rank: int,
    ) -> None:
        self._adam, self._optimizer, self._zero_stage, self._rank = adam, optimizer, zero_stage, rank
        self._members = members
        self._group_of = {id(parameter): number for number, group in enumerate(members) for parameter in group}

    def kinds(self, parameter: nn.Parameter) -> tuple[str, ...]:
        """ "parameter", and the states that are kept of it."""
        group = self._adam.param_groups[self._group_of[id(parameter)]]
        return ("parameter", *STATES[group["kind"]])

    def fragment(self, parameter: nn.Parameter, kind: str) -> Fragment:
        """What this rank holds of one of the kinds of a parameter."""
        located = self._locate(parameter)
        if located is None:
            return Fragment(0, torch.empty(0))
        flat, offset, start, length = located
        values = flat.detach() if kind == "parameter" else self._adam.state[flat][kind]
        return Fragment(start, values.view(-1).narrow(0, offset, length))

    @torch.no_grad()
    def scale(self, parameter: nn.Parameter, factors: Tensor, flats: set[int]) -> None:
        """Multiplies a parameter's float32 rows, in as many equal blocks as there are factors.

        Only where its flat tensor is among those of the ids `flats`. Nothing waits for the device.
        """
        located = self._locate(parameter)
        if located is None or id(located[0]) not in flats:
            return
        flat, offset, start, length = located
        values = flat.detach().view(-1).narrow(0, offset, length)
        block, factors = shape_of(parameter).numel() // len(factors), factors.to(values.device, values.dtype)
        done = 0
        while done < length:  # a part of a block at either end at most
            number, inside = divmod(start + done, block)
            whole = 0 if inside else (length - done) // block
            size = whole * block if whole else min(block - inside, length - done)
            part = values.narrow(0, done, size).view(max(1, whole), -1)
            part.mul_(factors[number : number + len(part)].unsqueeze(1))
            done += size

    def stacks(self, flat: Tensor) -> list[Stack]:
        """The matrices of the parameters that a flat tensor has parts of, on whichever rank; see `Muon`."""
        number, group = next((n, group) for n, (each, group) in enumerate(self._flat_tensors()) if each is flat)
        if self._zero_stage == 0:
            members = [flat]
        else:
            members = self._members[group]
            if self._zero_stage == 3:  # which may split a group
                members = [parameter for parameter in members if self._position(parameter)[0] == number]
        return [stack_of(parameter, shape_of(parameter), self._locate(parameter)) for parameter in members]

    def create_moments(self, steps: int | None = None) -> None:
        """Makes zero states where there are none yet; sets the number of steps taken, if `steps` is not None."""
        for flat, group in self._flat_tensors():
            create_states(self._adam.state[flat], flat, self._adam.param_groups[group], steps)

    @property
    def steps(self) -> int:
        """Steps that the optimizer has taken."""
        state = self._adam.state[self._flat_tensors()[0][0]]
        return int(state["step"]) if state else 0

    def _flat_tensors(self) -> list[tuple[Tensor, int]]:
        """What the optimizer steps, with the number of its group."""
        if self._zero_stage == 0:
            return [(parameter, number) for number, group in enumerate(self._members) for parameter in group]
        if self._zero_stage == 3:
            flats = self._optimizer.fp32_partitioned_groups_flat
            return [(flat, self._optimizer.sub_group_to_group_id[number]) for number, flat in enumerate(flats)]
        return [(flat, number) for number, flat in enumerate(self._partitions())]

    def _partitions(self) -> list[Tensor]:
        # Stage 1 in bfloat16 with float32 accumulation is another class of DeepSpeed's.
        name = "single_partition_of_fp32_groups"
        return getattr(self._optimizer, name if hasattr(self._optimizer, name) else "fp32_groups_flat_partition")

    def _position(self, parameter: Any) -> tuple[int, int, int]:
        """On stage 3: the number of a parameter's flat tensor, the offset in it and the length, padding included."""
        return self._optimizer.grad_position[self._optimizer.get_param_id(parameter)]

    def _locate(self, parameter: Any) -> tuple[Tensor, int, int, int] | None:
        """(flat tensor, offset in it, first element of the parameter, number of elements); None if it is elsewhere."""
        if self._zero_stage == 0:
            return parameter, 0, 0, parameter.numel()
        if self._zero_stage == 3:
            group, offset, length = self._position(parameter)
            start = self._rank * length
            size = min(length, parameter.ds_numel - start)  # the last partition is padded
            return (self._optimizer.fp32_partitioned_groups_flat[group], offset, start, size) if size > 0 else None
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        high, low = mapping.hp_fragment_address, mapping.lp_fragment_address
        return self._partitions()[mapping.param_group_index], high.start, low.start, low.numel


def stack_of(parameter: Tensor, shape: torch.Size, located: tuple[Tensor, int, int, int] | None) -> Stack:
    """A parameter as matrices, with what this rank has of it."""
    _, offset, start, length = located or (parameter, 0, 0, 0)
    return Stack(math.prod(shape[:-2]), shape[-2], shape[-1], offset, start, length)
