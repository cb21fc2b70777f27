"""The optimizers: torch's AdamW, or one whose groups of parameters each have a rule of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .muon import Locate, Muon
from .settings import OptimizerSettings

STATES = {"adamw": ("exp_avg", "exp_avg_sq"), "muon": ("momentum",), "lion": ("average",)}
"""What each kind keeps of a parameter, besides the number of its steps."""


def make_optimizer(
    groups: list[dict[str, Any]], settings: OptimizerSettings, device: torch.device
) -> torch.optim.Optimizer:
    """The optimizer of these groups (see `parameter_groups`), which steps flat tensors as DeepSpeed makes them.

    device: where Muon's matrices are orthogonalised. Where there are any, `locate` of it must be set.
    """
    adam: dict[str, Any] = {
        "lr": settings.learning_rate,
        "betas": tuple(settings.betas),
        "eps": settings.eps,
        "fused": True,  # the others need temporaries as large as a rank's whole share, and take 7 times as long
    }
    if settings.kind == "adamw":
        return torch.optim.AdamW(groups, **adam)
    return Grouped(groups, adam, settings, device)


class Grouped(torch.optim.Optimizer):
    """Steps each group by its `kind`."""

    def __init__(
        self, groups: list[dict[str, Any]], adam: dict[str, Any], settings: OptimizerSettings, device: torch.device
    ) -> None:
        super().__init__(groups, {"lr": settings.learning_rate})
        # DeepSpeed replaces what a group's dictionary holds, so AdamW shares dictionaries and states.
        self._adam = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], **adam)
        for group in self.param_groups:
            for key, value in self._adam.defaults.items():
                group.setdefault(key, value)
        self._adam.state = self.state
        self._betas, self._muon = settings.betas, Muon(settings.decay, device)

    def locate(self, locate: Locate, ranks: int, group: Any = None) -> None:
        """Says where the matrices of a flat tensor are, whose parts `ranks` ranks of a group hold; see `Muon`."""
        self._muon.locate, self._muon.ranks, self._muon.group = locate, ranks, group

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Steps every parameter that has a gradient."""
        assert closure is None
        groups = self.param_groups
        by_kind = {kind: [group for group in groups if group["kind"] == kind and group["params"]] for kind in STATES}
        if by_kind["adamw"]:
            self._adam.param_groups = by_kind["adamw"]
            self._adam.step()
        for group in (*by_kind["muon"], *by_kind["lion"]):
            for flat in group["params"]:
                if flat.grad is not None:
                    create_states(self.state[flat], flat, group)
                    self.state[flat]["step"] += 1
        if by_kind["muon"]:
            self._muon.step(by_kind["muon"], self.state)
        for group in by_kind["lion"]:
            _lion(group, self.state, self._betas)


def create_states(state: dict[str, Any], flat: Tensor, group: dict[str, Any], steps: int | None = None) -> None:
    """Makes the zero states of a flat tensor where there are none; sets the number of steps taken, unless None."""
    if not state:  # AdamW's own first step does the same
        device = flat.device if group.get("fused") else "cpu"
        state["step"] = torch.zeros((), dtype=torch.float32, device=device)
        for kind in STATES[group["kind"]]:
            state[kind] = torch.zeros_like(flat.detach())
    if steps is not None:
        state["step"].fill_(steps)


def _lion(group: dict[str, Any], states: Any, betas: tuple[float, float]) -> None:
    """The sign of a mean of the gradients: p = (1 - lr wd) p - lr sign(b1 m + (1 - b1) g), m = b2 m + (1 - b2) g."""
    rate, decay = group["lr"], group["lr"] * group["weight_decay"]
    for flat in group["params"]:
        if flat.grad is not None:
            average = states[flat]["average"]
            direction = average.lerp(flat.grad, 1 - betas[0]).sign_()
            flat.mul_(1 - decay).add_(direction, alpha=-rate)
            average.lerp_(flat.grad, 1 - betas[1])
