"""Sent: what a rank sends of one op in a micro-batch, and what it is where forwards run again or on more ranks."""

from __future__ import annotations

from collections import Counter
from copy import deepcopy
from dataclasses import dataclass, field, replace

from ...parallel.ahead import FirstTokens
from ...parallel.ops.experts import Rows
from ..settings import Settings

Key = tuple[str, str, str]  # mixer, op, phase


@dataclass
class Sent:
    """Of all calls of one op in a micro-batch: bytes by link, seconds, and whether values say how much it is."""

    bytes: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    overlaps: bool = False
    listed: bool = False


def with_ranks(settings: Settings, ranks: int) -> Settings:
    """The settings with as many tokens a rank on fewer ranks."""
    made = deepcopy(settings)
    made.data.sequence_length = settings.data.sequence_length // settings.parallel.sequence * ranks
    made.parallel.sequence = ranks
    return made


def again(sent: dict[Key, Sent], settings: Settings) -> dict[Key, Sent]:
    """What is sent where forwards run again: of whole blocks, which send again what they keep nothing of, and of tiles.

    Tokens travel to experts wherever a feed-forward layer runs; what multi-token prediction reads is gathered once.
    """
    mode, tile = settings.trainer.activation_checkpointing, settings.trainer.tile_tokens
    tokens = settings.data.rows_per_micro_batch * settings.data.sequence_length // settings.parallel.sequence

    def times(key: Key) -> int:
        mixer, op, phase = key
        if mixer == Rows.where:
            tiles = 1 if tile is None or op == Rows.what else -(-tokens // tile)
            return tiles * (1 if phase == "backward" else 1 + (mode != "none") + (tile is not None))
        return 2 if (mode, phase) == ("full", "forward") and mixer != FirstTokens.where else 1

    return {
        key: replace(of, bytes=Counter({x: n * count for x, count in of.bytes.items()}), seconds=n * of.seconds)
        for key, of in sent.items()
        for n in [times(key)]
    }


def further(less: dict[Key, Sent], more: dict[Key, Sent], times: float) -> dict[Key, Sent]:
    """What grows as it did from `less` to `more`, so many times as far."""
    found = {}
    for key, of in more.items():
        before = less.get(key, Sent())
        links = {*of.bytes, *before.bytes}
        sent = Counter({x: round(of.bytes[x] + times * (of.bytes[x] - before.bytes[x])) for x in links})
        seconds = of.seconds + times * (of.seconds - before.seconds)
        found[key] = Sent(sent, seconds, of.overlaps, of.listed)
    return found
