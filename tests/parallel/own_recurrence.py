"""A recurrence that is none of the project's, and a mixer of it: what someone writes who adds an op.

h_t = e^{a_t + i θ_t} h_{t−1} + x_t        out_t = Re h_t        h complex, one number per channel
"""

from typing import Any, NamedTuple

import torch
from parallel_cases import CASES, Case, agree
from torch import Tensor, nn
from torch.nn import functional as F

from longreach.kernels.operation import Tensors
from longreach.kernels.problem import Problem
from longreach.kernels.recurrence import Diagonal, Summary
from longreach.models.mixer import Mixer
from longreach.parallel import ops
from longreach.parallel.sequence import Sequence


class RotationInputs(NamedTuple):
    x: Tensor
    log_decay: Tensor
    angle: Tensor


class Rotation(Diagonal[RotationInputs]):
    """States and transitions are complex numbers, kept as pairs."""

    name = "rotation"
    record = RotationInputs
    dims = dict.fromkeys(RotationInputs._fields, "B T D")
    out, state = "B T D", "B D 2"

    def one_state(self, like: Tensor) -> Tensor:
        return torch.tensor([1.0, 0.0]).to(like).expand_as(like)

    def advance(self, summary: Summary, state: Tensor) -> Tensor:
        return summary.state + product(summary.transition, state)

    def combine(self, later: Summary, earlier: Summary) -> Summary:
        return Summary(product(later.transition, earlier.transition), self.advance(later, earlier.state))

    def backward(
        self, problem: Problem[Any], dout: Tensor, dfinal_state: Tensor | None, initial_state: Tensor | None
    ) -> tuple[Tensors, Tensor]:
        """What it already does, as someone writes it who has a quicker one."""
        return super().backward(problem, dout, dfinal_state, initial_state)

    def retreat(self, summary: Summary, dstate: Tensor, local: Tensor) -> Tensor:
        return local + product(summary.transition * torch.tensor([1.0, -1.0]).to(dstate), dstate)


def product(a: Tensor, b: Tensor) -> Tensor:
    return torch.view_as_real(torch.view_as_complex(a.contiguous()) * torch.view_as_complex(b.contiguous()))


def forward(problem: Problem[RotationInputs], initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
    x, log_decay, angle = (tensor.to(problem.dtype) for tensor in problem.inputs)
    factor, h, outputs = torch.polar(log_decay.exp(), angle), torch.view_as_complex(problem.entering(initial_state)), []
    for t, goes_on, real in problem.tokens():
        h = factor[:, t] * torch.where(goes_on[:, None], h, 0.0) + x[:, t]
        h = torch.where(real[:, None], h, 0.0)
        outputs.append(h.real)
    out = torch.stack(outputs, dim=1)
    return out if problem.exact else out.to(problem.inputs.x.dtype), torch.view_as_real(h)


class Rotating(Mixer):
    def __init__(self, *, width: int, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.project = nn.Linear(width, 3 * channels)
        self.output = nn.Linear(channels, width)

    def forward(self, x: Tensor, seq: Sequence) -> Tensor:
        value, decay, angle = self.project(x).chunk(3, dim=-1)
        return self.output(ops.recurrent(Rotation, RotationInputs(value, F.logsigmoid(decay), angle), seq=seq))

    def mixing_flops(self, seq: Sequence) -> int:
        return 8 * seq.local.batch * seq.local.length * self.channels


def rotation(x: Tensor, log_decay: Tensor, angle: Tensor, *, seq: Sequence) -> Tensor:
    return ops.recurrent(Rotation, RotationInputs(x, log_decay, angle), seq=seq)


_ROWS = ("T", 8)
_CASE = Case(rotation, ((_ROWS, "normal"), (_ROWS, "decay"), (_ROWS, "normal")), _ROWS)


def agree_on_rotation(
    rank: int, world: int, packings: list, length: int, spans: int, strategy: str, keep: bool
) -> None:
    CASES["rotation"] = _CASE  # on the ranks of this test alone
    agree(rank, world, ["rotation"], packings, length, spans, strategy, keep=keep)
