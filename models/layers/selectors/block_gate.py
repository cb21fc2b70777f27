"""Block gate: which blocks of keys attention will want, learned from their pooled keys."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ....kernels import gate_divergence
from ....kernels.masks import Mask
from ....kernels.pointwise import rotate
from ....kernels.select_blocks import Rule
from ....parallel import ops
from ....parallel.sequence import Sequence
from ..rotary import rotary
from .selector import Selector

POOLS = 3  # the greatest, the least and the mean


class Gate(NamedTuple):
    """What a gate makes of the tokens: q `[B, T, G, D]`, and k `[B, N // block_size, G, D]` of the row's blocks."""

    q: Tensor
    k: Tensor


class BlockGate(Selector):
    """The gate of SeerAttention-R (Gao et al., 2025, arXiv 2506.08889), one per group of heads.

        q_tg = rotate_t(W_g [queries of the heads of group g])
        k_bg = rotate_b(V_g [max; min; mean of the keys of block b])        at the position of the block's first token
        s_tgb = q_tg . k_bg / sqrt(dim)        for the blocks that end at or before t

    Queries and keys are those of attention before rotation, as constants: its `loss` reaches the gate alone.
    """

    def __init__(
        self,
        rule: Rule,
        *,
        heads: int,
        groups: int,
        head_dim: int,
        dim: int,
        rope_base: float | None,
        rope_scaling: dict[str, Any] | None,
    ) -> None:
        if dim < 1:
            raise ValueError(f"gate_dim must be at least 1; got {dim}")
        super().__init__(rule)
        self.dim, self.groups = dim, groups
        self.rotary = rotary(dim, rope_base, 1.0, rope_scaling)
        self.query = GroupedLinear(groups, heads // groups * head_dim, dim)
        self.key = GroupedLinear(groups, POOLS * head_dim, dim, every=rule.block_size)

    def project(self, q: Tensor, k: Tensor, seq: Sequence) -> Gate:
        """Of queries `[B, T, H, K]` and keys `[B, T, G, K]` that are not rotated."""
        q, k, size = q.detach().unflatten(2, (self.groups, -1)).flatten(3), k.detach(), self.rule.block_size
        gate_q = self.query(q)
        rows = ops.local_windows(k, seq=seq, size=size, stride=size)  # [B, W, size, G, K]
        gate_k = self.key(torch.cat([rows.amax(2), rows.amin(2), rows.mean(2)], dim=-1))
        if self.rotary is not None:
            gate_q, gate_k = self.rotary(gate_q, seq), self._at_first_token(gate_k, seq)
        return Gate(gate_q, ops.gather_windows(gate_k, seq=seq, size=size, stride=size))

    def _at_first_token(self, x: Tensor, seq: Sequence) -> Tensor:
        """Turns `[B, W, G, D]` of the blocks that end on this rank by the position of each block's first token."""
        assert self.rotary is not None
        size, dtype = self.rule.block_size, torch.promote_types(x.dtype, torch.float32)
        turns = torch.cat(seq.rotations(self.rotary.rotation, x.device, dtype), dim=-1)  # of each token
        first = ops.local_windows(turns, seq=seq, size=size, stride=size, slot="turns")[:, :, 0]
        return rotate(x, *(part.contiguous() for part in first.chunk(2, dim=-1)))

    def select(self, gate: Gate, seq: Sequence) -> Tensor:
        """Lists int32 `[B, T, G, count]`."""
        return self(gate.q, gate.k, seq)

    def loss(self, q: Tensor, k: Tensor, gate: Gate, lists: Tensor | None, seq: Sequence) -> Tensor:
        """The divergence of the gate from attention of q to k that is pooled over blocks: its mean over groups, summed
        over this rank's tokens. Over the blocks listed, or all for None. 0 where nothing trains."""
        if seq.cache is not None or not torch.is_grad_enabled():
            return q.new_zeros((), dtype=torch.promote_types(q.dtype, torch.float32))
        size = self.rule.block_size
        return ops.gate_divergence(q, k, gate.q, gate.k, lists, seq=seq, block_size=size).mean(-1).sum()

    def loss_flops(self, seq: Sequence, *, heads: int, key_dim: int, dense: bool) -> int:
        """Forward FLOPs of the loss."""
        pairs = seq.pairs(Mask()) if dense else self.listed_pairs(seq)
        return gate_divergence.flops(pairs, heads=heads, key_dim=key_dim, listed=not dense)


class GroupedLinear(nn.Module):
    """A linear map per group, `[…, G, inputs]` to `[…, G, outputs]`, that runs once for `every` tokens.

    Weights start normal, with variance 1 / inputs.
    """

    def __init__(self, groups: int, inputs: int, outputs: int, every: int = 1) -> None:
        super().__init__()
        self.every = every
        self.weight = nn.Parameter(torch.empty(groups, outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...gi,goi->...go", x, self.weight)

    def flops(self, seq: Sequence) -> int:
        """Forward FLOPs on the tokens of `seq`'s rank."""
        places = seq.places if self.every == 1 else ops.windows_held(seq, self.every)
        return 2 * places * self.weight.numel()

    def initialise_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> bool:
        tensor.normal_(0.0, tensor.shape[-1] ** -0.5, generator=generator)
        return True
