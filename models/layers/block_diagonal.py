"""Linear layers whose weight is block-diagonal."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...parallel.sequence import Sequence


class BlockDiagonalLinear(nn.Module):
    """A linear layer for each of `blocks` equal parts of the channels, without bias.

        y_b = W_b x_b          for each block b

    `[..., width]` to `[..., width]`; weights `[blocks, out, in]` of width / blocks each start normal, with variance
    1 / (width / blocks). Raises ValueError where the blocks do not divide the width. As in Griffin (De et al., 2024,
    arXiv 2402.19427).
    """

    matrices = ("weight",)

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        if blocks < 1 or width % blocks:
            raise ValueError(f"blocks must divide the {width} channels; got {blocks}. Change one of them")
        self.weight = nn.Parameter(torch.empty(blocks, width // blocks, width // blocks))

    def forward(self, x: Tensor) -> Tensor:
        parts = x.unflatten(-1, self.weight.shape[::2])
        return torch.einsum("...bi,boi->...bo", parts, self.weight).flatten(-2)

    def flops(self, seq: Sequence) -> int:
        """Forward FLOPs on the tokens of `seq`'s rank."""
        return 2 * seq.places * self.weight.shape[0] * self.weight.shape[1] ** 2

    def initialise_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> bool:
        tensor.normal_(0.0, tensor.shape[-1] ** -0.5, generator=generator)
        return True
