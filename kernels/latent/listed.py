"""Attention of absorbed queries to the rows that they list: latent attention over blocks, or over single tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from ..attend import Gradient, OnOneDevice, documents_of
from ..block_sparse import BlockSparseAttend, attend, attend_backward
from ..blocks import BlockTile
from ..documents import Documents
from ..masks import Mask
from ..operation import run
from ..softmax import check_inputs


def listed_latent_attention(
    q: Tensor,
    latent: Tensor,
    blocks: Tensor,
    *,
    latent_rank: int,
    block_size: int,
    scale: float,
    documents: Documents | None = None,
    backend: str = "auto",
) -> Tensor:
    """Causal attention of absorbed queries to the rows in listed blocks: `[B, T, H, C]` in q's type.

        s_ijh = scale * q_ih . [r_j; c_j] for j in a listed block;  o_ih = sum_j softmax_j(s_ijh) c_j

    q `[B, T, H, R + C]`, as `longreach.kernels.latent.absorbed` makes them; latent `[B, T, R + C]`, of which the last
    C = `latent_rank` dims are the values. All heads read this one key, and `scale` is that of keys before absorption.
    `blocks` `[B, T, 1 or H, M]`, `documents` and `backend` are those of
    `longreach.kernels.block_sparse.block_sparse_attention`, whose kernels run. Gradients go to q and latent. Raises
    ValueError for shapes that do not fit and for a backend that cannot run.

    DeepSeek-AI, 2025, "DeepSeek-V3.2", arXiv 2512.02556.
    """
    op = ListedLatentAttend(block_size, 1, Mask(), float(scale), latent_rank)
    inputs = ListedLatentInputs(q, latent, blocks)
    op.check(inputs)
    documents, _ = documents_of(q, latent, documents)
    op.check_lists(inputs, op.layout(documents), documents)
    return run(OnOneDevice(op), inputs, (op.tile(documents, documents), backend))[0]


class ListedLatentInputs(NamedTuple):
    """q `[B, T, H, R + C]`, latent `[B, S, R + C]`, and the lists `[B, L, 1 or H, M]` of the queries."""

    q: Tensor
    latent: Tensor
    blocks: Tensor


@dataclass(frozen=True)
class ListedLatentAttend(BlockSparseAttend):
    """Block-sparse attention whose only key is a token's row, and whose value is the row's last `latent_rank` dims.

    A row travels once, and so does its gradient.
    """

    record = ListedLatentInputs
    travels = ("latent",)

    latent_rank: int

    def check(self, inputs: ListedLatentInputs) -> None:  # type: ignore[override]
        q, latent, _ = inputs
        if latent.dim() != 3 or not 0 < self.latent_rank <= latent.shape[2]:
            raise ValueError(
                f"latent must be [B, S, R + C] with C = {self.latent_rank}; got {tuple(latent.shape)} for "
                f"q {tuple(q.shape)}"
            )
        check_inputs(q, *self._keys(latent))

    def kv_heads(self, inputs: ListedLatentInputs) -> int:
        return 1

    def width(self, inputs: ListedLatentInputs) -> tuple[int, int]:
        return inputs.q.shape[2], self.latent_rank

    def attend(  # type: ignore[override]
        self, inputs: ListedLatentInputs, received: tuple[Tensor, ...], tile: BlockTile, backend: str
    ) -> tuple[Tensor, Tensor]:
        k, v = self._keys(*received)
        return attend(inputs.q, k, v, inputs.blocks, tile=tile, scale=self.scale, backend=backend)

    def attend_backward(  # type: ignore[override]
        self,
        gradient: Gradient,
        inputs: ListedLatentInputs,
        received: tuple[Tensor, ...],
        tile: BlockTile,
        backend: str,
    ) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        q, (k, v) = inputs.q, self._keys(*received)
        dq, dk, dv = attend_backward(gradient, q, k, v, inputs.blocks, tile=tile, scale=self.scale, backend=backend)
        dk[..., -self.latent_rank :] += dv
        return {"q": dq}, (dk.squeeze(2),)

    def _keys(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Keys `[B, S, 1, R + C]` and values `[B, S, 1, C]`."""
        rows = latent.unsqueeze(2)
        return rows, rows[..., -self.latent_rank :]
