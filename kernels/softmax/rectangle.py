"""Attention inside one rectangle of queries and keys: torch's fused CPU kernel, or explicit matmuls on any device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..attend import Gradient
from ..masks import Mask
from ..masks.rectangles import Rectangle

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


COPIED = 32  # queries from which on inputs are copied head by head


class _Rectangles:
    """Inputs of a tile, in the type of the partial results, from which rectangles are taken. Heads stay grouped."""

    limit: int | None = None

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> None:
        self.scale = scale
        self.dtype = torch.promote_types(q.dtype, torch.float32)
        self.key_dim, self.value_dim = q.shape[-1], v.shape[-1]
        self.q, self.k, self.v = (x.to(self.dtype) for x in (q, k, v))
        self._bands: dict[tuple[int, int, int, int], Tensor] = {}

    def bias(self, at: Rectangle) -> Tensor:
        """0 where visible and −inf elsewhere, `[queries, keys]`; a few are kept, since most bands are alike."""
        if at.hidden is not None:
            hidden = at.hidden.to(self.q.device)
            return torch.zeros(hidden.shape, dtype=self.dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)
        n, m = at.queries[1] - at.queries[0], at.keys[1] - at.keys[0]
        key = (n, m, at.lead, at.window)
        if key not in self._bands:
            if len(self._bands) == 16:  # the ends of many documents differ, and not all may stay in memory
                self._bands.clear()
            device = self.q.device
            i, j = torch.arange(n, device=device) + at.lead, torch.arange(m, device=device)
            hidden = ~Mask(window=at.window).visible(i, j)
            self._bands[key] = torch.zeros(n, m, dtype=self.dtype, device=device).masked_fill_(hidden, float("-inf"))
        return self._bands[key]


def _take(x: Tensor, rows: tuple[int, int], span: tuple[int, int]) -> Tensor:
    return x[rows[0] : rows[1], span[0] : span[1]]


class FlashRectangles(_Rectangles):
    """By torch's flash attention for CPU, which returns the log-sum-exp and whose backward takes a merged one.

    It needs equal dims of keys and values, and contiguous heads (it silently misreads other strides), so inputs are
    padded with zeros once per tile. It is a tenth faster where a head's tokens follow one another in memory, which is
    worth a copy if several queries read each key. Its backward takes no gradient of the log-sum-exp: one more value
    column, 0 in v, 1 in dout and −dlse in out, puts −dlse into the row sums of dout·out and has no other effect.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, gradient: Gradient | None = None) -> None:
        super().__init__(q, k, v, scale=scale)
        columns = self.value_dim
        if gradient is not None:
            dout, out = gradient.dout.to(self.dtype), gradient.out.to(self.dtype)
            if gradient.dlse is not None:
                columns += 1
                dout = torch.cat([dout, torch.ones_like(dout[..., :1])], dim=-1)
                out = torch.cat([out, -gradient.dlse.to(self.dtype).unsqueeze(-1)], dim=-1)
        self.dim = max(self.key_dim, columns)
        self.copies = q.shape[1] >= COPIED
        self.q, self.k, self.v = (self._by_head(x) for x in (self.q, self.k, self.v))
        if gradient is not None:
            self.gradient = self._by_head(dout), self._by_head(out), gradient.lse.to(self.dtype).transpose(1, 2)

    def _by_head(self, x: Tensor) -> Tensor:
        """`[B, T, heads, X]` to `[B, heads, T, dim]`."""
        x = F.pad(x, (0, self.dim - x.shape[-1])) if x.shape[-1] < self.dim else x
        x = x.transpose(1, 2)
        return x.contiguous() if self.copies or x.stride(-1) != 1 else x

    def forward(self, at: Rectangle) -> tuple[Tensor, Tensor]:
        out, lse = _flash(*self._inputs(at), 0.0, at.shape == "causal", attn_mask=self._bias(at), scale=self.scale)
        return out.transpose(1, 2)[..., : self.value_dim], lse.transpose(1, 2)

    def backward(self, at: Rectangle) -> tuple[Tensor, Tensor, Tensor]:
        dout, out, lse = (self._part(x, at.rows, at.queries) for x in self.gradient)
        dq, dk, dv = _flash_backward(
            dout, *self._inputs(at), out, lse, 0.0, at.shape == "causal", attn_mask=self._bias(at), scale=self.scale
        )
        dq, dk, dv = (x.transpose(1, 2) for x in (dq, dk, dv))
        return dq[..., : self.key_dim], dk[..., : self.key_dim], dv[..., : self.value_dim]

    def _bias(self, at: Rectangle) -> Tensor | None:
        return self.bias(at) if at.shape in ("band", "packed") else None

    def _inputs(self, at: Rectangle) -> tuple[Tensor, Tensor, Tensor]:
        q = self._part(self.q, at.rows, at.queries)
        k, v = (self._part(x, at.rows, at.keys) for x in (self.k, self.v))
        return q, k, v

    @staticmethod
    def _part(x: Tensor, rows: tuple[int, int], span: tuple[int, int]) -> Tensor:
        return x[rows[0] : rows[1], :, span[0] : span[1]]


class PlainRectangles(_Rectangles):
    """By explicit matmuls on any device, over rectangles small enough for all their scores to be in memory.

    They cap logits, and add levels of queries `[B, T, L]` and keys `[B, S, L]`, L being G or H.
    """

    limit = 1024

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float,
        softcap: float | None = None,
        levels: tuple[Tensor, Tensor] | None = None,
        gradient: Gradient | None = None,
    ) -> None:
        super().__init__(q, k, v, scale=scale)
        self.softcap = softcap
        self.levels = None if levels is None else tuple(x.to(self.dtype) for x in levels)
        if gradient is not None:
            delta = gradient.delta(self.dtype).unsqueeze(-1)
            self.gradient = gradient.dout.to(self.dtype), delta, gradient.lse.to(self.dtype).unsqueeze(-1)

    def forward(self, at: Rectangle) -> tuple[Tensor, Tensor]:
        q, k, v = self._inputs(at)
        scores, _ = self._scores(q, k, at)
        lse = scores.logsumexp(-1, keepdim=True)
        out = scores.sub_(lse).exp_() @ v
        return self._ungrouped(out, at), self._ungrouped(lse, at).squeeze(-1)

    def backward(self, at: Rectangle) -> tuple[Tensor, ...]:
        q, k, v = self._inputs(at)
        dout, delta, lse = (self._grouped(_take(x, at.rows, at.queries)) for x in self.gradient)
        scores, slope = self._scores(q, k, at, with_slope=True)
        p = scores.sub_(lse).exp_()
        dv = p.mT @ dout
        ds = (dout @ v.mT).sub_(delta).mul_(p)
        of_levels = [] if self.levels is None else [self._of_levels(ds, at)]
        if slope is not None:
            ds.mul_(slope)
        ds.mul_(self.scale)
        return self._ungrouped(ds @ k, at), (ds.mT @ q).transpose(1, 2), dv.transpose(1, 2), *of_levels

    def _inputs(self, at: Rectangle) -> tuple[Tensor, Tensor, Tensor]:
        k, v = (_take(x, at.rows, at.keys).transpose(1, 2) for x in (self.k, self.v))
        return self._grouped(_take(self.q, at.rows, at.queries)), k, v

    def _grouped(self, x: Tensor) -> Tensor:
        """`[b, t, H, X]` to `[b, G, R·t, X]`: the heads of a group one after the other against its keys."""
        return x.unflatten(2, (self.k.shape[2], -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)

    def _ungrouped(self, x: Tensor, at: Rectangle) -> Tensor:
        return x.unflatten(2, (-1, at.queries[1] - at.queries[0])).permute(0, 3, 1, 2, 4).flatten(2, 3)

    def _scores(self, q: Tensor, k: Tensor, at: Rectangle, with_slope: bool = False) -> tuple[Tensor, Tensor | None]:
        """`[b, G, R·n, m]`, and on request the derivative of the capped logits by those before, if they are capped."""
        scores, slope = (q @ k.mT).mul_(self.scale), None
        if self.softcap is not None:
            scores.div_(self.softcap).tanh_()
            slope = 1 - scores.square() if with_slope else None
            scores.mul_(self.softcap)
        n, m = at.queries[1] - at.queries[0], at.keys[1] - at.keys[0]
        by_head = scores.unflatten(2, (-1, n))
        if self.levels is not None:
            of_queries, of_keys = (
                _take(x, at.rows, span).unflatten(2, (self.k.shape[2], -1)).permute(0, 2, 3, 1)
                for x, span in zip(self.levels, (at.queries, at.keys), strict=True)
            )
            by_head.add_(of_queries.unsqueeze(-1) - of_keys.unsqueeze(-2))
        if at.shape == "causal":
            by_head.masked_fill_(torch.ones(n, m, dtype=torch.bool, device=q.device).triu_(1), float("-inf"))
        elif at.shape != "full":
            by_head.add_(self.bias(at))
        return scores, slope

    def _of_levels(self, ds: Tensor, at: Rectangle) -> Tensor:
        """The gradient of the levels of keys `[b, m, L]`."""
        assert self.levels is not None
        per_head = ds.unflatten(2, (-1, at.queries[1] - at.queries[0])).sum(3).flatten(1, 2)
        return -per_head.unflatten(1, (self.levels[1].shape[2], -1)).sum(2).transpose(1, 2)
