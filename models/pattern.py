"""Patterns: which mixers each layer of a model has.

softmax*3            three layers of the mixer `softmax`
softmax+mamba        a layer of two mixers side by side: they read one input and their outputs are summed
mamba|softmax        a layer of two mixers in sequence, each with its own norm and residual connection
mamba|softmax+gla*2  two layers of `mamba` followed by `softmax` and `gla` side by side
"""

from __future__ import annotations

from itertools import groupby


def expand_pattern(pattern: list[str], depth: int, known: list[str]) -> list[str]:
    """The mixers of each layer: `["lightning*7", "softmax"]` is eight items, repeated to `depth`.

    Raises ValueError for unknown names, for a name that is twice side by side, for mixers that the pattern does not
    use, and for a depth that it does not divide.
    """
    if not pattern:
        raise ValueError(f"model.pattern must name at least one mixer; got []. Known: {', '.join(known)}")
    items: list[str] = []
    for repeated in pattern:
        if not isinstance(repeated, str):
            raise ValueError(f"model.pattern must use names of model.mixers ({', '.join(known)}); got {repeated!r}")
        item, star, times = repeated.partition("*")
        for together in stages(item):
            for name in together:
                if name not in known:
                    raise ValueError(f"model.pattern must use names of model.mixers ({', '.join(known)}); got {name!r}")
            if len(set(together)) < len(together):
                raise ValueError(
                    f"model.pattern must have different mixers side by side; got {'+'.join(together)!r}. "
                    "Give one of them another name in model.mixers"
                )
        if star and (not times.isdecimal() or int(times) < 1):
            raise ValueError(f"model.pattern must repeat a name by a positive number, as in {item}*3; got {repeated!r}")
        items += [item] * (int(times) if star else 1)
    used = {name for item in items for together in stages(item) for name in together}
    unused = [name for name in known if name not in used]
    if unused:
        remedy = " ".join(f"~model.mixers.{name}" for name in unused)
        raise ValueError(
            f"model.mixers must all occur in model.pattern; got {', '.join(unused)} besides. Remove them: {remedy}"
        )
    if not items or depth % len(items):
        raise ValueError(
            f"model.depth must be a multiple of the pattern's {len(items)} layers; got {depth}. "
            "Change model.depth or model.pattern"
        )
    return items * (depth // len(items))


def stages(item: str) -> list[list[str]]:
    """The mixers of one layer: in sequence, and in each place of it side by side."""
    return [stage.split("+") for stage in item.split("|")]


def run_lengths(layers: list[str]) -> list[str]:
    """['full', 'full', 'window'] as a pattern: ['full*2', 'window']; ['full'] where all layers are alike."""
    if len(set(layers)) == 1:
        return layers[:1]
    runs = [(name, len(list(same))) for name, same in groupby(layers)]
    return [name if count == 1 else f"{name}*{count}" for name, count in runs]
