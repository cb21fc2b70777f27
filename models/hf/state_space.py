"""Components of the Mamba models: blocks of a mixer alone, and the mixers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..mixers.state_space.mamba import Mamba
from ..mixers.state_space.mamba2 import Mamba2
from .components import BLOCK, MODEL, Component
from .config import ConfigReader, ConfigWriter
from .fields import Field, Fixed, Flag, Integer, Number, Unread
from .rules import Absent, Known, Only, Rule
from .tensors import Weight, convolution, rows_of


@dataclass(frozen=True)
class StepRank(Field):
    """A positive integer, or "auto" for a sixteenth of `width`, rounded up."""

    key: str
    width: str = "hidden_size"

    def read(self, reader: ConfigReader) -> int:
        if reader.get(self.key, "auto") == "auto":
            return -(-reader.integer(self.width) // 16)
        return reader.integer(self.key)

    def write(self, writer: ConfigWriter, setting: str, value: Any) -> None:
        writer.put(self.key, value, setting)


def expansion_of(inner: int, width: int) -> float:
    """The expansion by which a mixer has the inner width: its product with the width is rounded down."""
    ratio = inner / width
    exact = ratio if int(ratio * width) == inner else math.nextafter(ratio, math.inf)
    return int(exact) if exact == int(exact) else exact


class Expansion(Field):
    """What `intermediate_size` is over `hidden_size`; without that key, `expand`."""

    def read(self, reader: ConfigReader) -> float:
        if reader.get("intermediate_size") is None:
            return reader.integer("expand", 2)
        reader.get("expand")
        return expansion_of(reader.integer("intermediate_size"), reader.integer("hidden_size"))

    def write(self, writer: ConfigWriter, setting: str, value: Any) -> None:
        if (width := writer.config.get("hidden_size")) is not None:
            writer.put("intermediate_size", int(value * width), setting)
        writer.put("expand", max(1, round(value)), setting)


@dataclass(frozen=True)
class HeadsTimesSize(Field):
    """An expansion by two keys: how many heads of which size, the latter an earlier field's, over `hidden_size`."""

    heads: str
    size: str
    defaults: tuple[int, int]

    def read(self, reader: ConfigReader) -> float:
        inner = reader.integer(self.heads, self.defaults[0]) * reader.integer(self.size, self.defaults[1])
        return expansion_of(inner, reader.integer("hidden_size"))

    def write(self, writer: ConfigWriter, setting: str, value: Any) -> None:
        width, size = writer.config.get("hidden_size"), writer.config.get(self.size)
        if width is not None and size:
            writer.put(self.heads, int(value * width) // size, setting)


@dataclass(frozen=True)
class HeadSize(Field):
    """A positive integer, or "auto": the inner width by `expand` over `heads`."""

    key: str
    expand: str
    heads: str

    def read(self, reader: ConfigReader) -> int:
        if reader.get(self.key, "auto") == "auto":
            return max(
                1, reader.integer(self.expand, 2) * reader.integer("hidden_size") // reader.integer(self.heads, 128)
            )
        return reader.integer(self.key)

    def write(self, writer: ConfigWriter, setting: str, value: Any) -> None:
        writer.put(self.key, value, setting)


@dataclass(frozen=True)
class StepLimit(Field):
    """The least and the largest step; infinity stands for None."""

    key: str

    def read(self, reader: ConfigReader) -> tuple[float, float | None]:
        value = reader.get(self.key, (0.0, None))
        least, most = value if isinstance(value, list | tuple) and len(value) == 2 else (None, None)
        if isinstance(most, Mapping):  # as transformers writes what JSON has no number for
            most = float(next(iter(most.values())))
        if not isinstance(least, int | float) or not isinstance(most, int | float | None) or least < 0:
            reader.problem(f"{self.key} must be two numbers; got {value!r}")
            return 0.0, None
        return float(least), None if most is None or most == float("inf") else float(most)

    def write(self, writer: ConfigWriter, setting: str, value: Any) -> None:
        least, most = value
        writer.put(self.key, [float(least), float("inf") if most is None else float(most)], setting)


@dataclass(frozen=True)
class Heads(Rule):
    """A key that must be expand * hidden_size / head_dim, the number of heads.

    auto: whether heads are as large as their number says where nothing is said of their size, which is else 64.
    """

    key: str = "num_heads"
    expand: str = "expand"
    size: str = "head_dim"
    auto: bool = False

    def read(self, reader: ConfigReader) -> None:
        size, value = self._count(reader.config), reader.get(self.key)
        if value is not None and size is not None and value != size:
            reader.problem(f"{self.key} must be expand * hidden_size / head_dim = {size:g}; got {value!r}")

    def write(self, writer: ConfigWriter) -> None:
        count = self._count(writer.config)
        writer.config[self.key] = 1 if count is None else int(count)  # 1: no layer has heads

    def _count(self, config: Mapping[str, Any]) -> float | None:
        sizes = config.get(self.expand, 2), config.get("hidden_size"), config.get(self.size, None if self.auto else 64)
        if not all(isinstance(size, int) for size in sizes):
            return None  # which the fields tell of
        expand, width, dim = sizes
        return expand * width / dim


_OF_FLASH_LINEAR_ATTENTION = {
    "norm_eps": "layer_norm_epsilon", "dt_limit": "time_step_limit", "dt_rank": "time_step_rank",
    "dt_min": "time_step_min", "dt_max": "time_step_max", "dt_init_floor": "time_step_floor",
    "dt_scale": "time_step_scale", "dt_init_scheme": "time_step_init_scheme",
}  # fmt: skip


def of_either_library(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A `current` of Mamba and Mamba-2: the models of flash-linear-attention have the same type and class names.

    They are told by `norm_eps`, and hold the same tensors.
    """
    if "norm_eps" not in config or "layer_norm_epsilon" in config:
        return config
    known = {_OF_FLASH_LINEAR_ATTENTION.get(key, key): value for key, value in config.items()}
    return {"tie_word_embeddings": False, "n_groups": 1, **known}


class OutputNorm(Rule):
    """`rmsnorm`, `norm_before_gate` and `D_has_hdim` of flash-linear-attention's Mamba-2, which has the first of these
    keys, must say what transformers' class does.
    """

    def read(self, reader: ConfigReader) -> None:
        reader.get("D_has_hdim")
        if reader.get("rmsnorm") is not None:
            reader.only("rmsnorm", True)
            reader.only("norm_before_gate", False)
            reader.only("D_has_hdim", False)

    def write(self, writer: ConfigWriter) -> None:
        pass


def _resolve_mamba(arguments: Mapping[str, Any]) -> Mapping[str, Any]:
    rank = -(-arguments["width"] // 16) if arguments["step_rank"] is None else arguments["step_rank"]
    without = ("norm_eps",) if arguments["part_norms"] is None else ()
    return {name: value for name, value in {**arguments, "step_rank": rank}.items() if name not in without}


STATE_SPACE_MODEL = MODEL.but(
    norm_eps=Number("layer_norm_epsilon", 1e-5),
    tied_embeddings=Flag("tie_word_embeddings", default=True),
    names={"embedding": "backbone.embeddings", "norm": "backbone.norm_f"},
)
STATE_SPACE_BLOCK = BLOCK.but(norm_eps=Unread("layer_norm_epsilon"), names={"mixer_norm": "norm"})
STATE_SPACE_RULES: tuple[Rule, ...] = (
    Only("hidden_act", ("silu", "swish")),
    Absent("quantization_config", "Save the model dequantised"),
    Known(
        ("residual_in_fp32", "rescale_prenorm_residual", "use_mambapy", "use_associative_scan",
         "use_falcon_mambapy", "time_step_scale", "time_step_min", "time_step_max", "time_step_floor", "chunk_size",
         "time_step_init_scheme", "time_step_rank", "d_inner", "d_model", "n_layer", "fused_add_norm", "ssm_cfg",
         "rms_norm", "norm_before_gate", "layer_types", "fuse_norm", "fuse_cross_entropy",
         "fuse_linear_cross_entropy", "use_l2warp", "conv_init", "A_init_range")
    ),
)  # fmt: skip
CONVOLUTION: dict[str, str | Weight] = {
    "conv.weight": convolution("mixer.conv1d.weight"),
    "conv.bias": "mixer.conv1d.bias",
}
MAMBA = Component(
    Mamba,
    {
        "expansion": Expansion(),
        "state": Integer("state_size", 16),
        "step_rank": StepRank("time_step_rank"),
        "conv_size": Integer("conv_kernel", 4),
        "bias": Flag("use_bias"),
        "conv_bias": Flag("use_conv_bias", default=True),
        "part_norms": Fixed(None),
        **dict.fromkeys(("step_range", "step_floor"), Unread()),
    },
    {
        "value": Weight("mixer.in_proj", rows=lambda mixer: rows_of(0, (mixer.inner, mixer.inner))),
        "gate": Weight("mixer.in_proj", rows=lambda mixer: rows_of(1, (mixer.inner, mixer.inner))),
        **CONVOLUTION,
        "selection": "mixer.x_proj",
        "step": "mixer.dt_proj",
        "dt_bias": "mixer.dt_proj.bias",
        "A_log": "mixer.A_log",
        "D": "mixer.D",
        "output": "mixer.out_proj",
    },
    _resolve_mamba,
)


def _input(number: int) -> Weight:
    """Of the fused projection the rows of the gate, x, B, C or the steps."""

    def rows(mixer: Mamba2) -> torch.Tensor:
        inner, channels = mixer.heads * mixer.head_dim, mixer.groups * mixer.state
        return rows_of(number, (inner, inner, channels, channels, mixer.heads))

    return Weight("mixer.in_proj", rows=rows)


MAMBA2 = Component(
    Mamba2,
    {
        "head_dim": Integer("head_dim", 64),
        "expansion": Integer("expand", 2),
        "state": Integer("state_size", 128),
        "groups": Integer("n_groups", 8),
        "conv_size": Integer("conv_kernel", 4),
        "step_limit": StepLimit("time_step_limit"),
        "bias": Flag("use_bias"),
        "conv_bias": Flag("use_conv_bias", default=True),
        "norm_eps": Unread("layer_norm_epsilon"),
        **dict.fromkeys(("step_range", "step_floor", "initial_skip"), Unread()),
    },
    {
        **{name: _input(number) for number, name in enumerate(("gate", "value", "key", "query", "step"))},
        **CONVOLUTION,
        "dt_bias": "mixer.dt_bias",
        "A_log": "mixer.A_log",
        "D": "mixer.D",
        "norm": "mixer.norm",
        "output": "mixer.out_proj",
    },
)
HYBRID_MAMBA2 = MAMBA2.moved("mixer.", "mamba.").but(
    expansion=Integer("mamba_expand", 2),
    head_dim=HeadSize("mamba_d_head", "mamba_expand", "mamba_n_heads"),
    state=Integer("mamba_d_state", 256),
    groups=Integer("mamba_n_groups", 1),
    conv_size=Integer("mamba_d_conv", 4),
    bias=Flag("mamba_proj_bias"),
    conv_bias=Flag("mamba_conv_bias", default=True),
    norm_eps=Unread("rms_norm_eps"),
)
