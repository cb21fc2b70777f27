"""LanguageModel: a pattern of mixers becomes blocks, and tokens become logits or a loss."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
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
from .block import Block, SideBySide
from .layers.normalisation import norm_of
from .mixer import RECIPE, check_composite, check_part, construct, name_of, naming
from .part import Composite, Part, flops_of, named_weights, shape_of
from .pattern import expand_pattern, stages

NO_TARGET = -100
NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)  # of torch, whose weights start at 1 as ours do
CHECKPOINTING = ("none", "full", "mixing")

Partial = Callable[..., nn.Module]
Gather = Callable[[list[nn.Parameter]], AbstractContextManager]
Write = Callable[[nn.Parameter, int], AbstractContextManager]


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
    pattern: names of `mixers`, with `name*n` for repetition, `a+b` for mixers side by side and `a|b` for mixers in
        sequence; tiled to `depth`. See `longreach.models.pattern`.
    mixers, feed_forward, block, side_by_side: partials (`_partial_: true` in YAML), called with those of `width`,
        `depth`, `layer`, `occurrence` (see `Mixer`) and `norm_eps` that their signatures declare. `mixers` may hold
        feed-forward layers too, and `feed_forward` may be None: then the pattern says where they stand.
        `block` (default: pre-norm) and `side_by_side` (default: a plain sum) join them, and get them as `parts`.
    norm: of blocks and before the head: "rms", "unweighted_rms", "layer", or "unbiased_layer".
    embedding_norm: whether the embedding is normed too, as in RWKV.
    tied_embeddings: the head's weight is the embedding's.
    activation_checkpointing: "none"; "full", which recomputes each block in backward; "mixing", which does too but
        keeps what the mixing ops computed, so that no collective is repeated.
    initial_std: of the normal distribution of weights; see `initialise`. embedding_std: of the embedding's, where it is
        to be another; the embedding is not tied to the head then.

    Raises ValueError for settings that do not fit; each layer checks its own before it allocates anything.
    """

    def __init__(
        self,
        *,
        vocabulary: int,
        width: int,
        depth: int,
        pattern: list[str],
        mixers: dict[str, Partial],
        feed_forward: Partial | None = None,
        block: Partial | None = None,
        side_by_side: Partial | None = None,
        norm: str = "rms",
        norm_eps: float = 1e-6,
        embedding_norm: bool = False,
        tied_embeddings: bool = False,
        activation_checkpointing: str = "none",
        initial_std: float = 0.02,
        embedding_std: float | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("vocabulary", vocabulary), ("width", width), ("depth", depth)):
            if value < 1:
                raise ValueError(f"model.{name} must be at least 1; got {value}")
        if activation_checkpointing not in CHECKPOINTING:
            known = ", ".join(CHECKPOINTING)
            raise ValueError(f"activation_checkpointing must be one of {known}; got {activation_checkpointing!r}")
        self.names = expand_pattern(pattern, depth, list(mixers))  # of the mixers of each layer
        self.mixer_names = tuple(mixers)
        if side_by_side is not None and not any("+" in name for name in self.names):
            raise ValueError("model.side_by_side must come with a pattern that has mixers side by side, as in a+b")
        self.vocabulary, self.width, self.depth = vocabulary, width, depth
        self.activation_checkpointing = activation_checkpointing
        if embedding_std is not None and tied_embeddings:
            raise ValueError(
                f"model.embedding_std must be null with tied_embeddings; got {embedding_std}. Set model.initial_std, "
                "by which the head's weight starts"
            )
        self.initial_std, self.embedding_std = initial_std, embedding_std
        occurrences: Counter[str] = Counter()

        def build(layer: int) -> nn.Module:
            context = {"width": width, "depth": depth, "layer": layer, "norm_eps": norm_eps}

            def make(partial: Partial, setting: str) -> Part:
                made = construct(partial, setting, occurrence=occurrences[setting], **context)
                occurrences[setting] += 1
                part = check_part(made, setting)
                if not part.causal:
                    raise ValueError(
                        f"{setting}.causal must be true in a language model; got false. It would see the tokens that "
                        "it predicts"
                    )
                part.setting, part.label = setting, f"{setting} ({name_of(type(part))}), layer {layer}"
                return part

            def join(names: list[str]) -> Part:
                together = {name: make(mixers[name], f"model.mixers.{name}") for name in names}
                if len(together) == 1:
                    return together[names[0]]
                beside = side_by_side or SideBySide
                return check_composite(
                    construct(beside, "model.side_by_side", parts=together, **context), "side_by_side"
                )

            joined = [join(names) for names in stages(self.names[layer])]
            several = len(joined) > 1
            parts = {f"mixer_{number}" if several else "mixer": part for number, part in enumerate(joined, 1)}
            if feed_forward is not None:
                parts["feed_forward"] = make(feed_forward, "model.feed_forward")
            return check_composite(
                construct(block or Block, "model.block", parts=parts, norm=norm, **context), "model.block"
            )

        self.blocks = nn.ModuleList(build(layer) for layer in range(depth))
        check_reads(self)
        self.embedding = Embedding(vocabulary, width)
        self.embedding_norm = norm_of(norm, width, norm_eps) if embedding_norm else None
        self.norm = norm_of(norm, width, norm_eps)
        self.head = Head(width, vocabulary)
        if tied_embeddings:
            self.head.weight = self.embedding.weight

    def forward(
        self,
        tokens: Tensor,
        seq: Sequence,
        targets: Tensor | None = None,
        correct: bool = False,
        reports: bool = False,
    ) -> Tensor | tuple[Tensor | dict[str, Tensor], ...]:
        """Logits `[B, T, Vocab]`; given targets, (sum of the token losses, number of targets) of this rank's tokens.

        tokens, targets: int64 `[B, T]`; a target of −100 counts for nothing. Without any target the loss is a zero
        that every parameter is connected to. With `correct`, for evaluation: without a gradient of the head, and third
        the number of targets that have the largest logit. With `reports`, for training: last, by path, what the parts
        report of `losses` and `sums`; see `Part`. The loss holds none of it.
        """
        hidden, reported = self._run(tokens, seq)
        if targets is None:
            return self.head(hidden)
        results: tuple[Tensor | dict[str, Tensor], ...]
        count = (targets != NO_TARGET).sum()
        if correct:
            loss, right = self.head(hidden, targets, True)
            results = loss, count, right
        else:
            results = self.head(hidden, targets), count
        return (*results, reported) if reports else results

    def hidden(self, tokens: Tensor, seq: Sequence) -> Tensor:
        """`[B, T, D]`: what the head reads."""
        return self._run(tokens, seq)[0]

    def _run(self, tokens: Tensor, seq: Sequence) -> tuple[Tensor, dict[str, Tensor]]:
        """What the head reads, and by path what the parts report."""
        x = self.embedding(tokens)
        x = x if self.embedding_norm is None else self.embedding_norm(x)
        published: dict[str, Tensor] = {}  # for later layers
        reported: dict[str, Tensor] = {}
        recompute = self.activation_checkpointing != "none" and seq.cache is None and torch.is_grad_enabled()
        for layer, block in enumerate(self.layers):
            at_layer = seq.at(layer, self.names[layer])
            read = [published[name] for name in block.reads]
            if recompute and self.activation_checkpointing == "mixing":
                at_layer = replace(at_layer, kept=Kept())
            with self.naming(layer):
                if recompute:
                    result = checkpoint(block, x, at_layer, *read, use_reentrant=False, preserve_rng_state=False)
                else:
                    result = block(x, at_layer, *read)
            x, *rest = cast(tuple[Tensor, ...], result if block.gives else (result,))
            published.update(zip(block.publishes, rest, strict=False))
            names = [f"blocks.{layer}.{name}" for name in (*block.losses, *block.sums)]
            reported.update(zip(names, rest[len(block.publishes) :], strict=True))
        return self.norm(x), reported

    @property
    def layers(self) -> list[Composite]:
        """The blocks."""
        return [cast(Composite, block) for block in self.blocks]

    @property
    def mixers(self) -> list[Part]:
        """The first part of each layer: its mixer, or its mixers side by side."""
        return [block.part(block.names[0]) for block in self.layers]

    def leaves(self, layer: int | None = None) -> Iterator[tuple[str, Part]]:
        """(path, part) of every mixer and feed-forward layer, of one layer or of all."""
        for number in range(self.depth) if layer is None else (layer,):
            yield from self.layers[number].leaves(f"blocks.{number}")

    def naming(self, layer: int) -> AbstractContextManager[None]:
        """Errors within say which part of this layer they are of: see `mixer.naming`."""
        owners = ((part.label, part) for _, part in self.leaves(layer))  # read where there is an error
        return naming(f"model.block ({name_of(type(self.blocks[layer]))}), layer {layer}", owners)

    def at_step(self, step: int) -> None:
        """Tells every part at which step of training the model is, counted from 0: see `Part.at_step`."""
        for _, part in self.leaves():
            with naming(part.label):
                part.at_step(step)

    @property
    def losses(self) -> dict[str, float]:
        """The weight of each auxiliary loss, by its path: see `Part.losses`."""
        return {f"{path}.{name}": weight for path, part in self.leaves() for name, weight in part.losses.items()}

    @property
    def sums(self) -> list[str]:
        """The paths of the sums that parts are told after each step: see `Part.sums`."""
        return [f"{path}.{name}" for path, part in self.leaves() for name in part.sums]

    def loss_counts(self, documents: Documents) -> list[float]:
        """What each of `losses` is divided by, for whole rows."""
        seq = Sequence.single(documents)
        return [part.loss_count(name, seq) for _, part in self.leaves() for name in part.losses]

    @torch.no_grad()
    def update(self, sums: Mapping[str, Tensor]) -> None:
        """Tells the parts their sums over the global batch, float64 by path, of which each updates its buffers."""
        for path, part in self.leaves():
            if part.sums:
                with naming(part.label):
                    part.update({name: sums[f"{path}.{name}"] for name in part.sums})

    def statistics(self, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What metrics show of the sums over a step, by name: means over the parts that have one of it."""
        values: dict[str, list[Tensor]] = {}
        for path, part in self.leaves():
            if part.sums:
                own = {name: sums[f"{path}.{name}"] for name in part.sums}
                for name, value in part.statistics(own).items():
                    values.setdefault(name, []).append(value)
        return {name: torch.stack(of).mean() for name, of in values.items()}

    def parameter_count(self, *, active: bool = False) -> int:
        """Parameters, shared ones once; `active`: those that a token uses, without experts that it does not run."""
        idle = sum(part.idle_parameters() for _, part in self.leaves()) if active else 0
        return sum(shape_of(parameter).numel() for _, parameter in named_weights(self)) - idle

    def flops(self, documents: Documents) -> int:
        """Forward FLOPs on whole rows, padding included: the sum of what the parts state."""
        seq, total = Sequence.single(documents), 0
        for layer, block in enumerate(self.layers):
            with self.naming(layer):
                total += block.flops(seq)
        return total + flops_of(self.head, seq)

    @torch.no_grad()
    def initialise(self, seed: int, write: Write | None = None, rank: int = 0, ranks: int = 1) -> None:
        """Gives every parameter its initial value, which depends on the seed and the parameter's name alone.

        Weights are normal with `initial_std`, those that write to the residual stream (see `Part.outputs`) divided by
        sqrt(2 * depth); norms start at 1 and biases at 0; a layer may set its own in `initialise_parameter`. Values are
        drawn on the CPU in float32, whatever the device and dtype.

        `ranks` ranks that call it together share the drawing: each draws every `ranks`-th parameter. `write` is entered
        on all of them, in the same order, with each parameter and the rank that fills it: one at a time, so that no
        rank holds the whole of a ZeRO-3 model. What a layer raises is raised after the last one, where no other rank
        waits for this one.
        """
        parameters, failure = list(named_weights(self)), None
        for first in range(0, len(parameters), ranks):
            turn = parameters[first : first + ranks]  # one for each rank; they draw at the same time
            value = None
            if rank < len(turn):
                name, parameter = turn[rank]
                try:
                    value = self._initial_value(name, shape_of(parameter), seed)
                except Exception as error:
                    failure = failure or error
            for owner, (_, parameter) in enumerate(turn):
                with write(parameter, owner) if write else nullcontext():
                    if owner == rank and value is not None:
                        parameter.copy_(value)
        if failure is not None:
            raise failure

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
        owners = [(cut, self.get_submodule(".".join(path[:cut]))) for cut in range(1, len(path))]
        parts = [(cut, owner) for cut, owner in owners if isinstance(owner, Part)]
        if value.dim() < 2:
            settings = [part.setting for _, part in parts if part.setting]
            raise ValueError(
                f"{name}{f' of {settings[-1]}' if settings else ''} must get its initial value from "
                "initialise_parameter of its mixer or layer; it is not a matrix, and has no other. Fill the tensor "
                f"there and return True, as {RECIPE} shows"
            )
        writes_residual = any(".".join(path[cut:-1]) in part.outputs for cut, part in parts)
        scale = 1 / math.sqrt(2 * self.depth) if writes_residual else 1.0
        std = self.initial_std if self.embedding_std is None or path[0] != "embedding" else self.embedding_std
        return value.normal_(0.0, std * scale, generator=generator)


def check_reads(model: LanguageModel) -> None:
    """Raises ValueError for a part that reads what no earlier one publishes."""
    published: set[str] = set()
    for path, part in model.leaves():
        missing = [name for name in part.reads if name not in published]
        if missing:
            raise ValueError(
                f"model.pattern must publish what layer {path.split('.')[1]} reads before it; got no "
                f"{', '.join(missing)} from the layers before {type(part).__name__}. Put a layer that publishes it "
                "first"
            )
        published.update(part.publishes)
