"""LanguageModel: a pattern of mixers becomes blocks, and tokens become logits or a loss."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..kernels.documents import Documents
from ..kernels.operation import Kept
from ..kernels.pointwise import cross_entropy, embedding, loss_and_correct
from ..parallel.sequence import Sequence
from .block import Block
from .layers.normalisation import RMSNorm
from .mixer import RECIPE, Mixer, check_mixer, construct, name_of, naming

NO_TARGET = -100
NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)  # of torch, whose weights start at 1 as ours do
CHECKPOINTING = ("none", "full", "mixing")

Part = Callable[..., nn.Module]
Gather = Callable[[list[nn.Parameter]], AbstractContextManager]


class Embedding(nn.Embedding):
    """The input layer: tokens int64 `[B, T]` to `[B, T, D]`."""

    def forward(self, tokens: Tensor) -> Tensor:
        return embedding(tokens, self.weight)


class Head(nn.Linear):
    """The output layer; given targets it returns their loss, so that the logits of a sequence never exist at once.

    hidden `[B, T, D]` to logits `[B, T, Vocab]`; with targets int64 `[B, T]` (−100 = none) to the sum of the token
    losses, a scalar in float32 or, for float64, float64. The loss is computed in here because this is where ZeRO-3
    gathers the weight. With `correct`, for evaluation: without gradient, and also the number of targets that have the
    largest logit.
    """

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__(width, vocabulary, bias=False)

    def forward(
        self, hidden: Tensor, targets: Tensor | None = None, correct: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        if targets is None:
            return super().forward(hidden)
        if correct:
            return loss_and_correct(hidden, self.weight, targets)
        return cross_entropy(hidden, self.weight, targets)


class LanguageModel(nn.Module):
    """Embedding, blocks by a pattern of mixers, norm and head.

    vocabulary, width, depth: tokens, size of the residual stream, number of blocks.
    pattern: names of `mixers`, with `name*n` for repetition; tiled to `depth`.
    mixers, feed_forward, block: partials (`_partial_: true` in YAML), called with those of `width`, `depth`, `layer`,
        `occurrence` (see `Mixer`) and `norm_eps` that their signatures declare; `block` (default pre-norm) also with
        `mixer` and `feed_forward`.
    tied_embeddings: the head's weight is the embedding's.
    activation_checkpointing: "none"; "full", which recomputes each block in backward; "mixing", which does too but
        keeps what the mixing ops computed, so that no collective is repeated.
    initial_std: of the normal distribution of weights; see `initialise`.

    Raises ValueError for settings that do not fit; each layer checks its own before it allocates anything.
    """

    def __init__(
        self,
        *,
        vocabulary: int,
        width: int,
        depth: int,
        pattern: list[str],
        mixers: dict[str, Part],
        feed_forward: Part,
        block: Part | None = None,
        norm_eps: float = 1e-6,
        tied_embeddings: bool = False,
        activation_checkpointing: str = "none",
        initial_std: float = 0.02,
    ) -> None:
        super().__init__()
        for name, value in (("vocabulary", vocabulary), ("width", width), ("depth", depth)):
            if value < 1:
                raise ValueError(f"model.{name} must be at least 1; got {value}")
        if activation_checkpointing not in CHECKPOINTING:
            known = ", ".join(CHECKPOINTING)
            raise ValueError(f"activation_checkpointing must be one of {known}; got {activation_checkpointing!r}")
        self.names = names = expand_pattern(pattern, depth, list(mixers))  # of the mixer of each layer
        self.vocabulary, self.width, self.depth = vocabulary, width, depth
        self.activation_checkpointing = activation_checkpointing
        self.initial_std = initial_std

        def build(layer: int) -> nn.Module:
            name = names[layer]
            occurrence = names[:layer].count(name)
            context = {
                "width": width, "depth": depth, "layer": layer, "occurrence": occurrence, "norm_eps": norm_eps,
            }  # fmt: skip
            setting = f"model.mixers.{name}"
            mixer = check_mixer(construct(mixers[name], setting, **context), setting)
            rest = construct(feed_forward, "model.feed_forward", **context)
            return construct(block or Block, "model.block", mixer=mixer, feed_forward=rest, **context)

        self.blocks = nn.ModuleList(build(layer) for layer in range(depth))
        check_reads(self.mixers)
        self.embedding = Embedding(vocabulary, width)
        self.norm = RMSNorm(width, norm_eps)
        self.head = Head(width, vocabulary)
        if tied_embeddings:
            self.head.weight = self.embedding.weight

    def forward(
        self, tokens: Tensor, seq: Sequence, targets: Tensor | None = None, correct: bool = False
    ) -> Tensor | tuple[Tensor, ...]:
        """Logits `[B, T, Vocab]`; given targets, (sum of the token losses, number of targets) of the tokens held here.

        tokens, targets: int64 `[B, T]`; a target of −100 counts for nothing. Without any target the loss is a zero
        that every parameter is connected to. With `correct`, for evaluation: without a gradient of the head, and third
        the number of targets that have the largest logit.
        """
        hidden = self.hidden(tokens, seq)
        if targets is None:
            return self.head(hidden)
        count = (targets != NO_TARGET).sum()
        if correct:
            loss, right = self.head(hidden, targets, True)
            return loss, count, right
        return self.head(hidden, targets), count

    def hidden(self, tokens: Tensor, seq: Sequence) -> Tensor:
        """`[B, T, D]`: what the head reads."""
        x = self.embedding(tokens)
        shared: dict[str, Tensor] = {}  # what mixers gave to later layers
        recompute = self.activation_checkpointing != "none" and seq.cache is None and torch.is_grad_enabled()
        for layer, (block, mixer) in enumerate(zip(self.blocks, self.mixers, strict=True)):
            here = seq.at(layer, self.names[layer])
            read = [shared[name] for name in mixer.reads]
            if recompute and self.activation_checkpointing == "mixing":
                here = replace(here, kept=Kept())
            with self.naming(layer):
                if recompute:
                    outputs = checkpoint(block, x, here, *read, use_reentrant=False, preserve_rng_state=False)
                else:
                    outputs = block(x, here, *read)
            x, published = cast(tuple[Tensor, tuple[Tensor, ...]], outputs)
            shared.update(zip(mixer.publishes, published, strict=True))
        return self.norm(x)

    @property
    def mixers(self) -> list[Mixer]:
        """The mixer of each layer."""
        return [cast(Mixer, block.mixer) for block in self.blocks]

    def naming(self, layer: int) -> AbstractContextManager[None]:
        """Errors within say which part of this layer they are of: see `mixer.naming`."""
        block = self.blocks[layer]
        feed_forward = f"model.feed_forward ({name_of(type(block.feed_forward))}), layer {layer}"
        owners = {self._mixer_name(layer): block.mixer, feed_forward: block.feed_forward}
        return naming(f"model.block ({name_of(type(block))}), layer {layer}", cast(dict[str, nn.Module], owners))

    def _mixer_name(self, layer: int) -> str:
        return f"model.mixers.{self.names[layer]} ({name_of(type(self.blocks[layer].mixer))}), layer {layer}"

    def at_step(self, step: int) -> None:
        """Tells every mixer at which step of training the model is, counted from 0: see `Mixer.at_step`."""
        for layer, mixer in enumerate(self.mixers):
            with naming(self._mixer_name(layer)):
                mixer.at_step(step)

    def parameter_count(self) -> int:
        """Parameters, shared ones once. Under ZeRO-3 the tensors are empty and carry their size in `ds_numel`."""
        return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in self.parameters())

    def flops(self, documents: Documents) -> int:
        """Forward FLOPs on whole rows: linear layers at 2 a weight and token, padding included, and the mixers' ops."""
        seq = Sequence.single(documents)
        weights = sum(m.in_features * m.out_features for m in self.modules() if isinstance(m, nn.Linear))
        linear = 2 * weights * documents.batch * documents.length
        return linear + sum(self._mixing_flops(layer, mixer, seq) for layer, mixer in enumerate(self.mixers))

    def _mixing_flops(self, layer: int, mixer: Mixer, seq: Sequence) -> int:
        with naming(self._mixer_name(layer)):
            count = mixer.mixing_flops(seq)
        if not isinstance(count, int | float):
            raise ValueError(
                f"model.mixers.{self.names[layer]} must count its ops' FLOPs as a number; got {count!r} from "
                f"{name_of(type(mixer))}.mixing_flops. Return 0 where it calls no op"
            )
        return count

    @torch.no_grad()
    def initialise(self, seed: int, gather: Gather | None = None) -> None:
        """Gives every parameter its initial value, which depends on the seed and the parameter's name alone.

        Weights are normal with `initial_std`, those that write to the residual stream (a mixer's `output`, a feed-
        forward layer's `down`) divided by sqrt(2 * depth); norms start at 1 and biases at 0; a layer may set its own
        in `initialise_parameter`. Values are drawn on the CPU in float32, whatever the device and dtype. `gather`
        is entered with one parameter at a time, so that no rank holds the whole of a ZeRO-3 model.
        """
        for name, parameter in self.named_parameters():
            with gather([parameter]) if gather else nullcontext():
                parameter.copy_(self._initial_value(name, parameter.shape, seed))

    def check_initial_values(self) -> None:
        """Raises ValueError for a parameter that gets no initial value: a vector of which no layer knows the value."""
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                self._initial_value(name, parameter.shape, seed=0)

    def _initial_value(self, name: str, shape: torch.Size, seed: int) -> Tensor:
        digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
        generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest, "big") >> 1)
        value = torch.empty(shape, dtype=torch.float32, device="cpu")
        path = name.split(".")
        for cut in range(1, len(path)):  # from the outermost module inwards: a mixer knows more than its layers
            module = self.get_submodule(".".join(path[:cut]))
            own = getattr(module, "initialise_parameter", None)
            if own is None:
                if isinstance(module, NORMS) and path[cut:] == ["weight"]:
                    return value.fill_(1.0)
                continue
            with self.naming(int(path[1])) if path[0] == "blocks" else nullcontext():
                done = own(".".join(path[cut:]), value, generator)
            if not isinstance(done, bool):
                raise ValueError(
                    f"{name} must be answered for with True or False; got {done!r} from initialise_parameter of "
                    f"{name_of(type(module))}. Return True where it has filled the tensor, and False elsewhere"
                )
            if done:
                return value
        if path[-1] == "bias":
            return value.zero_()
        if value.dim() < 2:
            part = f" of model.mixers.{self.names[int(path[1])]}" if path[::2][:2] == ["blocks", "mixer"] else ""
            raise ValueError(
                f"{name}{part} must get its initial value from initialise_parameter of its mixer or layer; it is not a "
                f"matrix, and has no other. Fill the tensor there and return True, as {RECIPE} shows"
            )
        writes_residual = path[-3:-1] == ["mixer", "output"] or path[-3:-1] == ["feed_forward", "down"]
        scale = 1 / math.sqrt(2 * self.depth) if writes_residual else 1.0
        return value.normal_(0.0, self.initial_std * scale, generator=generator)


def check_reads(mixers: list[Mixer]) -> None:
    """Raises ValueError for a mixer that reads what no earlier layer publishes."""
    published: set[str] = set()
    for layer, mixer in enumerate(mixers):
        missing = [name for name in mixer.reads if name not in published]
        if missing:
            raise ValueError(
                f"model.pattern must publish what layer {layer} reads before it; got no {', '.join(missing)} from the "
                f"layers before {type(mixer).__name__}. Put a layer that publishes it first"
            )
        published.update(mixer.publishes)


def expand_pattern(pattern: list[str], depth: int, known: list[str]) -> list[str]:
    """The mixer of each layer: `["lightning*7", "softmax"]` is eight names, repeated to `depth`.

    Raises ValueError for unknown names, for mixers that the pattern does not use, and for a depth that it does not
    divide.
    """
    names: list[str] = []
    for item in pattern:
        name, star, times = item.partition("*")
        if name not in known:
            raise ValueError(f"model.pattern must use names of model.mixers ({', '.join(known)}); got {name!r}")
        if star and (not times.isdecimal() or int(times) < 1):
            raise ValueError(f"model.pattern must repeat a name by a positive number, as in {name}*3; got {item!r}")
        names += [name] * (int(times) if star else 1)
    unused = [name for name in known if name not in names]
    if unused:
        raise ValueError(f"model.mixers must all occur in model.pattern; got {', '.join(unused)} besides. Remove them")
    if not names or depth % len(names):
        raise ValueError(
            f"model.depth must be a multiple of the pattern's {len(names)} layers; got {depth}. "
            "Change model.depth or model.pattern"
        )
    return names * (depth // len(names))
