"""Layers of a mixer that share their weights, and the low-rank adapters that tell them apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from .layers.low_rank import LowRank
from .part import Composite, Part, shape_of

FEED_FORWARD = "feed_forward"


class AdaptedLinear(nn.Linear):
    """A linear layer with a low-rank adapter (LoRA, Hu et al., 2021, arXiv 2106.09685).

        y = W x + b + B A x

    layer: whose W and b these are. A is `[rank, in_features]`, B `[out_features, rank]`, both of its own, unless A is
    that of the adapter `beside`. Raises ValueError if that reads another width.
    """

    def __init__(self, layer: nn.Linear, rank: int, beside: AdaptedLinear | None = None) -> None:
        super(nn.Linear, self).__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        self.adapter = LowRank(layer.in_features, rank, outputs=layer.out_features, bias=False)
        if beside is not None:
            if beside.in_features != layer.in_features:
                raise ValueError(f"layers must read one width; got {beside.in_features} and {layer.in_features}")
            self.adapter.down.weight = beside.adapter.down.weight

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.adapter(x)


class Sharing:
    """What layers of a model share, while it is built; see `LanguageModel` for the settings.

    Raises ValueError for names of no mixer, and for adapters without a rank or the other way round.
    """

    def __init__(self, shared: Mapping[str, list[str]] | None, adapter_rank: int | None, known: list[str]) -> None:
        self.adapted = {name: list(layers or ()) for name, layers in (shared or {}).items()}
        if unknown := [name for name in self.adapted if name not in known]:
            raise ValueError(
                f"model.shared must have names of model.mixers or feed_forward ({', '.join(known)}); got "
                f"{', '.join(unknown)}. Rename them"
            )
        if any(self.adapted.values()) != (adapter_rank is not None):
            raise ValueError(
                f"model.adapter_rank must be set with layers that have adapters, as in shared.NAME=[query], and not "
                f"without; got {adapter_rank}"
            )
        if adapter_rank is not None and adapter_rank < 1:
            raise ValueError(f"model.adapter_rank must be at least 1; got {adapter_rank}. 128 is usual")
        self.rank = adapter_rank
        self._weights: dict[str, dict[str, nn.Parameter]] = {name: {} for name in self.adapted}

    def part(self, name: str, part: Part) -> Part:
        """A part of the mixer `name`, just made: it gets its adapters, and the weights of those before it."""
        if name in self.adapted:
            for layers in self.adapted[name]:
                self._adapt(name, part, layers.split("+"))
            self._tie(name, "", part)
        return part

    def block(self, block: Composite) -> Composite:
        """A block of such parts, just made: the norms of those that share weights are shared too."""
        for name in block.names:
            setting = block.part(name).setting.rpartition(".")[2]
            for child, norm in block.named_children() if setting in self.adapted else ():
                if child.startswith(f"{name}_") and child.endswith("norm"):
                    self._tie(setting, f"{child.removeprefix(name)}.", norm)
        return block

    def _adapt(self, name: str, part: Part, together: list[str]) -> None:
        """Gives these linear layers adapters, which have A in common."""
        assert self.rank is not None
        linear = (path for path, module in part.named_modules() if type(module) is nn.Linear)
        known = [path for path in linear if "adapter" not in path.split(".")]
        beside: AdaptedLinear | None = None
        for path in together:
            if path not in known:
                raise ValueError(
                    f"model.shared.{name} must name linear layers of {type(part).__name__} ({', '.join(known)}), each "
                    f"once, or several with a common first matrix, as in {'+'.join(known[:2])}; got {path!r}"
                )
            parent, _, last = path.rpartition(".")
            try:
                adapted = AdaptedLinear(part.get_submodule(path), self.rank, beside)  # type: ignore[arg-type]
            except ValueError as error:
                raise ValueError(f"model.shared.{name}: {'+'.join(together)}: {error}. Write them apart") from None
            setattr(part.get_submodule(parent), last, adapted)
            beside = beside or adapted

    def _tie(self, name: str, prefix: str, module: nn.Module) -> None:
        """Every weight of the module but those of adapters becomes that of the first layer which has one by its path.

        What a layer alone has (the first layer of RWKV-7 lacks a matrix of later ones) is its own.
        """
        weights = self._weights[name]
        for path, owner, parameter in _own_weights(module):
            first = weights.setdefault(prefix + path, parameter)
            if shape_of(first) != shape_of(parameter):
                raise ValueError(
                    f"model.shared.{name} must be of layers with equal shapes; got {path} of {tuple(shape_of(first))} "
                    f"and {tuple(shape_of(parameter))}. Give the layers that differ another name in model.mixers"
                )
            held = owner._parameters if path.rpartition(".")[2] in owner._parameters else vars(owner)
            held[path.rpartition(".")[2]] = first


def _own_weights(module: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
    """(path, layer, weight) of a module, without those of adapters."""
    adapters = {each.adapter for each in module.modules() if isinstance(each, AdaptedLinear)}
    inside = {layer for adapter in adapters for layer in adapter.modules()}
    for path, layer in list(module.named_modules()):
        if layer in inside:
            continue
        by_expert = {name: vars(layer)[name] for name in getattr(layer, "by_expert", ()) if name in vars(layer)}
        for name, parameter in [*layer._parameters.items(), *by_expert.items()]:
            if parameter is not None:
                yield (f"{path}.{name}" if path else name), layer, parameter
