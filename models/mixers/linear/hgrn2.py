"""HGRN2: HGRN with a matrix for a state."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from ....kernels.gated_linear import flops
from ....parallel import ops
from ....parallel.sequence import Sequence
from ...layers.decay_gate import GateLinear
from ...layers.layer_decays import LowerBounds, bounded
from ...layers.normalisation import RMSNorm
from ...mixer import Mixer, head_size


class HGRN2(Mixer):
    """A gated recurrence whose keys are what its forget gates let in (HGRN2, Qin et al., 2024, arXiv 2404.07904).

        f_t = bound + (1 - bound) sigmoid(W_f x_t)          bound of this layer, see `LowerBounds`
        S_t = diag(f_t) S_(t-1) + (1 - f_t)^T v_t           o_t = silu(W_q x_t) S_t / sqrt(key_dim)
        y = W_o RMSNorm(o)                                  the norm spans all heads

    Later layers forget less. The first layer of a model (by `occurrence`) owns the bounds of all layers and publishes
    `hgrn2_bounds`, the others read it; lower_bounds=False leaves them out. key_dim: of a head, by default width /
    heads; the paper's models have 128. The scale of the output, which the norm takes out again but for its epsilon, is
    that of flash-linear-attention. Raises ValueError for sizes that do not divide.
    """

    def __init__(
        self,
        *,
        width: int,
        layer: int,
        depth: int,
        heads: int,
        occurrence: int = 0,
        key_dim: int | None = None,
        lower_bounds: bool = True,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.heads, self.layer = heads, layer
        self.value_dim = head_size("heads", width, heads)
        self.key_dim = self.value_dim if key_dim is None else key_dim
        keys, first = heads * self.key_dim, lower_bounds and occurrence == 0
        self.publishes = ("hgrn2_bounds",) if first else ()
        self.reads = ("hgrn2_bounds",) if lower_bounds and not first else ()
        self.no_weight_decay = ("bounds.weight",) if first else ()
        self.bounds = LowerBounds(depth, keys) if first else None
        self.query = nn.Linear(width, keys, bias=False)
        self.forget = GateLinear(width, keys, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.norm = RMSNorm(width, norm_eps)
        self.output = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, seq: Sequence, *read: Tensor) -> Tensor | tuple[Tensor, ...]:
        own = () if self.bounds is None else (self.bounds(),)
        log_decay, k = bounded(self.forget(x), next(iter(own or read), None), self.layer)
        parts = F.silu(self.query(x)), k.to(x.dtype), self.value(x), log_decay
        q, k, v, log_decay = (part.unflatten(-1, (self.heads, -1)) for part in parts)
        out = ops.gated_linear_attention(q, k, v, log_decay, seq=seq)
        result = self.output(self.norm(out.flatten(-2)))
        return (result, *own) if own else result

    def mixing_flops(self, seq: Sequence) -> int:
        return flops(seq.places, heads=self.heads, key_dim=self.key_dim, value_dim=self.value_dim)
