"""The delta rule: a linear recurrence that erases what it holds under a key before it writes there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from ..documents import Documents
from ..recurrence import Dense

CHUNK = 32  # tokens: half of what gated linear attention takes, as a solve and twice the scores grow with the length


class DeltaInputs(NamedTuple):
    """Tensors of the delta rule, see `delta_rule`; a and b are those of `erase`."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor | None = None
    log_decay: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None


@dataclass(frozen=True)
class DeltaRecurrence(Dense[DeltaInputs]):
    """The recurrence of the delta rule; its transitions are matrices `[B, H, K, K]`."""

    name = "delta_rule"
    record = DeltaInputs
    dims = {
        "q": "B T G K",
        "k": "B T G K",
        "v": "B T H V",
        "beta": "B T H",
        "log_decay": "B T H | B T H K",
        "a": "B T G K",
        "b": "B T G K",
    }
    out, state = "B T H V", "B H K V"

    scale: float | None = None

    def check_inputs(self, inputs: DeltaInputs) -> None:
        """Raises ValueError unless there is a beta, or both tensors of `erase`, or none of the three."""
        if (inputs.a is None) != (inputs.b is None) or (inputs.a is not None and inputs.beta is not None):
            raise ValueError(
                "erase must be a pair of tensors, in place of beta; got both, or one of the pair. Multiply beta into it"
            )


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None = None,
    log_decay: Tensor | None = None,
    *,
    erase: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    documents: Documents | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Decays a state of outer products, moves what it holds under the key k_t towards v_t, and reads it.

        S_t = (I - beta_t k_t^T k_t) diag(e^{g_t}) S_{t-1} + beta_t k_t^T v_t        o_t = scale q_t S_t

    q, k `[B, T, H, K]`, or of G groups where G divides H (never expanded beyond a workspace); v `[B, T, H, V]`; `beta`
    `[B, T, H]` (None is 1), in [0, 2] for keys of length 1: with longer keys the state may grow without bound.
    `log_decay` g, never positive: None, `[B, T, H]` (gated DeltaNet) or `[B, T, H, K]` (Kimi Delta Attention).

    `erase` = (a, b), each shaped like k, in place of beta makes the general diagonal-plus-low-rank step of RWKV-7

        S_t = (diag(e^{g_t}) + b_t^T a_t) S_{t-1} + k_t^T v_t        a_t meets the state before its decay

    of which the first is the case a_t = -beta_t e^{g_t} ⊙ k_t, b_t = k_t, with beta_t v_t written.

    `scale=None` is K^(-1/2). `documents` (default: each row one document) reset the state at their starts; padding
    gives 0. `initial_state` `[B, H, K, V]` enters only rows whose first token continues a document
    (`documents.continues`); without `documents` it enters every row. Returns the output `[B, T, H, V]` in q's type and
    the state after each row's last token `[B, H, K, V]` in float32 (float64 for float64), in which all is computed
    too. Every tensor gets its gradient. Raises ValueError for shapes that do not fit, a positive decay, beta and
    erase together, or a backend that cannot run.

    Schlag et al., 2021, arXiv 2102.11174; in chunks Yang et al., 2024, arXiv 2406.06484; with decay arXiv 2412.06464,
    per channel arXiv 2510.26692; RWKV-7: Peng et al., 2025, arXiv 2503.14456.
    """
    inputs = DeltaInputs(q, k, v, beta, log_decay, *(erase or ()))
    return DeltaRecurrence(scale)(inputs, initial_state, documents, backend)


def flops(tokens: int, *, heads: int, key_dim: int, value_dim: int, general: bool = False, chunk: int = CHUNK) -> int:
    """Floating-point operations of a forward pass in chunks of C: 6 K V + C (4 K + 3 V) per token and head.

    Reading, erasing and writing the state take 2 K V each; the scores of rows and of queries 2 C K each, the solve C V
    and what is read within the chunk 2 C V. `general` is with `erase`: 2 K V + 4 C (K + V) more for what it also
    writes.
    """
    each = 6 * key_dim * value_dim + chunk * (4 * key_dim + 3 * value_dim)
    if general:
        each += 2 * key_dim * value_dim + 4 * chunk * (key_dim + value_dim)
    return tokens * heads * each
