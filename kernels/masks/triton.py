"""The patterns of masks inside Triton kernels."""

# Kernels are typed by Triton, when they are compiled.
# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportArgumentType=false

from __future__ import annotations

import triton
import triton.language as tl

from .pattern import FAR, Pattern


def flat_bands(mask: Pattern) -> tuple[int, ...]:
    """The bands as one tuple, six numbers each: the constant BANDS of kernels."""
    return tuple(number for band in mask.bands for number in band)


FAR_AWAY = tl.constexpr(FAR)


@triton.jit
def in_band(
    i, j, FIRST: tl.constexpr, LAST: tl.constexpr, BACK: tl.constexpr, AHEAD: tl.constexpr, R: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Whether key positions j are in a band of query positions i, of whatever shape both broadcast to."""
    seen = (j - i <= AHEAD) if AHEAD < FAR_AWAY else ((i >= i) & (j >= j))
    if BACK < FAR_AWAY:
        seen = seen & (i - j <= BACK)
    if FIRST > 0:
        seen = seen & (j >= FIRST)
    if LAST < FAR_AWAY:
        seen = seen & (j < LAST)
    if R > 1:
        seen = seen & (tl.abs(i - j) % R == 0)
    if BLOCK < FAR_AWAY:
        seen = seen & (i // BLOCK == j // BLOCK)
    return seen


@triton.jit
def visible(i, j, BANDS: tl.constexpr):
    """Whether queries at positions i see keys at positions j of the same document."""
    seen = in_band(i, j, BANDS[0], BANDS[1], BANDS[2], BANDS[3], BANDS[4], BANDS[5])
    for n in tl.static_range(1, len(BANDS) // 6):
        m: tl.constexpr = 6 * n
        seen = seen | in_band(i, j, BANDS[m], BANDS[m + 1], BANDS[m + 2], BANDS[m + 3], BANDS[m + 4], BANDS[m + 5])
    return seen
