"""Blocks: mixers and a feed-forward layer, joined by a residual scheme."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..parallel.sequence import Sequence
from .layers.normalisation import RMSNorm, norm_of
from .part import Composite, Part
from .published import EMBEDDING


class Block(Composite):
    """Pre-norm residual block.

        x = x + part(norm(x))        for each of `parts` in turn: mixers, then the feed-forward layer

    `[B, T, width]`, and what the parts read, to the same and what they give; see `Part`. A part called `name` comes
    with a norm called `name_norm`, of the kind `norm`: see `norm_of`.
    """

    def __init__(self, *, parts: Mapping[str, Part], width: int, norm_eps: float = 1e-6, norm: str = "rms") -> None:
        super().__init__(parts)
        for name, part in parts.items():
            self.add_module(f"{name}_norm", norm_of(norm, width, norm_eps))
            self.add_module(name, part)

    def norm(self, name: str, x: Tensor) -> Tensor:
        """The norm that belongs to the part `name`."""
        return getattr(self, f"{name}_norm")(x)

    def forward(self, x: Tensor, seq: Sequence, *read: Tensor) -> Tensor | tuple[Tensor, ...]:
        values = dict(zip(self.reads, read, strict=True))
        for name in self.names:
            x = self.step(name, x, seq, values)
        return self.result(x, values)

    def step(self, name: str, x: Tensor, seq: Sequence, values: dict[str, Tensor]) -> Tensor:
        """The residual stream after the part `name`; `values` as in `run`."""
        return x + self.run(name, self.norm(name, x), seq, values)


class ScaledBlock(Block):
    """Residual block that multiplies what its parts return by a constant.

        x = x + multiplier * part(norm(x))

    multiplier: 1.4 / sqrt(depth) in MiniCPM (Hu et al., 2024, arXiv 2404.06395), 0.22 in Granite. Raises ValueError for
    one that is not positive.
    """

    def __init__(
        self,
        *,
        parts: Mapping[str, Part],
        width: int,
        multiplier: float,
        norm_eps: float = 1e-6,
        norm: str = "rms",
    ) -> None:
        super().__init__(parts=parts, width=width, norm_eps=norm_eps, norm=norm)
        if multiplier <= 0:
            raise ValueError(f"model.block.multiplier must be positive; got {multiplier}")
        self.multiplier = multiplier

    def step(self, name: str, x: Tensor, seq: Sequence, values: dict[str, Tensor]) -> Tensor:
        return x + self.multiplier * self.run(name, self.norm(name, x), seq, values)


class OutputNormBlock(Block):
    """Residual block that norms what its parts return, as in OLMo 2 (arXiv 2501.00656).

        x = x + norm(part(x))

    mixers: in layers of these mixers alone, by their names in the pattern; other layers are as in `Block`. OLMo Hybrid
    has so its attention layers. None for all layers. `known`: the names of all mixers of the model. Raises ValueError
    for a name of none of them.
    """

    def __init__(
        self,
        *,
        parts: Mapping[str, Part],
        width: int,
        norm_eps: float = 1e-6,
        norm: str = "rms",
        mixers: list[str] | None = None,
        known: tuple[str, ...] = (),
    ) -> None:
        super().__init__(parts=parts, width=width, norm_eps=norm_eps, norm=norm)
        if unknown := [name for name in mixers or () if name not in known]:
            raise ValueError(
                f"model.block.mixers must be names of model.mixers ({', '.join(known)}); got {', '.join(unknown)}. "
                "Rename them"
            )
        leaves = (leaf for name, part in parts.items() for _, leaf in part.leaves(name))
        own = {leaf.setting.rpartition(".")[2] for leaf in leaves}
        self.of_outputs = mixers is None or not own.isdisjoint(mixers)

    def step(self, name: str, x: Tensor, seq: Sequence, values: dict[str, Tensor]) -> Tensor:
        if not self.of_outputs:
            return super().step(name, x, seq, values)
        return x + self.norm(name, self.run(name, x, seq, values))


class PostNormBlock(Block):
    """Post-norm residual block, as in the first transformer (Vaswani et al., 2017, arXiv 1706.03762).

    x = norm(x + part(x))
    """

    def step(self, name: str, x: Tensor, seq: Sequence, values: dict[str, Tensor]) -> Tensor:
        return self.norm(name, x + self.run(name, x, seq, values))


class SandwichBlock(Block):
    """Residual block that norms what its parts read and what they return, as in Gemma 2 (arXiv 2408.00118).

    x = x + output_norm(part(norm(x)))
    """

    def __init__(self, *, parts: Mapping[str, Part], width: int, norm_eps: float = 1e-6, norm: str = "rms") -> None:
        super().__init__(parts=parts, width=width, norm_eps=norm_eps, norm=norm)
        for name in parts:
            self.add_module(f"{name}_output_norm", norm_of(norm, width, norm_eps))

    def step(self, name: str, x: Tensor, seq: Sequence, values: dict[str, Tensor]) -> Tensor:
        return x + self.norm(f"{name}_output", self.run(name, self.norm(name, x), seq, values))


class ParallelBlock(Composite):
    """Residual block whose parts read one normed input, as in GPT-J and PaLM (arXiv 2204.02311).

    x = x + sum of part(norm(x)) over `parts`: mixers and the feed-forward layer
    """

    def __init__(self, *, parts: Mapping[str, Part], width: int, norm_eps: float = 1e-6, norm: str = "rms") -> None:
        super().__init__(parts)
        self.norm = norm_of(norm, width, norm_eps)
        self.add(parts)

    def forward(self, x: Tensor, seq: Sequence, *read: Tensor) -> Tensor | tuple[Tensor, ...]:
        values = dict(zip(self.reads, read, strict=True))
        normed = self.norm(x)
        for name in self.names:
            x = x + self.run(name, normed, seq, values)
        return self.result(x, values)


class MiniMaxBlock(Block):
    """The residual scheme of MiniMax-01 (arXiv 2501.08313), after DeepNorm (Wang et al., 2022, arXiv 2203.00555).

        x = norm(x)    x = alpha * x + beta * part(x)        for each of `parts` in turn

    The residual path carries the normed value. alpha: by default (2 * depth)^(1/4).
    """

    def __init__(
        self,
        *,
        parts: Mapping[str, Part],
        width: int,
        depth: int,
        alpha: float | None = None,
        beta: float = 1.0,
        norm_eps: float = 1e-6,
        norm: str = "rms",
    ) -> None:
        super().__init__(parts=parts, width=width, norm_eps=norm_eps, norm=norm)
        self.alpha = (2 * depth) ** 0.25 if alpha is None else alpha
        self.beta = beta

    def step(self, name: str, x: Tensor, seq: Sequence, values: dict[str, Tensor]) -> Tensor:
        x = self.norm(name, x)
        out = self.run(name, x, seq, values)
        return torch.add(out if self.beta == 1.0 else self.beta * out, x, alpha=self.alpha)


class ZambaBlock(Block):
    """Residual block whose last part also reads what those before it made (Zamba, arXiv 2405.16712).

        z = part(norm(z))                          for each of `parts` but the last; z is [x; embedding] at first
        x = x + last(norm(x + W z))

    Nothing but the last part writes to the residual stream. Where the first part is not `with_embedding`, z begins as
    x. Without parts before the last it is `Block`.
    """

    def __init__(self, *, parts: Mapping[str, Part], width: int, norm_eps: float = 1e-6, norm: str = "rms") -> None:
        super().__init__(parts=parts, width=width, norm_eps=norm_eps, norm=norm)
        *before, self.last = self.names
        self.branch = nn.Linear(width, width, bias=False) if before else None
        if before and parts[before[0]].with_embedding:
            self.add_module(f"{before[0]}_norm", norm_of(norm, 2 * width, norm_eps))
            self.reads = (*self.reads, EMBEDDING)

    def forward(self, x: Tensor, seq: Sequence, *read: Tensor) -> Tensor | tuple[Tensor, ...]:
        values = dict(zip(self.reads, read, strict=True))
        z = torch.cat([x, values[EMBEDDING]], dim=-1) if EMBEDDING in values else x
        for name in self.names[:-1]:
            z = self.run(name, self.norm(name, z), seq, values)
        last = x if self.branch is None else x + self.branch(z)
        return self.result(x + self.run(self.last, self.norm(self.last, last), seq, values), values)


class SideBySide(Composite):
    """Mixers that read one input; their outputs are summed.

        y = sum of multiplier * scale * norm(mixer(input_multiplier * x)) over the mixers

    norms: an RMS norm of each output. scales: a learned vector `[width]` per mixer, which starts at 1 / (number of
    mixers), as in Hymba (arXiv 2411.13676). multipliers, input_multipliers: constants by the mixers' names, as in
    Falcon-H1 (arXiv 2507.22448). Each is there only where it is asked for. `known`: the names of all mixers of the
    model. Raises ValueError for a multiplier of none of them.
    """

    no_weight_decay: tuple[str, ...] = ()

    def __init__(
        self,
        *,
        parts: Mapping[str, Part],
        width: int,
        norms: bool = False,
        scales: bool = False,
        multipliers: dict[str, float] | None = None,
        input_multipliers: dict[str, float] | None = None,
        known: tuple[str, ...] = (),
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__(parts)
        self.add(parts)
        self.multipliers, self.input_multipliers = dict(multipliers or {}), dict(input_multipliers or {})
        for setting, chosen in (("multipliers", self.multipliers), ("input_multipliers", self.input_multipliers)):
            mixers = known or tuple(parts)
            if unknown := [name for name in chosen if name not in mixers]:
                raise ValueError(
                    f"model.side_by_side.{setting} must be of mixers by their names in the pattern ("
                    f"{', '.join(mixers)}); got {', '.join(unknown)}. Rename them"
                )
        self.norms = nn.ModuleList(RMSNorm(width, norm_eps) for _ in parts) if norms else None
        self.scales = nn.Parameter(torch.empty(len(parts), width)) if scales else None
        if scales:
            self.no_weight_decay = ("scales",)

    def forward(self, x: Tensor, seq: Sequence, *read: Tensor) -> Tensor | tuple[Tensor, ...]:
        values = dict(zip(self.reads, read, strict=True))
        outputs = [self.run(name, _times(x, self.input_multipliers.get(name)), seq, values) for name in self.names]
        if self.norms is not None:
            outputs = [norm(output) for norm, output in zip(self.norms, outputs, strict=True)]
        if self.scales is not None:
            outputs = [scale.to(x.dtype) * output for scale, output in zip(self.scales, outputs, strict=True)]
        outputs = [_times(output, self.multipliers.get(name)) for name, output in zip(self.names, outputs, strict=True)]
        total = outputs[0]
        for output in outputs[1:]:
            total = total + output
        return self.result(total, values)

    def initialise_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> bool:
        if name != "scales":
            return False
        tensor.fill_(1 / len(self.names))
        return True


def _times(x: Tensor, multiplier: float | None) -> Tensor:
    return x if multiplier is None or multiplier == 1.0 else x * multiplier
