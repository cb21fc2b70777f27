"""Softmax attention by the kernels of libraries on CUDA: flash-attn 3 or 2 where installed, else those inside torch.

A tile is cut into calls of sequences that lie one after the other, as libraries take packed rows, and the calls merge
by log-sum-exp. These routines change their names and meanings between versions. So no version is checked: a provider
is used for a kind of problem after it has agreed with the reference on a small one.

Libraries add up gradients in the order of arrival, so that the last bits may differ from run to run, unless
torch.use_deterministic_algorithms is on (`trainer.deterministic`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from ..attend import Gradient, merge_weight
from ..dispatch import announce
from ..documents import Documents, expanded
from ..masks import Mask, Tile
from ..masks.calls import Call, plan
from . import reference

logger = logging.getLogger("longreach")

SHORTEST = 64  # spans that cuDNN is given: it refuses those of one token, with an error that breaks its next call too
MAX_CALLS = 8  # with more of them a tile spends its time on merging


class Problem(NamedTuple):
    """A call on its own tokens: q `[N, H, K]`, k `[M, G, K]`, v `[M, G, V]`, spans one after the other."""

    q: Tensor
    k: Tensor
    v: Tensor
    call: Call
    scale: float
    offsets: tuple[Tensor, Tensor]  # int32 starts of the spans' queries and keys, and their ends

    def longest(self) -> tuple[int, int]:
        n, m = self.call.lengths
        return max(n), max(m)

    def batch(self, x: Tensor) -> Tensor:
        """`[N, heads, dim]` of a dense call to `[spans, heads, tokens, dim]`."""
        return x.unflatten(0, (len(self.call.spans), -1)).transpose(1, 2)


Gradients = tuple[Tensor, Tensor, Tensor]


class Provider(NamedTuple):
    """One library: whether it takes a call, its forward to `(out [N, H, V], lse [N, H])`, and its backward."""

    name: str
    takes: Callable[[Call, torch.device], bool]
    forward: Callable[[Problem], tuple[Tensor, Tensor]]
    backward: Callable[[Problem, Tensor, Tensor, Tensor], Gradients]


def _flash_limits(call: Call) -> dict[str, int | bool]:
    return {"causal": call.kind == "causal", "window_size_left": call.left, "window_size_right": call.right}


def _flash_attn_3_arguments(at: Problem) -> dict[str, object]:
    borders = dict(zip(("cu_seqlens_q", "cu_seqlens_k"), at.offsets, strict=True))
    longest = dict(zip(("max_seqlen_q", "max_seqlen_k"), at.longest(), strict=True))
    limits = {"window_size_left": at.call.left, "window_size_right": at.call.right}
    return {**borders, **longest, **limits, "softmax_scale": at.scale}


def _flash_attn_3_forward(at: Problem) -> tuple[Tensor, Tensor]:
    import flash_attn_interface as library  # type: ignore[import-not-found]

    causal = at.call.kind == "causal"
    out, lse, *_ = library._flash_attn_forward(at.q, at.k, at.v, causal=causal, **_flash_attn_3_arguments(at))
    return out, lse.T


def _flash_attn_3_backward(at: Problem, dout: Tensor, out: Tensor, lse: Tensor) -> Gradients:
    import flash_attn_interface as library  # type: ignore[import-not-found]

    dq, dk, dv = (torch.empty_like(x) for x in (at.q, at.k, at.v))
    library._flash_attn_backward(
        dout, at.q, at.k, at.v, out, lse.T.contiguous(), dq=dq, dk=dk, dv=dv, is_causal=at.call.kind == "causal",
        deterministic=torch.are_deterministic_algorithms_enabled(), **_flash_attn_3_arguments(at),
    )  # fmt: skip
    return dq, dk, dv


def _flash_attn_forward(at: Problem) -> tuple[Tensor, Tensor]:
    from flash_attn import flash_attn_interface as library  # type: ignore[import-not-found]

    out, lse, *_ = library._flash_attn_varlen_forward(
        at.q, at.k, at.v, *at.offsets, *at.longest(), dropout_p=0.0, softmax_scale=at.scale, **_flash_limits(at.call)
    )
    return out, lse.T


def _flash_attn_backward(at: Problem, dout: Tensor, out: Tensor, lse: Tensor) -> Gradients:
    from flash_attn import flash_attn_interface as library  # type: ignore[import-not-found]

    dq, dk, dv = (torch.empty_like(x) for x in (at.q, at.k, at.v))
    library._flash_attn_varlen_backward(
        dout, at.q, at.k, at.v, out, lse.T.contiguous(), dq, dk, dv, *at.offsets, *at.longest(), dropout_p=0.0,
        softmax_scale=at.scale, softcap=0.0, alibi_slopes=None,
        deterministic=torch.are_deterministic_algorithms_enabled(), **_flash_limits(at.call),
    )  # fmt: skip
    return dq, dk, dv


def _cudnn_forward(at: Problem) -> tuple[Tensor, Tensor]:
    q, k, v = (at.batch(x) for x in (at.q, at.k, at.v))
    causal = at.call.kind == "causal"
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, causal, False, scale=at.scale
    )
    lse = lse.reshape(q.shape[:3])
    return out.transpose(1, 2).flatten(0, 1), lse.transpose(1, 2).flatten(0, 1)


def _cudnn_backward(at: Problem, dout: Tensor, out: Tensor, lse: Tensor) -> Gradients:
    q, k, v, dout, out = (at.batch(x) for x in (at.q, at.k, at.v, dout, out))
    lse = at.batch(lse.unsqueeze(-1)).contiguous()
    seed = torch.zeros((), dtype=torch.int64, device=q.device)  # for dropout, which is not used
    gradients = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        dout, q, k, v, out, lse, seed, seed, None, None, None, q.shape[2], k.shape[2], 0.0, at.call.kind == "causal",
        scale=at.scale,
    )  # fmt: skip
    dq, dk, dv = (x.transpose(1, 2).flatten(0, 1) for x in gradients)
    return dq, dk, dv


def _torch_limits(call: Call) -> dict[str, int]:
    return {} if call.kind != "band" else {"window_size_left": call.left, "window_size_right": call.right}


def _torch_forward(at: Problem) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        at.q, at.k, at.v, *at.offsets, *at.longest(), 0.0, at.call.kind == "causal", False, scale=at.scale,
        **_torch_limits(at.call),
    )  # fmt: skip
    return out, lse.T


def _torch_backward(at: Problem, dout: Tensor, out: Tensor, lse: Tensor) -> Gradients:
    state = torch.zeros(2, dtype=torch.uint64, device=at.q.device)  # for dropout, which is not used
    with _insisting():
        return torch.ops.aten._flash_attention_backward(
            dout, at.q, at.k, at.v, out, lse.T.contiguous(), *at.offsets, *at.longest(), 0.0, at.call.kind == "causal",
            state, state[:1], scale=at.scale, **_torch_limits(at.call),
        )  # fmt: skip


@contextmanager
def _insisting() -> Iterator[None]:
    """Deterministic algorithms are demanded where they are on: asked for with warnings alone, torch takes others."""
    if not (torch.are_deterministic_algorithms_enabled() and torch.is_deterministic_algorithms_warn_only_enabled()):
        yield
        return
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(True, warn_only=True)


def _on_cuda(call: Call, device: torch.device) -> bool:
    return device.type == "cuda"


def _on_hopper(call: Call, device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def _for_cudnn(call: Call, device: torch.device) -> bool:
    # Its backward is not deterministic, and torch refuses it then.
    if device.type != "cuda" or not call.is_dense or torch.are_deterministic_algorithms_enabled():
        return False
    return min(map(min, call.lengths)) >= SHORTEST


PROVIDERS = [
    Provider("flash-attn 3", _on_hopper, _flash_attn_3_forward, _flash_attn_3_backward),
    Provider("flash-attn", _on_cuda, _flash_attn_forward, _flash_attn_backward),
    Provider("cuDNN", _for_cudnn, _cudnn_forward, _cudnn_backward),
    Provider("torch's flash attention", _on_cuda, _torch_forward, _torch_backward),
]

_tested: dict[tuple[object, ...], bool] = {}


def provider_for(call: Call, q: Tensor, k: Tensor, v: Tensor) -> Provider | None:
    """The first provider that takes the call and was right on a small problem of its kind; None where there is none."""
    for provider in PROVIDERS:
        if provider.takes(call, q.device) and _agrees(provider, call, q, k, v):
            return provider
    return None


def refusal(q: Tensor, k: Tensor, v: Tensor, tile: Tile) -> str | None:
    """Why no library can serve the tile, or None where one can."""
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"libraries take float16 and bfloat16, not {q.dtype}"
    calls = _plan(tile)
    if len(calls) > MAX_CALLS:
        return f"a tile takes more than {MAX_CALLS} calls"
    for call in calls:
        if provider_for(call, q, k, v) is None:
            return (
                f"no library is installed that serves {call.kind} attention on {q.device.type} in {q.dtype} with "
                f"{q.shape[2]} heads on {k.shape[2]}, key dim {q.shape[3]} and value dim {v.shape[3]}"
            )
    return None


def _plan(tile: Tile) -> tuple[Call, ...]:
    return tile.derive(plan)


def _indices(tile: Tile, number: int, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """Where a call's queries and keys lie in the flattened `[B·T]` and `[B·S]`; None where they are all, in order."""
    return tile.on(device, _both_indices, number)


def _offsets(tile: Tile, number: int) -> tuple[Tensor, Tensor]:
    queries, keys = (torch.tensor([0, *x]).cumsum(0).to(torch.int32) for x in _plan(tile)[number].lengths)
    return queries, keys


def _both_indices(tile: Tile, number: int) -> tuple[Tensor | None, Tensor | None]:
    spans = _plan(tile)[number].spans
    queries, keys = (
        _index([(s.row * tokens.length + first, s.row * tokens.length + stop) for s, (first, stop) in side], tokens)
        for tokens, side in (
            (tile.queries, [(s, s.queries) for s in spans]),
            (tile.keys, [(s, s.keys) for s in spans]),
        )
    )
    return queries, keys


def _index(ranges: Sequence[tuple[int, int]], tokens: Documents) -> Tensor | None:
    first, stop = torch.tensor(ranges).unbind(1)
    owner, place = expanded(stop - first)
    index = first[owner] + place
    every = torch.arange(tokens.batch * tokens.length)
    return None if torch.equal(index, every) else index


def _is_one_call(q: Tensor, k: Tensor, tile: Tile) -> bool:
    """Whether a single call covers all queries and keys in their order, so that no gather or merge is needed."""
    return len(_plan(tile)) == 1 and all(index is None for index in _indices(tile, 0, q.device))


def _take(x: Tensor, index: Tensor | None) -> Tensor:
    flat = x.flatten(0, 1)
    return flat.contiguous() if index is None else flat.index_select(0, index)


def _problems(
    q: Tensor, k: Tensor, v: Tensor, tile: Tile, scale: float
) -> Iterator[tuple[Problem, Tensor | None, Tensor | None]]:
    for number, call in enumerate(_plan(tile)):
        queries, keys = _indices(tile, number, q.device)
        offsets = tile.on(q.device, _offsets, number)
        yield Problem(_take(q, queries), _take(k, keys), _take(v, keys), call, scale, offsets), queries, keys


def _provider(problem: Problem, provider: Provider | None) -> Provider:
    chosen = provider or provider_for(problem.call, problem.q[None], problem.k[None], problem.v[None])
    if chosen is None:
        raise ValueError("backend must not be 'library' for a tile that no library serves; ask `refusal` first")
    return chosen


def attend(
    q: Tensor, k: Tensor, v: Tensor, *, tile: Tile, scale: float, provider: Provider | None = None
) -> tuple[Tensor, Tensor]:
    """See `longreach.kernels.softmax.attend`. Each call's out is rounded to q's type; they merge in float32."""
    if _is_one_call(q, k, tile):
        problem, *_ = next(_problems(q, k, v, tile, scale))
        part, level = _provider(problem, provider).forward(problem)
        return part.float().unflatten(0, q.shape[:2]), level.float().contiguous().unflatten(0, q.shape[:2])
    out = q.new_zeros((*q.shape[:3], v.shape[-1]), dtype=torch.float32)
    lse = q.new_full(q.shape[:3], float("-inf"), dtype=torch.float32)
    rows, levels = out.flatten(0, 1), lse.flatten(0, 1)
    for number, (problem, queries, _) in enumerate(_problems(q, k, v, tile, scale)):
        part, level = _provider(problem, provider).forward(problem)
        part, level = part.float(), level.float()
        if number:
            before, level_before = _take(out, queries), _take(lse, queries)
            part = before.lerp(part, merge_weight(level_before, level).unsqueeze(-1))
            level = torch.logaddexp(level_before, level)
        _put(rows, queries, part)
        _put(levels, queries, level)
    return out, lse


def attend_backward(
    gradient: Gradient, q: Tensor, k: Tensor, v: Tensor, *, tile: Tile, scale: float, provider: Provider | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """See `longreach.kernels.softmax.attend_backward`; libraries take no gradient of lse, so there must be none."""
    dout, out = gradient.dout.to(q.dtype), gradient.out.to(q.dtype)
    if _is_one_call(q, k, tile):
        problem, *_ = next(_problems(q, k, v, tile, scale))
        incoming = (dout.flatten(0, 1), out.flatten(0, 1), gradient.lse.float().flatten(0, 1))
        gradients = _provider(problem, provider).backward(problem, *incoming)
        dq, dk, dv = (part.float().view(x.shape) for part, x in zip(gradients, (q, k, v), strict=True))
        return dq, dk, dv
    sums = [torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (q, k, v)]
    for number, (problem, queries, keys) in enumerate(_problems(q, k, v, tile, scale)):
        incoming = (_take(dout, queries), _take(out, queries), _take(gradient.lse, queries).float())
        gradients = _provider(problem, provider).backward(problem, *incoming)
        for total, part, index in zip(sums, gradients, (queries, keys, keys), strict=True):
            part = part.float()
            _put(total.flatten(0, 1), index, part + _take(total, index) if number else part)
    return sums[0], sums[1], sums[2]


def _put(rows: Tensor, index: Tensor | None, values: Tensor) -> None:
    if index is None:
        rows.copy_(values)
    else:
        rows.index_copy_(0, index, values)


def _agrees(provider: Provider, call: Call, q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether a provider gives the reference's results on a small problem like this one; tested once per process."""
    group = q.shape[2] // k.shape[2]
    key = (provider.name, call.kind, str(q.device), q.dtype, group, q.shape[3], v.shape[3])
    if key not in _tested:
        try:
            error = _error(provider, call.kind, q, group, v.shape[3])
        except (ImportError, AttributeError, TypeError, ValueError, RuntimeError, NotImplementedError) as reason:
            logger.info("softmax_attention: %s not used for %s attention: %s", provider.name, call.kind, reason)
            error = float("inf")
        _tested[key] = error < 0.02
        if _tested[key]:
            announce("softmax_attention", q.device.type, provider.name, f"for {call.kind} attention")
        elif error < float("inf"):
            logger.warning("softmax_attention: %s is off by %.2g and not used", provider.name, error)
    return _tested[key]


def _error(provider: Provider, kind: str, example: Tensor, group: int, value_dim: int) -> float:
    """The largest relative error over out, lse and gradients, where the gradients are those after a merge."""
    documents = Documents.from_lengths([[80, 80]])
    mask = {"full": Mask(causal=False), "causal": Mask(), "band": Mask(window=33)}[kind]
    tile = mask.tile(documents, documents)
    assert tile is not None
    generator = torch.Generator().manual_seed(0)

    def draw(heads: int, dim: int) -> Tensor:
        return torch.randn(1, 160, heads, dim, generator=generator).to(example.device, example.dtype)

    dim = example.shape[3]
    q, k, v, dout = draw(group, dim), draw(1, dim), draw(1, value_dim), draw(group, value_dim)
    out, lse = reference.attend(q, k, v, tile=tile, scale=dim**-0.5)
    # As if three more such tiles, with values of 0, were merged in.
    gradient = Gradient(dout, out / 4, lse + 2 * torch.log(torch.tensor(2.0)))
    results = (
        *attend(q, k, v, tile=tile, scale=dim**-0.5, provider=provider),
        *attend_backward(gradient, q, k, v, tile=tile, scale=dim**-0.5, provider=provider),
    )
    expected = (out, lse, *reference.attend_backward(gradient, q, k, v, tile=tile, scale=dim**-0.5))
    return max(float((a - b).norm() / b.norm()) for a, b in zip(results, expected, strict=True))
