"""Softmax attention: the public op, and the parts from which `longreach.parallel` makes it sequence-parallel."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from ..attend import Attend, Gradient, OnOneDevice, check_documents, merge
from ..dispatch import asked, best, resolve
from ..documents import Documents
from ..masks import Mask, Pattern, Tile
from ..masks.pattern import Intervals
from ..masks.plain_bands import Order, with_plain_bands
from ..operation import run
from ..plain import made_of
from . import chunked, library, reference


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Pattern | None = None,
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
    causal, `Mask()`, by default. `documents` are those of the queries (default: a row is one document), `key_documents`
    those of the keys (default: `documents`, for S = T). `scale` is K^(-1/2) by default. `sink_logits` `[H]` is one more
    logit with no value in each head's denominator. Returns out `[B, T, H, V]` in q's type and, with `return_lse`, lse
    `[B, T, H]` in float32 (float64 for float64); both carry gradients to every input. A query that sees no key has out
    0 and lse −inf (or its sink logit). On CUDA "auto" uses flash-attn if it is installed, else cuDNN or torch's flash
    attention, and the Triton kernels where none of these can run; "library" uses one of these or raises. Raises
    ValueError for shapes that do not fit and for a backend that cannot run.

    Dao et al., 2022, "FlashAttention", arXiv 2205.14135; grouped heads: Ainslie et al.,
    2023, arXiv 2305.13245; sink logits: Xiao et al., 2023, arXiv 2309.17453.
    """
    op = SoftmaxAttend(Mask() if mask is None else mask, q.shape[-1] ** -0.5 if scale is None else float(scale))
    inputs = SoftmaxInputs(q, k, v, sink_logits)
    op.check(inputs)
    if documents is None:
        documents = Documents.whole(q.shape[0], q.shape[1])
    if key_documents is None:
        key_documents = documents
    check_documents(documents, key_documents, q, k)
    out, lse = run(OnOneDevice(op), inputs, (op.tile(documents, key_documents), backend))
    return (out, lse) if return_lse else out


class SoftmaxInputs(NamedTuple):
    """q `[B, T, H, K]`, k `[B, S, G, K]`, v `[B, S, G, V]`, sink_logits `[H]`."""

    q: Tensor
    k: Tensor
    v: Tensor
    sink_logits: Tensor | None = None


@dataclass(frozen=True)
class SoftmaxAttend(Attend):
    """The op as `longreach.kernels.attend` describes it. `mask` is a pattern or the `settings` of one."""

    name, record = "softmax_attention", SoftmaxInputs

    mask: Pattern
    scale: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "mask", made_of(self.mask))

    def check(self, inputs: SoftmaxInputs) -> None:
        check_inputs(inputs.q, inputs.k, inputs.v, inputs.sink_logits)

    def tile(self, queries: Documents, keys: Documents) -> Tile | None:
        return self.mask.tile(queries, keys)

    def reached(self, parts: Documents, number: int) -> Tensor:
        return self.mask.reached(parts, number)

    def kept(self, length: int) -> Intervals:
        return self.mask.kept(length)

    def attend(
        self, inputs: SoftmaxInputs, received: tuple[Tensor, ...], tile: Tile, backend: str
    ) -> tuple[Tensor, Tensor]:
        k, v = received
        merged: tuple[Tensor, Tensor] | None = None
        for part in with_plain_bands(tile, k.device):
            tensors = _in_order(inputs.q, part.queries), _in_order(k, part.keys), _in_order(v, part.keys)
            out, lse = _implementation(backend, *tensors, part.tile).attend(*tensors, tile=part.tile, scale=self.scale)
            if part.queries is not None:
                out, lse = part.queries.back(out), part.queries.back(lse, float("-inf"))
            merged = (out, lse) if merged is None else merge(*merged, out, lse)
        assert merged is not None  # a tile has visible pairs
        return merged

    def attend_backward(
        self, gradient: Gradient, inputs: SoftmaxInputs, received: tuple[Tensor, ...], tile: Tile, backend: str
    ) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        k, v = received
        dq, *travelled = attend_backward(gradient, inputs.q, k, v, tile=tile, scale=self.scale, backend=backend)
        return {"q": dq}, tuple(travelled)

    def finish(self, out: Tensor, lse: Tensor, inputs: SoftmaxInputs) -> tuple[Tensor, Tensor]:
        return (out, lse) if inputs.sink_logits is None else apply_sink(out, lse, inputs.sink_logits)

    def finish_backward(self, gradient: Gradient, inputs: SoftmaxInputs) -> dict[str, Tensor]:
        return {} if inputs.sink_logits is None else {"sink_logits": sink_backward(gradient, inputs.sink_logits)}


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
    q: Tensor, k: Tensor, v: Tensor, *, tile: Tile, scale: float, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Attention over the keys of one tile: out `[B, T, H, V]` and lse `[B, T, H]`, float32 (float64 for float64).

    Queries that see no key of the tile have out 0 and lse −inf, the neutral element of `merge`. No gradient flows
    through the results.
    """
    return SoftmaxAttend(tile.mask, scale).attend(SoftmaxInputs(q, k, v), (k, v), tile, backend)


@torch.no_grad()
def attend_backward(
    gradient: Gradient, q: Tensor, k: Tensor, v: Tensor, *, tile: Tile, scale: float, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of one tile, float32 (float64 for float64); the gradients of tiles add up.

        p_ij = exp(s_ij - lse_i);  ds_ij = p_ij (dout_i . v_j - dout_i . out_i + dlse_i)

    The same inputs give the same bits at every run, from libraries too where torch.use_deterministic_algorithms is on.
    Libraries take no gradient of lse: where there is one, "library" means the Triton kernels.
    """
    total: tuple[Tensor, ...] | None = None
    for part in with_plain_bands(tile, q.device):
        inputs = _in_order(q, part.queries), _in_order(k, part.keys), _in_order(v, part.keys)
        dlse = None if gradient.dlse is None else _in_order(gradient.dlse, part.queries)
        of_part = Gradient(*(_in_order(x, part.queries) for x in gradient[:3]), dlse)  # type: ignore[arg-type]
        module = _implementation(backend, *inputs, part.tile, has_dlse=gradient.dlse is not None)
        gradients = module.attend_backward(of_part, *inputs, tile=part.tile, scale=scale)
        if part.queries is not None and part.keys is not None:
            orders = part.queries, part.keys, part.keys
            gradients = tuple(order.back(x) for order, x in zip(orders, gradients, strict=True))
        total = gradients if total is None else tuple(a + b for a, b in zip(total, gradients, strict=True))
    assert total is not None
    return total[0], total[1], total[2]


def _in_order(x: Tensor, order: Order | None) -> Tensor:
    return x if order is None else order.take(x)


def _implementation(backend: str, q: Tensor, k: Tensor, v: Tensor, tile: Tile, *, has_dlse: bool = False) -> ModuleType:
    """The module that runs a tile. Raises ValueError if a backend chosen by name cannot."""
    backend, why = asked("softmax_attention", backend), None
    if backend == "library" or (backend == "auto" and q.device.type == "cuda"):
        refusal = "there is a gradient of lse, which they do not take" if has_dlse else library.refusal(q, k, v, tile)
        if refusal is None:
            return library
        if backend == "library" and not has_dlse:
            raise ValueError(
                f"backend must be one that can run; got 'library': {refusal}. Use 'auto', or 'triton' on CUDA"
            )
        backend, why = best(q.device, q.dtype), f"not by a library: {refusal}"
    chosen = resolve("softmax_attention", backend, q.device, q.dtype, why=why)
    if chosen == "triton":
        from . import triton as kernels

        return kernels
    return chunked if chosen == "chunked" else reference


def apply_sink(out: Tensor, lse: Tensor, sink_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Adds a logit without a value, `[H]`, to each head's denominator, after the last merge."""
    sink = sink_logits.to(lse.dtype)
    return out * torch.sigmoid(lse - sink).unsqueeze(-1), torch.logaddexp(lse, sink.expand_as(lse))


def sink_backward(gradient: Gradient, sink_logits: Tensor) -> Tensor:
    """Gradient of sink_logits, `[H]` in its type: Σ exp(sink − lse) (dlse − dout · out) over rows and tokens."""
    lse = gradient.lse
    share = torch.exp(sink_logits.to(lse.dtype) - lse)
    return (-share * gradient.delta(lse.dtype)).sum((0, 1)).to(sink_logits.dtype)


def flops(work: Tile | int, *, heads: int, key_dim: int, value_dim: int) -> int:
    """Forward FLOPs of the visible pairs of `work` (a tile, or their number); a backward does 2.5 times as many."""
    pairs = work.pairs if isinstance(work, Tile) else work
    return 2 * pairs * heads * (key_dim + value_dim)


def state_bytes(
    tokens: int, *, kv_heads: int, key_dim: int, value_dim: int, mask: Pattern | None = None, element_bytes: int = 2
) -> int:
    """Bytes of keys and values that decoding keeps for one row after `tokens` tokens; a window bounds them."""
    if mask is not None:
        tokens = sum(stop - start for start, stop in mask.kept(tokens))
    return tokens * kv_heads * (key_dim + value_dim) * element_bytes


def bytes_sent(tokens: int, *, kv_heads: int, key_dim: int, value_dim: int, ranks: int, element_bytes: int = 2) -> int:
    """Bytes that a rank of a ring sends in forward: P − 1 blocks of the keys and values of `tokens` tokens.

    With a causal mask or a window it is less: a block travels only to the last rank that sees it.
    """
    return (ranks - 1) * tokens * kv_heads * (key_dim + value_dim) * element_bytes
