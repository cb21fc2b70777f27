"""HGRN: a gated linear recurrence whose forget gates have lower bounds."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from ....kernels.diagonal_scan import flops
from ....parallel import ops
from ....parallel.sequence import Sequence
from ...layers.decay_gate import GateLinear
from ...layers.layer_decays import LowerBounds, bounded
from ...layers.normalisation import RMSNorm
from ...mixer import Mixer


class HGRN(Mixer):
    """A hierarchically gated recurrence (HGRN, Qin et al., 2023, arXiv 2311.04823).

        f_t = bound + (1 - bound) sigmoid(W_f x_t)          bound of this layer, see `LowerBounds`
        h_t = f_t h_(t-1) + (1 - f_t) silu(W_i x_t)
        y = W_o (RMSNorm(h) * silu(W_g x))

    Later layers forget less. The first layer of a model (by `occurrence`) owns the bounds of all layers and publishes
    `hgrn_bounds`, the others read it; lower_bounds=False leaves them out. expansion: channels of h over the width. The
    state is real, as in flash-linear-attention; the paper also turns it by a learned angle per channel, which is left
    out here. Raises ValueError for an expansion that leaves no channel.
    """

    def __init__(
        self,
        *,
        width: int,
        layer: int,
        depth: int,
        occurrence: int = 0,
        expansion: float = 1,
        lower_bounds: bool = True,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        inner = int(expansion * width)
        if inner < 1:
            raise ValueError(f"expansion * width must be at least 1; got {expansion} * {width}. Raise the expansion")
        self.inner, self.layer = inner, layer
        first = lower_bounds and occurrence == 0
        self.publishes = ("hgrn_bounds",) if first else ()
        self.reads = ("hgrn_bounds",) if lower_bounds and not first else ()
        self.no_weight_decay = ("bounds.weight",) if first else ()
        self.bounds = LowerBounds(depth, inner) if first else None
        self.value = nn.Linear(width, inner, bias=False)  # i
        self.forget = GateLinear(width, inner, bias=False)  # f
        self.gate = nn.Linear(width, inner, bias=False)  # g
        self.norm = RMSNorm(inner, norm_eps)
        self.output = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, seq: Sequence, *read: Tensor) -> Tensor | tuple[Tensor, ...]:
        own = () if self.bounds is None else (self.bounds(),)
        log_decay, closed = bounded(self.forget(x), next(iter(own or read), None), self.layer)
        entering = F.silu(self.value(x)) * closed.to(x.dtype)
        out = ops.diagonal_scan(entering, log_decay, seq=seq)
        result = self.output(self.norm(out, self.gate(x), "silu"))
        return (result, *own) if own else result

    def mixing_flops(self, seq: Sequence) -> int:
        return flops(seq.places, channels=self.inner)
