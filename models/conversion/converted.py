"""What a conversion gives, and what mixers that are converted have to be."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from ..mixers.softmax.attention import Attention
from ..mixers.softmax.softmax_attention import SoftmaxAttention

Weights = Mapping[str, Tensor]


class Converted(NamedTuple):
    """A mixer's settings after the conversion, its weights by name, and how its outputs differ from those before.

    errors: the relative errors of weights, by what they are of. exact_until: where outputs are the same only at
    positions of a document below this one. new: layers that the mixer did not have.
    """

    settings: dict[str, Any]
    weights: dict[str, Tensor]
    errors: dict[str, float]
    exact_until: int | None = None
    new: tuple[str, ...] = ()

    @property
    def report(self) -> str:
        """The same in words."""
        off = [f"{what} off by {error:.1e}" for what, error in self.errors.items() if error]
        exact = "exact" if self.exact_until is None else f"exact at positions below {self.exact_until:,} of a document"
        return (", ".join(off) or exact) + (f"; new: {', '.join(self.new)}" if self.new else "")


def check_plain(mixer: Attention, settings: Mapping[str, Any], known: Collection[str], form: str) -> None:
    """Raises ValueError unless the mixer is softmax attention whose other settings than `known` have their defaults."""
    if type(mixer) is not SoftmaxAttention:
        raise ValueError(f"mixers must be SoftmaxAttention for form={form}; got {type(mixer).__name__}. Name others")
    for name, parameter in inspect.signature(SoftmaxAttention).parameters.items():
        value = settings.get(name, parameter.default)
        if name not in known and value != parameter.default:
            raise ValueError(
                f"{name} must be {parameter.default} for form={form}, which has no such setting; got {value!r}. Name "
                "other layers in mixers"
            )
