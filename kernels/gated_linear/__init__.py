"""Gated linear attention: linear attention with every decay that is no matrix, and its variants."""

from __future__ import annotations

from torch import Tensor

from ..chunks.slabs import CHUNK
from ..documents import Documents
from .parts import GatedLinearInputs as GatedLinearInputs
from .parts import GatedLinearRecurrence as GatedLinearRecurrence


def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    value_log_decay: Tensor | None = None,
    bonus: Tensor | None = None,
    log_input: Tensor | None = None,
    read: str = "inclusive",
    normaliser: str | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    documents: Documents | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Linear attention over a decaying state of outer products.

        S_t = diag(e^{g_t}) S_{t-1} diag(e^{w_t}) + e^{i_t} k_t^T v_t
        o_t = scale q_t S_t                                                     read="inclusive"
        o_t = scale q_t (S_{t-1} + diag(u) e^{i_t} k_t^T v_t)                   read="exclusive"

    q, k `[B, T, H, K]`, or of G groups where G divides H (never expanded beyond a workspace); v `[B, T, H, V]`;
    `log_decay` g, never positive: None, `[H]`, `[H, K]`, `[B, T, H]` or `[B, T, H, K]`. `scale=None` is K^(-1/2).
    value_log_decay: w `[B, T, H, V]`, never positive. bonus: u `[H, K]`, what an exclusive read sees of the token
        itself (none without it; RWKV-5 and 6, Peng et al., 2024, arXiv 2404.05892).
    normaliser: divides o_t by d_t, what v = 1 would give: "sum" by d_t (Katharopoulos et al.), "at_least_one" by
        max(|d_t|, 1) (mLSTM). Where there is nothing to divide by, as for keys of 0, the output is 0.
    log_input: i `[B, T, H]`, of any size: an exponential input gate, computed relative to a running log scale (mLSTM,
        Beck et al., 2024, arXiv 2405.04517). It comes with a normaliser and at most one decay per head.
    `documents` (default: each row one document) reset the state at their starts; padding gives 0. `initial_state`
    `[B, H, K, V]` enters only rows whose first token continues a document (`documents.continues`); without `documents`
    it enters every row. Returns the output `[B, T, H, V]` in q's type and the state after each row's last token
    `[B, H, K, V]` in float32 (float64 for float64), in which all is computed too. With a normaliser states have a last
    column more, the sums of keys; with log_input a last row more, their log scale. Every tensor gets its gradient
    (log scales are units, and get 0). Raises ValueError for shapes that do not fit, a positive decay, variants that
    have no meaning together, or a backend that cannot run.

    RWKV-4's time mixing is this op on heads of one channel, K = V = 1: q = k = 1, log_input = its keys, log_decay =
    its w `[H]`, read="exclusive", bonus = e^u, normaliser="sum", scale=1; AFT-simple the same with no decay and an
    inclusive read. `kernels.wkv` computes both at a fraction of the cost.

    Katharopoulos et al., 2020, arXiv 2006.16236; with decay Yang et al., 2024, arXiv 2312.06635.
    """
    op = GatedLinearRecurrence(read, normaliser, log_input is not None, scale)
    inputs = GatedLinearInputs(q, k, v, log_decay, value_log_decay, bonus, log_input)
    raw, final = op(inputs, initial_state, documents, backend)
    return op.finish(raw, q.dtype), final


def flops(tokens: int, *, heads: int, key_dim: int, value_dim: int, chunk: int = CHUNK) -> int:
    """Floating-point operations of a forward pass in chunks: 4 K V + 2 C (K + V) per token and head."""
    return tokens * heads * (4 * key_dim * value_dim + 2 * chunk * (key_dim + value_dim))
