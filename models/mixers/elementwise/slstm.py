"""sLSTM, the scalar memory of xLSTM."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ....kernels.slstm import flops
from ....parallel import ops
from ....parallel.sequence import Sequence
from ...layers.block_diagonal import BlockDiagonalLinear
from ...layers.normalisation import HeadNorm
from ...layers.short_convolution import ShortConvolution
from ...mixer import Mixer, head_size


class SLSTM(Mixer):
    """Memory cells whose exponential gates read their own output (xLSTM, Beck et al., 2024, arXiv 2405.04517).

        i, f = W_if silu(conv(x)) + R_if h_(t-1) + b_if        z, o = W_zo x + R_zo h_(t-1) + b_zo
        c_t = sigmoid(f_t) c_(t-1) + exp(i_t) tanh(z_t)        n_t likewise with 1 for tanh(z_t)
        h_t = sigmoid(o_t) c_t / n_t                           y = LayerNorm_h(h)        within each head

    W and R are block-diagonal, a block per head. As in the authors' code: no layer after the norm, forget gates by a
    sigmoid, R and the other biases start at 0, and those of forget gates between 5 and -7, longer memories in later
    layers. Serial: ranks that share a row run this mixer one after the other, unless they exchange tokens for heads.
    conv_size: taps of the convolution, None for none. Raises ValueError for heads that do not divide the width.
    """

    outputs = ()
    in_float32 = ("bias",)
    no_weight_decay = ("bias",)

    def __init__(
        self, *, width: int, heads: int, layer: int, depth: int, conv_size: int | None = 4, norm_eps: float = 1e-5
    ) -> None:
        super().__init__()
        size = head_size("heads", width, heads)
        self.heads, self.place = heads, layer / max(depth - 1, 1)
        self.conv = None if conv_size is None else ShortConvolution(width, conv_size, bias=True, activation="silu")
        self.input_gate = BlockDiagonalLinear(width, heads)
        self.forget_gate = BlockDiagonalLinear(width, heads)
        self.cell = BlockDiagonalLinear(width, heads)
        self.output_gate = BlockDiagonalLinear(width, heads)
        self.recurrent = nn.Parameter(torch.empty(heads, size, 4 * size))
        self.bias = nn.Parameter(torch.empty(heads, 4, size))
        self.norm = HeadNorm(heads, size, norm_eps, bias=False)

    def forward(self, x: Tensor, seq: Sequence) -> Tensor:
        smooth = x if self.conv is None else self.conv(x, seq)
        raw = self.input_gate(smooth), self.forget_gate(smooth), self.cell(x), self.output_gate(x)
        gates = torch.stack([gate.unflatten(-1, (self.heads, -1)) for gate in raw], dim=-2)
        gates = gates.to(torch.promote_types(x.dtype, torch.float32))  # sums of log forget gates are exponents
        out = ops.slstm(gates + self.bias.to(gates.dtype), self.recurrent.flatten(1), seq=seq)
        return self.norm(out).to(x.dtype)

    def mixing_flops(self, seq: Sequence) -> int:
        return flops(seq.places, heads=self.heads, key_dim=self.recurrent.shape[1])

    def initialise_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> bool:
        if name not in ("recurrent", "bias"):
            return False
        tensor.zero_()
        if name == "bias":
            size = tensor.shape[-1]
            places = torch.arange(size, dtype=tensor.dtype, device=tensor.device) / max(size - 1, 1)
            tensor[:, 1] = 5.0 - 12.0 * places ** (0.3 + 1.3 * self.place)
        return True
