"""The diagonal state space model of S4D, with its parameters."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ...kernels.diagonal_ssm import flops
from ...parallel import ops
from ...parallel.sequence import Sequence
from .decay_gate import check_steps, log_uniform

INITIAL = ("lin", "inv")
DISCRETISATIONS = ("zoh", "bilinear")


class DiagonalSSM(nn.Module):
    """A linear time-invariant state space model per head, with a complex diagonal (S4D, arXiv 2206.11893).

        h'(t) = A h(t) + x(t)          y(t) = 2 Re(C h(t))          A = -exp(A_log) + i A_imaginary, of N / 2 states
        h_t = e^{delta A} h_(t-1) + x_t          y_t = 2 Re(C (e^{delta A} - 1) / A h_t)          "zoh"
        h_t = (1 + delta A / 2) / (1 - delta A / 2) h_(t-1) + x_t
        y_t = 2 Re(C delta / (1 - delta A / 2) h_t)                                               "bilinear"

    x `[B, T, H, P]` to the same: P channels share the model of their head. state: N, real numbers per channel, even.
    initial: where A starts, "lin" at -1/2 + i pi n, "inv" at -1/2 + i (N / pi) (N / (2 n + 1) - 1). step_range: within
    which delta starts, log-uniformly. C starts complex normal, with variance 1. Raises ValueError for settings out of
    range.
    """

    in_float32 = ("log_step", "A_log", "A_imaginary")

    def __init__(
        self,
        heads: int,
        state: int,
        initial: str = "lin",
        discretisation: str = "zoh",
        step_range: tuple[float, float] = (1e-3, 1e-1),
    ) -> None:
        super().__init__()
        if state < 2 or state % 2:
            raise ValueError(f"state must be even and at least 2; got {state}. Complex states are two numbers each")
        if initial not in INITIAL:
            raise ValueError(f"initial must be one of {', '.join(INITIAL)}; got {initial!r}. Choose one")
        if discretisation not in DISCRETISATIONS:
            known = ", ".join(DISCRETISATIONS)
            raise ValueError(f"discretisation must be one of {known}; got {discretisation!r}. Choose one")
        self.state, self.initial, self.discretisation = state, initial, discretisation
        self.step_range = check_steps(step_range)
        self.log_step = nn.Parameter(torch.empty(heads))
        self.A_log = nn.Parameter(torch.empty(heads, state // 2))
        self.A_imaginary = nn.Parameter(torch.empty(heads, state // 2))
        self.C = nn.Parameter(torch.empty(heads, state // 2, 2))

    def forward(self, x: Tensor, seq: Sequence, slot: str = "state") -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        step = self.log_step.to(wide).exp().unsqueeze(-1)
        rate, turn = -self.A_log.to(wide).exp(), self.A_imaginary.to(wide)
        discretise = _hold if self.discretisation == "zoh" else _bilinear
        log_decay, angle, (real, imaginary) = discretise(rate, turn, step)
        c_real, c_imaginary = (2 * self.C.to(wide)).unbind(-1)
        out_real = c_real * real - c_imaginary * imaginary
        out_imaginary = c_real * imaginary + c_imaginary * real
        return ops.diagonal_ssm(x, log_decay, angle, out_real, out_imaginary, seq=seq, slot=slot)

    def mixing_flops(self, seq: Sequence, channels: int) -> int:
        """Forward FLOPs on the tokens of `seq`'s rank, of so many channels in all."""
        return flops(seq.places, channels=channels, states=self.state // 2)

    def initialise_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> bool:
        count = self.state
        number = torch.arange(count // 2)
        if name == "log_step":
            log_uniform(tensor, generator, self.step_range).log_()
        elif name == "A_log":
            tensor.fill_(math.log(0.5))
        elif name == "A_imaginary":
            inverse = count / math.pi * (count / (2 * number + 1) - 1)
            tensor.copy_(math.pi * number if self.initial == "lin" else inverse)
        else:
            tensor.normal_(0.0, 0.5**0.5, generator=generator)
        return True


Discrete = tuple[Tensor, Tensor, tuple[Tensor, Tensor]]


def _hold(rate: Tensor, turn: Tensor, step: Tensor) -> Discrete:
    """Logarithm and angle of e^{delta A}, and (e^{delta A} - 1) / A: of an input that is held for a step."""
    log_decay, angle = step * rate, step * turn
    size = log_decay.exp()
    real, imaginary = size * angle.cos() - 1, size * angle.sin()
    square = rate.square() + turn.square()
    return log_decay, angle, ((real * rate + imaginary * turn) / square, (imaginary * rate - real * turn) / square)


def _bilinear(rate: Tensor, turn: Tensor, step: Tensor) -> Discrete:
    """Logarithm and angle of (1 + delta A / 2) / (1 - delta A / 2), and delta / (1 - delta A / 2)."""
    half_rate, half_turn = step * rate / 2, step * turn / 2
    above = (1 + half_rate).square() + half_turn.square()
    below = (1 - half_rate).square() + half_turn.square()
    log_decay = (above.log() - below.log()) / 2
    angle = torch.atan2(half_turn, 1 + half_rate) + torch.atan2(half_turn, 1 - half_rate)
    return log_decay, angle, (step * (1 - half_rate) / below, step * half_turn / below)
