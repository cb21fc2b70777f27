"""The delta rule: a linear recurrence that erases what it holds under a key before it writes there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from ..documents import Documents
from ..recurrence import Dense

CHUNK = 32  # tokens: half of what gated linear attention takes, as a solve and twice the scores grow with the length


class DeltaInputs(NamedTuple):
    """Tensors of the delta rule, see `delta_rule`; a and b are those of a pair `erase`."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor | None = None
    log_decay: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    erase: Tensor | None = None

    @property
    def steps(self) -> int:
        """How often each token changes the state."""
        return self.k.shape[3] if self.k.dim() == 5 else 1


@dataclass(frozen=True)
class DeltaRecurrence(Dense[DeltaInputs]):
    """The recurrence of the delta rule; its transitions are matrices `[B, H, K, K]`."""

    name = "delta_rule"
    record = DeltaInputs
    dims = {
        "q": "B T G K",
        "k": "B T G K | B T G N K",
        "v": "B T H V | B T H N V",
        "beta": "B T H | B T H N",
        "log_decay": "B T H | B T H K",
        "a": "B T G K | B T G N K",
        "b": "B T G K | B T G N K",
        "erase": "B T G K | B T G N K",
    }
    out, state = "B T H V", "B H K V"

    scale: float | None = None
    erase_first: bool = False

    def check_inputs(self, inputs: DeltaInputs) -> None:
        """Raises ValueError for half a pair `erase`, one beside a beta, and several steps of some tensors alone."""
        pair = inputs.a is not None
        if pair != (inputs.b is not None) or (pair and (inputs.beta is not None or inputs.erase is not None)):
            raise ValueError(
                "erase must be a pair of tensors, in place of beta; got both, or one of the pair. Multiply beta into it"
            )
        if pair and self.erase_first:
            raise ValueError("erase_first must be left out with a pair `erase`, which always meets the state undecayed")
        for name in ("v", "beta", "a", "b", "erase"):
            x = getattr(inputs, name)
            if x is not None and (x.dim() == 4 + (name != "beta")) != (inputs.k.dim() == 5):
                raise ValueError(
                    f"{name} must have the steps per token that k has, here {inputs.steps}; got {list(x.shape)} with k "
                    f"{list(inputs.k.shape)}. Put the steps after the heads in both"
                )


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None = None,
    log_decay: Tensor | None = None,
    *,
    erase: Tensor | tuple[Tensor, Tensor] | None = None,
    erase_first: bool = False,
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

    `erase` e, shaped like k, erases what the state holds under another key than the one that is written (Gated
    DeltaNet-2); with `erase_first` it is read before the state decays (Comba). A pair (a, b) in place of beta makes the
    general diagonal-plus-low-rank step of RWKV-7:

        S_t = (I - beta_t k_t^T e_t) diag(e^{g_t}) S_{t-1} + beta_t k_t^T v_t
        S_t = (diag(e^{g_t}) - beta_t k_t^T e_t) S_{t-1} + beta_t k_t^T v_t       with erase_first
        S_t = (diag(e^{g_t}) + b_t^T a_t) S_{t-1} + k_t^T v_t                     a_t meets the state before its decay

    Without `erase` e_t is k_t. The first is the case a_t = -beta_t e^{g_t} ⊙ e_t, b_t = k_t of the last, with
    beta_t v_t written; the second is that without e^{g_t}.

    Several steps per token (DeltaProduct): k `[B, T, H, N, K]`, v `[B, T, H, N, V]`, beta `[B, T, H, N]`, and `erase`
    like k. The state decays once, then takes the N steps in order, and is read after the last. Apart from these inputs
    nothing of the whole length is N-fold; they are read without a copy if the steps lie before the heads in memory.

    `scale=None` is K^(-1/2). `documents` (default: each row one document) reset the state at their starts; padding
    gives 0. `initial_state` `[B, H, K, V]` enters only rows whose first token continues a document
    (`documents.continues`); without `documents` it enters every row. Returns the output `[B, T, H, V]` in q's type and
    the state after each row's last token `[B, H, K, V]` in float32 (float64 for float64), in which all is computed
    too. Every tensor gets its gradient. Raises ValueError for shapes that do not fit, a positive decay, beta and a
    pair `erase` together, or a backend that cannot run.

    Schlag et al., 2021, arXiv 2102.11174; in chunks Yang et al., 2024, arXiv 2406.06484; with decay arXiv 2412.06464,
    per channel arXiv 2510.26692; RWKV-7: Peng et al., 2025, arXiv 2503.14456; Comba: Hu et al., 2025, arXiv 2506.02475;
    several steps per token: Siems et al., 2025, arXiv 2502.10297.
    """
    inputs = delta_inputs(q, k, v, beta, log_decay, erase)
    return DeltaRecurrence(scale, erase_first)(inputs, initial_state, documents, backend)


def delta_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    erase: Tensor | tuple[Tensor, Tensor] | None,
) -> DeltaInputs:
    """The record of the arguments of `delta_rule`."""
    if isinstance(erase, tuple):
        return DeltaInputs(q, k, v, beta, log_decay, *erase)
    return DeltaInputs(q, k, v, beta, log_decay, erase=erase)


def flops(tokens: int, *, heads: int, key_dim: int, value_dim: int, general: bool = False, chunk: int = CHUNK) -> int:
    """Floating-point operations of a forward pass in chunks of C: 6 K V + C (4 K + 3 V) per token and head.

    `tokens` counts each of several steps per token.

    Reading, erasing and writing the state take 2 K V each; the scores of rows and of queries 2 C K each, the solve C V
    and what is read within the chunk 2 C V. `general` is with a pair `erase`: 2 K V + 4 C (K + V) more for what it also
    writes.
    """
    each = 6 * key_dim * value_dim + chunk * (4 * key_dim + 3 * value_dim)
    if general:
        each += 2 * key_dim * value_dim + 4 * chunk * (key_dim + value_dim)
    return tokens * heads * each
