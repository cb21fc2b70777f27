"""sLSTM: gated memory cells, mixed within heads, whose gates read the output before them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..documents import Documents
from ..gated_linear.stable import LOWEST
from ..serial import Serial

GATES = 4  # input, forget, cell input, output: the order in every tensor of gates


class SLSTMInputs(NamedTuple):
    """What the gates get from a token, with biases, and the recurrent matrices of the heads, flat."""

    gates: Tensor
    recurrent: Tensor


class SLSTMRecurrence(Serial[SLSTMInputs]):
    """The recurrence of sLSTM. A state is (h, c, n, m), with c and n in units of e^m, and all 0 before any token."""

    name = "slstm"
    record = SLSTMInputs
    dims = {"gates": "B T H 4 K", "recurrent": "H R"}
    out, state = "B T H K", "B H 4 K"

    def check_inputs(self, inputs: SLSTMInputs) -> None:
        (key_dim, size), shape = (inputs.gates.shape[-1], inputs.recurrent.shape[1]), list(inputs.recurrent.shape)
        if size != GATES * key_dim**2:
            raise ValueError(
                f"recurrent must be [H, K * 4 * K] = {[shape[0], GATES * key_dim**2]}; got {shape}. "
                "Flatten the matrix of each head"
            )


def slstm(
    gates: Tensor,
    recurrent: Tensor,
    *,
    initial_state: Tensor | None = None,
    documents: Documents | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Memory cells with exponential input gates, recurrent through their output.

        (i, f, z, o)_t = gates_t + h_{t-1} R                          R one matrix [K, 4 K] per head
        c_t = sigmoid(f_t) c_{t-1} + e^{i_t} tanh(z_t)                n_t likewise, with 1 for tanh(z_t)
        h_t = sigmoid(o_t) c_t / n_t                                  out_t = h_t

    gates `[B, T, H, 4, K]` in the order i, f, z, o; recurrent `[H, K * 4 * K]`, the entry (k, g, j) of a head being
    what channel k of h gives to channel j of gate g. Cells are kept in units of e^m, m_t = max(m_{t-1} +
    log sigmoid(f_t), i_t), so that nothing overflows. `documents` (default: each row one document) reset the state at
    their starts; padding gives 0. `initial_state` `[B, H, 4, K]` = (h, c, n, m) enters only rows whose first token
    continues a document; without `documents` it enters every row. Returns every h `[B, T, H, K]` in the type of the
    gates, and the state after each row's last token in float32 (float64 for float64), in which all is computed too.
    Every tensor gets its gradient, for which m, on which no output depends, is a constant. Raises ValueError for shapes
    that do not fit, or a backend that cannot run.

    Beck et al., 2024, "xLSTM", arXiv 2405.04517, with the sigmoid forget gate of its public code.
    """
    return SLSTMRecurrence()(SLSTMInputs(gates, recurrent), initial_state, documents, backend)


def flops(tokens: int, *, heads: int, key_dim: int) -> int:
    """Floating-point operations of a forward pass: the products with R, and about 20 per channel."""
    return tokens * heads * key_dim * (2 * GATES * key_dim + 20)


def usable(state: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(h, c, n, m) of a state `[..., 4, K]`; an empty one, whose n is 0, is at the lowest scale."""
    h, c, n, m = state.unbind(-2)
    return h, c, n, torch.where(n == 0, LOWEST, m)
