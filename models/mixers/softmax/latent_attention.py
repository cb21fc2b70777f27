"""Multi-head latent attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ....kernels.latent import flops
from ....kernels.masks import Mask
from ....parallel import ops
from ....parallel.sequence import Sequence
from ...layers.normalisation import RMSNorm
from ...layers.output_gate import output_gate
from ...layers.rotary import rotary
from ...mixer import Mixer, head_size
from ...part import Clipped


class LatentAttention(Mixer):
    """Softmax attention whose keys and values are linear in a latent (MLA, DeepSeek-V2, 2024, arXiv 2405.04434).

        [r_t; a_t] = W_a x_t      c_t = RMSNorm(a_t)      k_th = [rotate(r_t); W^K_h c_t]      v_th = W^V_h c_t
        q_th = rotate W_q x_t, or rotate W_q RMSNorm(W_b x_t)          the rotation turns the dims of r alone
        o_i = sum_j softmax_j(scale q_i . k_j) v_j        j <= i in i's document

    Between ranks and in the decoding cache a token is c and the rotated r: latent_rank + rope_heads * rope_dim numbers.

    heads: of queries, keys and values. Keys have rope_heads * rope_dim + key_dim dims, key_dim being width / heads by
    default, and values value_dim, by default key_dim. latent_rank: of c. query_rank: of the compressed queries, None
    for W_q alone. rope_dim: of r, the part of the keys that all heads share, 0 for none. rope_heads: of how many parts
    of rope_dim dims, which turn alike, r consists; models made of grouped attention have several. rope_base: None
    leaves r unrotated, as in Kimi Linear. rope_scaling: see `RopeScaling`. latent_norm: whether there is an RMSNorm in
    c and in the queries. scale: by default that of the keys' dims; models extended by YaRN multiply it. gate,
    gate_rank, gate_bias: the output's, see `OutputGate`. sink_logits: a learned logit per head in the softmax's
    denominator. bias, query_bias, output_bias: of W_a and W_b, of W_q, and of the output.
    Raises ValueError for sizes that do not fit and for settings without effect.
    """

    small = {"latent_rank": 12, "query_rank": 10, "rope_dim": 6, "value_dim": 10}

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        latent_rank: int = 512,
        query_rank: int | None = None,
        key_dim: int | None = None,
        value_dim: int | None = None,
        rope_dim: int = 64,
        rope_heads: int = 1,
        rope_base: float | None = 10000.0,
        rope_scaling: dict[str, Any] | None = None,
        latent_norm: bool = True,
        norm_eps: float = 1e-6,
        scale: float | None = None,
        gate: str | None = None,
        gate_rank: int | None = None,
        gate_bias: bool = False,
        sink_logits: bool = False,
        bias: bool = False,
        query_bias: bool = False,
        output_bias: bool = False,
    ) -> None:
        super().__init__()
        key_dim = head_size("heads", width, heads, "key_dim") if key_dim is None else key_dim
        value_dim = key_dim if value_dim is None else value_dim
        _check_sizes(
            {"heads": heads, "latent_rank": latent_rank, "value_dim": value_dim, "query_rank": query_rank,
             "rope_heads": rope_heads}, {"key_dim": key_dim, "rope_dim": rope_dim},
        )  # fmt: skip
        if rope_dim == 0 and (rope_base is not None or rope_heads != 1):
            raise ValueError(
                f"rope_base must be null and rope_heads 1 with rope_dim=0; got {rope_base} and {rope_heads}. "
                "Leave them so, or give rope_dim"
            )
        self.heads, self.rope_heads, self.shared_dim = heads, rope_heads, rope_heads * rope_dim
        self.key_dim, self.value_dim = self.shared_dim + key_dim, value_dim
        self.latent_rank, self.scale = latent_rank, scale
        self.rotary = rotary(rope_dim, rope_base, 1.0, rope_scaling)
        self.query_down = self.query_norm = None
        if query_rank is not None:
            self.query_down = nn.Linear(width, query_rank, bias=bias)
            self.query_norm = RMSNorm(query_rank, norm_eps) if latent_norm else None
        self.query = nn.Linear(width if query_rank is None else query_rank, heads * self.key_dim, bias=query_bias)
        self.latent = nn.Linear(width, self.shared_dim + latent_rank, bias=bias)
        self.latent_norm = RMSNorm(latent_rank, norm_eps) if latent_norm else None
        self.attend = ExpandedAttention(latent_rank, heads * (key_dim + value_dim), heads if sink_logits else None)
        self.gate = output_gate(gate, width, heads, value_dim, rank=gate_rank, bias=gate_bias)
        self.output = nn.Linear(heads * value_dim, width, bias=output_bias)

    def forward(self, x: Tensor, seq: Sequence) -> Tensor:
        q = self.queries(self.compressed(x), seq)
        return self.gated(x, self.attend(q, self.rows(x, seq), seq, self.scale, self.largest_logits))

    def gated(self, x: Tensor, out: Tensor) -> Tensor:
        """`[B, T, width]` of what attention gives, `[B, T, heads, value_dim]`."""
        return self.output((out if self.gate is None else self.gate(x, out)).flatten(-2))

    def compressed(self, x: Tensor) -> Tensor:
        """What queries are made of: `[B, T, query_rank]`, or x itself without a query_rank."""
        if self.query_down is None:
            return x
        x = self.query_down(x)
        return x if self.query_norm is None else self.query_norm(x)

    def queries(self, compressed: Tensor, seq: Sequence) -> Tensor:
        """`[B, T, heads, key_dim]`, rotated."""
        return self.rotate(self.query(compressed).unflatten(-1, (self.heads, -1)), seq)

    def rows(self, x: Tensor, seq: Sequence) -> Tensor:
        """`[B, T, shared_dim + latent_rank]`: of each token the rotated shared part of its key, and its latent."""
        rows = self.latent(x)
        if self.latent_norm is not None:
            shared, latent = rows.split([self.shared_dim, self.latent_rank], dim=-1)
            rows = torch.cat([shared, self.latent_norm(latent)], dim=-1)
        return self.rotate(rows.unsqueeze(2), seq).squeeze(2)

    def rotate(self, x: Tensor, seq: Sequence) -> Tensor:
        """Turns the first shared_dim dims of `[B, T, H, …]`."""
        if self.rotary is None:
            return x
        if self.rope_heads == 1:
            return self.rotary(x, seq)
        shared, rest = x.split([self.shared_dim, x.shape[-1] - self.shared_dim], dim=-1)
        parts = self.rotary(shared.unflatten(-1, (self.rope_heads, -1)).flatten(2, 3), seq)
        return torch.cat([parts.view(shared.shape), rest], dim=-1)

    def clipped(self) -> Clipped | str | None:
        return Clipped(self.query, self.heads)

    def mixing_flops(self, seq: Sequence) -> int:
        return flops(seq.pairs(Mask()), heads=self.heads, key_dim=self.key_dim, value_dim=self.value_dim)


class ExpandedAttention(nn.Linear):
    """Attention to the latents that arrive, whose expansion to keys and values is this layer's weight."""

    def __init__(self, latent_rank: int, expanded: int, sinks: int | None) -> None:
        super().__init__(latent_rank, expanded, bias=False)
        self.sink_logits = None if sinks is None else nn.Parameter(torch.zeros(sinks))

    def forward(  # type: ignore[override]
        self, q: Tensor, rows: Tensor, seq: Sequence, scale: float | None, largest: Tensor | None = None
    ) -> Tensor:
        sinks = self.sink_logits
        return ops.latent_attention(q, rows, self.weight, seq=seq, scale=scale, sink_logits=sinks, largest=largest)

    def initialise_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> bool:
        if name != "sink_logits":
            return False
        tensor.zero_()
        return True


def _check_sizes(positive: dict[str, int | None], others: dict[str, int]) -> None:
    for name, size in positive.items():
        if size is not None and size < 1:
            raise ValueError(f"{name} must be at least 1; got {size}")
    for name, size in others.items():
        if size < 0:
            raise ValueError(f"{name} must not be negative; got {size}")
    if not any(others.values()):
        raise ValueError(f"{' + '.join(others)} must be at least 1, for keys to have dims; got 0")
