"""Llama (Touvron et al., 2023, arXiv 2302.13971) and Qwen3 (arXiv 2505.09388) as settings of a `LanguageModel`.

Both are pre-norm blocks of softmax attention with grouped heads and rotary embeddings and of SwiGLU. Qwen3 adds a
norm of each query and key head, and can give some layers a window.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from typing import Any

from ..language_model import expand_pattern
from .architecture import Architecture, Node, Settings, Tensors
from .config import ConfigReader, read_rope, write_rope

BLOCK = "longreach.models.block.Block"
LANGUAGE_MODEL = "longreach.models.language_model.LanguageModel"
SOFTMAX_ATTENTION = "longreach.models.mixers.softmax.softmax_attention.SoftmaxAttention"
SWIGLU = "longreach.models.feed_forward.swiglu.SwiGLU"

_LAYER_TYPES = ("full_attention", "sliding_attention")


def settings(config: Mapping[str, Any]) -> Settings:
    """The settings of the `LanguageModel` that a Llama or Qwen3 config.json describes.

    Raises one ValueError that names every key whose value is not supported.
    """
    reader = ConfigReader(config)
    qwen3 = config["model_type"] == "qwen3"
    width, heads = reader.integer("hidden_size"), reader.integer("num_attention_heads")
    # Absent keys mean what transformers' own config classes make of them.
    kv_heads = reader.integer("num_key_value_heads", 32 if qwen3 and "num_key_value_heads" not in config else heads)
    head_dim = reader.integer("head_dim", 128 if qwen3 else max(1, width // heads))
    if heads % kv_heads:
        reader.problems.append(f"num_key_value_heads must divide num_attention_heads = {heads}; got {kv_heads}")
    if not qwen3 and config.get("head_dim") is None and width % heads:
        reader.problems.append(f"num_attention_heads must divide hidden_size = {width}; got {heads}")
    base, scaling = read_rope(reader)
    bias, eps = reader.flag("attention_bias"), reader.number("rms_norm_eps", 1e-6)
    reader.only("hidden_act", "silu", "swish")
    reader.only("attention_dropout", 0, 0.0)
    reader.absent("quantization_config", "Save the model dequantised")
    reader.absent("rope_interleaved", "Rotary pairs are half-split here")
    mlp_bias = reader.flag("mlp_bias")
    if qwen3 and mlp_bias:
        reader.problems.append("mlp_bias must be false in a qwen3 model; got True")
    depth = reader.integer("num_hidden_layers")
    windows = _windows(reader, depth, qwen3)
    mixer = {
        "_target_": SOFTMAX_ATTENTION,
        "_partial_": True,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "rope_base": base,
        "rope_scaling": scaling,
        "qk_norm": "head" if qwen3 else None,
        "bias": bias,
        "output_bias": bias,
    }
    names = {window: "full" if window is None else "window" for window in windows}
    result = {
        "_target_": LANGUAGE_MODEL,
        "vocabulary": reader.integer("vocab_size"),
        "width": width,
        "depth": depth,
        "pattern": _run_lengths([names[window] for window in windows]),
        "mixers": {name: {**mixer, "window": window} for window, name in names.items()},
        "feed_forward": {
            "_target_": SWIGLU,
            "_partial_": True,
            "hidden": reader.integer("intermediate_size"),
            "bias": mlp_bias,
        },
        "norm_eps": eps,
        "tied_embeddings": reader.flag("tie_word_embeddings"),
    }
    reader.finish()
    return result


def _windows(reader: ConfigReader, depth: int, qwen3: bool) -> list[int | None]:
    """The window of each layer, None for full attention."""
    layer_types = reader.get("layer_types")
    used = qwen3 and reader.flag("use_sliding_window")
    window, first = reader.get("sliding_window"), reader.get("max_window_layers")
    if layer_types is None:
        first = 28 if first is None else first
        sliding = used and window is not None
        layer_types = [_LAYER_TYPES[sliding and layer >= first] for layer in range(depth)]
    if not isinstance(layer_types, list) or len(layer_types) != depth or not set(layer_types) <= set(_LAYER_TYPES):
        reader.problems.append(
            f"layer_types must name one of {', '.join(_LAYER_TYPES)} for each of {depth} layers; got {layer_types!r}"
        )
        return [None] * depth
    if "sliding_attention" not in layer_types:
        return [None] * depth
    if not used:
        reader.problems.append(
            "layer_types must be all full_attention unless use_sliding_window is true in a qwen3 "
            "model; got sliding_attention"
        )
    window = reader.integer("sliding_window")
    return [window if kind == "sliding_attention" else None for kind in layer_types]


def _run_lengths(layers: list[str]) -> list[str]:
    """['full', 'full', 'window'] as a pattern: ['full*2', 'window']; ['full'] where all layers are alike."""
    if len(set(layers)) == 1:
        return layers[:1]
    runs = [(name, len(list(same))) for name, same in groupby(layers)]
    return [name if count == 1 else f"{name}*{count}" for name, count in runs]


def config(settings: Settings) -> dict[str, Any]:
    """The config.json of a Llama, or of a Qwen3 where queries and keys are normed.

    Raises one ValueError that names every setting that neither can express.
    """
    model = Node.of(settings)
    layers = expand_pattern(model["pattern"], model["depth"], list(model["mixers"]))
    mixers = {name: Node.of(node) for name, node in model["mixers"].items()}
    feed_forward = Node.of(model["feed_forward"])
    if problems := _inexpressible(model, mixers, feed_forward):
        raise ValueError("the model must be a Llama or a Qwen3; it is not, by " + "; ".join(problems))
    mixer = mixers[layers[0]]
    qwen3 = mixer["qk_norm"] == "head"
    name = "Qwen3" if qwen3 else "Llama"
    result = {
        "architectures": [f"{name}ForCausalLM"],
        "model_type": name.lower(),
        "vocab_size": model["vocabulary"],
        "hidden_size": model["width"],
        "intermediate_size": feed_forward["hidden"],
        "num_hidden_layers": model["depth"],
        "num_attention_heads": mixer["heads"],
        "num_key_value_heads": mixer["kv_heads"] or mixer["heads"],
        "head_dim": mixer["head_dim"] or model["width"] // mixer["heads"],
        "hidden_act": "silu",
        "attention_bias": mixer["bias"],
        "attention_dropout": 0.0,
        "rms_norm_eps": model["norm_eps"],
        "tie_word_embeddings": model["tied_embeddings"],
        "initializer_range": model["initial_std"],
        **write_rope(mixer["rope_base"], mixer["rope_scaling"]),
    }
    if qwen3:
        windows = [mixers[layer]["window"] for layer in layers]
        return {**result, **_write_windows(windows)}
    return {**result, "mlp_bias": feed_forward["bias"]}


def _inexpressible(model: Node, mixers: Mapping[str, Node], feed_forward: Node) -> list[str]:
    """What of the settings the config.json of a Llama or Qwen3 has no word for."""
    problems = []
    shared = ("vocabulary", "width", "depth", "pattern", "mixers", "feed_forward", "norm_eps", "tied_embeddings")
    told = ("activation_checkpointing", "initial_std", "block")
    problems += [f"model.{key}={value!r}" for key, value in model.unexpressed(shared + told).items()]
    if model["block"] is not None and Node.of(model["block"]).target != BLOCK:
        problems.append(f"model.block={model['block']['_target_']}")
    if feed_forward.target != SWIGLU:
        return [*problems, f"model.feed_forward={feed_forward.target}"]
    if other := sorted({mixer.target for mixer in mixers.values()} - {SOFTMAX_ATTENTION}):
        return [*problems, f"mixers {', '.join(other)}"]
    alike = ("heads", "kv_heads", "head_dim", "rope_base", "rope_scaling", "qk_norm", "bias", "output_bias")
    for key in alike:
        values = [mixer[key] for mixer in mixers.values()]
        if any(value != values[0] for value in values):
            problems.append(f"{key} of {values}, which must be one for all layers")
    for name, mixer in mixers.items():
        extra = mixer.unexpressed((*alike, "window", "norm_eps"))
        problems += [f"mixers.{name}.{key}={value!r}" for key, value in extra.items()]
    return problems + _inexpressible_attention(model, mixers, feed_forward)


def _inexpressible_attention(model: Node, mixers: Mapping[str, Node], feed_forward: Node) -> list[str]:
    problems = []
    mixer = next(iter(mixers.values()))
    windows = {m["window"] for m in mixers.values()} - {None}
    if mixer["rope_base"] is None:
        problems.append("rope_base=None")
    if mixer["bias"] != mixer["output_bias"]:
        problems.append(f"bias={mixer['bias']} with output_bias={mixer['output_bias']}")
    if mixer["qk_norm"] == "full":
        problems.append("qk_norm='full'")
    if len(windows) > 1:
        problems.append(f"windows of {sorted(windows)}, of which it has one")
    if mixer["qk_norm"] == "head":
        given = {m.given.get("norm_eps", model["norm_eps"]) for m in mixers.values()}
        if given != {model["norm_eps"]}:
            problems.append(f"norm_eps={model['norm_eps']} with {sorted(given)} in its mixers")
        if feed_forward["bias"]:
            problems.append("feed_forward.bias with qk_norm='head'")
    elif windows:
        problems.append("window without qk_norm='head'")
    elif mixer["head_dim"] and model["width"] % mixer["heads"]:
        problems.append(f"heads={mixer['heads']}, which transformers' Llama wants to divide the width")
    return problems


def _write_windows(windows: list[int | None]) -> dict[str, Any]:
    used = next((window for window in windows if window is not None), None)
    full = [layer for layer, window in enumerate(windows) if window is None]
    return {
        "use_sliding_window": used is not None,
        "sliding_window": used,
        # Windows begin here for versions of transformers that do not know layer_types.
        "max_window_layers": full[-1] + 1 if full else 0,
        "layer_types": [_LAYER_TYPES[window is not None] for window in windows],
    }


def tensors(settings: Settings) -> Tensors:
    """Every tensor is one of ours by another name."""
    model = Node.of(settings)
    mixer = Node.of(next(iter(model["mixers"].values())))
    names = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
    biased: list[str] = []
    for layer in range(model["depth"]):
        ours, theirs = f"blocks.{layer}", f"model.layers.{layer}"
        attention = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"}
        feed_forward = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
        biased += [f"{ours}.mixer.{name}" for name in attention if mixer["bias"]]
        biased += [f"{ours}.feed_forward.{name}" for name in feed_forward if Node.of(model["feed_forward"])["bias"]]
        if mixer["qk_norm"]:
            attention |= {"query_norm": "q_norm", "key_norm": "k_norm"}
        names[f"{ours}.mixer_norm"] = f"{theirs}.input_layernorm"
        names |= {f"{ours}.mixer.{a}": f"{theirs}.self_attn.{b}" for a, b in attention.items()}
        names[f"{ours}.feed_forward_norm"] = f"{theirs}.post_attention_layernorm"
        names |= {f"{ours}.feed_forward.{a}": f"{theirs}.mlp.{b}" for a, b in feed_forward.items()}
    duplicates = {}
    if model["tied_embeddings"]:
        del names["head"]
        duplicates = {"lm_head.weight": "model.embed_tokens.weight"}
    renamed = {f"{a}.weight": f"{b}.weight" for a, b in names.items()}
    renamed |= {f"{a}.bias": f"{names[a]}.bias" for a in biased}
    return Tensors.renamed(renamed, duplicates=duplicates, ignored=("rotary_emb.inv_freq",))


ARCHITECTURE = Architecture(("llama", "qwen3"), settings, config, tensors)
