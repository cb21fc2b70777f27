"""Draws docs/shared_row.png, a row of packed documents on four ranks through a hybrid: `python docs/shared_row.py`."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

PICTURE = Path(__file__).with_suffix(".png")
RANKS = ("#3b6fb6", "#d9822b", "#3f9b6c", "#9a5fb0")
INK, FAINT, EMPTY = "#24292f", "#6e7781", "#dde2e7"
DOCUMENTS = {"A": 0.375, "B": 0.8125, "C": 1.0}  # where each ends, as a share of the row
LEFT, SPAN, GAP = 2.85, 2.0, 0.16  # of the first rank's column, of a column, between two
NOTES = LEFT + 4 * SPAN + 3 * GAP + 0.3


def left(rank: int) -> float:
    """The left edge of a rank's column."""
    return LEFT + rank * (SPAN + GAP)


def place(share: float) -> float:
    """Where a position of the row, 0 to 1, is in the picture."""
    rank = min(int(share * 4), 3)
    return left(rank) + (share * 4 - rank) * SPAN


def document_of(share: float) -> str:
    """The document of a position."""
    return next(name for name, end in DOCUMENTS.items() if share < end)


def box(axes: Axes, x: float, y: float, width: float, height: float, color: str, alpha: float = 1.0) -> None:
    """A filled box with round corners."""
    shape = "round,pad=0,rounding_size=0.06"
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=shape, fc=color, ec="none", alpha=alpha, zorder=2))


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], color: str, bend: float = 0.0) -> None:
    """An arrow, bent to the left by a share of its length."""
    style = f"arc3,rad={bend}"
    axes.add_patch(
        FancyArrowPatch(start, end, connectionstyle=style, arrowstyle="-|>", mutation_scale=11, color=color, lw=1.5,
                        shrinkA=0, shrinkB=0, zorder=5)
    )  # fmt: skip


def band(axes: Axes, y: float, height: float, title: str, under: str, travels: str, note: str) -> None:
    """A layer: a pale box on each rank, its name at the left and what travels at the right."""
    for rank, color in enumerate(RANKS):
        box(axes, left(rank), y, SPAN, height, color, 0.11)
    middle = y + height / 2
    axes.text(LEFT - 0.25, middle + 0.02, title, ha="right", va="bottom", fontsize=12.5, weight="bold", color=INK)
    axes.text(LEFT - 0.25, middle - 0.04, under, ha="right", va="top", fontsize=9.5, color=FAINT, linespacing=1.3)
    axes.text(NOTES, middle + 0.02, travels, va="bottom", fontsize=11.5, weight="bold", color=INK)
    axes.text(NOTES, middle - 0.04, note, va="top", fontsize=9.5, color=FAINT, linespacing=1.3)


def row(axes: Axes, y: float) -> None:
    """The packed documents, cut by the borders of the ranks."""
    for rank, color in enumerate(RANKS):
        axes.text(left(rank) + SPAN / 2, y + 0.72, f"rank {rank}", ha="center", fontsize=13, weight="bold", color=color)
    begin = 0.0
    for name, end in DOCUMENTS.items():
        cuts = [begin, *(border for border in (0.25, 0.5, 0.75) if begin < border < end), end]
        for first, last in pairwise(cuts):
            rank = int(first * 4)
            x, width = place(first), (last - first) * 4 * SPAN
            box(axes, x + 0.015, y, width - 0.03, 0.5, RANKS[rank], {"A": 0.95, "B": 0.75, "C": 0.6}[name])
            axes.text(
                x + width / 2, y + 0.24, name, ha="center", va="center", color="white", fontsize=12, weight="bold"
            )
        begin = end
    axes.text(
        LEFT - 0.25, y + 0.27, "one row of tokens", ha="right", va="bottom", fontsize=12.5, weight="bold", color=INK
    )
    axes.text(LEFT - 0.25, y + 0.2, "documents A, B, C, packed", ha="right", va="top", fontsize=9.5, color=FAINT)
    axes.text(NOTES, y + 0.27, "each rank holds a quarter", va="bottom", fontsize=11.5, weight="bold", color=INK)
    axes.text(NOTES, y + 0.2, "and knows where all documents start", va="top", fontsize=9.5, color=FAINT)


def convolution(axes: Axes, y: float) -> None:
    """Halos: the last tokens of a span go to the next rank."""
    band(axes, y, 0.62, "short convolution", "token shift", "halo", "the width − 1 tokens before a span")
    for rank in range(4):
        for i in range(14):
            last, first = i >= 12, rank and i < 2
            color = RANKS[rank] if not first else RANKS[rank - 1]
            x = left(rank) + 0.1 + i * 0.1305
            axes.add_patch(
                Rectangle((x, y + 0.22), 0.095, 0.18, fc=color, alpha=0.95 if last or first else 0.3, zorder=3)
            )
        if rank:
            arrow(axes, (left(rank - 1) + SPAN - 0.2, y + 0.42), (left(rank) + 0.2, y + 0.42), RANKS[rank - 1], -0.5)


def states(axes: Axes, y: float) -> None:
    """State passing: a summary of every span, gathered once."""
    note = (
        "one gather of (transition, state) each way,\nof a size that does not depend on the length.\n"
        "A document's start clears it"
    )
    band(axes, y, 1.25, "linear attention", "delta rule, Mamba", "state passing", note)
    generator = np.random.default_rng(3)
    for rank, color in enumerate(RANKS):
        x = left(rank)
        axes.plot([x + 0.1, x + 1.3], [y + 0.97] * 2, color=color, lw=5, alpha=0.35, solid_capstyle="round", zorder=3)
        arrow(axes, (x + 0.1, y + 0.97), (x + 1.5, y + 0.97), color)
        for i in range(4):
            for j in range(4):
                shade = 0.25 + 0.7 * generator.random()
                spot = (x + 1.56 + 0.08 * i, y + 0.81 + 0.08 * j)
                axes.add_patch(Rectangle(spot, 0.07, 0.07, fc=color, alpha=shade, zorder=4))
    rail = y + 0.46
    axes.plot([left(0) + 1.72, left(3) + 0.32], [rail] * 2, color=FAINT, lw=1.6, zorder=3)
    for rank, color in enumerate(RANKS):
        if rank < 3:
            axes.plot([left(rank) + 1.72] * 2, [rail, y + 0.77], color=color, lw=1.6, zorder=4)
            axes.plot([left(rank) + 1.72], [rail], "o", color=color, ms=5, zorder=5)
        if rank:
            arrow(axes, (left(rank) + 0.32, rail), (left(rank) + 0.32, y + 0.88), color)
            start = document_of(rank / 4)
            for sender in range(rank):
                spot = (left(rank) + 0.2 + 0.13 * sender, y + 0.19)
                counts = document_of((sender + 0.999) / 4) == start
                fill = RANKS[sender] if counts else "none"
                axes.add_patch(Rectangle(spot, 0.1, 0.12, fc=fill, ec=RANKS[sender], lw=1, zorder=4))
            axes.text(left(rank) + 0.25 + 0.13 * rank, y + 0.245, "combined", va="center", fontsize=8.5, color=FAINT)


def attention(axes: Axes, y: float) -> None:
    """The ring: each rank's queries against all keys, as the causal mask and the documents let them."""
    note = (
        "key/value blocks travel; partial results\nmerge by log-sum-exp. Hidden blocks are\nneither computed nor sent"
    )
    band(axes, y, 1.5, "softmax attention", "queries ↓   keys →", "ring", note)
    cells = 96
    shares = (np.arange(cells) + 0.5) / cells
    names = np.array([document_of(share) for share in shares])
    seen = (names[:, None] == names[None, :]) & (shares[:, None] >= shares[None, :])
    for rank in range(4):
        rows = slice(rank * cells // 4, (rank + 1) * cells // 4)
        image = np.ones((cells // 4, cells, 3))
        for sender in range(4):
            keys = slice(sender * cells // 4, (sender + 1) * cells // 4)
            tile, color = seen[rows, keys], np.array(to_rgb(RANKS[sender]))
            image[:, keys][~tile] = to_rgb(EMPTY)
            image[:, keys][tile] = 0.88 * color + 0.12
            x, width = left(rank) + 0.12 + sender * 0.45, 0.42
            axes.imshow(image[:, keys], extent=(x, x + width, y + 0.42, y + 1.3), aspect="auto", zorder=3)
            label, ink = (f"rank {sender}", RANKS[sender]) if tile.any() else ("–", FAINT)
            axes.text(x + width / 2, y + 0.22, label, ha="center", va="center", fontsize=8.5, color=ink)


def blocks(axes: Axes, y: float) -> None:
    """Block-sparse attention: the blocks that the queries of a rank have selected."""
    note = "NSA, MoBA, an indexer: only the key blocks\nthat its queries have selected"
    band(axes, y, 0.9, "sparse attention", "blocks of keys", "listed blocks", note)
    listed = {0: (1, 3), 1: (0, 2, 6, 7), 2: (6, 8, 10, 11), 3: (7, 9, 12, 15)}
    for rank, chosen in listed.items():
        for block in range(16):
            color = RANKS[block // 4] if block in chosen else "#d5dae0"
            spot = (left(rank) + 0.12 + block * 0.11, y + 0.34)
            axes.add_patch(Rectangle(spot, 0.09, 0.26, fc=color, zorder=3))


def local(axes: Axes, y: float) -> None:
    """What treats every token by itself."""
    under = "projections, norms, loss"
    band(
        axes,
        y,
        0.62,
        "feed-forward",
        under,
        "nothing",
        "ZeRO 0–3 shards parameters, gradients\nand optimizer states over all ranks",
    )
    for rank, color in enumerate(RANKS):
        for i in range(7):
            x = left(rank) + 0.24 + i * 0.255
            arrow(axes, (x, y + 0.5), (x, y + 0.12), color)


def draw() -> plt.Figure:
    """The whole picture, from the row downwards."""
    figure, axes = plt.subplots(figsize=(15.2, 8.3))
    layers = ((row, 7.35), (convolution, 6.5), (states, 5.02), (attention, 3.3), (blocks, 2.18), (local, 1.34))
    for layer, y in layers:
        layer(axes, y)
    axes.text(NOTES, 8.07, "what travels between ranks", fontsize=11, color=FAINT, style="italic")
    axes.set(xlim=(0, NOTES + 3.35), ylim=(1.2, 8.35))
    axes.set_aspect("auto")
    axes.axis("off")
    figure.subplots_adjust(left=0.005, right=0.995, top=0.995, bottom=0.005)
    return figure


if __name__ == "__main__":
    draw().savefig(PICTURE, dpi=110, facecolor="white")
