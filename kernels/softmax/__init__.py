"""Softmax attention: the public op, and the parts from which `longreach.parallel` makes it sequence-parallel."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..dispatch import resolve
from ..documents import Documents
from ..mask import Mask, Tile
from . import chunked, library, reference

__all__ = [
    "apply_sink",
    "attend",
    "attend_backward",
    "bytes_sent",
    "check_inputs",
    "flops",
    "merge",
    "sink_backward",
    "softmax_attention",
    "state_bytes",
]


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | None = None,
    documents: Documents | None = None,
    key_documents: Documents | None = None,
    scale: float | None = None,
    sink_logits: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention over the keys that `mask` shows to each query of its document.

        s_ij = scale * q_i . k_j;  lse_i = log(sum_j exp(s_ij) + exp(sink_logit));  o_i = sum_j exp(s_ij - lse_i) v_j

    q `[B, T, H, K]`, k `[B, S, G, K]`, v `[B, S, G, V]`, G dividing H (head h reads group h // (H/G)). `mask` is
    `Mask()`, causal, where none is given. `documents` are those of the queries (default: a row is one document),
    `key_documents` those of the keys (default: `documents`, for S = T). `scale` is K^(-1/2) by default. `sink_logits`
    `[H]` is one more logit with no value in each head's denominator. Returns out `[B, T, H, V]` in q's type and, with
    `return_lse`, lse `[B, T, H]` in float32 (float64 for float64); both carry gradients to every input. A query that
    sees nothing has out 0 and lse −inf (or its sink logit). On CUDA "auto" takes flash-attn where it is installed, else
    cuDNN or torch's flash attention, and the Triton kernels for what these do not serve; "library" takes them or
    raises. Raises ValueError for shapes that do not fit and for a backend that cannot run.

    Dao et al., 2022, "FlashAttention", arXiv 2205.14135; grouped heads: Ainslie et al.,
    2023, arXiv 2305.13245; sink logits: Xiao et al., 2023, arXiv 2309.17453.
    """
    check_inputs(q, k, v, sink_logits)
    mask = Mask() if mask is None else mask
    if documents is None:
        documents = Documents.whole(q.shape[0], q.shape[1])
    if key_documents is None:
        key_documents = documents
    for name, held, x in (("documents", documents, q), ("key_documents", key_documents, k)):
        if (held.batch, held.length) != tuple(x.shape[:2]):
            raise ValueError(
                f"{name} must describe {x.shape[0]} rows of {x.shape[1]} tokens; got {held.batch} of {held.length}. "
                "Pass documents for the queries, and key_documents where keys are other tokens than the queries"
            )
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    out, lse = _SoftmaxAttention.apply(  # type: ignore[misc]
        q, k, v, sink_logits, mask.tile(documents, key_documents), scale, backend
    )
    return (out, lse) if return_lse else out


class _SoftmaxAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sink_logits: Tensor | None,
        tile: Tile | None,
        scale: float,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        out, lse = attend(q, k, v, tile=tile, scale=scale, backend=backend)
        if sink_logits is not None:
            out, lse = apply_sink(out, lse, sink_logits)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, sink_logits, out, lse)
        ctx.tile, ctx.scale, ctx.backend = tile, scale, backend
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, sink_logits, out, lse = ctx.saved_tensors
        dout = torch.zeros_like(out) if dout is None else dout
        dq, dk, dv = attend_backward(
            dout, q, k, v, out, lse, tile=ctx.tile, scale=ctx.scale, dlse=dlse, backend=ctx.backend
        )
        dsink = None
        if sink_logits is not None and ctx.needs_input_grad[3]:
            dsink = sink_backward(dout, out, lse, sink_logits, dlse)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dsink, None, None, None


def check_inputs(q: Tensor, k: Tensor, v: Tensor, sink_logits: Tensor | None = None) -> None:
    """Raises ValueError unless q `[B, T, H, K]`, k `[B, S, G, K]`, v `[B, S, G, V]` and sink_logits `[H]` fit."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4 or not x.is_floating_point():
            raise ValueError(
                f"{name} must be floating point of shape [batch, tokens, heads, dim]; got {x.dtype} {tuple(x.shape)}"
            )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must have one dtype; got {q.dtype}, {k.dtype} and {v.dtype}. Cast them alike")
    if k.shape[:3] != v.shape[:3] or k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise ValueError(
            "k must be [B, S, G, K] and v [B, S, G, V] for q [B, T, H, K]; "
            f"got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        )
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(f"key/value heads must divide the query heads ({q.shape[2]}); got {k.shape[2]}")
    if sink_logits is not None and tuple(sink_logits.shape) != (q.shape[2],):
        raise ValueError(f"sink_logits must be one for each of {q.shape[2]} heads; got {tuple(sink_logits.shape)}")


@torch.no_grad()
def attend(
    q: Tensor, k: Tensor, v: Tensor, *, tile: Tile | None, scale: float, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Attention over the keys of one tile: out `[B, T, H, V]` and lse `[B, T, H]`, float32 (float64 for float64).

    Queries that see nothing in the tile have out 0 and lse −inf, the neutral element of `merge`; `tile=None` is a tile
    in which no query sees anything. No gradient flows through the results.
    """
    return _implementation(backend, q, k, v, tile).attend(q, k, v, tile=tile, scale=scale)


@torch.no_grad()
def attend_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    tile: Tile | None,
    scale: float,
    dlse: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of one tile, given the final (out, lse), merged over all tiles and with the sink applied.

        p_ij = exp(s_ij - lse_i);  ds_ij = p_ij (dout_i . v_j - dout_i . out_i + dlse_i)

    Float32 (float64 for float64). `dlse` `[B, T, H]` is the gradient of lse. The gradients of tiles add up. The same
    inputs give the same bits at every run, from libraries too where torch.use_deterministic_algorithms is on. Libraries
    know no `dlse`: with one, "library" is the Triton kernels.
    """
    if backend == "library" and dlse is not None:
        backend = "auto"
    run = _implementation(backend, q, k, v, tile, has_dlse=dlse is not None)
    if run is library:
        return library.attend_backward(dout, q, k, v, out, lse, tile=tile, scale=scale)
    return run.attend_backward(dout, q, k, v, out, lse, tile=tile, scale=scale, dlse=dlse)


def _implementation(
    backend: str, q: Tensor, k: Tensor, v: Tensor, tile: Tile | None, *, has_dlse: bool = False
) -> ModuleType:
    """The module that runs a tile. Raises ValueError where the backend asked for by name cannot."""
    if backend == "library" or (backend == "auto" and q.device.type == "cuda" and not has_dlse):
        refusal = None if tile is None else library.refusal(q, k, v, tile)
        if refusal is None:
            return library
        if backend == "library":
            raise ValueError(
                f"backend must be one that can run; got 'library': {refusal}. Use 'auto', or 'triton' on CUDA"
            )
    chosen = resolve("softmax_attention", backend, q.device, q.dtype)
    if chosen == "triton":
        from . import triton as kernels

        return kernels
    return chunked if chosen == "chunked" else reference


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the keys of a and b together, from that over each; −inf in lse means no keys."""
    weight = chunked.merge_weight(lse_a, lse_b).unsqueeze(-1)
    return torch.lerp(out_a, out_b, weight), torch.logaddexp(lse_a, lse_b)


def apply_sink(out: Tensor, lse: Tensor, sink_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Adds a logit without a value, `[H]`, to each head's denominator; once, after the last merge."""
    sink = sink_logits.to(lse.dtype)
    return out * torch.sigmoid(lse - sink).unsqueeze(-1), torch.logaddexp(lse, sink.expand_as(lse))


def sink_backward(dout: Tensor, out: Tensor, lse: Tensor, sink_logits: Tensor, dlse: Tensor | None = None) -> Tensor:
    """Gradient of sink_logits, `[H]` in its type, given (out, lse) with the sink applied.

    dsink = sum over rows and tokens of exp(sink − lse) (dlse − dout · out).
    """
    through = -(dout.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
    if dlse is not None:
        through = through + dlse
    share = torch.exp(sink_logits.to(lse.dtype) - lse)
    return (share * through).sum((0, 1)).to(sink_logits.dtype)


def flops(work: Tile | int, *, heads: int, key_dim: int, value_dim: int) -> int:
    """Forward FLOPs of the visible pairs of `work` (a tile, or their number); a backward does 2.5 times as many."""
    pairs = work.pairs if isinstance(work, Tile) else work
    return 2 * pairs * heads * (key_dim + value_dim)


def state_bytes(
    tokens: int, *, kv_heads: int, key_dim: int, value_dim: int, mask: Mask | None = None, element_bytes: int = 2
) -> int:
    """Bytes of keys and values that decoding keeps for one row after `tokens` tokens; a window bounds them."""
    if mask is not None and mask.window is not None:
        tokens = min(tokens, mask.sink_tokens + mask.window - 1)
    return tokens * kv_heads * (key_dim + value_dim) * element_bytes


def bytes_sent(tokens: int, *, kv_heads: int, key_dim: int, value_dim: int, ranks: int, element_bytes: int = 2) -> int:
    """Bytes that a rank of a ring sends in forward: P − 1 blocks of the keys and values of `tokens` tokens.

    With a causal mask or a window it is less: a block that nobody further along the ring sees goes no further.
    """
    return (ranks - 1) * tokens * kv_heads * (key_dim + value_dim) * element_bytes
