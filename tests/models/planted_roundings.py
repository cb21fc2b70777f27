"""Faults of rounding that tests plant, each by a monkeypatch of the process that calls it, and a mixer that has one."""

import torch
from torch import nn
from torch.nn import functional as F

from longreach.kernels import softmax
from longreach.kernels.block_sparse import chunked as blocks
from longreach.kernels.masks import Mask
from longreach.kernels.softmax import flops
from longreach.models.layers.rotary import Rotary
from longreach.models.mixer import Mixer
from longreach.parallel import ops
from longreach.parallel.sequence import Sequence
from longreach.parallel.strategies import windows
from longreach.parallel.strategies.windows import Combination


class ForgettingAttention(Mixer):
    """Attention whose scores have Σ log f between key and query added: by a scan, and key channels that hold its sums.

    Three channels hold a sum to 24 digits, so that outputs are right; but the gradients of the channels are rounded
    before the scan adds them up, and they cancel.
    """

    def __init__(self, width=32, heads=4):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.forget = nn.Linear(width, heads)
        self.output = nn.Linear(width, width, bias=False)

    def forward(self, x, seq):
        q, k, v = (part(x).unflatten(-1, (self.heads, -1)) for part in (self.query, self.key, self.value))
        gate = self.forget(x)
        log_forget = F.logsigmoid(gate.to(torch.promote_types(gate.dtype, torch.float32)) + 2.0)
        total = ops.diagonal_scan(log_forget, torch.zeros_like(log_forget), seq=seq)
        parts, left = [], -total
        for _ in range(3):
            parts.append(left.to(k.dtype).unsqueeze(-1))
            left = left.detach() - parts[-1].detach().squeeze(-1).to(left.dtype)
        scale = k.shape[-1] ** 0.5
        k = torch.cat([k, *parts], dim=-1)
        q = torch.cat([q, scale * torch.ones_like(q[..., :3])], dim=-1)
        return self.output(ops.softmax_attention(q, k, v, seq=seq, scale=1 / scale).flatten(-2))

    def mixing_flops(self, seq):
        dim = self.query.out_features // self.heads
        return flops(seq.pairs(Mask()), heads=self.heads, key_dim=dim + 3, value_dim=dim)


def queries_gradient_added_up_rounded(patch):
    """dq of a ring is in the queries' type, to which 64 keys at a time are added."""
    original = softmax.SoftmaxAttend.attend_backward

    def attend_backward(self, gradient, inputs, received, tile, backend):
        k, v = received
        dq, dk, dv = torch.zeros_like(inputs.q), *(torch.zeros_like(x, dtype=gradient.exact) for x in (k, v))
        for start in range(0, k.shape[1], 64):
            keys = slice(start, start + 64)
            part = tile.mask.tile(tile.queries, tile.keys.slice(start, min(start + 64, k.shape[1])))
            if part is not None:
                stay, found = original(self, gradient, inputs, (k[:, keys], v[:, keys]), part, backend)
                dq += stay["q"].to(dq.dtype)
                dk[:, keys], dv[:, keys] = found
        return {"q": dq.to(gradient.exact)}, (dk, dv)

    patch.setattr(softmax.SoftmaxAttend, "attend_backward", attend_backward)


def blocks_gradient_added_up_rounded(patch):
    """dq of block-sparse attention is rounded whenever a block adds to it."""
    original = torch.Tensor.index_add_

    def index_add_(self, dim, index, source):
        original(self, dim, index, source)
        return self.copy_(self.bfloat16()) if kind[0] == torch.bfloat16 else self

    kind = [torch.float32]
    backward = blocks.attend_backward

    def attend_backward(gradient, q, *rest, **settings):
        kind[0] = q.dtype
        with patch.context() as inner:
            inner.setattr(torch.Tensor, "index_add_", index_add_)
            return backward(gradient, q, *rest, **settings)

    patch.setattr(blocks, "attend_backward", attend_backward)


def window_means_added_up_rounded(patch):
    """Tokens of a window are added one after the other in their own type."""

    def add_up(self, x):
        rows = torch.cat([x, x.new_zeros(1, *x.shape[1:])])
        total = torch.zeros_like(rows[self.index[:, 0]])
        for place in range(self.index.shape[1]):
            total = total + rows[self.index[:, place]]
        return total

    patch.setattr(windows, "_exact", lambda x: x.dtype)
    patch.setattr(Combination, "__call__", add_up)


def positions_rounded(patch):
    """Positions are bfloat16 in every type, float64 too: exact up to 256."""
    original = Sequence.positions
    patch.setattr(Sequence, "positions", lambda self, device="cpu": original(self, device).bfloat16())


def angles_rounded(patch):
    """Angles are in the type of what they turn."""

    def rotate(self, x, seq):
        frequencies, _ = self.rotation.frequencies()
        angles = (seq.positions()[..., None, None] * frequencies).to(x.dtype)
        first, second = x.chunk(2, dim=-1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    patch.setattr(Rotary, "__call__", rotate)
