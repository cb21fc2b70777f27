"""Gated memory unit."""

from __future__ import annotations

from torch import Tensor, nn

from ....kernels.pointwise import swiglu
from ....parallel.sequence import Sequence
from ...mixer import Mixer
from ..state_space.mamba2 import GatedRMSNorm


class GatedMemoryUnit(Mixer):
    """A gate on what an earlier layer read from its state (SambaY, Ren et al., 2025, arXiv 2507.06607).

        y_t = W_o (silu(W_g x_t) * m_t)        m what the mixer `memory_of` publishes of its own tokens

    It mixes no tokens itself, and keeps nothing when it decodes. memory_of: a mixer by its name in the pattern, such as
    `Mamba` with `publish`, of which the last layer before this one is meant. expansion: channels of m over the width.
    norm: whether an RMS norm follows the product, which memories of linear attention want. bias: of both linear layers.
    Raises ValueError for an expansion that leaves no channel.
    """

    stateless = True

    def __init__(
        self,
        *,
        width: int,
        memory_of: str,
        expansion: float = 2,
        norm: bool = False,
        bias: bool = False,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        channels = int(expansion * width)
        if channels < 1:
            raise ValueError(f"expansion must leave at least one channel of the width {width}; got {expansion}")
        self.reads = (f"{memory_of}.memory",)
        self.widths = {self.reads[0]: channels}
        self.gate = nn.Linear(width, channels, bias=bias)
        self.norm = GatedRMSNorm(channels, 1, norm_eps) if norm else None
        self.output = nn.Linear(channels, width, bias=bias)

    def forward(self, x: Tensor, seq: Sequence, *read: Tensor) -> Tensor:
        (memory,) = read
        gate = self.gate(x)
        return self.output(swiglu(gate, memory) if self.norm is None else self.norm(memory, gate))

    def mixing_flops(self, seq: Sequence) -> int:
        return 0
