"""Zamba2 (arXiv 2411.15242): Mamba-2, which in some layers also reads attention and an MLP that these layers share."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ....block import ZambaBlock
from ....feed_forward.geglu import GEGLU
from ...components import ATTENTION, BLOCK, GATED_MLP, MODEL
from ...config import ConfigReader, ConfigWriter
from ...family import RULES, Family
from ...fields import Field, Fixed, Flag, Integer, Number
from ...layers import LINEAR, LayerTypes
from ...rope import RopeBase, RopeScale
from ...rules import Absent, Known, Only, Replaced, Rule
from ...state_space import HYBRID_MAMBA2, Heads
from ...tensors import Weight, rows_of

SHARED, MLP = "attention", "mlp"
HYBRID = f"{SHARED}|{MLP}|{LINEAR}"
TYPES, SETS, ADAPTED = "layers_block_type", "num_mem_blocks", "use_shared_attention_adapter"
PROJECTIONS, FUSED = ["query", "key", "value"], ["gate+up"]
PLAIN = "linear_attention"
OLDER = {"mamba": PLAIN, "mamba2": PLAIN}


def _current(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the configuration class makes of keys that are absent or null; layers have had other names."""
    new = {"layers_block_type": config.get("layer_types"), **config}
    width = new.get("hidden_size")
    if new[TYPES] is None:
        new[TYPES] = [kind for before in (6, 5, 5, 5, 5, 5, 5, 4, 3) for kind in (*[PLAIN] * before, "hybrid")]
        new[TYPES] += [PLAIN] * 2
    if isinstance(new[TYPES], list):
        new[TYPES] = [OLDER.get(kind, kind) for kind in new[TYPES]]
    if isinstance(width, int):
        new["intermediate_size"] = new.get("intermediate_size") or 4 * width
        new["mamba_headdim"] = (new.get("mamba_expand") or 2) * width // (new.get("n_mamba_heads") or 8)
    return new


def _hybrids(reader: ConfigReader) -> int:
    types = reader.get(TYPES)
    return types.count("hybrid") if isinstance(types, list) else 0


class Layers(LayerTypes):
    """Mamba-2 in all layers; in hybrid ones `num_mem_blocks` sets of attention and MLP take turns before it."""

    def read(self, reader: ConfigReader, depth: int) -> list[str]:
        types, sets = reader.get(TYPES), reader.integer(SETS, 1)
        if not isinstance(types, list) or len(types) != depth or not {*types} <= {*self.kinds}:
            reader.problem(f"{TYPES} must name {' or '.join(self.kinds)} for each of {depth} layers; got {types!r}")
            return [LINEAR] * depth
        turns = [types[:layer].count("hybrid") % sets + 1 for layer in range(depth)]
        return [
            f"{SHARED}_{turn}|{MLP}_{turn}|{LINEAR}" if kind == "hybrid" else LINEAR
            for kind, turn in zip(types, turns, strict=True)
        ]

    def write(self, writer: ConfigWriter, layers: Sequence[str]) -> None:
        kinds = {ours: kind for kind, ours in self.kinds.items()}
        if unknown := sorted({*layers} - {*kinds}):
            writer.problems.append(f"layers of {', '.join(unknown)}, which must be of {' or '.join(kinds)}")
        writer.config[TYPES] = [kinds.get(kind, "hybrid") for kind in layers]
        pairs = [names[:2] for names in writer.layers if len(names) == 3]
        sets = list(dict.fromkeys(pairs))
        writer.config[SETS] = len(sets) or 1
        if pairs != [sets[turn % len(sets)] for turn in range(len(pairs))] or len({*sum(sets, ())}) < 2 * len(sets):
            writer.problems.append("attention and MLPs that do not take turns in hybrid layers")


class SharedWeights(Field):
    """Attention and MLPs share their weights, MLPs always with adapters, attention by a key."""

    def read(self, reader: ConfigReader) -> dict[str, list[str]] | None:
        own = {SHARED: PROJECTIONS if reader.flag(ADAPTED) else [], MLP: FUSED}
        turns = range(1, min(_hybrids(reader), reader.integer(SETS, 1)) + 1)
        return {f"{name}_{turn}": list(layers) for turn in turns for name, layers in own.items()} or None

    def write(self, writer: ConfigWriter, setting: str, value: Any) -> None:
        value, mixers = value or {}, {name for names in writer.layers for name in names}
        own = {kind: {name for name in mixers if writer.kinds.get(name) == kind} for kind in (SHARED, MLP)}
        adapted = [list(value.get(name, ())) for name in own[SHARED]]
        expected = {name: PROJECTIONS if [*map(bool, adapted)][:1] == [True] else [] for name in own[SHARED]}
        expected |= dict.fromkeys(own[MLP], FUSED)
        if {name: list(layers) for name, layers in value.items()} != expected:
            writer.refuse(setting, value, f", which must be {expected} in this family")
        writer.put(ADAPTED, any(adapted), setting)


class AdapterRank(Field):
    """Of all adapters; there are none without hybrid layers."""

    def read(self, reader: ConfigReader) -> int | None:
        return reader.integer("adapter_rank", 128) if _hybrids(reader) else None

    def write(self, writer: ConfigWriter, setting: str, value: Any) -> None:
        if value is not None:
            writer.put("adapter_rank", value, setting)


@dataclass(frozen=True)
class OfHeadSize(Field):
    """A function of the size of a head, which is twice the width over the heads."""

    scale: bool = False

    def read(self, reader: ConfigReader) -> float:
        return self._value(2 * reader.integer("hidden_size") // reader.integer("num_attention_heads", 32))

    def write(self, writer: ConfigWriter, setting: str, value: Any) -> None:
        size = 2 * writer.config.get("hidden_size", 1) // writer.config.get("num_attention_heads", 1)
        if value is None or not math.isclose(value, self._value(size), rel_tol=1e-9):
            writer.refuse(setting, value, f", which must be {self._value(size)} by hidden_size and num_attention_heads")

    def _value(self, size: int) -> float:
        return (max(size, 1) / 2) ** -0.5 if self.scale else size


class Rotation(RopeBase):
    """A base where `use_mem_rope` is true, else no rotation."""

    def read(self, reader: ConfigReader) -> float | None:
        base = super().read(reader)
        return base if reader.flag("use_mem_rope") else None

    def write(self, writer: ConfigWriter, setting: str, value: Any) -> None:
        writer.put("use_mem_rope", value is not None, setting)
        if value is not None:
            super().write(writer, setting, value)


class Scaling(RopeScale):
    """That of such a rotation."""

    def read(self, reader: ConfigReader) -> dict[str, Any] | None:
        scaling = super().read(reader)
        return scaling if reader.flag("use_mem_rope") else None


class LeastStep(Field):
    """Steps have a lower bound and no upper one."""

    def read(self, reader: ConfigReader) -> tuple[float, None]:
        return reader.coefficient("time_step_min", 0.001), None

    def write(self, writer: ConfigWriter, setting: str, value: Any) -> None:
        if value[1] is not None:
            writer.refuse(setting, value)
        writer.put("time_step_min", float(value[0]), setting)


class AdaptedHeads(Rule):
    """Adapters of attention are those of as many heads of keys and values as of queries."""

    def read(self, reader: ConfigReader) -> None:
        heads = reader.integer("num_attention_heads", 32)
        if reader.flag(ADAPTED) and reader.integer("num_key_value_heads", heads) != heads:
            reader.problem(f"{ADAPTED} must be false unless num_key_value_heads is num_attention_heads; got true")

    def write(self, writer: ConfigWriter) -> None:
        config = writer.config
        if config.get(ADAPTED) and config.get("num_key_value_heads") != config.get("num_attention_heads"):
            writer.problems.append("adapters of attention with grouped heads")


def _fused(number: int, name: str) -> Weight:
    """Of the gate's and the values' rows, one's."""

    def rows(layer: nn.Module) -> Tensor:
        return rows_of(number, [layer.up.out_features] * 2)  # type: ignore[union-attr, list-item]

    return Weight(f"shared_transformer.feed_forward.{name}", rows=rows)


LISTS = {name: f"shared_transformer.self_attn.linear_{name[0]}_adapter_list.{{use}}" for name in PROJECTIONS}
MLPS = "gate_up_proj_adapter_list.{use}"

FAMILY = Family(
    model_type="zamba2",
    architecture="Zamba2ForCausalLM",
    mixers={
        SHARED: ATTENTION.moved("self_attn.", "shared_transformer.self_attn.").but(
            heads=Integer("num_attention_heads", 32),
            head_dim=OfHeadSize(),
            scale=OfHeadSize(scale=True),
            rope_base=Rotation(),
            rope_scaling=Scaling(),
            with_embedding=Fixed(True),
            names={f"{name}.adapter.down": f"{place}.0" for name, place in LISTS.items()}
            | {f"{name}.adapter.up": f"{place}.1" for name, place in LISTS.items()},
        ),
        MLP: GATED_MLP.but(
            target=GEGLU,
            bias=Flag("add_bias_linear"),
            names={
                "gate": _fused(0, "gate_up_proj"),
                "up": _fused(1, "gate_up_proj"),
                "down": "shared_transformer.feed_forward.down_proj",
                "gate.adapter.down": f"shared_transformer.feed_forward.{MLPS}.0",
                "gate.adapter.up": _fused(0, f"{MLPS}.1"),
                "up.adapter.up": _fused(1, f"{MLPS}.1"),
                "up.adapter.down": f"shared_transformer.feed_forward.{MLPS}.0",
            },
        ),
        LINEAR: HYBRID_MAMBA2.but(
            head_dim=Integer("mamba_headdim"),
            state=Integer("mamba_d_state", 64),
            groups=Integer("mamba_ngroups", 1),
            bias=Flag("add_bias_linear"),
            conv_bias=Fixed(True),
            step_limit=LeastStep(),
            norm_eps=Fixed(1e-5),
        ),
    },
    layers=Layers(lambda reader, depth: [LINEAR] * depth, {"hybrid": HYBRID, PLAIN: LINEAR}, TYPES),
    feed_forwards={},
    block=BLOCK.but(target=ZambaBlock),
    block_names={
        HYBRID: {
            "mixer_1_norm": "shared_transformer.input_layernorm",
            "mixer_2_norm": "shared_transformer.pre_ff_layernorm",
            "mixer_3_norm": "mamba_decoder.input_layernorm",
            "branch": "linear",
        }
    },
    model=MODEL.but(
        norm_eps=Number("rms_norm_eps", 1e-5),
        tied_embeddings=Fixed(True),
        shared=SharedWeights(),
        adapter_rank=AdapterRank(),
        names={"norm": "model.final_layernorm"},
    ),
    rules=(
        Only("hidden_act", ("gelu",)),
        Only("tie_word_embeddings", (True,)),  # else transformers 5 ties nothing, attention and MLPs neither
        *RULES[1:],
        Heads("n_mamba_heads", "mamba_expand", "mamba_headdim"),
        AdaptedHeads(),
        Replaced("use_conv_bias", True),
        Absent("use_long_context", "Versions of transformers differ in what it does to the rotation"),
        Known(("mamba_headdim", "kv_channels", "num_query_groups", "attention_hidden_size", "attention_head_dim",
               "head_dim", "time_step_max", "time_step_floor", "use_mamba_kernels", "chunk_size", "use_mem_eff_path",
               "num_logits_to_keep", "hybrid_layer_ids", "layer_types", "use_shared_mlp_adapter", "mamba_dt_rank",
               "ffn_hidden_size", "lora_rank")),
    ),
    in_sequence=True,
    moved={HYBRID: ("mamba.", "mamba_decoder.mamba.")},
    current=_current,
)  # fmt: skip
