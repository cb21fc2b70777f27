"""Masters: where each ZeRO stage keeps a parameter's float32 value and Adam moments, in the part this rank holds.

DeepSpeed's own accessors lack the moments of a fresh engine and, on stages 1 and 2, those of the later parameter
groups. So the flat tensors are read directly, by the names of DeepSpeed 0.19.8, which the checkpoint tests pin.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = ("parameter", *MOMENTS)


class Fragment(NamedTuple):
    """Elements `start ..` of a flattened parameter: a view of the state itself, float32 `[n]`, n possibly 0."""

    start: int
    values: Tensor


class Masters:
    """The float32 parameters and moments behind `adam`, which DeepSpeed's `optimizer` (None on stage 0) has split."""

    def __init__(self, adam: torch.optim.AdamW, optimizer: Any, zero_stage: int, rank: int) -> None:
        self._adam, self._optimizer, self._zero_stage, self._rank = adam, optimizer, zero_stage, rank

    def fragment(self, parameter: nn.Parameter, kind: str) -> Fragment:
        """What this rank holds of one of KINDS of a parameter."""
        located = self._locate(parameter)
        if located is None:
            return Fragment(0, torch.empty(0))
        flat, offset, start, length = located
        values = flat.detach() if kind == "parameter" else self._adam.state[flat][kind]
        return Fragment(start, values.view(-1).narrow(0, offset, length))

    def create_moments(self, steps: int | None = None) -> None:
        """Makes zero moments where there are none yet; sets the number of steps taken, if `steps` is not None."""
        fused = bool(self._adam.defaults.get("fused"))
        for flat in self._flat_tensors():
            state = self._adam.state[flat]
            if not state:
                # AdamW's own first step does the same.
                device = flat.device if fused else "cpu"
                state["step"] = torch.zeros((), dtype=torch.float32, device=device)
                for kind in MOMENTS:
                    state[kind] = torch.zeros_like(flat.detach())
            if steps is not None:
                state["step"].fill_(steps)

    @property
    def steps(self) -> int:
        """Steps that AdamW has taken."""
        state = self._adam.state[self._flat_tensors()[0]]
        return int(state["step"]) if state else 0

    def _flat_tensors(self) -> list[Tensor]:
        if self._zero_stage == 0:
            return [parameter for group in self._adam.param_groups for parameter in group["params"]]
        if self._zero_stage == 3:
            return list(self._optimizer.fp32_partitioned_groups_flat)
        return list(self._partitions())

    def _partitions(self) -> list[Tensor]:
        # Stage 1 in bfloat16 with float32 accumulation is another class of DeepSpeed's.
        name = "single_partition_of_fp32_groups"
        return getattr(self._optimizer, name if hasattr(self._optimizer, name) else "fp32_groups_flat_partition")

    def _locate(self, parameter: Any) -> tuple[Tensor, int, int, int] | None:
        """(flat tensor, offset in it, first element of the parameter, number of elements); None if it is elsewhere."""
        if self._zero_stage == 0:
            return parameter, 0, 0, parameter.numel()
        if self._zero_stage == 3:
            group, offset, length = self._optimizer.grad_position[self._optimizer.get_param_id(parameter)]
            start = self._rank * length
            size = min(length, parameter.ds_numel - start)  # the last partition is padded
            return (self._optimizer.fp32_partitioned_groups_flat[group], offset, start, size) if size > 0 else None
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        high, low = mapping.hp_fragment_address, mapping.lp_fragment_address
        return self._partitions()[mapping.param_group_index], high.start, low.start, low.numel
