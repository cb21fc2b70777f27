"""Softmax attention: the public op, and the parts from which `longreach.parallel` makes it sequence-parallel."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..attend import Gradient, MaskedAttend, OnOneDevice, documents_of, merge
from ..dispatch import asked, best, resolve
from ..documents import Documents
from ..masks import Mask, Pattern, Tile
from ..masks.plain_bands import Order, Part, with_plain_bands
from ..operation import run
from ..plain import made_of
from . import chunked, library, reference

NO_DLSE = "there is a gradient of lse, which they do not take"


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Pattern | None = None,
    documents: Documents | None = None,
    key_documents: Documents | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    levels: Tensor | None = None,
    key_levels: Tensor | None = None,
    sink_logits: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention over the keys that `mask` shows to each query of its document.

        s_ij = scale * q_i . k_j;  lse_i = log(sum_j exp(s_ij) + exp(sink_logit));  o_i = sum_j exp(s_ij - lse_i) v_j
        with softcap c:  c tanh(s_ij / c) in place of s_ij;  with levels a of queries and b of keys:  + a_i - b_j

    q `[B, T, H, K]`, k `[B, S, G, K]`, v `[B, S, G, V]`, G dividing H (head h reads group h // (H/G)). v may have a
    divisor of G heads, which neighbouring heads of k share. `mask` is
    causal, `Mask()`, by default. `documents` are those of the queries (default: a row is one document), `key_documents`
    those of the keys (default: `documents`, for S = T). `scale` is K^(-1/2) by default. `levels` `[B, T, G or H]` and
    `key_levels` `[B, S, …]` (default: `levels`, for S = T) are float32, or float64 for float64: with the sums of
    the logarithms of forget gates as levels, a_i - b_j is what was forgotten between j and i. `sink_logits` `[H]` is
    one more logit with no value in each head's denominator. Returns out `[B, T, H, V]` in q's type and, with
    `return_lse`, lse `[B, T, H]` in float32 (float64 for float64); both carry gradients to every input. A query that
    sees no key has out 0 and lse −inf (or its sink logit). On CUDA "auto" uses flash-attn if it is installed, else
    cuDNN or torch's flash attention, and the Triton kernels where none of these can run; "library" uses one of these or
    raises. Libraries neither cap logits nor add levels. Raises ValueError for shapes that do not fit and for a backend
    that cannot run.

    Dao et al., 2022, "FlashAttention", arXiv 2205.14135; grouped heads: Ainslie et al.,
    2023, arXiv 2305.13245; sink logits: Xiao et al., 2023, arXiv 2309.17453; levels: Lin et al., 2025, arXiv
    2503.02130; soft capping: Gemma 2, arXiv 2408.00118.
    """
    settings = (
        Mask() if mask is None else mask,
        q.shape[-1] ** -0.5 if scale is None else float(scale),
        None if softcap is None else float(softcap),
    )
    if levels is None and key_levels is not None:
        raise ValueError("key_levels must come with levels of the queries; got key_levels alone. Pass both")
    op: SoftmaxAttend = SoftmaxAttend(*settings)
    inputs: Any = SoftmaxInputs(q, k, v, sink_logits)
    if levels is not None:
        op = LevelledAttend(*settings)
        inputs = LevelledInputs(q, k, v, levels, levels if key_levels is None else key_levels, sink_logits)
    op.check(inputs)
    documents, key_documents = documents_of(q, k, documents, key_documents)
    out, lse = run(OnOneDevice(op), inputs, (op.tile(documents, key_documents), backend))
    return (out, lse) if return_lse else out


class SoftmaxInputs(NamedTuple):
    """q `[B, T, H, K]`, k `[B, S, G, K]`, v `[B, S, G, V]`, sink_logits `[H]`."""

    q: Tensor
    k: Tensor
    v: Tensor
    sink_logits: Tensor | None = None


@dataclass(frozen=True)
class SoftmaxAttend(MaskedAttend):
    """The op as `longreach.kernels.attend` describes it. `mask` is a pattern or the `settings` of one."""

    name, record = "softmax_attention", SoftmaxInputs

    mask: Pattern
    scale: float
    softcap: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "mask", made_of(self.mask))
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"softcap must be more than 0; got {self.softcap}. Leave it out for logits without bounds")

    def check(self, inputs: Any) -> None:
        check_inputs(inputs.q, inputs.k, inputs.v, inputs.sink_logits, shared_values=True)
        refusal = self._without_libraries()
        if refusal is not None and asked("softmax_attention", "auto") == "library":  # of every rank, before any waits
            raise ValueError(f"kernels.softmax_attention must be one that can run; got 'library': {refusal}. Use auto")

    def attend(self, inputs: Any, received: tuple[Tensor, ...], tile: Tile, backend: str) -> tuple[Tensor, Tensor]:
        merged: tuple[Tensor, Tensor] | None = None
        for part in with_plain_bands(tile, inputs.q.device):
            tensors = self._tensors(inputs, received, part)
            q, k, v = tensors[:3]
            module = _implementation(backend, q, k, v, part.tile, refusal=self._without_libraries())
            out, lse = module.attend(q, k, v, tile=part.tile, **self._logits(tensors))
            if part.queries is not None:
                out, lse = part.queries.back(out), part.queries.back(lse, float("-inf"))
            merged = (out, lse) if merged is None else merge(*merged, out, lse)
        assert merged is not None  # a tile has visible pairs
        return merged

    def attend_backward(
        self, gradient: Gradient, inputs: Any, received: tuple[Tensor, ...], tile: Tile, backend: str
    ) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        total: tuple[Tensor, ...] | None = None
        refusal = self._without_libraries() or (None if gradient.dlse is None else NO_DLSE)
        for part in with_plain_bands(tile, inputs.q.device):
            tensors = self._tensors(inputs, received, part)
            dlse = None if gradient.dlse is None else _in_order(gradient.dlse, part.queries)
            of_part = Gradient(*(_in_order(x, part.queries) for x in gradient[:3]), dlse)  # type: ignore[arg-type]
            q, k, v = tensors[:3]
            module = _implementation(backend, q, k, v, part.tile, refusal=refusal)
            gradients = module.attend_backward(of_part, q, k, v, tile=part.tile, **self._logits(tensors))
            if part.queries is not None and part.keys is not None:
                orders = part.queries, *[part.keys] * len(received)
                gradients = tuple(order.back(x) for order, x in zip(orders, gradients, strict=True))
            total = gradients if total is None else tuple(a + b for a, b in zip(total, gradients, strict=True))
        assert total is not None
        dq, dk, dv, *of_levels = total
        if dv.shape[2] != (held := received[1].shape[2]):
            dv = dv.unflatten(2, (held, -1)).sum(3)
        return {"q": dq}, (dk, dv, *of_levels)

    def finish(self, out: Tensor, lse: Tensor, inputs: Any) -> tuple[Tensor, Tensor]:
        return (out, lse) if inputs.sink_logits is None else apply_sink(out, lse, inputs.sink_logits)

    def finish_backward(self, gradient: Gradient, inputs: Any) -> dict[str, Tensor]:
        return {} if inputs.sink_logits is None else {"sink_logits": sink_backward(gradient, inputs.sink_logits)}

    def of_queries(self, inputs: Any) -> tuple[Tensor, ...]:
        """What the logits take of each query."""
        return (inputs.q,)

    def _tensors(self, inputs: Any, received: tuple[Tensor, ...], part: Part) -> tuple[Tensor, ...]:
        """q, k and v in the part's order, and the levels of keys and of queries, if any.

        Values that heads of keys share are repeated here, after they have travelled.
        """
        q, *of_queries = (_in_order(x, part.queries) for x in self.of_queries(inputs))
        k, v, *of_keys = (_in_order(x, part.keys) for x in received)
        v = v if v.shape[2] == k.shape[2] else v.repeat_interleave(k.shape[2] // v.shape[2], dim=2)
        return q, k, v, *of_keys, *of_queries

    def _logits(self, tensors: tuple[Tensor, ...]) -> dict[str, Any]:
        """How a backend makes the logits: what it is not told leaves them as they are."""
        given: dict[str, Any] = {"scale": self.scale}
        if self.softcap is not None:
            given["softcap"] = self.softcap
        if len(tensors) > 3:
            given["levels"] = tensors[4], tensors[3]
        return given

    def _without_libraries(self) -> str | None:
        return None if self.softcap is None else "they are not used to cap logits"


class LevelledInputs(NamedTuple):
    """Those of `SoftmaxInputs`, and levels of queries `[B, T, G or H]` and of keys `[B, S, G or H]`."""

    q: Tensor
    k: Tensor
    v: Tensor
    levels: Tensor
    key_levels: Tensor
    sink_logits: Tensor | None = None


class LevelledAttend(SoftmaxAttend):
    """Softmax attention to whose logits level_i − level_j is added. The levels of keys travel in their own type.

    The level of a query moves all its logits alike. So it changes nothing but the log-sum-exp, and its gradient, the
    sum of those of the query's logits, is what a gradient of the log-sum-exp and sinks leave of it.
    """

    record = LevelledInputs
    travels = ("k", "v", "key_levels")

    def check(self, inputs: LevelledInputs) -> None:
        super().check(inputs)
        check_levels(*inputs[:5])

    def of_queries(self, inputs: LevelledInputs) -> tuple[Tensor, ...]:
        return inputs.q, inputs.levels

    def finish_backward(self, gradient: Gradient, inputs: LevelledInputs) -> dict[str, Tensor]:
        heads = gradient.lse.new_zeros(gradient.lse.shape)
        if gradient.dlse is not None:
            heads += gradient.dlse
        if inputs.sink_logits is not None:
            share = torch.exp(inputs.sink_logits.to(heads.dtype) - gradient.lse)
            heads += share * gradient.delta(heads.dtype)
        heads = heads.masked_fill(gradient.lse == float("-inf"), 0.0)
        levels = heads.unflatten(2, (inputs.levels.shape[2], -1)).sum(3)
        return super().finish_backward(gradient, inputs) | {"levels": levels}

    def _without_libraries(self) -> str | None:
        return "they add no levels to logits"


def check_inputs(
    q: Tensor, k: Tensor, v: Tensor, sink_logits: Tensor | None = None, *, shared_values: bool = False
) -> None:
    """Raises ValueError unless q `[B, T, H, K]`, k `[B, S, G, K]`, v `[B, S, G, V]` and sink_logits `[H]` fit.

    shared_values: v may have a divisor of G heads.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4 or not x.is_floating_point():
            raise ValueError(
                f"{name} must be floating point of shape [batch, tokens, heads, dim]; got {x.dtype} {tuple(x.shape)}"
            )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must have one dtype; got {q.dtype}, {k.dtype} and {v.dtype}. Cast them alike")
    heads = k.shape[2] % max(1, v.shape[2]) if shared_values else k.shape[2] != v.shape[2]
    if k.shape[:2] != v.shape[:2] or heads or k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise ValueError(
            "k must be [B, S, G, K] and v [B, S, G, V] for q [B, T, H, K]; "
            f"got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        )
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(f"key/value heads must divide the query heads ({q.shape[2]}); got {k.shape[2]}")
    if sink_logits is not None and tuple(sink_logits.shape) != (q.shape[2],):
        raise ValueError(f"sink_logits must be one for each of {q.shape[2]} heads; got {tuple(sink_logits.shape)}")


def check_levels(q: Tensor, k: Tensor, v: Tensor, levels: Tensor, key_levels: Tensor) -> None:
    """Raises ValueError unless levels `[B, T, G or H]` and key_levels `[B, S, as many]` fit q, k and v."""
    exact = torch.promote_types(q.dtype, torch.float32)
    for name, x, of in (("levels", levels, q), ("key_levels", key_levels, k)):
        if x.dtype != exact:
            raise ValueError(
                f"{name} must be {exact} for q of {q.dtype}; got {x.dtype}. Their differences are small beside them: "
                "compute them so from the first"
            )
        heads = [k.shape[2], q.shape[2]]
        if x.dim() != 3 or x.shape[:2] != of.shape[:2] or x.shape[2] not in heads:
            raise ValueError(
                f"{name} must be [{of.shape[0]}, {of.shape[1]}, {' or '.join(map(str, sorted(set(heads))))}], one per "
                f"token and head of keys or queries; got {list(x.shape)}"
            )
    if levels.shape[2] != key_levels.shape[2]:
        raise ValueError(
            f"key_levels must have the heads of levels, {levels.shape[2]}; got {key_levels.shape[2]}. Pass one of both"
        )


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
    op, inputs = SoftmaxAttend(tile.mask, scale), SoftmaxInputs(q, k, v)
    stay, (dk, dv) = op.attend_backward(gradient, inputs, (k, v), tile, backend)
    return stay["q"], dk, dv


def _in_order(x: Tensor, order: Order | None) -> Tensor:
    return x if order is None else order.take(x)


def _implementation(
    backend: str, q: Tensor, k: Tensor, v: Tensor, tile: Tile, *, refusal: str | None = None
) -> ModuleType:
    """The module that runs a tile. Raises ValueError if a backend chosen by name cannot.

    refusal: why no library may run it, if so.
    """
    backend, why = asked("softmax_attention", backend), None
    if backend == "library" or (backend == "auto" and q.device.type == "cuda"):
        refusal = library.refusal(q, k, v, tile) if refusal is None else refusal
        if refusal is None:
            return library
        if backend == "library" and refusal != NO_DLSE:
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
    tokens: int,
    *,
    kv_heads: int,
    key_dim: int,
    value_dim: int,
    levels: int = 0,
    mask: Pattern | None = None,
    element_bytes: int = 2,
) -> int:
    """Bytes of keys and values, and of `levels` levels per key, that decoding keeps for one row after `tokens` tokens;
    a window bounds them.
    """
    if mask is not None:
        tokens = sum(stop - start for start, stop in mask.kept(tokens))
    return tokens * _bytes_of_key(kv_heads, key_dim, value_dim, levels, element_bytes)


def bytes_sent(
    tokens: int,
    *,
    kv_heads: int,
    key_dim: int,
    value_dim: int,
    ranks: int,
    levels: int = 0,
    element_bytes: int = 2,
) -> int:
    """Bytes that a rank of a ring sends in forward: P − 1 blocks of the keys and values of `tokens` tokens, and of
    `levels` levels per key.

    With a causal mask or a window it is less: a block travels only to the last rank that sees it.
    """
    return (ranks - 1) * tokens * _bytes_of_key(kv_heads, key_dim, value_dim, levels, element_bytes)


def _bytes_of_key(kv_heads: int, key_dim: int, value_dim: int, levels: int, element_bytes: int) -> int:
    return kv_heads * (key_dim + value_dim) * element_bytes + levels * max(4, element_bytes)
