"""Short causal convolutions along the sequence, within documents: `short_conv`, and `token_shift` with its one tap."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from ..dispatch import resolve
from ..documents import Documents
from . import chunked, reference

ACTIVATIONS = (None, "silu")


def short_conv(
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    documents: Documents | None = None,
    history: Tensor | None = None,
    activation: str | None = None,
    backend: str = "auto",
) -> Tensor:
    """Causal depthwise convolution of few taps, within documents.

        out_t = activation(sum_{d = 0 .. W-1} weight_{W-1-d} x_{t-d} + bias)        x_{t-d} of t's document only

    x `[B, T, D]`; weight `[D, W]`, its last tap for the token itself; bias `[D]`; activation None or "silu". `history`
    `[B, W-1, D]` is the rows of x before the first token. Where the first document continues one begun earlier, as many
    of these rows are used as its position says; without `documents` all are. Padding gives 0. Returns `[B, T, D]` in
    x's type, summed in float32 (float64 for float64). All tensors get their gradients. Raises ValueError for shapes
    that do not fit, an unknown activation, or a backend that cannot run.

    As in Mamba (Gu and Dao, 2023, arXiv 2312.00752).
    """
    if weight.dim() != 2 or x.dim() != 3 or weight.shape[0] != x.shape[2] or weight.shape[1] < 1:
        raise ValueError(
            f"weight must be [D, W] for x [B, T, D]; got {list(weight.shape)} and {list(x.shape)}. "
            "Pass one filter per channel"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [D] = [{weight.shape[0]}]; got {list(bias.shape)}. Pass one value per channel")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be None or 'silu'; got {activation!r}. Apply another one outside")
    documents, history = _complete(x, documents, history, weight.shape[1] - 1)
    return _implementation(backend, x).short_conv(x, weight, bias, documents, history, activation)


def token_shift(
    x: Tensor, *, documents: Documents | None = None, history: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """The token before each token of its document.

        out_t = x_{t-1}        0 at a document's start

    x `[B, T, D]`; `history` `[B, 1, D]` is the row before the first token, used where the first document continues one
    begun earlier; without `documents` always. Padding gives 0. x and `history` get their gradients. Raises ValueError
    for shapes that do not fit or a backend that cannot run.

    Peng et al., 2023, arXiv 2305.13048.
    """
    if x.dim() != 3:
        raise ValueError(f"x must be [B, T, D]; got {list(x.shape)}. Flatten heads into one dimension")
    documents, history = _complete(x, documents, history, 1)
    return _implementation(backend, x).token_shift(x, documents, history)


def flops(tokens: int, *, channels: int, taps: int) -> int:
    """Floating-point operations of a forward pass: a product and a sum per tap, channel and token."""
    return 2 * tokens * channels * taps


def state_bytes(*, batch: int, channels: int, taps: int, element_bytes: int = 2) -> int:
    """Bytes of the rows that decoding keeps, whatever the length."""
    return batch * channels * (taps - 1) * element_bytes


def bytes_sent(*, batch: int, channels: int, taps: int, ranks: int, spans: int = 1, element_bytes: int = 2) -> int:
    """Bytes that a rank sends forward and backward: its spans' last rows to all others, and an all-reduce of all such
    rows' gradients, which costs twice as much. The length of the sequence does not matter.
    """
    return 3 * (ranks - 1) * spans * batch * channels * (taps - 1) * element_bytes


def _implementation(backend: str, x: Tensor) -> ModuleType:
    chosen = resolve("short_conv", backend, x.device, x.dtype)
    if chosen == "triton":
        from . import triton as kernels

        return kernels
    return reference if chosen == "reference" else chunked


def _complete(x: Tensor, documents: Documents | None, history: Tensor | None, width: int) -> tuple[Documents, Tensor]:
    """Documents and history with their defaults: one document per row, without history."""
    batch, length, dim = x.shape
    if length == 0:
        raise ValueError("the sequence must have at least one token; got none. Leave empty segments out")
    if history is not None and history.shape != (batch, width, dim):
        raise ValueError(
            f"history must be [B, W - 1, D] = {[batch, width, dim]}; got {list(history.shape)}. "
            "Pass the rows just before the first token"
        )
    if documents is None:
        documents = Documents.whole(batch, length, position=0 if history is None else max(1, width))
    documents.require(batch, length)
    return documents, x.new_zeros(batch, width, dim) if history is None else history
