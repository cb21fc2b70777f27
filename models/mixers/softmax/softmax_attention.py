"""Softmax attention: multi-head, grouped and multi-query, with or without positions, windows and sinks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ....kernels.masks import BlockLocal, Dilated, Mask
from ....kernels.softmax import flops
from ....parallel import ops
from ....parallel.sequence import Sequence
from ...layers.logit_factor import logit_factor
from ...mixer import also_takes
from ...part import Clipped
from .attention import Attention


class SoftmaxAttention(Attention):
    """Softmax attention, of all keys or within a window.

    window: keys that a query sees, itself included. sink_tokens: first tokens of the document that stay visible.
    dilation: 2 for every second key of those, counted from the query; and so on (atrous attention).
    block: of how many positions the query's own block has, beyond which it sees nothing: blocks of a document, side by
        side (DiagAttention of TransNormer, arXiv 2210.10340; the chunked attention of Llama 4).
    sink_logits: a learned logit per head in the softmax's denominator.
    scale: of logits, by default head_dim^(-1/2).
    softcap: logits s become softcap * tanh(s / softcap) (Gemma 2, arXiv 2408.00118).
    log_length, temperature, temperature_length: factors on logits by position, see `LogitFactor`.
    The other settings are those of `Attention`. Raises ValueError as that does.
    """

    shares_keys = measures_logits = True

    @also_takes(Attention)
    def __init__(
        self, *, window: int | None = None, sink_tokens: int = 0, dilation: int = 1, block: int | None = None,
        sink_logits: bool = False, scale: float | None = None, softcap: float | None = None,
        log_length: int | None = None, temperature: float | None = None, temperature_length: int | None = None,
        **attention: Any,
    ) -> None:  # fmt: skip
        super().__init__(**attention)
        if block is not None and (window is not None or sink_tokens or dilation != 1):
            raise ValueError(
                f"block must come without window, sink_tokens and dilation; got {block}. Leave out one or the other"
            )
        if dilation != 1 and sink_tokens:
            raise ValueError(f"sink_tokens must be 0 with a dilation; got {sink_tokens}. Leave one of them out")
        if block is not None:
            self.mask = BlockLocal(block)
        else:
            self.mask = Mask(window=window, sink_tokens=sink_tokens) if dilation == 1 else Dilated(dilation, window)
        if softcap is not None and softcap <= 0:
            raise ValueError(f"softcap must be more than 0; got {softcap}. Leave it out for logits without bounds")
        if scale is not None and scale <= 0:
            raise ValueError(f"scale must be more than 0; got {scale}. Leave it out for head_dim^(-1/2)")
        self.scale, self.softcap = scale, softcap
        self.factor = logit_factor(log_length, temperature, temperature_length)
        self.sink_logits = nn.Parameter(torch.zeros(self.heads)) if sink_logits else None

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        seq: Sequence,
        *,
        levels: Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        q = q if self.factor is None else self.factor(q, seq)
        scale = self.scale if scale is None else scale
        return ops.softmax_attention(
            q, k, v, seq=seq, mask=self.mask, scale=scale, softcap=self.softcap, levels=levels,
            sink_logits=self.sink_logits, keys_as=self.keys_as, keys_of=self.keys_of,
            largest=self.largest_logits,
        )  # fmt: skip

    def clipped(self) -> Clipped | str | None:
        return super().clipped() if self.softcap is None else "whose softcap bounds logits already"

    def mixing_flops(self, seq: Sequence) -> int:
        return flops(seq.pairs(self.mask), heads=self.heads, key_dim=self.head_dim, value_dim=self.head_dim)

    def initialise_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> bool:
        if name != "sink_logits":
            return False
        tensor.zero_()
        return True
