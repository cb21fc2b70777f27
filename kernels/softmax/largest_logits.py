"""The largest logits of attention, by the kernels that compute it.

With logits multiplied by `SHARPNESS`, the log-sum-exp over n keys divided by it lies between the largest logit and
log(n) / SHARPNESS above: 0.2 for 131,072 keys. So whatever tells a log-sum-exp, libraries too, tells the largest logit.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import SoftmaxAttend

SHARPNESS = 64.0


class OfLogits:
    """Makes an op whose `scale` is SHARPNESS times that of the logits give the largest one in place of its output.

    `[B, T, H, 1]`, in q's type; −inf for a query that sees no key.
    """

    def width(self, inputs: Any) -> tuple[int, int]:
        return inputs.q.shape[2], 1

    def finish(self, out: Tensor, lse: Tensor, inputs: Any) -> tuple[Tensor, Tensor]:
        return (lse / SHARPNESS).unsqueeze(-1), lse


class SoftmaxLogits(OfLogits, SoftmaxAttend):
    """Of `SoftmaxAttend`."""
