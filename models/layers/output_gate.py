"""Output gates of attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .low_rank import LowRank

GATES = (None, "head", "channel")


class OutputGate(nn.Module):
    """Multiplies the output of each head by sigmoid(W x) of the layer's input (Qiu et al., 2025, arXiv 2505.06708).

    x `[B, T, width]` and out `[B, T, heads, dim]` to the same shape and dtype as out. gate: "head" for one number per
    head, "channel" for one per channel of the output. rank: W is a product of matrices of that rank. bias: after W.
    """

    def __init__(
        self, width: int, heads: int, dim: int, gate: str, *, rank: int | None = None, bias: bool = False
    ) -> None:
        super().__init__()
        outputs = heads if gate == "head" else heads * dim
        if rank is None:
            self.project: nn.Module = nn.Linear(width, outputs, bias=bias)
        else:
            self.project = LowRank(width, rank, outputs=outputs, bias=bias)
        self.per_head = gate == "head"

    def forward(self, x: Tensor, out: Tensor) -> Tensor:
        raw = self.project(x)
        gate = torch.sigmoid(raw.unsqueeze(-1) if self.per_head else raw.view(out.shape))
        return out * gate


def output_gate(
    gate: str | None, width: int, heads: int, dim: int, *, rank: int | None = None, bias: bool = False
) -> OutputGate | None:
    """The gate by a mixer's settings `gate`, `gate_rank` and `gate_bias`; None without one.

    Raises ValueError for an unknown gate and for settings that then have no effect.
    """
    if gate not in GATES:
        raise ValueError(f"gate must be one of {', '.join('null' if g is None else g for g in GATES)}; got {gate!r}")
    if gate is None:
        if rank is not None or bias:
            raise ValueError("gate_rank and gate_bias must come with a gate; got gate=None. Choose head or channel")
        return None
    if rank is not None and rank < 1:
        raise ValueError(f"gate_rank must be at least 1; got {rank}")
    return OutputGate(width, heads, dim, gate, rank=rank, bias=bias)
