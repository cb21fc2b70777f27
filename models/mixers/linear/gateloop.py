"""GateLoop."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ....kernels import diagonal_scan, gated_linear
from ....parallel import ops
from ....parallel.sequence import Sequence
from ...layers.decay_gate import GateLinear, WideLinear
from ...layers.phases import cumulative_phases, turned
from ...mixer import Mixer, head_size


class GateLoop(Mixer):
    """A linear recurrence with complex decays that depend on the token (GateLoop, Katsch, 2023, arXiv 2311.01927).

        S_t = diag(a_t) S_(t-1) + k_t^T v_t        o_t = q_t Re(S_t)        y = W_o (silu(W_g x) * o)
        a_t = sigmoid(W_a x_t + b_a) exp(i (W_p x_t + b_p))                 one per key channel

    A complex decay is a real one, of q and k that are turned by the cumulative phases. heads: by default one per
    channel, as in the paper's experiments: S_t is then elementwise, and the recurrence a scan. rotation=False leaves
    the phases out: decays are real. Where implementations differ (some take the sigmoid of the modulus of a complex
    projection) this is the paper's polar form; that gates start open, with b_a between 3 and 6, is ours. Raises
    ValueError for heads that do not divide the width.
    """

    def __init__(self, *, width: int, heads: int | None = None, rotation: bool = True) -> None:
        super().__init__()
        self.heads, self.elementwise = (width, True) if heads is None else (heads, False)
        self.head_dim = head_size("heads", width, self.heads)
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.decay = GateLinear(width, width)  # of which sigmoid is the modulus
        self.phase = WideLinear(width, width) if rotation else None
        self.gate = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, seq: Sequence) -> Tensor:
        parts = self.query(x), self.key(x), self.value(x), F.logsigmoid(self.decay(x))
        q, k, v, log_decay = (part.unflatten(-1, (self.heads, -1)) for part in parts)
        if self.phase is not None:
            phases = cumulative_phases(self.phase(x), seq).unflatten(-1, (self.heads, -1))
            q, k = (turned(torch.stack([part, torch.zeros_like(part)], dim=-1).flatten(-2), phases) for part in (q, k))
            log_decay = log_decay.repeat_interleave(2, dim=-1)  # of a real and an imaginary part
        if self.elementwise:
            out = (q * ops.diagonal_scan(k * v, log_decay, seq=seq)).sum(-1)
        else:
            out = ops.gated_linear_attention(q, k, v, log_decay, seq=seq, scale=1.0).flatten(-2)
        return self.output((out * F.silu(self.gate(x))).to(x.dtype))

    def mixing_flops(self, seq: Sequence) -> int:
        parts = 1 if self.phase is None else 2
        angles = 0 if self.phase is None else diagonal_scan.flops(seq.places, channels=self.heads * self.head_dim)
        if self.elementwise:
            return angles + diagonal_scan.flops(seq.places, channels=parts * self.heads)
        sizes = {"key_dim": parts * self.head_dim, "value_dim": self.head_dim}
        return angles + gated_linear.flops(seq.places, heads=self.heads, **sizes)

    def initialise_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> bool:
        if name != "decay.bias":
            return False
        tensor.copy_(torch.linspace(3.0, 6.0, len(tensor)))
        return True
