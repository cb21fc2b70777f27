"""Hyper-connections: blocks whose residual stream is several streams, mixed anew for every token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.pointwise import doubly_stochastic
from ...parallel.sequence import Sequence
from ..block import Block
from ..layers.normalisation import norm_of
from ..mixer import also_takes

EPS = 1e-6  # of the reads and of Sinkhorn's sums, as in DeepSeek-V4
START = 0.01  # of what makes connections depend on the token


class HyperConnection(nn.Module):
    """The connections of a part to `streams` residual streams X `[B, T, n, D]`, made from these streams.

        read_i = (read + scale_1 tanh(norm(X_i) W_1))_i            write_i likewise, with scale_2 and W_3
        mix_ij = (mix + scale_1 tanh(norm(X_i) W_2))_ij

    Returns read, write `[B, T, n]` and mix `[B, T, n, n]`, in float32 at least. `number`: of the part in the model. At
    first the part reads the stream number mod n, and writes to all (Zhu et al., 2024, arXiv 2409.19606).
    """

    no_weight_decay = ("static",)
    in_float32 = ("static", "scales")

    def __init__(self, width: int, streams: int, number: int, norm: str, norm_eps: float) -> None:
        super().__init__()
        self.streams, self.number = streams, number
        self.norm = norm_of(norm, width, norm_eps)
        self.dynamic = nn.Linear(width, streams + 2, bias=False)  # of a stream: its read, its mix, its write
        self.static = nn.Parameter(torch.empty(streams, streams + 2))
        self.scales = nn.Parameter(torch.empty(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        wide = torch.promote_types(x.dtype, torch.float32)
        dynamic = self.dynamic(self.norm(x)).to(wide).tanh()
        scales = torch.cat([self.scales[:1].expand(self.streams + 1), self.scales[1:]]).to(wide)
        read, mix, write = (self.static.to(wide) + scales * dynamic).split([1, self.streams, 1], dim=-1)
        return read.squeeze(-1), write.squeeze(-1), mix

    def flops(self, seq: Sequence) -> int:
        return 2 * seq.places * self.streams * self.dynamic.weight.shape[0] * self.dynamic.in_features

    def initialise_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> bool:
        if name == "static":
            n = self.streams
            tensor.zero_()
            tensor[self.number % n, 0] = 1.0
            tensor[:, 1 : n + 1] = torch.eye(n)
            tensor[:, n + 1] = 1.0
        elif name == "scales":
            tensor.fill_(START)
        elif name == "dynamic.weight":
            tensor.zero_()
        else:
            return False
        return True


class OfAllStreams(nn.Module):
    """Base of what is made from all streams of a token, as one vector x.

    z = scale * (W x / sqrt(mean(x^2) + eps)) + bias        in parts of so many numbers, each with a scale of its own
    """

    in_float32 = ("scales", "bias")

    def __init__(self, width: int, streams: int, parts: tuple[int, ...], norm_eps: float) -> None:
        super().__init__()
        self.streams, self.parts, self.norm_eps = streams, parts, norm_eps
        self.projection = nn.Linear(streams * width, sum(parts), bias=False)
        self.scales = nn.Parameter(torch.empty(len(parts)))
        self.bias = nn.Parameter(torch.empty(sum(parts)))

    def numbers(self, x: Tensor) -> tuple[Tensor, ...]:
        """z of x `[B, T, n, D]`, part after part, in float32 at least."""
        wide, flat = torch.promote_types(x.dtype, torch.float32), x.flatten(2)
        size = torch.linalg.vector_norm(flat, dim=-1, keepdim=True, dtype=wide)
        numbers = self.projection(flat).to(wide) * (size.square() / flat.shape[-1] + self.norm_eps).rsqrt()
        parts = zip(numbers.split(self.parts, -1), self.bias.to(wide).split(self.parts), self.scales, strict=True)
        return tuple(part * scale.to(wide) + bias for part, bias, scale in parts)

    def initialise_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> bool:
        if name == "scales":
            tensor.fill_(START)
        elif name == "bias":
            tensor.zero_()
        else:
            return False
        return True


class ManifoldConnection(OfAllStreams):
    """The connections of a part to the streams X, with a mix that is doubly stochastic (arXiv 2512.24880).

        read = sigmoid(z_1) + eps        write = 2 sigmoid(z_2)        mix = Sinkhorn(exp(z_3))

    z: `OfAllStreams`. Returns read, write `[B, T, n]` and mix `[B, T, n, n]`, as `HyperConnection` does. As everything
    starts near read = 1/2, write = 1 and a uniform mix, streams that are equal go on as one pre-norm residual stream.
    """

    def __init__(self, width: int, streams: int, iterations: int, norm_eps: float) -> None:
        super().__init__(width, streams, (streams, streams, streams * streams), norm_eps)
        self.iterations = iterations

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        read, write, mix = self.numbers(x)
        mix = doubly_stochastic(mix.unflatten(-1, (self.streams, -1)), self.iterations, EPS)
        return read.sigmoid() + EPS, 2 * write.sigmoid(), mix


class LearnedReadout(OfAllStreams):
    """X `[B, T, n, D]` to `[B, T, D]`, sum_i (sigmoid(z) + eps)_i X_i: the end of the streams, as in DeepSeek-V4."""

    def __init__(self, width: int, streams: int, norm_eps: float) -> None:
        super().__init__(width, streams, (streams,), norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        (read,) = self.numbers(x)
        return _read(read.sigmoid() + EPS, x)


class HyperConnectionBlock(Block):
    """Block with n residual streams X `[B, T, n, D]` (hyper-connections, Zhu et al., 2024, arXiv 2409.19606).

        x = sum_i read_i X_i    y = part(norm(x))    X_j = sum_i mix_ij X_i + write_j y        for each of `parts`

    Connections: see `HyperConnection`. The model's first block copies the embedding to all streams, and the last adds
    them up. Everything is done token by token. Raises ValueError for less than 2 streams.
    """

    @also_takes(Block)
    def __init__(
        self, *, width: int, before: int, last: bool, streams: int = 4, norm_eps: float = 1e-6, norm: str = "rms",
        **block: Any,
    ) -> None:  # fmt: skip
        super().__init__(width=width, norm_eps=norm_eps, norm=norm, **block)
        if streams < 2:
            raise ValueError(f"model.block.streams must be at least 2; got {streams}. Leave model.block out for one")
        self.streams, self.width, self.first, self.last = streams, width, before == 0, last
        for number, name in enumerate(self.names, before):
            self.add_module(f"{name}_connection", self.connection(number, norm, norm_eps))

    def connection(self, number: int, norm: str, norm_eps: float) -> nn.Module:
        """The connections of the part of this number, counted through all blocks."""
        return HyperConnection(self.width, self.streams, number, norm, norm_eps)

    def readout(self, x: Tensor) -> Tensor:
        """The streams `[B, T, n, D]` as the one that leaves the last block."""
        return x.sum(2)

    def forward(self, x: Tensor, seq: Sequence, *read: Tensor) -> Tensor | tuple[Tensor, ...]:
        if self.first:
            x = x.unsqueeze(2).expand(-1, -1, self.streams, -1)
        values = dict(zip(self.reads, read, strict=True))
        for name in self.names:
            x = self.step(name, x, seq, values)
        return self.result(self.readout(x) if self.last else x, values)

    def step(self, name: str, x: Tensor, seq: Sequence, values: dict[str, Tensor]) -> Tensor:
        read, write, mix = getattr(self, f"{name}_connection")(x)
        out = self.run(name, self.norm(name, _read(read, x)), seq, values)
        return mix.to(x.dtype).transpose(-1, -2) @ x + write.to(x.dtype).unsqueeze(-1) * out.unsqueeze(2)

    def mixing_flops(self, seq: Sequence) -> int:
        # Multiply and add: n numbers are read and n written, n * n mixed, for each of D channels.
        n = self.streams
        return 2 * seq.places * self.width * (len(self.names) * (n * n + 2 * n) + n * self.last)


class ManifoldHyperConnectionBlock(HyperConnectionBlock):
    """Block with n residual streams whose mix is doubly stochastic (mHC, Xie et al., 2025, arXiv 2512.24880).

    As `HyperConnectionBlock`, with `ManifoldConnection`; the last block's `LearnedReadout` makes one stream of them.
    iterations: of Sinkhorn's normalisation. Raises ValueError for less than 2 streams or 1 iteration.
    """

    @also_takes(HyperConnectionBlock)
    def __init__(self, *, last: bool, iterations: int = 20, norm_eps: float = 1e-6, **block: Any) -> None:
        if iterations < 1:
            raise ValueError(f"model.block.iterations must be at least 1; got {iterations}. 20 are usual")
        self.iterations = iterations
        super().__init__(last=last, norm_eps=norm_eps, **block)
        self.final = LearnedReadout(self.width, self.streams, norm_eps) if last else None

    def connection(self, number: int, norm: str, norm_eps: float) -> nn.Module:
        return ManifoldConnection(self.width, self.streams, self.iterations, norm_eps)

    def readout(self, x: Tensor) -> Tensor:
        assert self.final is not None
        return self.final(x)


def _read(shares: Tensor, x: Tensor) -> Tensor:
    """sum_i shares_i X_i of X `[B, T, n, D]`."""
    return (shares.to(x.dtype).unsqueeze(-2) @ x).squeeze(-2)
