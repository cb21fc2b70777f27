"""Work: FLOPs of a forward by kind of layer, as the modules state them, of whole rows and of the busiest rank."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from ...kernels.documents import Documents
from ...models.activations.recomputation import mode_of
from ...models.language_model import LanguageModel
from ...models.part import FeedForward, Part, flops_of
from ...parallel.alone import alone
from ...parallel.sequence import Sequence
from ..ranks.settings import layout_of, strategy_of, ulysses_ranks
from ..settings import Settings

HEAD = "embedding and loss"


@dataclass
class Kind:
    """Layers of one kind, all together, on the rows of a micro-batch: forward FLOPs.

    linear, mixing: of linear layers and of ops, of all ranks of a row; busiest: of ops, of the rank that has most.
    recomputed: the parts of linear and of mixing FLOPs that run again in backward.
    """

    linear: float = 0.0
    mixing: float = 0.0
    busiest: float = 0.0
    again_linear: float = 0.0
    again_mixing: float = 0.0
    layers: int = 0


@dataclass
class Work:
    """By kind of layer; `tokens` of a micro-batch of rows, on all ranks that share them."""

    tokens: int
    ranks: int
    kinds: dict[str, Kind] = field(default_factory=dict)

    @property
    def flops(self) -> float:
        """Of a forward."""
        return sum(kind.linear + kind.mixing for kind in self.kinds.values())

    def per_token(self, name: str) -> float:
        """FLOPs of forward and backward, of all layers of a kind."""
        kind = self.kinds[name]
        return 3 * (kind.linear + kind.mixing) / self.tokens


def work(model: LanguageModel, settings: Settings) -> Work:
    """Of rows of one document each. A backward counts as two forwards, as MFU has it."""
    layout = layout_of(settings.parallel, settings.data.sequence_length)
    documents = Documents.whole(settings.data.rows_per_micro_batch, layout.length)
    strategy, ulysses = strategy_of(settings.parallel), ulysses_ranks(settings.parallel)
    whole = Sequence.single(documents)
    places = sorted({0, layout.ranks // 2, layout.ranks - 1})
    ranks = [alone(documents, layout, rank, strategy, ulysses)[0] for rank in places]
    found = Work(whole.places, layout.ranks)
    stated: dict[str, tuple[float, float, float]] = {}
    for number, (_, block) in enumerate(model.composites):
        item = model.names[min(number, model.depth - 1)]
        mode = mode_of(settings.trainer.activation_checkpointing, item)
        for _, part in block.leaves(""):
            name = "feed-forward" if isinstance(part, FeedForward) else part.setting.rpartition(".")[2]
            if name not in stated:
                stated[name] = _stated(part, whole, ranks, ulysses)
            linear, mixing, busiest = stated[name]
            kind = found.kinds.setdefault(name, Kind())
            tiled = settings.trainer.tile_tokens is not None and isinstance(part, FeedForward)
            kind.linear, kind.mixing, kind.busiest = kind.linear + linear, kind.mixing + mixing, kind.busiest + busiest
            kind.again_linear += linear * ((mode != "none") + tiled)
            kind.again_mixing += busiest * (mode == "full" or (mode == "mixing" and isinstance(part, FeedForward)))
            kind.layers += 1
    total, heads = model.flops(documents), flops_of(model.head, whole)
    rest = total - found.flops
    found.kinds[HEAD] = Kind(linear=max(rest, heads), layers=1)
    return found


def _stated(part: Part, whole: Sequence, ranks: list[Sequence], ulysses: int) -> tuple[float, float, float]:
    """FLOPs of linear layers, of ops on whole rows, and of ops on the busiest of some ranks."""
    linear = sum(flops_of(child, whole) for child in part.children())
    mixing = part.mixing_flops(whole)
    name = part.setting.rpartition(".")[2]
    shares = []
    for seq in ranks:
        if seq.heads is not None and seq.strategy.of(name).attention == "ulysses":
            shares.append(part.mixing_flops(seq.by_heads) / ulysses)
        else:
            shares.append(part.mixing_flops(seq))
    return linear, mixing, max(shares)


def counts(model: LanguageModel) -> Counter[str]:
    """How many layers of each item of the pattern."""
    return Counter(model.names)
