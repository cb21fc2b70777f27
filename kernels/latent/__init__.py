"""Latent attention: softmax attention whose keys and values are made, where they are needed, of a small row per token.

Between ranks and in the decoding cache a token is its row: the latent and the part of its key that all heads share.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ..attend import Gradient, OnOneDevice, documents_of
from ..dispatch import asked
from ..documents import Documents
from ..masks import Mask, Pattern, Tile
from ..operation import run
from ..softmax import SoftmaxAttend, SoftmaxInputs
from ..softmax.largest_logits import OfLogits
from .listed import listed_latent_attention as listed_latent_attention


def latent_attention(
    q: Tensor,
    latent: Tensor,
    expansion: Tensor,
    *,
    mask: Pattern | None = None,
    documents: Documents | None = None,
    key_documents: Documents | None = None,
    scale: float | None = None,
    sink_logits: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention over keys and values that are linear in a latent, but for a part of the key that heads share.

        k_jh = [r_j; W^K_h c_j]     v_jh = W^V_h c_j     s_ijh = scale * q_ih . k_jh
        lse_ih = log(sum_j exp(s_ijh) + exp(sink_logit_h));  o_ih = sum_j exp(s_ijh - lse_ih) v_jh

    q `[B, T, H, R + K]`; latent `[B, S, R + C]`, of each token the shared part r, usually rotated, and the latent c;
    expansion `[H (K + V), C]`, of each head W^K and then W^V. R is what q and the latent have beside K and C, and may
    be 0. `mask`, `documents`, `key_documents`, `scale` (by default (R + K)^(-1/2)), `sink_logits`, `return_lse` and
    `backend` are those of `longreach.kernels.softmax.softmax_attention`, whose kernels run. Returns out `[B, T, H, V]`
    in q's type and, with `return_lse`, lse `[B, T, H]` in float32 (float64 for float64); both carry gradients to every
    input. Raises ValueError for shapes that do not fit and for a backend that cannot run.

    DeepSeek-AI, 2024, "DeepSeek-V2", arXiv 2405.04434.
    """
    op = LatentAttend(Mask() if mask is None else mask, q.shape[-1] ** -0.5 if scale is None else float(scale))
    inputs = LatentInputs(q, latent, expansion, sink_logits)
    op.check(inputs)
    documents, key_documents = documents_of(q, latent, documents, key_documents)
    out, lse = run(OnOneDevice(op), inputs, (op.tile(documents, key_documents), backend))
    return (out, lse) if return_lse else out


class LatentInputs(NamedTuple):
    """q `[B, T, H, R + K]`, latent `[B, S, R + C]`, expansion `[H (K + V), C]`, sink_logits `[H]`."""

    q: Tensor
    latent: Tensor
    expansion: Tensor
    sink_logits: Tensor | None = None


class Dims(NamedTuple):
    """Of a head: the dims of its key that all heads share, its own, and those of its value; and those of the latent."""

    shared: int
    key: int
    value: int
    latent: int

    @classmethod
    def of(cls, inputs: LatentInputs) -> Dims:
        latent = inputs.expansion.shape[1]
        shared = inputs.latent.shape[2] - latent
        key = inputs.q.shape[3] - shared
        return cls(shared, key, inputs.expansion.shape[0] // inputs.q.shape[2] - key, latent)


@dataclass(frozen=True)
class LatentAttend(SoftmaxAttend):
    """The op as `longreach.kernels.attend` describes it: the latent travels, and is expanded where it arrives.

    So is its gradient, which comes home, while that of the expansion is added up over all that has arrived.
    """

    record = LatentInputs
    travels = ("latent",)
    without_heads = ("latent",)

    def check(self, inputs: LatentInputs) -> None:  # type: ignore[override]
        check_inputs(*inputs)

    def width(self, inputs: LatentInputs) -> tuple[int, int]:
        return inputs.q.shape[2], Dims.of(inputs).value

    def attend(  # type: ignore[override]
        self, inputs: LatentInputs, received: tuple[Tensor, ...], tile: Tile, backend: str
    ) -> tuple[Tensor, Tensor]:
        keyed = _expanded(inputs, *received)
        return self._softmax.attend(keyed, (keyed.k, keyed.v), tile, backend)

    def attend_backward(  # type: ignore[override]
        self, gradient: Gradient, inputs: LatentInputs, received: tuple[Tensor, ...], tile: Tile, backend: str
    ) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        (latent,), keyed = received, _expanded(inputs, *received)
        stay, (dk, dv, *_) = self._softmax.attend_backward(gradient, keyed, (keyed.k, keyed.v), tile, backend)
        shared = Dims.of(inputs).shared
        rows = latent[..., shared:].flatten(0, 1)
        dexpanded = torch.cat([dk[..., shared:], dv], dim=-1).flatten(2).flatten(0, 1)  # [B S, H (K + V)]
        dlatent = product(dexpanded, inputs.expansion, latent.dtype).unflatten(0, latent.shape[:2])
        dlatent = torch.cat([dk[..., :shared].sum(2), dlatent], dim=-1)
        return stay | {"expansion": product(dexpanded.T, rows, latent.dtype)}, (dlatent,)

    def decode(  # type: ignore[override]
        self, inputs: LatentInputs, received: tuple[Tensor, ...], tile: Tile, backend: str
    ) -> tuple[Tensor, Tensor]:
        """Absorbed, for few queries: the expansion is applied to the queries and to the output rather than to all keys.

        Then every head reads one key, the row itself, and one value, its latent.
        """
        (rows,), dims = received, Dims.of(inputs)
        if not absorbing_pays(inputs.q.shape[1], rows.shape[1], dims):
            return self.attend(inputs, received, tile, backend)
        q, values = absorbed(inputs.q, inputs.expansion, row_dim=rows.shape[2])
        rows = rows.unsqueeze(2)
        named = SoftmaxInputs(q, rows, rows[..., dims.shared :])
        # One key for all heads is two matrix products, wider than other kernels take.
        chosen = "reference" if asked("softmax_attention", backend) == "reference" else "chunked"
        out, lse = self._softmax.attend(named, (named.k, named.v), tile, chosen)
        return torch.einsum("bthc,hvc->bthv", out, values.to(out.dtype)), lse

    @cached_property
    def _softmax(self) -> SoftmaxAttend:
        """The op on keys and values, with the same settings."""
        return SoftmaxAttend(**{field.name: getattr(self, field.name) for field in fields(self)})


class LatentLogits(OfLogits, LatentAttend):
    """The largest logits in place of the output."""


def check_inputs(q: Tensor, latent: Tensor, expansion: Tensor, sink_logits: Tensor | None = None) -> None:
    """Raises ValueError unless the shapes and types are those of `LatentInputs`."""
    for name, x, dims in (("q", q, 4), ("latent", latent, 3), ("expansion", expansion, 2)):
        if x.dim() != dims or not x.is_floating_point():
            raise ValueError(f"{name} must be floating point with {dims} dims; got {x.dtype} {tuple(x.shape)}")
    if q.dtype != latent.dtype or q.shape[0] != latent.shape[0]:
        raise ValueError(
            f"q and latent must be of one dtype and batch; got {q.dtype} {tuple(q.shape)} and {latent.dtype} "
            f"{tuple(latent.shape)}"
        )
    heads, (rows, width) = q.shape[2], expansion.shape
    shared = latent.shape[2] - width
    key = q.shape[3] - shared
    if heads == 0 or rows % heads or not 0 <= shared <= q.shape[3] or rows // heads <= key:
        raise ValueError(
            f"expansion must be [H (K + V), C] for q [B, T, H, R + K] and latent [B, S, R + C]; got "
            f"{tuple(expansion.shape)} for q {tuple(q.shape)} and latent {tuple(latent.shape)}"
        )
    if sink_logits is not None and tuple(sink_logits.shape) != (heads,):
        raise ValueError(f"sink_logits must be one for each of {heads} heads; got {tuple(sink_logits.shape)}")


def expand(latent: Tensor, expansion: Tensor, *, heads: int, key_dim: int) -> tuple[Tensor, Tensor]:
    """Keys `[B, S, H, R + K]` and values `[B, S, H, V]` of rows `[B, S, R + C]`; `key_dim` is R + K. Differentiable."""
    shared = latent.shape[2] - expansion.shape[1]
    expanded = torch.nn.functional.linear(latent[..., shared:], expansion.to(latent.dtype)).unflatten(-1, (heads, -1))
    own, v = expanded.split([key_dim - shared, expanded.shape[-1] - key_dim + shared], dim=-1)
    if shared == 0:
        return own, v
    common = latent[..., None, :shared].expand(*own.shape[:3], shared)
    return torch.cat([common, own], dim=-1), v


def absorbed(q: Tensor, expansion: Tensor, *, row_dim: int) -> tuple[Tensor, Tensor]:
    """Queries `[B, T, H, R + C]` of rows `[B, S, R + C]` themselves, and W^V `[H, V, C]`, which expands what they read.

    q `[B, T, H, R + K]`, expansion `[H (K + V), C]`, `row_dim` R + C. Differentiable.
    """
    heads, shared = q.shape[2], row_dim - expansion.shape[1]
    weights = expansion.to(q.dtype).unflatten(0, (heads, -1))  # [H, K + V, C]
    key_dim = q.shape[3] - shared
    keys, values = weights.split([key_dim, weights.shape[1] - key_dim], dim=1)
    own = torch.einsum("bthk,hkc->bthc", q[..., shared:], keys)
    return torch.cat([q[..., :shared], own], dim=-1), values


def _expanded(inputs: LatentInputs, latent: Tensor) -> SoftmaxInputs:
    q = inputs.q
    k, v = expand(latent, inputs.expansion, heads=q.shape[2], key_dim=q.shape[3])
    return SoftmaxInputs(q, k, v)


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a b, added up and returned in float32 (float64), of factors that CUDA rounds to `dtype`, as layers do."""
    if a.is_cuda and dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a.to(dtype), b.to(dtype), out_dtype=torch.float32)
    exact = torch.promote_types(dtype, torch.float32)
    return a.to(exact) @ b.to(exact)


def absorbing_pays(queries: int, keys: int, dims: Dims) -> bool:
    """Whether the absorbed form has fewer products: it expands the queries, but their scores are as wide as rows."""
    expansion = dims.latent * (dims.key + dims.value)
    wider = 2 * dims.latent - dims.key - dims.value
    return queries * (expansion + keys * wider) < keys * expansion


def flops(pairs: int, *, heads: int, key_dim: int, value_dim: int) -> int:
    """Forward FLOPs of `pairs` visible pairs; the expansion of each token's row is that of a linear layer."""
    return 2 * pairs * heads * (key_dim + value_dim)


def bytes_sent(tokens: int, *, latent_dim: int, shared_dim: int, ranks: int, element_bytes: int = 2) -> int:
    """Bytes that a rank of a ring sends in forward: P − 1 blocks of the rows of `tokens` tokens.

    With a causal mask it is less: a block travels only to the last rank that sees it.
    """
    return (ranks - 1) * tokens * (latent_dim + shared_dim) * element_bytes


def state_bytes(tokens: int, *, latent_dim: int, shared_dim: int, element_bytes: int = 2) -> int:
    """Bytes of the rows that decoding keeps for one sequence after `tokens` tokens."""
    return tokens * (latent_dim + shared_dim) * element_bytes
