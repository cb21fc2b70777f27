"""How the tensors of a Hugging Face checkpoint and the parameters of a `LanguageModel` make one another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

EACH = "{}"  # in the name of a tensor: it is one of those that a parameter is made of


def _same(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class Weight:
    """Where transformers keeps one of our parameters, or the parameters of one of our modules.

    name: theirs. With `{}` in it there is a tensor for each entry of the parameter's first dim, such as its experts;
        with `parts` there is one for each of these, in parts of that dim whose sizes `sizes` tells of our module,
        by default equal ones.
    rows: of our module, the rows of their tensor that are ours, int64, in our order. Several parameters may have
        rows of one tensor: together they have each once. dim: that of the rows.
    read, write: from the shape of their tensor to that of ours, before rows are taken, and back.
    shape: of our module, the shape in which their tensor has our entries; `read` takes them out of it.
    of_layer: whether the name of a layer's tensor begins with that of the layer; else the name is whole.
    """

    name: str
    parts: tuple[str, ...] = ()
    sizes: Callable[[Any], Sequence[int]] | None = None
    rows: Callable[[Any], Tensor] | None = None
    dim: int = 0
    read: Callable[[Tensor], Tensor] = _same
    write: Callable[[Tensor], Tensor] = _same
    shape: Callable[[Any], tuple[int, ...]] | None = None
    of_layer: bool = True


class Entries:
    """A tensor whose entries of the first dim are read when they are asked for: of experts, no two at once."""

    def __init__(self, count: int, entry: Callable[[int], Tensor]) -> None:
        self.count, self.entry = count, entry

    def __getitem__(self, number: int) -> Tensor:
        return self.entry(number)

    def __iter__(self) -> Iterator[Tensor]:
        return (self.entry(number) for number in range(self.count))

    def whole(self) -> Tensor:
        """The tensor itself."""
        return torch.stack(list(self))


@dataclass(frozen=True)
class Recipe:
    """A tensor of one side, made from tensors of the other: `make(*sources)`; by default its only source itself.

    stacked: each source makes one entry of the first dim by `make(source)`, so that they can be read one by one.
    entry: it is made from this entry of the first dim of its only source.
    """

    sources: tuple[str, ...]
    make: Callable[..., Tensor] = _same
    stacked: bool = False
    entry: int | None = None

    def whole(self, *sources: Tensor | Entries) -> Tensor:
        """The tensor, of all sources at once."""
        if self.entry is not None:
            return self.make(sources[0][self.entry])
        tensors = [source.whole() if isinstance(source, Entries) else source for source in sources]
        return torch.stack([self.make(tensor) for tensor in tensors]) if self.stacked else self.make(*tensors)


@dataclass(frozen=True)
class Tensors:
    """`read` makes each of our parameters from their tensors, `write` each of their tensors from our parameters.

    `duplicates` names tensors that a checkpoint may hold a second time (tied heads) and of which they must then be
    equal copies; names that match one of `ignored`, regular expressions, are not read. Of our parameters, those whose
    names begin with one of `left_out` are not written. `buffers` are those of our names that are of buffers; `fixed`
    has the buffers that their checkpoints do not hold, and the value that they must have (None for any). `shapes` are
    those of our parameters and buffers, left out and fixed ones aside.
    """

    read: Mapping[str, Recipe]
    write: Mapping[str, Recipe]
    shapes: Mapping[str, torch.Size] = field(default_factory=dict)
    duplicates: Mapping[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    buffers: frozenset[str] = frozenset()
    fixed: Mapping[str, float | None] = field(default_factory=dict)

    @classmethod
    def of(cls, placed: Iterable[Placed], **more: Any) -> Tensors:
        """The tensors of our parameters, each with its place in theirs."""
        read: dict[str, Recipe] = {}
        write: dict[str, Recipe] = {}
        shapes: dict[str, torch.Size] = {}
        shared: dict[str, list[Placed]] = {}
        for each in placed:
            shapes[each.ours] = each.shape
            if each.weight.rows is not None:
                shared.setdefault(each.weight.name, []).append(each)
            else:
                read[each.ours], written = each.alone()
                write |= written
        for theirs, parts in shared.items():
            rows = [part.weight.rows(part.module) for part in parts if part.weight.rows is not None]
            order = torch.cat(rows)
            for part, own in zip(parts, rows, strict=True):
                read[part.ours] = Recipe((theirs,), partial(_taken, part.weight, own, len(order)))
            write[theirs] = Recipe(tuple(part.ours for part in parts), partial(_joined, parts[0].weight, order))
        return cls(read, write, shapes, **more)


@dataclass(frozen=True)
class Placed:
    """Our parameter of this name and shape, of `module`, with its whole name on their side."""

    ours: str
    shape: torch.Size
    module: nn.Module
    weight: Weight

    def alone(self) -> tuple[Recipe, dict[str, Recipe]]:
        """How it is read, and how their tensors of it are written."""
        weight = self.weight
        if weight.parts:
            names = [weight.name.replace(EACH, part) for part in weight.parts]
            read = Recipe(tuple(names), partial(_concatenated, weight.read))
            sizes = weight.sizes(self.module) if weight.sizes else [self.shape[0] // len(names)] * len(names)
            return read, {
                name: Recipe((self.ours,), partial(_part, weight.write, sum(sizes[:number]), sizes[number]))
                for number, name in enumerate(names)
            }
        if EACH in weight.name:
            names = [weight.name.replace(EACH, str(entry)) for entry in range(self.shape[0])]
            return Recipe(tuple(names), weight.read, stacked=True), {
                name: Recipe((self.ours,), weight.write, entry=entry) for entry, name in enumerate(names)
            }
        shape = weight.shape(self.module) if weight.shape else None
        write = weight.write if shape is None else partial(_shaped, shape)
        return Recipe((weight.name,), weight.read), {weight.name: Recipe((self.ours,), write)}


def _taken(weight: Weight, rows: Tensor, count: int, tensor: Tensor) -> Tensor:
    tensor = weight.read(tensor)
    if tensor.shape[weight.dim] != count:
        raise ValueError(f"a tensor must have {count} rows; got {tensor.shape[weight.dim]}")
    return tensor.index_select(weight.dim, rows.to(tensor.device))


def _joined(weight: Weight, order: Tensor, *parts: Tensor) -> Tensor:
    shape = list(parts[0].shape)
    shape[weight.dim] = len(order)
    joined = parts[0].new_empty(shape)
    for rows, part in zip(order.split([part.shape[weight.dim] for part in parts]), parts, strict=True):
        joined.index_copy_(weight.dim, rows.to(part.device), part.to(joined.dtype))
    return weight.write(joined)


def _concatenated(read: Callable[[Tensor], Tensor], *parts: Tensor) -> Tensor:
    return torch.cat([read(part) for part in parts])


def _part(write: Callable[[Tensor], Tensor], first: int, count: int, tensor: Tensor) -> Tensor:
    return write(tensor[first : first + count])


def _shaped(shape: tuple[int, ...], tensor: Tensor) -> Tensor:
    return tensor.reshape(shape)


# Rows of their tensors.


def halves(dim: int) -> Tensor:
    """The order of `dim` dims whose rotary pairs are neighbours, such that the two of a pair stand dim / 2 apart."""
    return torch.arange(dim).view(-1, 2).t().flatten()


def per_head(heads: int, order: Tensor) -> Tensor:
    """The rows of heads with as many rows each as `order` has, which are taken in that order."""
    return (torch.arange(heads)[:, None] * len(order) + order).flatten()


def rows_of(number: int, sizes: Sequence[int], groups: int = 1) -> Tensor:
    """The rows of one of the parts that stand one after the other in each of so many groups."""
    first = sum(sizes[:number])
    return (torch.arange(groups)[:, None] * sum(sizes) + first + torch.arange(sizes[number])).flatten()


def of_experts(number: int) -> Callable[[Any], Tensor]:
    """Rows of each expert's gate (0) or values (1), which stand one after the other."""
    return lambda layer: rows_of(number, [layer.hidden] * 2)


def inputs_first(name: str, rows: Callable[[Any], Tensor] | None = None) -> Weight:
    """Of the experts the weights, which are `[experts, inputs, outputs]` there; `rows` of the outputs."""
    return Weight(name, rows=rows, dim=1, read=_transposed, write=_transposed)


def _transposed(tensor: Tensor) -> Tensor:
    return tensor.transpose(1, 2)


def convolution(name: str, parts: tuple[str, ...] = (), sizes: Callable[[Any], Sequence[int]] | None = None) -> Weight:
    """Of a short convolution the weight, which is `[channels, 1, taps]` there."""
    return Weight(name, parts, sizes, read=lambda theirs: theirs.squeeze(1), write=lambda ours: ours.unsqueeze(1))
