"""Drawn settings of config.json for each family of Hugging Face checkpoints: those that transformers' class declares.

Of each setting the least usual value comes first: hypothesis tries it first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

from checkpoint_cases import CASES
from checkpoints import ORIGINAL, SMALL, config_of
from hypothesis import strategies as st

from longreach.models import hf
from longreach.models.hf.layers import ByPositions, LayerRule, LayerTypes, Switched, SwitchedWindows
from longreach.models.hf.rope import RopeScale
from longreach.models.hf.rules import Absent, Only

Settings = dict[str, Any]
Draw = Callable[..., Any]

# Each by itself, where it is declared.
ALONE: dict[str, tuple[Any, ...]] = {
    "vocab_size": (67, 61),
    "intermediate_size": (39, 40),
    "moe_intermediate_size": (23, 24),
    "shared_expert_intermediate_size": (19, 20),
    "shared_intermediate_size": (19, 20),
    "rms_norm_eps": (1e-2, 1e-5),
    "layer_norm_eps": (1e-2, 1e-5),
    "layer_norm_epsilon": (1e-2, 1e-5),
    "norm_eps": (1e-2, 1e-5),
    "sliding_window": (3, 200, 9),
    "kv_lora_rank": (7, 12),
    "q_lora_rank": (9, None),
    "qk_rope_head_dim": (2, 6),
    "qk_nope_head_dim": (5, 10),
    "v_head_dim": (7, 8),
    "routed_scaling_factor": (0.7, 2.5),
    "conv_kernel": (2, 4),
    "mamba_d_conv": (2, 4),
    "linear_conv_kernel_dim": (2, 4),
    "conv_L_cache": (2, 4),
    "state_size": (5, 8),
    "ssm_state_size": (5, 8),
    "mamba_d_state": (5, 8),
    "linear_key_head_dim": (5, 8),
    "linear_value_head_dim": (7, 8),
    "time_step_rank": (3, "auto"),
    "mamba_dt_rank": (3, "auto"),
    "logit_scale": (1.7, 0.25),
    "final_logit_softcapping": (3.0, None),
    "attn_logit_softcapping": (2.0, None),
    "output_logit_soft_cap": (3.0, 30.0),
    "gate_soft_cap": (2.0, 15.0),
    "qk_dim_factor": (0.75, 0.5),
    "v_dim_factor": (0.75, 1.0),
    "query_pre_attn_scalar": (7, 16),
    "embedding_multiplier": (2.0, 1.0),
    "residual_multiplier": (0.6, 1.0),
    "attention_multiplier": (0.3, 1.0),
    "logits_scaling": (0.8, 1.0),
    "position_embedding_type": ("rope", None),
    **dict.fromkeys(
        (
            "tie_word_embeddings", "attention_bias", "mlp_bias", "use_bias", "conv_bias", "mamba_proj_bias",
            "norm_topk_prob", "linear_allow_neg_eigval", "block_auto_adjust_ff_dim",
        ),
        (True, False),
    ),
    **dict.fromkeys(("use_conv_bias", "mamba_conv_bias"), (False, True)),
}  # fmt: skip
HEADS = ((5, 1), (6, 3), (3, 3), (4, 2))  # query heads, and those of keys and values
MAMBA_HEADS = (
    ("mamba_n_heads", "mamba_n_groups"), ("num_heads", "n_groups"), ("mamba_num_heads", "n_groups"),
    ("n_mamba_heads", "mamba_ngroups"),
)  # fmt: skip
PATTERNS = ("abbb", "aabb", "ba", "aba", "a", "b", "acb")  # kinds of layers, most without a period
ROPE: tuple[Settings, ...] = (
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL, "rope_theta": 2e4},
    {"rope_type": "linear", "factor": 3.0, "rope_theta": 500.0},
    {"rope_type": "default", "rope_theta": 7e4},
    {
        "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": ORIGINAL, "rope_theta": 1e4,
    },
    {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 700.0},
    {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 3 * ORIGINAL, "rope_theta": 2e4},
)  # fmt: skip
SOME: dict[str, dict[str, tuple[Any, ...]]] = {  # what classes of transformers run
    "deepseek_v2": {"kv_lora_rank": (8, 12), "qk_nope_head_dim": (6, 10)},  # complex numbers begin at even places
    "deepseek_v32": {"q_lora_rank": (9, 10)},
}
MIXED = {"olmo_hybrid", "rwkv"}  # classes that want a layer of each kind, or more than one


@st.composite
def drawn(draw: Draw, family: str) -> Settings:
    """Settings to lay over those of a small model."""
    from transformers import CONFIG_MAPPING

    declared = {field.name for field in fields(CONFIG_MAPPING[family])}
    settings = dict(CASES[family])
    for key in sorted(declared & ALONE.keys()):
        settings[key] = draw(st.sampled_from(_expressed(family, key)))
    for part in (_heads, _layers, _experts, _mamba, _linear):
        part(draw, family, declared, settings)
    if "rope_parameters" in declared:
        given = config_of(family, CASES[family]).rope_parameters or {}
        types = [key for key, value in given.items() if isinstance(value, dict)]
        turns = {key: value for key, value in given.items() if key == "partial_rotary_factor"}
        pairs = _pairs(declared, settings, turns.get("partial_rotary_factor", 1.0))
        scaled = st.sampled_from(_scalings(family)).map(lambda rope: _with_factors(rope, pairs))
        settings["rope_parameters"] = {each: draw(scaled) for each in types} if types else draw(scaled) | turns
    return settings


def _expressed(family: str, key: str) -> Sequence[Any]:
    """The values of the key, but for those that the family's table refuses, or transformers' class."""
    if key in SOME.get(family, {}):
        return SOME[family][key]
    for rule in hf.known_families()[family].rules:
        if isinstance(rule, Only) and rule.key == key:
            return [value for value in ALONE[key] if value in rule.allowed] or rule.allowed[:1]
        if isinstance(rule, Absent) and rule.key == key:
            return [value for value in ALONE[key] if not value] or [None]
    return ALONE[key]


def _scalings(family: str) -> Sequence[Settings]:
    scales = [
        field
        for mixer in hf.known_families()[family].mixers.values()
        for field in mixer.fields.values()
        if isinstance(field, RopeScale)
    ]
    return [rope for rope in ROPE if all(rope["rope_type"] in ("default", *scale.kinds) for scale in scales)]


def _pairs(declared: set[str], settings: Settings, part: float) -> int:
    """How many pairs of a head's dims turn."""
    size = settings.get("head_dim") or settings["hidden_size"] // settings["num_attention_heads"]
    return int((settings["qk_rope_head_dim"] if "qk_rope_head_dim" in declared else size) * part) // 2


def _with_factors(rope: Settings, pairs: int) -> Settings:
    """LongRoPE has factors for each pair."""
    if rope["rope_type"] != "longrope":
        return rope
    short, long = ([first + pair / 3 for pair in range(pairs)] for first in (1.0, 2.0))
    return {**rope, "short_factor": short, "long_factor": long}


def _heads(draw: Draw, family: str, declared: set[str], settings: Settings) -> None:
    """Grouped heads, of sizes that are no power of two; without a key for the size, the width follows from it."""
    if "num_attention_heads" not in declared:
        return
    heads, groups = draw(st.sampled_from(HEADS))
    turns = (config_of(family, settings).to_dict().get("rope_parameters") or {}).get("partial_rotary_factor", 1.0)
    size = draw(st.sampled_from([size for size in (10, 6, 16, 12, 8) if size * turns % 2 == 0]))
    settings |= {"num_attention_heads": heads}
    if "num_key_value_heads" in declared:
        settings["num_key_value_heads"] = heads if "kv_lora_rank" in declared else groups
    if "head_dim" in declared:
        settings |= {"head_dim": size, "hidden_size": 60}  # which some classes want to be a multiple of the heads
    else:
        settings["hidden_size"] = heads * size
    if "lru_width" in declared:
        settings["lru_width"] = heads * size  # as many blocks


def _layers(draw: Draw, family: str, declared: set[str], settings: Settings) -> None:
    table = hf.known_families()[family]
    pattern = draw(st.sampled_from([each for each in PATTERNS if len(set(each)) > 1 or family not in MIXED]))
    kinds, depth = _kinds(table.layers), len(pattern)
    if "num_hidden_layers" in declared:
        settings["num_hidden_layers"] = depth
    for key in ("layer_types", "layers_block_type"):
        if key in declared and kinds:
            settings[key] = [kinds["abc".index(letter) % len(kinds)] for letter in pattern]
            if "use_sliding_window" in declared:
                settings["use_sliding_window"] = "sliding_attention" in settings[key]
    numbers = st.lists(st.integers(0, depth - 1), max_size=depth, unique=True).map(sorted)
    for key in ("attn_layer_indices", "full_attn_idxs", "mlp_only_layers", "moe_layers"):
        if key in declared:
            settings[key] = draw(numbers)
    if "no_rope_layers" in declared:
        settings["no_rope_layers"] = draw(st.lists(st.integers(0, 1), min_size=depth, max_size=depth))
    for key in ("attn_layer", "expert_layer"):
        if f"{key}_period" in declared:
            settings[f"{key}_period"] = period = draw(st.sampled_from((3, 2, 1, 5)))
            settings[f"{key}_offset"] = draw(st.integers(0, period - 1))
    if "first_k_dense_replace" in declared:
        settings["first_k_dense_replace"] = draw(st.integers(0, depth))
    if "decoder_sparse_step" in declared:
        settings["decoder_sparse_step"] = draw(st.sampled_from((2, 1)))


def _kinds(rule: LayerRule) -> Sequence[str]:
    if isinstance(rule, Switched):
        return _kinds(rule.rule)
    if isinstance(rule, SwitchedWindows):
        return ("sliding_attention", "full_attention")
    return list(rule.kinds) if isinstance(rule, LayerTypes | ByPositions) else ()


def _experts(draw: Draw, family: str, declared: set[str], settings: Settings) -> None:
    for key in ("num_experts", "num_local_experts", "n_routed_experts"):
        if key not in declared:
            continue
        if "n_group" in declared:
            experts, groups, chosen, each = draw(st.sampled_from(((9, 3, 2, 4), (6, 1, 1, 2), (8, 4, 2, 3))))
            settings |= {"n_group": groups, "topk_group": chosen}
        else:
            experts, each = draw(st.sampled_from(((5, 3), (4, 2), (3, 3))))
        settings |= {key: experts, "num_experts_per_tok": each}


def _mamba(draw: Draw, family: str, declared: set[str], settings: Settings) -> None:
    """Heads of Mamba-2, as many for each group of keys and queries; their sizes make up the inner width."""
    inner = 2 * settings.get("hidden_size", SMALL["hidden_size"])
    sizes = [(each, groups) for each, groups in ((2, 3), (3, 1), (1, 2), (4, 1)) if inner % (each * groups) == 0]
    for key, groups_key in MAMBA_HEADS:
        if {key, groups_key} <= declared:
            each, groups = draw(st.sampled_from(sizes))
            settings |= {key: each * groups, groups_key: groups}
            if key == "num_heads":
                settings["head_dim"] = inner // (each * groups)
            if "mamba_head_dim" in declared:
                settings["mamba_head_dim"] = draw(st.sampled_from((7, 8)))
            if "mamba_d_ssm" in declared:
                settings["mamba_d_ssm"] = each * groups * draw(st.sampled_from((7, 8)))
    if "projectors_bias" in declared:
        settings["projectors_bias"] = settings["mamba_proj_bias"]


def _linear(draw: Draw, family: str, declared: set[str], settings: Settings) -> None:
    if "linear_num_value_heads" in declared:
        values, keys = draw(st.sampled_from(((6, 3), (3, 1), (2, 2))))
        settings |= {"linear_num_value_heads": values, "linear_num_key_heads": keys}
