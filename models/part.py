"""Part: the base class of what a block is made of, and composites of parts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ..kernels.pointwise import tiled
from ..parallel.sequence import Sequence


class Clipped(NamedTuple):
    """The layer of the queries, whose rows are those of `heads` heads, and in which the logits are linear."""

    queries: nn.Linear
    heads: int


class Part(nn.Module):
    """A part of a block: `[B, T, D]` of this rank's tokens to the same shape. It states what it costs and reports.

    `forward(x, seq, *read)` takes what the part reads after `seq`. It returns its output; a part that publishes or
    reports returns a tuple: the output, then the tensors of `publishes`, of `losses` and of `sums`, in this order.

    publishes, reads: names of tensors that the part gives to later parts and layers, and of those it takes from earlier
        ones. widths: the size of the last dim of some of these by name, which publisher and reader have to agree on.
    with_embedding: whether x is `[B, T, 2 * width]`: the hidden state and the model's embedding beside it. It takes a
        block that gives both (`ZambaBlock`).
    losses: auxiliary losses and their weights. For each, `forward` returns a scalar, the sum over this rank's tokens;
        the step adds weight * (sum over the global batch) / (sum of `loss_count` over the global batch) to its loss.
    detached: of a loss whose gradient reaches only parameters of one layer inside, since all else is a constant to it,
        the layer's name. The doctor checks that.
    sums: names of tensors that `forward` returns summed over this rank's tokens. After each optimizer step `update`
        gets their sums over the global batch, and `statistics` says what metrics show of them.
    outputs: names of the linear layers that write to the residual stream: their initial values are scaled down with the
        model's depth.
    no_weight_decay: names of own parameters (`"layer.weight"` for those of a layer) that weight decay leaves alone
        though they are matrices, such as the logarithms of decay rates. Those of one dim never decay anyway.
    matrices: names of own parameters, not of those of layers inside, that are matrices, or stacks of them, of the kind
        that linear layers have: Muon steps them too. Any layer can name such parameters.
    in_float32: names of own parameters, not of those of layers inside, that stay in float32 under
        `trainer.dtype=bfloat16`: logarithms of decay rates, biases of decay gates, and what else becomes an exponent
        that is summed over many tokens. Any layer can name such parameters.
    causal: whether outputs depend on no later token; a language model refuses a part that says False.
    stateless: whether decoding keeps nothing of earlier tokens for the part: the output of a token then depends on its
        own input, on its own entries of what the part reads, and on keys that an earlier part keeps. Layers at the end
        of a model that are stateless throughout run on the last token of a prompt alone.
    small: sizes with which a few dozen tokens exercise all of the part. Tests and the doctor replace larger sizes by
        these; the doctor keeps the numbers of heads and groups. A subclass states only what it adds or changes.
    largest_logits: float32 `[heads]`, where they are measured: what `forward` raises to the largest logit of each head;
        see `clipped`.
    setting, label: what messages call the part; set by the model.
    """

    publishes: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    widths: Mapping[str, int] = MappingProxyType({})
    with_embedding: bool = False
    losses: Mapping[str, float] = MappingProxyType({})
    detached: Mapping[str, str] = MappingProxyType({})
    sums: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    no_weight_decay: tuple[str, ...] = ()
    matrices: tuple[str, ...] = ()
    in_float32: tuple[str, ...] = ()
    causal: bool = True
    stateless: bool = False
    small: Mapping[str, int] = MappingProxyType({})
    largest_logits: Tensor | None = None
    setting: str = ""
    label: str = ""

    def forward(self, x: Tensor, seq: Sequence, *read: Tensor) -> Tensor | tuple[Tensor, ...]:
        """See the class."""
        raise NotImplementedError

    @property
    def gives(self) -> tuple[str, ...]:
        """Names of what `forward` returns after its output."""
        return (*self.publishes, *self.losses, *self.sums)

    def flops(self, seq: Sequence) -> int:
        """Forward FLOPs on the tokens of `seq`'s rank: those of the layers inside and of the mixing ops.

        A layer inside that does not run once per token states its own `flops(seq)`; see `flops_of`. Raises ValueError
        where `mixing_flops` is no number.
        """
        count = self.mixing_flops(seq)
        if not isinstance(count, int | float):
            raise ValueError(
                f"mixing_flops must count the FLOPs of the ops as a number; got {count!r} from {type(self).__name__}. "
                "Return 0 where it calls no op"
            )
        return count + sum(flops_of(child, seq) for child in self.children())

    def mixing_flops(self, seq: Sequence) -> int:
        """Forward FLOPs of the ops on the tokens of `seq`'s rank, without those of linear layers."""
        return 0

    def loss_count(self, name: str, seq: Sequence) -> int:
        """The number by which the auxiliary loss `name` is averaged: by default this rank's tokens without padding.

        It depends on documents alone, for the sum over the global batch must be known before the first backward.
        """
        return seq.tokens

    def update(self, sums: Mapping[str, Tensor]) -> None:
        """Updates buffers from the sums over the global batch, float64; runs on every rank alike, without gradient."""
        raise NotImplementedError

    def statistics(self, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Scalars by name that metrics show of a step, from what `update` gets; means over the parts of one name."""
        return {}

    def idle_parameters(self) -> int:
        """How many of its parameters a token does not use."""
        return 0

    def clipped(self) -> Clipped | str | None:
        """How QK-clip makes logits smaller, or why it cannot; None for a part without softmax over tokens."""
        return None

    def at_step(self, step: int) -> None:
        """Told before each step of training, counted from 0: for what changes as a run goes on."""

    def initialise_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> bool:
        """Fill `tensor` for the parameter `name` and return True; or return False for the model's own rule.

        What the constructor gave a parameter counts for nothing: values depend on the seed and the name alone.
        """
        return False

    def leaves(self, path: str) -> Iterator[tuple[str, Part]]:
        """(path, part) of the parts that are not composed of others; `path` is the part's own."""
        yield path, self


class Composite(Part):
    """Parts that a subclass joins: it registers each as a submodule by its name, and calls them through `run`.

    A part can read what a part before it publishes. Each has its own slots and the strategy that is set for its name.
    What the parts report is reported on, as `part.name`.
    """

    def __init__(self, parts: Mapping[str, Part]) -> None:
        super().__init__()
        self.names = tuple(parts)
        self.publishes = tuple(dict.fromkeys(name for part in parts.values() for name in part.publishes))
        published: set[str] = set()
        reads: list[str] = []
        for part in parts.values():
            reads += [name for name in part.reads if name not in published]
            published.update(part.publishes)
        self.reads = tuple(dict.fromkeys(reads))
        self.stateless = all(part.stateless for part in parts.values())
        self.losses = {f"{name}.{loss}": weight for name, part in parts.items() for loss, weight in part.losses.items()}
        self.sums = tuple(f"{name}.{each}" for name, part in parts.items() for each in part.sums)

    def add(self, parts: Mapping[str, Part]) -> None:
        """Registers parts by their names. Raises ValueError for a name that is the composite's own."""
        for name, part in parts.items():
            if hasattr(self, name) or "." in name:
                raise ValueError(f"model.mixers must have other names side by side; got {name!r}. Rename that mixer")
            self.add_module(name, part)

    def part(self, name: str) -> Part:
        """The part called `name`."""
        return cast(Part, getattr(self, name))

    def run(self, name: str, x: Tensor, seq: Sequence, values: dict[str, Tensor]) -> Tensor:
        """The output of a part. What it reads is in `values`, and what it gives is put there."""
        part = self.part(name)
        read = [values[each] for each in part.reads]
        result = part(x, seq.within(name, part.setting.rpartition(".")[2]), *read)
        if not part.gives:
            return result
        keys = (*part.publishes, *(f"{name}.{each}" for each in (*part.losses, *part.sums)))
        values.update(zip(keys, result[1:], strict=True))
        return result[0]

    def result(self, x: Tensor, values: dict[str, Tensor]) -> Tensor | tuple[Tensor, ...]:
        """What `forward` returns: the output and what the parts gave."""
        return (x, *(values[name] for name in self.gives)) if self.gives else x

    def leaves(self, path: str) -> Iterator[tuple[str, Part]]:
        for name in self.names:
            yield from self.part(name).leaves(f"{path}.{name}")


class FeedForward(Part):
    """What a block does with each token by itself: `forward(x, seq)`, `[B, T, D]` to the same.

    Constructors take what those of a `Mixer` may take; the last linear layer is called `down`. A subclass defines
    `each`, or a forward that computes through `by_tiles`.

    tile: how many tokens are computed at once; None for all. in_tiles: whether `by_tiles` has run with one.
    """

    outputs = ("down",)
    tile: int | None = None
    in_tiles: bool = False

    def forward(self, x: Tensor, seq: Sequence) -> Tensor | tuple[Tensor, ...]:
        return self.by_tiles(self.each, x)

    def each(self, x: Tensor) -> Tensor:
        """What the layer makes of tokens `[…, D]`, of each by itself."""
        raise NotImplementedError

    def by_tiles(self, compute: Callable[..., Any], *tokens: Tensor) -> Any:
        """compute(*tokens) of tensors `[B, T, …]`, which it may get as `[n, …]`, for `tile` tokens at a time.

        It returns `[…, D]`, or a tuple of that and of sums over tokens; see `tiled`.
        """
        if self.tile is None:
            return compute(*tokens)
        self.in_tiles = True
        weights = [parameter for _, parameter in named_weights(self)]
        out, *sums = tiled(compute, tuple(x.flatten(0, 1) for x in tokens), weights, self.tile)
        out = out.view(*tokens[0].shape[:2], *out.shape[1:])
        return (out, *sums) if sums else out


def tile(parts: Iterable[Part], tokens: int | None) -> None:
    """Has feed-forward layers compute so many tokens at once; None for all of them.

    Raises ValueError for a number below 1, and where there is no such layer.
    """
    if tokens is None:
        return
    if tokens < 1:
        raise ValueError(f"tile_tokens must be at least 1; got {tokens}. 4096 is usual, null computes all at once")
    layers = [part for part in parts if isinstance(part, FeedForward)]
    if not layers:
        raise ValueError(
            f"tile_tokens must be null for a model without feed-forward layers; got {tokens}. Leave it out"
        )
    for layer in layers:
        layer.tile = tokens


def flops_of(module: nn.Module, seq: Sequence) -> int:
    """Forward FLOPs of a module: what it states in `flops(seq)`; else those of its layers, each run once per token.

    Tokens are those of `seq`'s rank, padding included.
    """
    if (stated := getattr(module, "flops", None)) is not None:
        return stated(seq)
    if isinstance(module, nn.Linear):
        return linear_flops(module, seq.places)
    return sum(flops_of(child, seq) for child in module.children())


def linear_flops(module: nn.Module, rows: int) -> int:
    """Forward FLOPs of the linear layers in a module, on so many rows: 2 per weight and row."""
    return 2 * rows * sum(m.in_features * m.out_features for m in module.modules() if isinstance(m, nn.Linear))


class Cut(NamedTuple):
    """Of a weight by expert that ranks share out: its whole shape, and the experts that this rank holds."""

    shape: torch.Size
    held: range


def shape_of(parameter: Tensor) -> torch.Size:
    """The whole parameter's shape; ZeRO-3 leaves an empty tensor and a note, a rank of several its experts' part."""
    if (cut := getattr(parameter, "cut", None)) is not None:
        return cut.shape
    return getattr(parameter, "ds_shape", parameter.shape)


def is_sharded(parameter: Tensor) -> bool:
    """Whether ZeRO-3 has the parameter, and gathers it for the calls of the module that owns it alone."""
    return hasattr(parameter, "ds_shape")


def named_weights(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter once, by name, in the model's order, with those of experts that this rank alone holds.

    Under `parallel.experts` the latter are attributes of their layers, and not among torch's `parameters()`.
    """
    seen: set[int] = set()
    for path, module in model.named_modules():
        own = {name: vars(module)[name] for name in getattr(module, "by_expert", ()) if name in vars(module)}
        for name, parameter in (*module.named_parameters(recurse=False), *own.items()):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield f"{path}.{name}" if path else name, parameter


def cast_parameters(module: nn.Module, dtype: torch.dtype) -> None:
    """Casts all parameters to `dtype`, those that their layers name in `in_float32` to no less than float32."""
    for each in module.modules():
        cast_own_parameters(each, dtype)


def cast_own_parameters(module: nn.Module, dtype: torch.dtype) -> None:
    """As `cast_parameters`, without the parameters of layers inside."""
    exact = torch.promote_types(dtype, torch.float32)
    for name, parameter in module.named_parameters(recurse=False):
        parameter.data = parameter.data.to(exact if name in getattr(module, "in_float32", ()) else dtype)
