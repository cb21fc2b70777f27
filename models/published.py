"""What layers of a model publish for later ones: who reads it, and what need not run for every token of a prompt."""

from __future__ import annotations

from collections.abc import Iterable

from .part import Composite, Part

EMBEDDING = "the model's embedding"  # under this name blocks can read it: see `Part.with_embedding`


def check_reads(blocks: Iterable[tuple[str, Composite]]) -> None:
    """Raises ValueError for a part that reads what no earlier one publishes, or in another width.

    blocks: (path, block) of all of a model, in order.
    """
    published: dict[str, Part] = {}
    leaves = ((path, part, block) for where, block in blocks for path, part in block.leaves(where))
    for path, part, block in leaves:
        if part.with_embedding and (EMBEDDING not in block.reads or part is not block.part(block.names[0])):
            raise ValueError(
                f"{part.setting}.with_embedding must come with a block that gives the embedding to its first part, and "
                f"before another part; got {type(block).__name__}. Set model.block to {__package__}.block.ZambaBlock"
            )
        missing = [name for name in part.reads if name not in published]
        if missing:
            raise ValueError(
                f"model.pattern must publish what layer {path.split('.')[1]} reads before it; got no "
                f"{', '.join(missing)} from the layers before {type(part).__name__}. Put a layer that publishes it "
                "first"
            )
        for name in part.reads:
            given, wanted = published[name].widths.get(name), part.widths.get(name)
            if given is not None and wanted is not None and given != wanted:
                raise ValueError(
                    f"{part.setting} must read {name} as wide as {published[name].setting} publishes it, {given}; got "
                    f"{wanted}. Change the size of heads or of the memory in one of them"
                )
        published.update(dict.fromkeys(part.publishes, part))


def read_later(blocks: list[Composite]) -> list[frozenset[str]]:
    """After each block, the names of what has been published and is still to be read."""
    later: list[frozenset[str]] = []
    names: frozenset[str] = frozenset()
    for block in reversed(blocks):
        later.append(names)
        names = names.difference(block.publishes).union(block.reads)
    return later[::-1]


def stateless_from(blocks: list[Composite]) -> int:
    """The first of the blocks at the end that are stateless; the number of blocks where the last one is not."""
    first = len(blocks)
    while first and blocks[first - 1].stateless:
        first -= 1
    return first


def check_unread(parts: Iterable[tuple[str, Part]]) -> None:
    """Raises ValueError for a part that publishes under its own name in the pattern what no part reads.

    Names of another form are not settings': a model's only layer of RWKV-7 publishes first values too.
    """
    parts = list(parts)
    read = {name for _, part in parts for name in part.reads}
    for _, part in parts:
        mixer = part.setting.rpartition(".")[2]
        unread = [name for name in part.publishes if name.startswith(f"{mixer}.") and name not in read]
        if unread:
            raise ValueError(
                f"{part.setting} must be read by a later layer; got a pattern in which none reads {', '.join(unread)}. "
                f"Name {mixer} in keys_of or memory_of of a later mixer, or leave out share, publish or the mixer"
            )
