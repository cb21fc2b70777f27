"""Groups: which parameters an optimizer steps alike, and by which rule."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any

from torch import nn

from ...models.part import named_weights, shape_of
from ...models.vocabulary import Head
from .settings import OptimizerSettings, Rule


def frozen_parameters(model: nn.Module, only: list[str]) -> list[nn.Parameter]:
    """The parameters that do not train: those without any of the names `only`, which are parts of their paths.

    None for an empty list. Raises ValueError for a name that no parameter has.
    """
    paths = {name: name.split(".") for name, _ in named_weights(model)}
    if missing := [name for name in only if not any(name in path for path in paths.values())]:
        layers = sorted({part for path in paths.values() for part in path[2:-1] if not part.isdigit()})
        raise ValueError(
            f"optimizer.only must name layers or parameters of the model; got {', '.join(missing)}. "
            f"Its layers: {', '.join(layers)}"
        )
    trained = [bool(not only or set(only) & set(path)) for path in paths.values()]
    return [parameter for (_, parameter), trains in zip(named_weights(model), trained, strict=True) if not trains]


def hidden_matrices(model: nn.Module) -> set[int]:
    """Ids of the parameters that Muon steps: weights of linear layers, and what layers name in `matrices`.

    Not the head, nor what shares its weight with the embedding, nor what weight decay leaves alone. Everything else is
    no matrix of a hidden layer: embeddings, norms, biases, taps of convolutions, decay rates, mixing factors.
    """
    found: dict[int, nn.Parameter] = {}
    for module in model.modules():
        linear = isinstance(module, nn.Linear) and not isinstance(module, Head)
        for name in ("weight",) if linear else getattr(module, "matrices", ()):
            parameter = getattr(module, name)
            found[id(parameter)] = parameter
    outer = (module for module in model.modules() if isinstance(module, nn.Embedding | Head))
    return {*found} - {id(module.weight) for module in outer} - _exempt(model)


def _exempt(model: nn.Module) -> set[int]:
    """Ids of what modules name in `no_weight_decay`."""
    return {
        id(attrgetter(name)(module)) for module in model.modules() for name in getattr(module, "no_weight_decay", ())
    }


def matched(model: nn.Module, rules: Mapping[str, Rule]) -> dict[int, str]:
    """The rule of each parameter that has one, by its id.

    Raises ValueError for a pattern that no name matches, a parameter that two rules match, and blocks of rows that
    Muon cannot take.
    """
    names, found = dict(named_weights(model)), {}
    matrices = hidden_matrices(model)
    for rule, chosen in rules.items():
        for pattern in chosen.match:
            hits = fnmatch.filter(names, pattern)
            if not hits:
                raise ValueError(
                    f"optimizer.groups.{rule}.match must match parameters of the model; got {pattern}, which matches "
                    f"none. Names are like {next(iter(names))} and {list(names)[len(names) // 2]}"
                )
            for name in hits:
                if found.setdefault(id(names[name]), rule) != rule:
                    raise ValueError(
                        f"optimizer.groups must match each parameter once; {name} is matched by "
                        f"{found[id(names[name])]} and {rule}. Make a pattern narrower"
                    )
                blocks = chosen.row_blocks
                if blocks > 1 and (id(names[name]) not in matrices or shape_of(names[name])[-2] % blocks):
                    raise ValueError(
                        f"optimizer.groups.{rule}.row_blocks must divide the rows of matrices that Muon steps; got "
                        f"{chosen.row_blocks} for {name} of {list(shape_of(names[name]))}"
                    )
    return found


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    parameters: Iterable[nn.Parameter] | None = None,
    frozen: Sequence[nn.Parameter] = (),
    kind: str = "adamw",
    rules: Mapping[str, Rule] | None = None,
) -> list[dict[str, Any]]:
    """The parameters that decay (matrices and embeddings) and those that do not, each type in groups of its own.

    The latter are norms, biases, all of one dim, what a module names in `no_weight_decay` (see `Mixer`), and those that
    do not train. With Muon its matrices are groups apart, and so are the parameters that a rule of `rules` matches.
    Float32 ones come last where there are two types: DeepSpeed takes the first for that of the model.
    """
    rules = rules or {}
    exempt, idle = _exempt(model), set(map(id, frozen))
    matrices = hidden_matrices(model) if kind == "muon" else set()
    ruled, order = matched(model, rules), ["", *rules]
    groups: dict[tuple[int, int, str, float], list[nn.Parameter]] = {}
    for parameter in model.parameters() if parameters is None else parameters:
        name = ruled.get(id(parameter), "")
        decay = weight_decay if len(shape_of(parameter)) > 1 and id(parameter) not in exempt else 0.0
        if name and (own := rules[name].weight_decay) is not None:
            decay = own
        decay = 0.0 if id(parameter) in idle else decay
        step = "adamw" if kind == "muon" and id(parameter) not in matrices else kind
        key = (parameter.dtype.itemsize, order.index(name), step, decay)
        groups.setdefault(key, []).append(parameter)
    return [
        {
            "params": members,
            "weight_decay": decay,
            "kind": step,
            "factor": rules[order[number]].learning_rate_factor if number else 1.0,
            "row_blocks": rules[order[number]].row_blocks if number else 1,
        }
        for (_, number, step, decay), members in sorted(groups.items(), key=lambda item: _place(item[0]))
    ]


def _place(key: tuple[int, int, str, float]) -> tuple[int, int, str, bool, float]:
    """The order of groups: by type, rule and kind; those that decay come first."""
    size, number, step, decay = key
    return size, number, step, decay == 0, decay


def groups_of(
    model: nn.Module,
    settings: OptimizerSettings,
    frozen: Sequence[nn.Parameter],
    parameters: Iterable[nn.Parameter] | None = None,
) -> list[dict[str, Any]]:
    """`parameter_groups` as the settings say."""
    return parameter_groups(model, settings.weight_decay, parameters, frozen, settings.kind, settings.rules)
