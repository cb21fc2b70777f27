"""Rotary positions: the rotation, its angles, and the frequencies that long-context models scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from ..dispatch import by_kernels
from ..operation import Function
from .tiles import in_cache

# The settings that each kind of scaling reads beside `factor`; `_REQUIRED` have no default.
_READS = {
    "linear": (),
    "ntk": (),
    "dynamic": ("original_length", "length"),
    "llama3": ("original_length", "low_frequency_factor", "high_frequency_factor"),
    "yarn": ("original_length", "beta_fast", "beta_slow", "attention_factor", "truncate"),
    "longrope": ("original_length", "short_factors", "long_factors", "length", "attention_factor"),
}
_REQUIRED = ("original_length", "short_factors", "long_factors")
_DEFAULTS = {"low_frequency_factor": 1.0, "high_frequency_factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0}
ROPE_SCALINGS = tuple(_READS)


@dataclass(frozen=True)
class RopeScaling:
    """How the frequencies of a model trained at `original_length` are stretched by `factor`.

    linear: all of them (Chen et al., 2023, arXiv 2306.15595).
    ntk: the base grows by factor^(dim / (dim - 2)), so that the lowest frequency is that of linear and the highest
        stays (NTK-aware, bloc97, 2023; see arXiv 2309.00071).
    dynamic: as ntk, by the factor that documents of `length` tokens need: factor * length / original_length - (factor
        - 1), or 1 if they are shorter (dynamic NTK, emozilla, 2023). length: by default original_length.
    llama3: those whose wavelength exceeds original_length / low_frequency_factor (default 1), none below
        original_length / high_frequency_factor (default 4), blended in between (Llama 3.1, arXiv 2407.21783). Equal
        factors, as those of Llama 4 Scout, leave nothing to blend.
    yarn: by the number of turns over original_length, from those of fewer than `beta_slow` (default 1) to those of
        more than `beta_fast` (default 32), and queries and keys grow by `attention_factor` (default 0.1 ln factor + 1;
        Peng et al., 2023, arXiv 2309.00071); with `truncate` (default True) the blend begins and ends at whole dims.
    longrope: each by its own of `long_factors` where `length` exceeds original_length, else of `short_factors`
        (default: original_length), and queries and keys grow by `attention_factor` (default sqrt(1 + ln factor /
        ln original_length); Ding et al., 2024, arXiv 2402.13753; Phi-3, arXiv 2404.14219).

    The published models of dynamic and longrope look at each input's length. Here `length` is a setting, so that a
    token's rotation depends neither on what shares its row nor on how much has been decoded: documents beyond
    `longest` are refused.
    Raises ValueError for an unknown kind and for a setting that is missing or that the kind does not read.
    """

    kind: str
    factor: float
    original_length: int | None = None
    length: int | None = None
    low_frequency_factor: float | None = None
    high_frequency_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    attention_factor: float | None = None
    truncate: bool | None = None
    short_factors: Sequence[float] | None = None
    long_factors: Sequence[float] | None = None

    def __post_init__(self) -> None:
        if self.kind not in _READS:
            raise ValueError(f"rope scaling kind must be one of {', '.join(_READS)}; got {self.kind!r}")
        if not self.factor >= 1:
            raise ValueError(f"rope scaling factor must be at least 1; got {self.factor}")
        for name in sorted({name for names in _READS.values() for name in names}):
            value = getattr(self, name)
            if value is not None and name not in _READS[self.kind]:
                raise ValueError(f"{name} must not be given with kind={self.kind!r}, which ignores it; got {value}")
            if value is None and name in _REQUIRED and name in _READS[self.kind]:
                raise ValueError(f"{name} must be given with kind={self.kind!r}; got none")
        for name in ("original_length", "length"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")
        for name in ("short_factors", "long_factors"):
            if (values := getattr(self, name)) is not None:
                if not all(value > 0 for value in values):
                    raise ValueError(f"{name} must be positive numbers; got {list(values)}")
                object.__setattr__(self, name, tuple(map(float, values)))  # so that it can be hashed
        if self.kind == "llama3" and self.setting("low_frequency_factor") > self.setting("high_frequency_factor"):
            raise ValueError(
                "low_frequency_factor must be at most high_frequency_factor; "
                f"got {self.setting('low_frequency_factor')} and {self.setting('high_frequency_factor')}"
            )

    def setting(self, name: str) -> float:
        """A setting, or its default."""
        value = getattr(self, name)
        return float(_DEFAULTS[name] if value is None else value)

    @property
    def longest(self) -> int | None:
        """How many tokens a document may have; None for any number.

        Beyond it the frequencies of dynamic and longrope would be others than those of their `length`.
        """
        if self.kind not in ("dynamic", "longrope"):
            return None
        assert self.original_length is not None
        if self.kind == "dynamic":
            return max(self.length or 0, self.original_length)
        return None if self.long or self.short_factors == self.long_factors else self.original_length

    @property
    def long(self) -> bool:
        """Whether longrope takes its `long_factors`."""
        return self.length is not None and self.original_length is not None and self.length > self.original_length

    @property
    def growth(self) -> float:
        """The factor of what is rotated: 1 except for yarn and longrope."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.kind == "yarn":
            return 0.1 * math.log(self.factor) + 1
        if self.kind == "longrope":
            assert self.original_length is not None
            return math.sqrt(1 + math.log(self.factor) / math.log(self.original_length))
        return 1.0

    def base(self, base: float, dim: int) -> float:
        """The base of the frequencies of `dim` dims: another than the given one for ntk and dynamic."""
        if self.kind == "ntk":
            grown = self.factor
        elif self.kind == "dynamic":
            assert self.original_length is not None
            assert self.longest is not None
            grown = self.factor * self.longest / self.original_length - (self.factor - 1)
        else:
            return base
        return base * grown ** (dim / (dim - 2))

    def check(self, dim: int) -> None:
        """Raises ValueError where so many dims cannot turn by it."""
        if self.kind in ("ntk", "dynamic") and dim < 4:
            raise ValueError(
                f"rope dim must be at least 4 with scaling kind {self.kind}; got {dim}. Change head_dim, rope_fraction"
            )
        for name in ("short_factors", "long_factors"):
            if (factors := getattr(self, name)) is not None and len(factors) != dim // 2:
                raise ValueError(
                    f"{name} must be one for each pair of the {dim} dims that turn, {dim // 2}; got {len(factors)}"
                )


def rope_frequencies(dim: int, base: float, scaling: RopeScaling | None = None) -> tuple[Tensor, float]:
    """Inverse frequencies base^(−2i/dim), float32 `[dim/2]`, scaled, and the factor of rotated queries and keys.

    The factor is 1 except for yarn and longrope. Operations have the order of transformers', so that checkpoints turn
    by the same angles: at position 100,000 the last bit of a frequency is a hundredth of a radian. Raises ValueError
    for an odd dim and as `RopeScaling.check` does. Su et al., 2021, arXiv 2104.09864.
    """
    if dim < 2 or dim % 2:
        raise ValueError(f"rope dim must be even and at least 2; got {dim}. Change head_dim or rope_fraction")
    if scaling is not None:
        scaling.check(dim)
        base = scaling.base(base, dim)
    wavelengths = base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)  # over 2 pi
    frequencies = 1.0 / wavelengths
    if scaling is None or scaling.kind in ("ntk", "dynamic"):
        return frequencies, 1.0
    if scaling.kind == "linear":
        return frequencies / scaling.factor, 1.0
    if scaling.kind == "llama3":
        low, high = scaling.setting("low_frequency_factor"), scaling.setting("high_frequency_factor")
        turns = scaling.setting("original_length") / (2 * math.pi / frequencies)
        kept = (turns >= low).float() if low == high else ((turns - low) / (high - low)).clamp(0.0, 1.0)
        return (1 - kept) * frequencies / scaling.factor + kept * frequencies, 1.0
    if scaling.kind == "longrope":
        factors = scaling.long_factors if scaling.long else scaling.short_factors
        return 1.0 / (torch.tensor(factors, dtype=torch.float32) * wavelengths), scaling.growth
    kept = _yarn_kept(dim, base, scaling)
    return 1.0 / (scaling.factor * wavelengths) * (1 - kept) + frequencies * kept, scaling.growth


def _yarn_kept(dim: int, base: float, scaling: RopeScaling) -> Tensor:
    """How much of each frequency is kept: from 1 down to 0 along the dims between the two numbers of turns."""

    def index_of(turns: float) -> float:
        return dim * math.log(scaling.setting("original_length") / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = index_of(scaling.setting("beta_fast")), index_of(scaling.setting("beta_slow"))
    if scaling.truncate is not False:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = max(high - low, 0.001)
    return 1 - ((torch.arange(dim // 2, dtype=torch.float32) - low) / width).clamp(0.0, 1.0)


@dataclass(frozen=True)
class Rotation:
    """Which rotation a head's first `dims` dims undergo: that of `rope_frequencies(dims, base, scaling)`."""

    dims: int
    base: float
    scaling: RopeScaling | None = None

    @lru_cache(maxsize=256)  # noqa: B019 - of settings, of which a model has few
    def frequencies(self) -> tuple[Tensor, float]:
        """Inverse frequencies, float32 `[dims / 2]` on the host, and the factor of what is rotated."""
        with torch.device("cpu"):
            return rope_frequencies(self.dims, self.base, self.scaling)

    @torch.compiler.assume_constant_result
    def name(self) -> str:
        """A text by which a compiled graph finds the rotation again, with `named`."""
        _named[repr(self)] = self
        return repr(self)

    @property
    def longest(self) -> int | None:
        """How many tokens a document may have, as by `RopeScaling`; None for any number."""
        return None if self.scaling is None else self.scaling.longest

    @staticmethod
    def named(name: str) -> Rotation:
        return _named[name]


_named: dict[str, Rotation] = {}


def rotations(
    positions: Tensor, inverse_frequencies: Tensor, attention_factor: float = 1.0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """(cos, sin) of the angles `position * inverse_frequencies`, times `attention_factor`.

    positions `[B, T]`, inverse_frequencies `[R/2]`; results `[B, T, R/2]` in `dtype`, float32 or float64. Angles are
    float64, since at a million tokens the float32 product is off by a thirtieth of a radian.
    """
    angles = positions.to(torch.float64)[..., None] * inverse_frequencies.to(torch.float64)
    if dtype == torch.float32:
        angles = angles.remainder_(2 * math.pi).to(dtype)
    return angles.cos().mul_(attention_factor), angles.sin_().mul_(attention_factor)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the first R dims of each head by its token's angles, whose `rotations` are given; passes the rest.

        y_i = x_i cos_i − x_{i+R/2} sin_i;  y_{i+R/2} = x_{i+R/2} cos_i + x_i sin_i

    x `[B, T, H, K]`; cos, sin `[B, T, R/2]`, float32 (float64 for float64), which carry no gradient; half-split
    pairing, as in GPT-NeoX and Llama's published form. Computed in their type; y is in x's. Backward keeps cos and sin
    and no activation. Raises ValueError where shapes or types do not fit.
    """
    if cos.shape != sin.shape or cos.shape[:-1] != x.shape[:2] or 2 * cos.shape[-1] > x.shape[-1]:
        raise ValueError(
            f"cos and sin must be [B, T, R/2] for x [B, T, H, K], R at most K; got {list(cos.shape)} and "
            f"{list(sin.shape)} for {list(x.shape)}"
        )
    if cos.dtype != torch.promote_types(x.dtype, torch.float32):
        raise ValueError(f"cos and sin must be float32, or float64 for float64; got {cos.dtype} for {x.dtype}")
    return _Rotate.call(x, cos, sin)


def rope(x: Tensor, positions: Tensor, *, inverse_frequencies: Tensor, attention_factor: float = 1.0) -> Tensor:
    """Rotates the first R = 2·len(inverse_frequencies) dims of each head by its token's position; passes the rest.

    x `[B, T, H, K]`, positions `[B, T]`: `rotate` by the `rotations` of the positions, for whom these are of no other
    use. Raises ValueError where shapes do not fit. Su et al., 2021, arXiv 2104.09864.
    """
    if tuple(positions.shape) != tuple(x.shape[:2]):
        raise ValueError(f"positions must be {list(x.shape[:2])}, one per token; got {list(positions.shape)}")
    if 2 * inverse_frequencies.shape[0] > x.shape[-1]:
        raise ValueError(
            f"inverse_frequencies must be at most half of the head's {x.shape[-1]} dims; "
            f"got {inverse_frequencies.shape[0]}"
        )
    dtype = torch.promote_types(x.dtype, torch.float32)
    return rotate(x, *rotations(positions, inverse_frequencies, attention_factor, dtype))


class _Rotate(Function):
    """The transpose of a rotation is the rotation back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, 1.0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _rotate(dy, cos, sin, -1.0), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, direction: float) -> Tensor:
    kernels = by_kernels("rope", x)
    if kernels is not None and x.numel():
        return kernels.turned(x, cos, sin, direction)
    (y,) = in_cache(partial(_turned, direction=direction), (x.flatten(0, 1), cos.flatten(0, 1), sin.flatten(0, 1)), 1)
    return y.view(x.shape)


def _turned(x: Tensor, cos: Tensor, sin: Tensor, *, direction: float) -> tuple[Tensor, ...]:
    """Of tokens `[n, H, K]`."""
    half = cos.shape[-1]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    first, second = (x[..., i * half : (i + 1) * half].to(cos.dtype) for i in range(2))
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    y[..., :half] = (first * cos).addcmul_(second, sin, value=-direction)
    y[..., half : 2 * half] = (second * cos).addcmul_(first, sin, value=direction)
    if 2 * half < x.shape[-1]:
        y[..., 2 * half :] = x[..., 2 * half :]
    return (y,)
