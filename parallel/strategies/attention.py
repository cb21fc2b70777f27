"""Attention across ranks: what its strategies share, whatever way keys and values come to the queries."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.mask import Mask
from ...kernels.operation import Tensors
from ...kernels.softmax import apply_sink, sink_backward
from ..operation import Operation, present
from ..sequence import Sequence


@dataclass(frozen=True)
class SharedAttention(Operation):
    """softmax(scale q kᵀ + mask) v over keys and values of all sequence ranks; on one rank, over those held.

    Tokens at position `until` of their document and beyond, if it is given, take no part: their outputs are 0.

    An `Operation`; its inputs are (q, k, v, sink_logits or None). It saves the output in float32, where it is not
    already, and the log-sum-exp. Keys and values travel in their own type, which loses nothing; partial results and
    gradients are float32 (float64).
    """

    causal: bool
    window: int | None
    sink_tokens: int
    scale: float
    until: int | None = None

    @property
    def mask(self) -> Mask:
        return Mask(self.causal, self.window, self.sink_tokens)

    @abstractmethod
    def attend(self, q: Tensor, k: Tensor, v: Tensor, seq: Sequence) -> tuple[Tensor, Tensor] | None:
        """(out, log-sum-exp) of the queries held here; None where they see nothing."""

    @abstractmethod
    def attend_backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, seq: Sequence
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(dq, dk, dv) of what is held here, in out's type."""

    def forward(self, inputs: Tensors, seq: Sequence) -> tuple[Tensors, Tensors]:
        q, k, v, sink_logits = _present(inputs)
        result = self.attend(q, k, v, self._cut(seq))
        if result is None:  # every token held here is padding
            dtype = torch.promote_types(q.dtype, torch.float32)
            out = q.new_zeros((*q.shape[:-1], v.shape[-1]), dtype=dtype)
            result = out, q.new_full(q.shape[:-1], float("-inf"), dtype=dtype)
        return rounded_once(*(result if sink_logits is None else apply_sink(*result, sink_logits)), q.dtype)

    def backward(
        self, gradients: Tensors, inputs: Tensors, outputs: tuple[Tensor, ...], saved: Tensors, seq: Sequence
    ) -> Tensors:
        q, k, v, sink_logits = _present(inputs)
        out, lse = exact_result(outputs, saved)
        (dout,) = present(*gradients)
        dout = dout.to(out.dtype)
        dsink = None if sink_logits is None else sink_backward(dout, out, lse, sink_logits)
        dq, dk, dv = self.attend_backward(dout, q, k, v, out, lse, self._cut(seq))
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dsink

    def like(self, inputs: Tensors, ranks: int, spans: int) -> tuple[tuple[Tensor, ...], Tensors]:
        q, _, v, _ = _present(inputs)
        return attention_like(q, v)

    def _cut(self, seq: Sequence) -> Sequence:
        return seq if self.until is None else seq.up_to(self.until)


def rounded_once(out: Tensor, lse: Tensor, dtype: torch.dtype) -> tuple[Tensors, Tensors]:
    """The output in the queries' type, and what backward needs: the exact output where that is another, and lse."""
    return (out.to(dtype),), (None if out.dtype == dtype else out, lse)


def exact_result(outputs: tuple[Tensor, ...], saved: Tensors) -> tuple[Tensor, Tensor]:
    """(exact output, lse) of what `rounded_once` gave."""
    exact, lse = saved
    assert lse is not None
    return outputs[0] if exact is None else exact, lse


def attention_like(q: Tensor, v: Tensor) -> tuple[tuple[Tensor, ...], Tensors]:
    """Empty tensors like those of `rounded_once`, for queries `[B, T, H, K]` and values `[…, V]`."""
    shape, exact = (*q.shape[:-1], v.shape[-1]), torch.promote_types(q.dtype, torch.float32)
    out = None if exact == q.dtype else q.new_empty(shape, dtype=exact)
    return (q.new_empty(shape),), (out, q.new_empty(shape[:-1], dtype=exact))


def _present(inputs: Tensors) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    q, k, v, sink_logits = inputs
    assert q is not None
    assert k is not None
    assert v is not None
    return q, k, v, sink_logits


class Block:
    """Keys and values, or their gradients, travelling as one message."""

    def __init__(self, flat: Tensor, k_shape: torch.Size, v_shape: torch.Size) -> None:
        self.flat, self.shapes = flat, (k_shape, v_shape)

    @classmethod
    def pack(cls, k: Tensor, v: Tensor) -> Block:
        return cls(torch.cat([k.reshape(-1), v.reshape(-1)]), k.shape, v.shape)

    def like(self) -> Block:
        return Block(torch.empty_like(self.flat), *self.shapes)

    def unpack(self) -> tuple[Tensor, Tensor]:
        split = self.shapes[0].numel()
        return self.flat[:split].view(self.shapes[0]), self.flat[split:].view(self.shapes[1])
