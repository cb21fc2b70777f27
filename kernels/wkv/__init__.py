"""WKV: each channel's running mean of values, weighted by the exponentials of its keys, which fade with time."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..documents import Documents
from ..gated_linear import stable
from ..problem import Problem, per_row
from ..recurrence import Diagonal, Summary


class WKVInputs(NamedTuple):
    """Tensors of the op, see `wkv`."""

    k: Tensor
    v: Tensor
    log_decay: Tensor | None = None
    bonus: Tensor | None = None


class WKVRecurrence(Diagonal[WKVInputs]):
    """The recurrence of `wkv`.

    States `[B, D, 3]` are the sum of weighted values, the sum of weights, and the log scale that both are relative to,
    so that nothing overflows. The scale is a unit, no variable: it carries no gradient, and in the gradient of a state
    it says which unit the gradient is for. Transitions are logarithms, `[B, D]`.
    """

    name = "wkv"
    record = WKVInputs
    dims = {"k": "B T D", "v": "B T D", "log_decay": "D | B T D", "bonus": "D"}
    out, state = "B T D", "B D 3"

    def transition_dims(self, inputs: WKVInputs) -> str:
        return "B D"

    def zero_state(self, like: Tensor) -> Tensor:
        """Zeros; a log scale as low as they come."""
        zeros = torch.zeros_like(like)
        zeros[..., 2] = stable.LOWEST
        return zeros

    def with_units(self, dstate: Tensor, state: Tensor) -> Tensor:
        return torch.cat([dstate[..., :2], state[..., 2:]], dim=-1)

    def transition(self, problem: Problem[WKVInputs]) -> Tensor:
        """The sum of the row's log decays; −inf unless one document goes through."""
        k, _, log_decay, _ = problem.inputs
        total = torch.zeros_like(k[:, 0], dtype=torch.float64)
        if log_decay is not None:
            total += log_decay.double() * k.shape[1] if log_decay.dim() == 1 else log_decay.sum(1, dtype=torch.float64)
        return torch.where(per_row(problem.through, total), total, -torch.inf).to(problem.dtype)

    def combine(self, later: Summary, earlier: Summary) -> Summary:
        return Summary(later.transition + earlier.transition, self.advance(later, earlier.state))

    def advance(self, summary: Summary, state: Tensor) -> Tensor:
        own, before, log_transition = summary.state[..., None], state[..., None], summary.transition[..., None, None]
        return stable.advance(before, log_transition, own).squeeze(-1)

    def retreat(self, summary: Summary, dstate: Tensor, local: Tensor) -> Tensor:
        log_transition = summary.transition[..., None, None]
        return stable.retreat(dstate[..., None], log_transition, local[..., None]).squeeze(-1)


def wkv(
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    bonus: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    documents: Documents | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """A mean of the values so far, in each channel by itself, weighted by exponentials of keys that decay.

                sum_{i<t} e^{k_i + w_{i+1} + ... + w_{t-1}} v_i + e^{u + k_t} v_t
        out_t = -----------------------------------------------------------------
                sum_{i<t} e^{k_i + w_{i+1} + ... + w_{t-1}}     + e^{u + k_t}

    k, v `[B, T, D]`, keys of any size; `log_decay` w, never positive: None, `[D]` or `[B, T, D]`; `bonus` u `[D]`, 0 if
    it is None. `documents` (default: each row one document) reset the sums at their starts; padding gives 0.
    `initial_state` `[B, D, 3]` enters only rows whose first token continues a document (`documents.continues`); without
    `documents` it enters every row. Returns the output in k's type, and the state after each row's last token in
    float32 (float64 for float64), in which all is computed too: the two sums relative to e^m, and m. Every tensor gets
    its gradient (m is a unit, and gets 0). Raises ValueError for shapes that do not fit, a positive decay, or a backend
    that cannot run.

    RWKV-4's time mixing (Peng et al., 2023, arXiv 2305.13048); without decay and bonus it is AFT-simple's (Zhai et al.,
    2021, arXiv 2105.14103). `gated_linear_attention` on heads of one channel gives the same, at many times the cost.
    """
    return WKVRecurrence()(WKVInputs(k, v, log_decay, bonus), initial_state, documents, backend)


def flops(tokens: int, *, channels: int) -> int:
    """Floating-point operations of a forward pass: 24 per token and channel, four exponentials among them as 1 each."""
    return 24 * tokens * channels
