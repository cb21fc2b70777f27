"""Definitions: every op over keys, windows and taps written out document by document, for the truth.

They share nothing with `kernels` or `parallel` but the names of settings: no masks, no block or window tables, no
backward of their own. A packed row is cut into its documents, each is computed as if there were no other, and autograd
does the rest. Recurrences are not here: their references in `kernels` are the recurrence, token by token.

`lengths` holds the lengths of each row's documents; what follows them is padding, whose output is 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Lengths = list[list[int]]


def documents_of(lengths: Lengths) -> Iterator[tuple[int, int, int]]:
    """(row, first token, length) of every document; for padding alone one without tokens, which has a gradient."""
    if not any(lengths):
        yield 0, 0, 0
    for row, sizes in enumerate(lengths):
        start = 0
        for size in sizes:
            yield row, start, size
            start += size


def joined(x: Tensor, parts: list[tuple[int, int, Tensor]], value: float = 0.0) -> Tensor:
    """Parts (row, first token, values) in the places of `[B, T]`, `value` elsewhere."""
    rest = parts[0][2].shape[1:]
    rows = []
    for row in range(x.shape[0]):
        pieces, end = [], 0
        for at, start, values in parts:
            if at == row:
                pieces += [values.new_full((start - end, *rest), value), values]
                end = start + len(values)
        pieces.append(parts[0][2].new_full((x.shape[1] - end, *rest), value))
        rows.append(torch.cat(pieces))
    return torch.stack(rows)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor,
    scale: float | None,
    sink: Tensor | None,
    softcap: float | None = None,
    levels: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Of one document: q `[T, H, K]`, k `[S, G, K]`, v `[S, G, V]`, seen `[H or 1, T, S]`, levels `[T, G or H]`; out
    and lse `[T, H]`.
    """
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = factor * torch.einsum("thk,shk->hts", q, k)
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    if levels is not None:
        level = levels.repeat_interleave(q.shape[1] // levels.shape[1], dim=1).T
        scores = scores + (level[:, :, None] - level[:, None])
    scores = scores.masked_fill(~seen, -torch.inf)
    lse = scores.logsumexp(-1)
    if sink is not None:
        lse = torch.logaddexp(lse, sink[:, None])
    blind = lse.isneginf()
    weights = (scores - lse.masked_fill(blind, 0.0).unsqueeze(-1)).exp()
    return torch.einsum("hts,shv->thv", weights, v), lse.transpose(0, 1)


def _seen(size: int, mask: Any) -> Tensor:
    """bool `[T, S]` of one document."""
    i, j = torch.arange(size)[:, None], torch.arange(size)[None]
    if mask is None:
        return j <= i
    if hasattr(mask, "dilation"):
        return (j <= i) & ((i - j) % mask.dilation == 0) & (i - j < (mask.window or size))
    if hasattr(mask, "block"):
        return (j <= i) & (i // mask.block == j // mask.block)
    if not hasattr(mask, "causal"):  # a pattern of the user's: what it says of each pair
        return mask.visible(i.squeeze(1), j.squeeze(0))
    seen = j <= i if mask.causal else torch.ones(size, size, dtype=torch.bool)
    return seen if mask.window is None else seen & ((i - j < mask.window) | (j < mask.sink_tokens))


def exactly(*tensors: Tensor) -> list[Tensor]:
    return [x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors]


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    lengths: Lengths,
    mask: Any = None,
    scale: float | None = None,
    softcap: float | None = None,
    levels: Tensor | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    dtype = q.dtype
    q, k, v = exactly(q, k, v)
    parts = []
    for row, start, size in documents_of(lengths):
        here = slice(start, start + size)
        seen = _seen(size, mask).to(q.device)
        of_logits = scale, sink_logits, softcap, None if levels is None else levels[row, here]
        parts.append((row, start, _attend(q[row, here], k[row, here], v[row, here], seen, *of_logits)[0]))
    return joined(q, parts).to(dtype)


def latent_attention(
    q: Tensor,
    latent: Tensor,
    expansion: Tensor,
    *,
    lengths: Lengths,
    mask: Any = None,
    scale: float | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    heads, shared = q.shape[2], latent.shape[2] - expansion.shape[1]
    weights = expansion.to(latent.dtype).unflatten(0, (heads, -1))
    key, value = weights[:, : q.shape[3] - shared], weights[:, q.shape[3] - shared :]
    c, common = latent[..., shared:], latent[..., :shared].unsqueeze(2).expand(-1, -1, heads, -1)
    k = torch.cat([common, torch.einsum("btc,hkc->bthk", c, key)], dim=-1)
    v = torch.einsum("btc,hvc->bthv", c, value)
    return softmax_attention(q, k, v, lengths=lengths, mask=mask, scale=scale, sink_logits=sink_logits)


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    *,
    lengths: Lengths,
    block_size: int,
    query_block: int = 1,
    mask: Any = None,
    scale: float | None = None,
    dense_length: int = 0,
) -> Tensor:
    dtype = q.dtype
    q, k, v = exactly(q, k, v)
    parts = []
    for row, start, size, first in numbered(lengths, lambda n: -(-n // block_size)):
        here, places = slice(start, start + size), torch.arange(size, device=q.device)
        listed = blocks[row, (places + start) // query_block]  # [T, J, M]
        of_key = first + places // block_size
        chosen = (listed.unsqueeze(-1) == of_key).any(2).transpose(0, 1)  # [J, T, S]
        chosen = chosen | (places < dense_length)[None, :, None]
        chosen = chosen.repeat_interleave(q.shape[2] // chosen.shape[0], dim=0) & _seen(size, mask).to(q.device)
        parts.append((row, start, _attend(q[row, here], k[row, here], v[row, here], chosen, scale, None)[0]))
    return joined(q, parts).to(dtype)


def listed_latent_attention(
    q: Tensor, latent: Tensor, blocks: Tensor, *, lengths: Lengths, latent_rank: int, block_size: int, scale: float
) -> Tensor:
    k, v = latent.unsqueeze(2), latent[..., latent.shape[2] - latent_rank :].unsqueeze(2)
    return block_sparse_attention(q, k, v, blocks, lengths=lengths, block_size=block_size, scale=scale)


def compressed_attention(
    q: Tensor, k: Tensor, v: Tensor, *, lengths: Lengths, size: int, stride: int, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    dtype = q.dtype
    q, k, v = exactly(q, k, v)
    outs, sums = [], []
    for row, start, length, first in numbered(lengths, lambda n: windows_of(n, size, stride)):
        count = windows_of(length, size, stride)
        windows = slice(first, first + count)
        last = torch.arange(count, device=q.device) * stride + size - 1
        seen = last[None] <= torch.arange(length, device=q.device)[:, None]
        out, lse = _attend(q[row, start : start + length], k[row, windows], v[row, windows], seen, scale, None)
        outs.append((row, start, out))
        sums.append((row, start, lse))
    return joined(q, outs).to(dtype), joined(q, sums, -torch.inf).detach()


def window_means(x: Tensor, *, lengths: Lengths, size: int, stride: int | None = None) -> Tensor:
    stride = size if stride is None else stride
    (exact,) = exactly(x)
    return gather_windows(local_windows(exact, lengths=lengths, size=size, stride=stride).mean(2), length=x.shape[1],
                          size=size, stride=stride).to(x.dtype)  # fmt: skip


def local_windows(x: Tensor, *, lengths: Lengths, size: int, stride: int) -> Tensor:
    """`[B, windows, size, …]`: all of the row's in their order, zero where a row has fewer than another."""
    rows: list[list[Tensor]] = [[] for _ in lengths]
    for row, start, length in documents_of(lengths):
        for i in range(windows_of(length, size, stride)):
            rows[row].append(x[row, start + i * stride : start + i * stride + size])
    most = max(map(len, rows))
    empty = x.new_zeros(size, *x.shape[2:])
    padded = [[*row, *[empty] * (most - len(row))] for row in rows]
    return torch.stack([torch.stack(row) if row else x.new_zeros(0, size, *x.shape[2:]) for row in padded])


def gather_windows(x: Tensor, *, length: int, size: int, stride: int, lengths: Lengths | None = None) -> Tensor:
    """The summaries of `local_windows`, zero past the last window of each row, `[B, length // stride, …]`."""
    if lengths is not None:
        counts = [sum(windows_of(n, size, stride) for n in row) for row in lengths]
        exists = torch.arange(x.shape[1], device=x.device) < torch.tensor(counts, device=x.device)[:, None]
        x = torch.where(exists.view(*exists.shape, *[1] * (x.dim() - 2)), x, 0.0)
    return F.pad(x, (*[0] * (2 * x.dim() - 4), 0, length // stride - x.shape[1]))


def short_conv(
    x: Tensor, weight: Tensor, *, lengths: Lengths, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    taps, (rows, kernel) = weight.shape[1], exactly(x, weight)
    parts = []
    for row, start, length in documents_of(lengths):
        padded = F.pad(rows[row, start : start + length], (0, 0, taps - 1, 0))
        out = sum((padded[i : i + length] * kernel[:, i] for i in range(taps)), rows.new_zeros(()))
        out = out if bias is None else out + bias.to(out.dtype)
        parts.append((row, start, F.silu(out) if activation == "silu" else out))
    return joined(rows, parts).to(x.dtype)


def token_shift(x: Tensor, *, lengths: Lengths) -> Tensor:
    return joined(x, [(r, s, F.pad(x[r, s : s + n], (0, 0, 1, 0))[:n]) for r, s, n in documents_of(lengths)])


def windows_of(length: int, size: int, stride: int) -> int:
    """Complete windows of a document."""
    return max(0, (length - size) // stride + 1)


def numbered(lengths: Lengths, count: Any) -> Iterator[tuple[int, int, int, int]]:
    """(row, first token, length, number in the row of the first of its `count(length)` items) of every document."""
    row_before, number = -1, 0
    for row, start, size in documents_of(lengths):
        number = 0 if row != row_before else number
        yield row, start, size, number
        row_before, number = row, number + count(size)


def rope(x: Tensor, positions: Tensor, *, inverse_frequencies: Tensor, attention_factor: float = 1.0) -> Tensor:
    """Pairs (x_i, x_(i + R/2)) as complex numbers, turned by their token's angle."""
    rotated = 2 * len(inverse_frequencies)
    angle = positions.double()[..., None, None] * inverse_frequencies.double()
    turn = torch.polar(torch.full_like(angle, attention_factor), angle)
    first, second = x[..., :rotated].double().chunk(2, dim=-1)
    turned = torch.complex(first, second) * turn
    return torch.cat([turned.real.to(x.dtype), turned.imag.to(x.dtype), x[..., rotated:]], dim=-1)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float = 1e-6, offset: float = 0.0) -> Tensor:
    (wide,) = exactly(x)
    normed = wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt()
    return (normed if weight is None else normed * (weight.to(wide.dtype) + offset)).to(x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    wide, factor = exactly(gate, up)
    return (wide * wide.sigmoid() * factor).to(gate.dtype)


def cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    chunk: int | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """The sum of the token losses, over targets that are not −100, whatever the chunks."""
    hidden, weight = exactly(hidden, weight)
    chosen = targets >= 0
    logits = logit_scale * (hidden[chosen] @ weight.T)
    logs = (logits if softcap is None else softcap * torch.tanh(logits / softcap)).log_softmax(-1)
    return -logs.gather(-1, targets[chosen].unsqueeze(-1)).sum()
