"""Blocks: a mixer and a feed-forward layer, joined by a residual scheme."""

from __future__ import annotations

from torch import Tensor, nn

from ..parallel.sequence import Sequence
from .layers.normalisation import RMSNorm
from .mixer import Mixer


class Block(nn.Module):
    """Pre-norm residual block.

        x = x + mixer(norm(x))        x = x + feed_forward(norm(x))

    `[B, T, width]`, and what the mixer reads, to the same and a tuple of what the mixer publishes.
    """

    def __init__(self, *, mixer: Mixer, feed_forward: nn.Module, width: int, norm_eps: float = 1e-6) -> None:
        super().__init__()
        self.mixer_norm = RMSNorm(width, norm_eps)
        self.mixer = mixer
        self.feed_forward_norm = RMSNorm(width, norm_eps)
        self.feed_forward = feed_forward

    def forward(self, x: Tensor, seq: Sequence, *read: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        mixed, published = self.mix(self.mixer_norm(x), seq, read)
        x = x + mixed
        return x + self.feed_forward(self.feed_forward_norm(x)), published

    def mix(self, x: Tensor, seq: Sequence, read: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The mixer's output, and what it publishes."""
        result = self.mixer(x, seq, *read)
        return (result[0], result[1:]) if self.mixer.publishes else (result, ())


class MiniMaxBlock(Block):
    """The residual scheme of MiniMax-01 (arXiv 2501.08313), after DeepNorm (Wang et al., 2022, arXiv 2203.00555).

        x = norm(x)    x = alpha * x + beta * mixer(x)    x = norm(x)    x = alpha * x + beta * feed_forward(x)

    The residual path carries the normed value. alpha: (2 * depth)^(1/4) unless given.
    """

    def __init__(
        self,
        *,
        mixer: Mixer,
        feed_forward: nn.Module,
        width: int,
        depth: int,
        alpha: float | None = None,
        beta: float = 1.0,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__(mixer=mixer, feed_forward=feed_forward, width=width, norm_eps=norm_eps)
        self.alpha = (2 * depth) ** 0.25 if alpha is None else alpha
        self.beta = beta

    def forward(self, x: Tensor, seq: Sequence, *read: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        x = self.mixer_norm(x)
        mixed, published = self.mix(x, seq, read)
        x = self.feed_forward_norm(self.alpha * x + self.beta * mixed)
        return self.alpha * x + self.beta * self.feed_forward(x), published
