"""RWKV-5's time mixing."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ....kernels.gated_linear import flops
from ....parallel import ops
from ....parallel.sequence import Sequence
from ...layers.normalisation import HeadNorm
from ...layers.token_shift import Start, log_decay, start_at, token_shifts
from ...mixer import Mixer


class MatrixMixing(Mixer):
    """What RWKV-5 and 6 share: a matrix state whose key channels decay, read before it is written.

    A subclass gives the inputs and decays in `shifted`. Raises ValueError for a head_dim that does not divide the
    width.
    """

    def __init__(self, *, width: int, layer: int, depth: int, head_dim: int, mixes: int) -> None:
        super().__init__()
        if head_dim < 1 or width % head_dim:
            raise ValueError(f"head_dim must divide width={width}; got {head_dim}. Change one of them")
        self.heads, self.head_dim = width // head_dim, head_dim
        self.layer, self.depth = layer, depth
        self.mix = nn.Parameter(torch.empty(mixes, width))
        self.bonus = nn.Parameter(torch.empty(self.heads, head_dim))
        self.receptance = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.gate = nn.Linear(width, width, bias=False)
        self.norm = HeadNorm(self.heads, head_dim, head_dim * 1e-5)
        self.output = nn.Linear(width, width, bias=False)

    def shifted(self, x: Tensor, seq: Sequence) -> tuple[Tensor, ...]:
        """The inputs of r, k, v and g `[B, T, D]`, and the log decays."""
        raise NotImplementedError

    def forward(self, x: Tensor, seq: Sequence) -> Tensor:
        x_r, x_k, x_v, x_g, log_decay = self.shifted(x, seq)
        r, k, v = (
            project(each).unflatten(-1, (self.heads, self.head_dim))
            for project, each in ((self.receptance, x_r), (self.key, x_k), (self.value, x_v))
        )
        out = ops.gated_linear_attention(
            r, k, v, log_decay, read="exclusive", bonus=self.bonus.to(x.dtype), scale=1.0, seq=seq
        )
        return self.output(self.norm(out, self.gate(x_g), "silu"))

    def mixing_flops(self, seq: Sequence) -> int:
        return flops(seq.places, heads=self.heads, key_dim=self.head_dim, value_dim=self.head_dim)

    def initialise_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> bool:
        start = self.start
        values = {
            "bonus": lambda: start.late * (1 - start.position) + 0.1 * start.zigzag,
            "norm.weight": lambda: torch.tensor(((self.layer + 1) / self.depth) ** 0.7),
        }
        gains = {"receptance": 1.0, "key": 0.1, "value": 1.0, "gate": 0.1, "output": 0.0}
        return start_at(name, tensor, generator, values, {f"{matrix}.weight": gain for matrix, gain in gains.items()})

    @property
    def start(self) -> Start:
        return Start(self.heads * self.head_dim, self.layer, self.depth)


class RWKV5(MatrixMixing):
    """A matrix state with a learned decay per key channel (RWKV-5 "Eagle", Peng et al., 2024, arXiv 2404.05892).

        r, k, v, g = W_c lerp(x_t, x_(t-1), mix_c)          for each c of r, k, v, g
        o_t = r_t (S_(t-1) + diag(u) k_t^T v_t)             S_t = diag(e^(-e^w)) S_(t-1) + k_t^T v_t
        y = W_o (silu(g) * HeadNorm(o))

    w and u are learned for each channel of each head. head_dim: of a head, 64 by default; it must divide the width. The
    norm's eps is 1e-5 * head_dim, that of the released models, which divide heads of 64 by 8 and then add 1e-5. The
    paper and its code agree. Parameters start as in the authors' code, the output at 0. Raises ValueError for a
    head_dim that does not divide.
    """

    in_float32 = ("decay",)
    no_weight_decay = ("mix", "decay", "bonus")

    def __init__(self, *, width: int, layer: int, depth: int, head_dim: int = 64) -> None:
        super().__init__(width=width, layer=layer, depth=depth, head_dim=head_dim, mixes=4)
        self.decay = nn.Parameter(torch.empty(self.heads, head_dim))

    def shifted(self, x: Tensor, seq: Sequence) -> tuple[Tensor, ...]:
        return *token_shifts(x, self.mix, seq), log_decay(self.decay)

    def initialise_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> bool:
        if name == "mix":
            tensor.copy_(self.start.mixes(0.5, 1.0, 1.0, 0.5))
            tensor[2] -= 0.3 * self.start.late
        elif name == "decay":
            tensor.copy_(self.start.speeds(-6.0, 5.0).view_as(tensor))
        else:
            return super().initialise_parameter(name, tensor, generator)
        return True
