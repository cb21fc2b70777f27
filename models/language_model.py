"""LanguageModel: a pattern of mixers becomes blocks, and tokens become logits or a loss."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..kernels.documents import Documents
from ..parallel.sequence import Sequence
from .activations.offloading import Copies, Journey, copies_of, departures
from .activations.recomputation import Modes, call, check_recomputation, mode_of
from .block import Block, SideBySide
from .initial_values import check_stds, initial_value
from .layers.normalisation import norm_of
from .mixer import check_composite, check_part, construct, name_of, naming
from .multi_token_prediction import MultiTokenPrediction, PredictionModule
from .part import Composite, Part, flops_of, named_weights, shape_of, tile
from .pattern import expand_pattern, stages
from .published import EMBEDDING, check_reads, read_later, stateless_from
from .sharing import Sharing
from .vocabulary import NO_TARGET, Embedding, Head

Partial = Callable[..., nn.Module]
Write = Callable[[nn.Parameter, int], AbstractContextManager]


class LanguageModel(nn.Module):
    """Embedding, blocks by a pattern of mixers, norm and head.

    vocabulary, width, depth: tokens, size of the residual stream, number of blocks.
    pattern: names of `mixers`, with `name*n` for repetition, `a+b` for mixers side by side and `a|b` for mixers in
        sequence; tiled to `depth`. See `longreach.models.pattern`.
    mixers, feed_forward, block, side_by_side: partials (`_partial_: true` in YAML), called with those of `width`,
        `depth`, `layer`, `name`, `occurrence` (see `Mixer`) and `norm_eps` that their signatures declare. `mixers` may
        hold feed-forward layers too, and `feed_forward` may be None: then the pattern says where they stand.
        `block` (default: pre-norm) and `side_by_side` (default: a plain sum) join them, and get them as `parts`. A
        `block` may declare `before` and `last` too: how many parts the residual stream has passed before it, and
        whether it ends with it; and, as `side_by_side` may, `known`: the names of all mixers.
    shared: mixers, or `feed_forward`, of which all layers have the same weights, those of their norms in the block too
        (ALBERT, Lan et al., 2020, arXiv 1909.11942). For each, the linear layers to which every layer adds a low-rank
        adapter of its own (Zamba2, arXiv 2411.15242; see `AdaptedLinear`), of rank `adapter_rank`: `[query, gate+up]`,
        where two joined by + have its first matrix in common. Each use of the weights has its own cache and buffers.
    norm: of blocks and before the head: "rms", "zero_centred_rms" (Gemma's, to whose weights 1 is added),
        "unweighted_rms", "layer", or "unbiased_layer".
    embedding_norm: whether the embedding is normed too, as in RWKV.
    tied_embeddings: the head's weight is the embedding's. embedding_multiplier, logit_multiplier: constants by which
        embeddings and logits are multiplied. logit_softcap: logits l become logit_softcap * tanh(l / logit_softcap).
    multi_token_prediction: how many modules learn to predict tokens further ahead, each with a block like the last;
        multi_token_prediction_weight: of their loss, by default 0.3. See `MultiTokenPrediction`.
    activation_checkpointing: "none"; "full", which recomputes each block in backward; "mixing", which does too but
        keeps what the mixing ops computed, so that no collective is repeated; or one of these by the names of mixers.
    tile_tokens: how many tokens feed-forward layers compute at once, forward and backward; None for all: see `tiled`.
    offload_activations: what recomputed blocks keep is in the host's memory meanwhile; see `Journey`.
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
        shared: dict[str, list[str]] | None = None,
        adapter_rank: int | None = None,
        norm: str = "rms",
        norm_eps: float = 1e-6,
        embedding_norm: bool = False,
        tied_embeddings: bool = False,
        embedding_multiplier: float = 1.0,
        logit_multiplier: float = 1.0,
        logit_softcap: float | None = None,
        multi_token_prediction: int = 0,
        multi_token_prediction_weight: float | None = None,
        activation_checkpointing: Modes = "none",
        tile_tokens: int | None = None,
        offload_activations: bool = False,
        initial_std: float = 0.02,
        embedding_std: float | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("vocabulary", vocabulary), ("width", width), ("depth", depth)):
            if value < 1:
                raise ValueError(f"model.{name} must be at least 1; got {value}")
        for name, value in (("multi_token_prediction", multi_token_prediction), ("norm_eps", norm_eps)):
            if value < 0:
                raise ValueError(f"model.{name} must not be negative; got {value}")
        for name, value in (("embedding_multiplier", embedding_multiplier), ("logit_multiplier", logit_multiplier)):
            if value <= 0:
                raise ValueError(f"model.{name} must be positive; got {value}. 1 leaves it out")
        if logit_softcap is not None and logit_softcap <= 0:
            raise ValueError(f"model.logit_softcap must be positive; got {logit_softcap}. null leaves it out")
        check_recomputation(activation_checkpointing, offload_activations, list(mixers))
        self.names = expand_pattern(pattern, depth, list(mixers))  # of the mixers of each layer
        self.mixer_names = tuple(mixers)
        if side_by_side is not None and not any("+" in name for name in self.names):
            raise ValueError("model.side_by_side must come with a pattern that has mixers side by side, as in a+b")
        self.vocabulary, self.width, self.depth = vocabulary, width, depth
        self.activation_checkpointing, self.offload_activations = activation_checkpointing, offload_activations
        self.copies: Copies | None = None  # how what is offloaded travels; None: as its device has it
        check_stds(initial_std, embedding_std, tied_embeddings)
        self.initial_std, self.embedding_std = initial_std, embedding_std
        sharing = Sharing(shared, adapter_rank, [*mixers, *(["feed_forward"] if feed_forward is not None else [])])
        occurrences: Counter[str] = Counter()
        passed = 0  # parts of the blocks so far

        def build(layer: int, ahead: int = 0) -> Composite:
            """The block of a layer, or one like it for a module of multi-token prediction, counted from 1."""
            nonlocal passed
            context = {"width": width, "depth": depth, "layer": layer, "norm_eps": norm_eps}
            where = f"multi-token prediction {ahead}" if ahead else f"layer {layer}"
            place = {"before": 0 if ahead else passed, "last": layer == depth - 1, "known": self.mixer_names}

            def make(partial: Partial, setting: str) -> Part:
                name = setting.rpartition(".")[2]
                made = construct(partial, setting, name=name, occurrence=occurrences[setting], **context)
                occurrences[setting] += 1
                part = check_part(made, setting)
                if not part.causal:
                    raise ValueError(
                        f"{setting}.causal must be true in a language model; got false. It would see the tokens that "
                        "it predicts"
                    )
                part.setting, part.label = setting, f"{setting} ({name_of(type(part))}), {where}"
                return sharing.part(name, part)

            def join(names: list[str]) -> Part:
                together = {name: make(mixers[name], f"model.mixers.{name}") for name in names}
                if len(together) == 1:
                    return together[names[0]]
                beside = side_by_side or SideBySide
                joined = construct(beside, "model.side_by_side", parts=together, known=self.mixer_names, **context)
                return check_composite(joined, "side_by_side")

            joined = [join(names) for names in stages(self.names[layer])]
            several = len(joined) > 1
            parts = {f"mixer_{number}" if several else "mixer": part for number, part in enumerate(joined, 1)}
            if feed_forward is not None:
                parts["feed_forward"] = make(feed_forward, "model.feed_forward")
            passed += len(parts)
            made = construct(block or Block, "model.block", parts=parts, norm=norm, **place, **context)
            return sharing.block(check_composite(made, "model.block"))

        self.blocks = nn.ModuleList(build(layer) for layer in range(depth))
        self.multi_token_prediction = MultiTokenPrediction(
            (
                PredictionModule(width=width, block=build(depth - 1, ahead + 1), norm=norm, norm_eps=norm_eps)
                for ahead in range(multi_token_prediction)
            ),
            multi_token_prediction_weight,
        )
        check_reads(self.composites)
        self._read_later, self._tail = read_later(self.layers), stateless_from(self.layers)
        tile([part for _, part in self.leaves()], tile_tokens)
        self.embedding = Embedding(vocabulary, width)
        self.embedding_norm = norm_of(norm, width, norm_eps) if embedding_norm else None
        self.norm = norm_of(norm, width, norm_eps)
        self.embedding_multiplier = embedding_multiplier
        self.head = Head(width, vocabulary, logit_multiplier, logit_softcap)
        if tied_embeddings:
            self.head.weight = self.embedding.weight

    def forward(
        self,
        tokens: Tensor,
        seq: Sequence,
        targets: Tensor | None = None,
        correct: bool = False,
        reports: bool = False,
        each: bool = False,
    ) -> Tensor | tuple[Tensor | dict[str, Tensor], ...]:
        """Logits `[B, T, Vocab]`; given targets, (sum of the token losses, number of targets) of this rank's tokens.

        tokens, targets: int64 `[B, T]`; a target of −100 counts for nothing. Without any target the loss is a zero
        that every parameter is connected to. With `correct`, for evaluation: without a gradient of the head, and third
        the number of targets that have the largest logit; with `each` too, in place of the sum the loss of every token
        `[B, T]`, 0 without a target, and in place of the number whether it is one of them, bool `[B, T]`. With
        `reports`, for training: last, by path, what the parts report of `losses` and `sums`; see `Part`. The loss holds
        none of it.
        """
        hidden, reported = self._run(tokens, seq)
        if targets is None:
            return self.head(hidden)
        results: tuple[Tensor | dict[str, Tensor], ...]
        count = (targets != NO_TARGET).sum()
        if reports and len(self.multi_token_prediction):
            reported |= self._ahead(hidden, tokens, targets, seq)
        if correct:
            loss, right = self.head(hidden, targets, True, each)
            results = loss, count, right
        else:
            results = self.head(hidden, targets), count
        return (*results, reported) if reports else results

    def hidden(self, tokens: Tensor, seq: Sequence, last: bool = False) -> Tensor:
        """`[B, T, D]`: what the head reads; with `last`, when decoding, `[B, 1, D]` of the last token.

        Then the layers at the end of the model that are stateless (see `Part`) run on that token alone, as in the
        prefill of a decoder-decoder (Sun et al., 2024, arXiv 2405.05254).
        """
        return self._run(tokens, seq, last)[0]

    def embed(self, tokens: Tensor) -> Tensor:
        """`[B, T, D]`: what the first block reads."""
        x = self.embedding(tokens)
        x = x if self.embedding_multiplier == 1.0 else x * self.embedding_multiplier
        return x if self.embedding_norm is None else self.embedding_norm(x)

    def _ahead(self, hidden: Tensor, tokens: Tensor, targets: Tensor, seq: Sequence) -> dict[str, Tensor]:
        """By path, what the modules of multi-token prediction report."""
        modules = self.multi_token_prediction

        def call(k: int, *inputs: Tensor) -> tuple[Tensor, ...]:
            return self._call(modules[k], self.depth + k, inputs, seq)

        reported = modules.predict(hidden, tokens, targets, seq, self.embed, self.head, call)
        return {f"multi_token_prediction.{path}": value for path, value in reported.items()}

    def _call(
        self, module: nn.Module, number: int, inputs: tuple[Tensor, ...], seq: Sequence, journey: Journey | None = None
    ) -> Any:
        """What a block, or the module around it, gives of the inputs: recomputed in backward where that is set."""
        name = self.names[min(number, self.depth - 1)]
        with self.naming(number):
            return call(module, inputs, seq.at(number, name), mode_of(self.activation_checkpointing, name), journey)

    def _run(self, tokens: Tensor, seq: Sequence, last: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
        """What the head reads, and by path what the parts report."""
        x = self.embed(tokens)
        published = {EMBEDDING: x}  # what layers may read
        reported: dict[str, Tensor] = {}
        depart = departures((self.copies or copies_of(x.device)) if self.offload_activations else None)
        for layer, block in enumerate(self.layers):
            if last and layer == self._tail and x.shape[1] > 1:
                seq, x = seq.last_token, x[:, -1:]
                published = {name: tensor[:, -1:] for name, tensor in published.items()}
            journey = depart and depart(layer == self.depth - 1)
            result = self._call(block, layer, (x, *(published[name] for name in block.reads)), seq, journey)
            x, *rest = cast(tuple[Tensor, ...], result if block.gives else (result,))
            published.update(zip(block.publishes, rest, strict=False))
            published = {name: tensor for name, tensor in published.items() if name in self._read_later[layer]}
            names = [f"blocks.{layer}.{name}" for name in (*block.losses, *block.sums)]
            reported.update(zip(names, rest[len(block.publishes) :], strict=True))
            del result, rest  # or what has had its last reader would live on for another layer
        return self.norm(x[:, -1:] if last else x), reported

    @property
    def layers(self) -> list[Composite]:
        """The blocks."""
        return [cast(Composite, block) for block in self.blocks]

    @property
    def mixers(self) -> list[Part]:
        """The first part of each layer: its mixer, or its mixers side by side."""
        return [block.part(block.names[0]) for block in self.layers]

    @property
    def composites(self) -> list[tuple[str, Composite]]:
        """(path, block) of the blocks and, after them, of those of multi-token prediction."""
        blocks = [(f"blocks.{number}", block) for number, block in enumerate(self.layers)]
        modules = enumerate(self.multi_token_prediction.members)
        return blocks + [(f"multi_token_prediction.{k}.block", each.block) for k, each in modules]

    def leaves(self, number: int | None = None) -> Iterator[tuple[str, Part]]:
        """(path, part) of every mixer and feed-forward layer: of all blocks, or of one by its place in `composites`."""
        composites = self.composites
        for path, block in composites if number is None else (composites[number],):
            yield from block.leaves(path)

    def naming(self, number: int) -> AbstractContextManager[None]:
        """Errors within say which part of this block they are of: see `mixer.naming`."""
        block, ahead = self.composites[number][1], number - self.depth
        where = f"layer {number}" if ahead < 0 else f"multi-token prediction {ahead + 1}"
        owners = ((part.label, part) for _, part in self.leaves(number))  # read where there is an error
        return naming(f"model.block ({name_of(type(block))}), {where}", owners)

    def at_step(self, step: int) -> None:
        """Tells every part at which step of training the model is, counted from 0: see `Part.at_step`."""
        for _, part in self.leaves():
            with naming(part.label):
                part.at_step(step)

    @property
    def losses(self) -> dict[str, float]:
        """The weight of each auxiliary loss, by its path: see `Part.losses`."""
        ahead = self.multi_token_prediction.losses
        of_parts = {f"{path}.{name}": weight for path, part in self.leaves() for name, weight in part.losses.items()}
        return of_parts | {f"multi_token_prediction.{name}": weight for name, weight in ahead.items()}

    @property
    def detached(self) -> dict[str, str]:
        """For each loss that trains one layer alone, how the paths of that layer's parameters begin: see `Part`."""
        return {
            f"{path}.{name}": f"{path}.{layer}."
            for path, part in self.leaves()
            for name, layer in part.detached.items()
        }

    @property
    def sums(self) -> list[str]:
        """The paths of the sums that parts are told after each step: see `Part.sums`."""
        return [f"{path}.{name}" for path, part in self.leaves() for name in part.sums]

    def loss_counts(self, documents: Documents, targets: Tensor | None = None) -> list[float]:
        """What each of `losses` is divided by, for whole rows.

        targets: int64 `[B, N]` on the host, −100 for none; by default every token has one.
        """
        seq = Sequence.single(documents)
        of_parts = [part.loss_count(name, seq) for _, part in self.leaves() for name in part.losses]
        return of_parts + self.multi_token_prediction.counts(targets, seq)

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
        parts = {id(next(part.parameters(), part)): part for _, part in self.leaves()}  # of those that share, one
        idle = sum(part.idle_parameters() for part in parts.values()) if active else 0
        return sum(shape_of(parameter).numel() for _, parameter in named_weights(self)) - idle

    def flops(self, documents: Documents) -> int:
        """Forward FLOPs on whole rows, padding included: the sum of what the parts state."""
        seq, total = Sequence.single(documents), 0
        for number, (_, block) in enumerate(self.composites):
            with self.naming(number):
                total += block.flops(seq)
        modules = self.multi_token_prediction.members
        heads = (1 + len(modules)) * flops_of(self.head, seq)
        return total + heads + sum(flops_of(each.projection, seq) for each in modules)

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
                    value = self.initial_value(name, shape_of(parameter), seed)
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
                self.initial_value(name, parameter.shape, seed=0)

    def initial_value(self, name: str, shape: torch.Size, seed: int) -> Tensor:
        """The value, float32 on the host, with which the parameter of this name begins; see `initialise`."""
        return initial_value(self, name, shape, seed, self.initial_std, self.embedding_std)
