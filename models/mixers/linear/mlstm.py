"""mLSTM, the matrix memory of xLSTM."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ....kernels.gated_linear import flops
from ....parallel import ops
from ....parallel.sequence import Sequence
from ...layers.decay_gate import GateLinear
from ...layers.normalisation import HeadNorm
from ...mixer import Mixer, head_size


class MLSTM(Mixer):
    """A matrix memory with exponential input gates (xLSTM, Beck et al., 2024, arXiv 2405.04517; as in xLSTM 7B,
    arXiv 2503.13427).

        S_t = sigmoid(f_t) S_(t-1) + exp(i_t) k_t^T v_t        z_t likewise for v = 1        i, f = cap(W x + b)
        h_t = q_t S_t / max(|q_t z_t|, 1)                      q scaled by 1 / sqrt(key_dim)
        y = W_o (sigmoid(W_g x) * LayerNorm_h(h))              within each head
        cap(x) = gate_cap tanh(x / gate_cap)

    key_dim, value_dim: of a head; by default half of and all of width / heads. gate_cap: None for no cap. A new model's
    gates do not look at their input: input gates start nearly closed, at -10, forget gates between 3 and 6.
    Raises ValueError for sizes that do not divide.
    """

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        key_dim: int | None = None,
        value_dim: int | None = None,
        gate_cap: float | None = 15.0,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if gate_cap is not None and gate_cap <= 0:
            raise ValueError(f"gate_cap must be positive; got {gate_cap}. Use null for no cap")
        self.heads, self.gate_cap = heads, gate_cap
        self.key_dim = head_size("2 * heads", width, 2 * heads, "key_dim") if key_dim is None else key_dim
        self.value_dim = head_size("heads", width, heads, "value_dim") if value_dim is None else value_dim
        keys, values = heads * self.key_dim, heads * self.value_dim
        self.query = nn.Linear(width, keys, bias=False)
        self.key = nn.Linear(width, keys, bias=False)
        self.value = nn.Linear(width, values, bias=False)
        self.input_gate = GateLinear(width, heads)
        self.forget_gate = GateLinear(width, heads)
        self.gate = nn.Linear(width, values, bias=False)
        self.norm = HeadNorm(heads, self.value_dim, norm_eps, bias=False)
        self.output = nn.Linear(values, width, bias=False)

    def forward(self, x: Tensor, seq: Sequence) -> Tensor:
        q, k, v = (project(x).unflatten(-1, (self.heads, -1)) for project in (self.query, self.key, self.value))
        log_decay = F.logsigmoid(self.capped(self.forget_gate(x)))
        out = ops.gated_linear_attention(
            q, k, v, log_decay, log_input=self.capped(self.input_gate(x)), normaliser="at_least_one", seq=seq
        )
        return self.output(self.norm(out, self.gate(x), "sigmoid"))

    def capped(self, gate: Tensor) -> Tensor:
        return gate if self.gate_cap is None else self.gate_cap * torch.tanh(gate / self.gate_cap)

    def mixing_flops(self, seq: Sequence) -> int:
        return flops(seq.places, heads=self.heads, key_dim=self.key_dim, value_dim=self.value_dim + 1)

    def initialise_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> bool:
        if name != "input_gate.bias":
            return start_gate(name, tensor)
        tensor.fill_(-10.0)
        return True


def start_gate(name: str, tensor: Tensor) -> bool:
    """Fills a weight of an mLSTM's gates with 0, biases of forget gates with 3 to 6; False for other parameters."""
    if name in ("input_gate.weight", "forget_gate.weight"):
        tensor.zero_()
    elif name == "forget_gate.bias":
        tensor.copy_(torch.linspace(3.0, 6.0, len(tensor)))
    else:
        return False
    return True
