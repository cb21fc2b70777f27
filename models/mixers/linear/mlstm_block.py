"""The mLSTM block of the first xLSTM: a matrix memory between an up-projection and a down-projection."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ....kernels.gated_linear import flops
from ....parallel import ops
from ....parallel.sequence import Sequence
from ...layers.block_diagonal import BlockDiagonalLinear
from ...layers.decay_gate import GateLinear
from ...layers.normalisation import HeadNorm
from ...layers.short_convolution import ShortConvolution
from ...mixer import Mixer, head_size
from .mlstm import start_gate


class MLSTMBlock(Mixer):
    """A matrix memory within an up-projection, with a convolution and a skip (xLSTM, Beck et al., 2024,
    arXiv 2405.04517).

        u = W_u x        s = silu(conv(u))        q, k = W_q s, W_k s        v = W_v u        W_q, W_k, W_v in blocks
        S_t = sigmoid(f_t) S_(t-1) + exp(i_t) k_t^T v_t        z_t likewise for v = 1        i, f = W (q, k, v) + b
        h_t = q_t S_t / max(|q_t z_t|, 1)                      q scaled by 1 / sqrt(channels of a head)
        y = W_o ((LayerNorm_h(h) + skip * s) * silu(W_g x))    within each head

    It needs no feed-forward layer. expansion: the width inside over the width. block: channels of a block of W_q, W_k
    and W_v. conv_size: taps of the convolution. Gates start as in the authors' code: they do not look at their input,
    and forget gates are between 3 and 6. Raises ValueError for sizes that do not divide.
    """

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        expansion: float = 2,
        block: int = 4,
        conv_size: int = 4,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        inner = int(expansion * width)
        self.heads, self.head_dim = heads, head_size("heads", inner, heads)
        blocks = head_size("block", inner, block)
        self.value = nn.Linear(width, inner, bias=False)  # u
        self.conv = ShortConvolution(inner, conv_size, bias=True, activation="silu")
        self.queries = BlockDiagonalLinear(inner, blocks)
        self.keys = BlockDiagonalLinear(inner, blocks)
        self.values = BlockDiagonalLinear(inner, blocks)
        self.input_gate = GateLinear(3 * inner, heads)
        self.forget_gate = GateLinear(3 * inner, heads)
        self.norm = HeadNorm(heads, self.head_dim, norm_eps, bias=False)
        self.skip = nn.Parameter(torch.empty(inner))
        self.gate = nn.Linear(width, inner, bias=False)
        self.output = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, seq: Sequence) -> Tensor:
        u = self.value(x)
        smooth = self.conv(u, seq)
        q, k, v = self.queries(smooth), self.keys(smooth), self.values(u)
        joined = torch.cat([q, k, v], dim=-1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in (q, k, v))
        log_decay = F.logsigmoid(self.forget_gate(joined))
        out = ops.gated_linear_attention(
            q, k, v, log_decay, log_input=self.input_gate(joined), normaliser="at_least_one", seq=seq
        )
        return self.output((self.norm(out) + self.skip.to(x.dtype) * smooth) * F.silu(self.gate(x)))

    def mixing_flops(self, seq: Sequence) -> int:
        return flops(seq.places, heads=self.heads, key_dim=self.head_dim, value_dim=self.head_dim + 1)

    def initialise_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> bool:
        if name == "input_gate.bias":
            tensor.normal_(0.0, 0.1, generator=generator)
        elif name == "skip":
            tensor.fill_(1.0)
        else:
            return start_gate(name, tensor)
        return True
