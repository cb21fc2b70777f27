"""Models of flash-linear-attention as oracles on a CPU: its own plain functions in place of its kernels.

What its ops compute is taken from the naive function that it has of each; what its fused modules compute from their
reference functions, or where there is none from what their docstrings say.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

SMALL = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 3, "num_heads": 2, "intermediate_size": 40}
FULL = {"layers": [1], "num_heads": 4, "num_kv_heads": 2, "rope_theta": 500.0}
WINDOW = {"layers": [0], "num_heads": 3, "qkv_bias": True, "window_size": 9}
RATIO = {"intermediate_size": None, "hidden_ratio": 3}
DELTA = {"head_dim": 5, "num_v_heads": 4, "expand_v": 1.4, "conv_size": 3}
RWKV7 = {
    "head_dim": 8,
    "num_heads": None,
    "decay_low_rank_dim": 4,
    "a_low_rank_dim": 5,
    "v_low_rank_dim": 6,
    "gate_low_rank_dim": 7,
}
# By the family, then by what else they are for.
CASES: dict[str, dict[str, Any]] = {
    "gla": {"expand_v": 0.75, "norm_eps": 1e-3},
    "gla_conv": {"use_short_conv": True, "conv_size": 3, "fuse_norm": False, "tie_word_embeddings": True, "attn": FULL},
    "retnet": {"expand_k": 0.5, "expand_v": 1.25, "num_heads": 2},
    "retnet_plain": {"fuse_norm": False, "fuse_swiglu": False, "hidden_ratio": None, "intermediate_size": None},
    "delta_net": {"expand_k": 0.75, "expand_v": 1.25, "conv_size": 3},
    "delta_net_gate": {"use_gate": True, "allow_neg_eigval": True, "use_short_conv": False, "attn": [WINDOW, FULL]},
    "gated_deltanet": DELTA,
    "gated_deltanet_sigmoid": DELTA | {"output_gate_activation": "sigmoid", "allow_neg_eigval": True, "attn": WINDOW},
    "gated_deltanet_plain": {"head_dim": 6, "expand_v": 1.5, "use_gate": False, "use_short_conv": False, **RATIO},
    "kda": DELTA,
    "kda_bounded": {
        "head_dim": 6, "lower_bound": -5.0, "safe_gate": True, "allow_neg_eigval": True, "use_short_conv": False,
        "attn": [FULL], "tie_word_embeddings": True,
    },
    "gsa": {"num_heads": 4, "num_kv_heads": 2, "num_slots": 5, "exapnd_k": 0.5, "norm_eps": 1e-3},
    "gsa_conv": {"num_slots": None, "use_short_conv": True, "conv_size": 3, "gate_logit_normalizer": 4, "attn": FULL},
    "hgrn2": {"expand_ratio": 8, "attn": WINDOW, "norm_eps": 1e-3, "num_heads": None},
    "hgrn2_unbounded": {"expand_ratio": None, "use_lower_bound": False},
    "hgrn": {"expand_ratio": 2, "attn": WINDOW},
    "hgrn_unbounded": {"use_lower_bound": False, "tie_word_embeddings": True},
    "rwkv7": RWKV7,
    "rwkv7_plain": RWKV7
    | {"fuse_norm": False, "norm_first": False, "norm_bias": False, "norm_eps": 1e-4, "head_dim": None, "num_heads": 2},
    "transformer": {"num_heads": 4, "num_kv_heads": 2, "qk_norm": True, "window_size": 9},
    "transformer_plain": {"num_heads": 4, "qkv_bias": True, "rope_theta": 500.0, **RATIO},
    "forgetting_transformer": {"num_heads": 4, "num_kv_heads": 2, "use_output_gate": True},
    "forgetting_transformer_plain": {"qkv_bias": True, "tie_word_embeddings": True},
}  # fmt: skip


# Of families of transformers, whose config.json it writes with other keys.
MAMBA = {"state_size": 5, "conv_kernel": 3, "norm_eps": 1e-3, "tie_word_embeddings": True, "pad_token_id": None}
ALSO: dict[str, dict[str, Any]] = {
    "mamba": MAMBA | {"dt_rank": 3, "use_bias": True, "use_conv_bias": False},
    "mamba2": MAMBA | {"head_dim": 8, "chunk_size": 16, "dt_limit": [0.01, 2.0], "num_heads": 6},
}


def config_of(family: str, more: dict[str, Any]) -> Any:
    """A small configuration of its class; skips the test without flash-linear-attention."""
    module = pytest.importorskip(f"fla.models.{family}", reason="needs flash-linear-attention, an oracle here alone")
    (name,) = (name for name in module.__all__ if name.endswith("Config"))
    return getattr(module, name)(**{**SMALL, **json.loads(json.dumps(more))})


def model_of(config: Any) -> Any:
    """A language model of its class, whose rotary frequencies are numbers of float32 in float64 too."""
    module = import_module(f"fla.models.{config.model_type}")
    (name,) = (name for name in module.__all__ if name.endswith("ForCausalLM"))
    model = getattr(module, name)(config)
    for each in model.modules():
        if hasattr(each, "inv_freq"):
            each._compute_inv_freq = lambda device=None, kept=each.inv_freq.double(): kept
    return model


def greedy(model: Any, prompt: Tensor, decoded: list[int]) -> list[int]:
    """The most likely token after the prompt and after each of `decoded` but the last, by one pass: what is cached
    needs other kernels. They are what greedy decoding gives if and only if they are `decoded`.
    """
    row = torch.cat([prompt, torch.tensor([decoded[:-1]])], dim=1)
    with torch.no_grad():
        return model(row, use_cache=False).logits[0, prompt.shape[1] - 1 :].argmax(-1).tolist()


@contextmanager
def plain_functions() -> Iterator[None]:
    """Its models that are made meanwhile run on a CPU, meanwhile."""
    pytest.importorskip("fla.models", reason="needs flash-linear-attention, an oracle here alone")
    with pytest.MonkeyPatch.context() as patch:
        for path, name, function in (*_modules(), *_ops()):
            patch.setattr(import_module(path), name, function)
        activations = import_module("fla.modules.activations")
        for name, function in (("swish", F.silu), ("silu", F.silu), ("sqrelu", lambda x: F.relu(x).square())):
            patch.setitem(activations.ACT2FN, name, function)
        yield


Replacement = tuple[str, str, Callable[..., Any]]


def _modules() -> list[Replacement]:
    """Norms, gates, convolutions, rotary positions and shifts."""
    norms, grouped = (import_module(f"fla.modules.norm.{name}") for name in ("layernorm", "layernorm_gated"))
    rotary = import_module("fla.modules.rotary.ops")
    shift = import_module("fla.modules.token_shift")

    def normed(reference: Callable[..., Any]) -> Callable[..., Any]:
        def call(x, weight, bias, residual=None, eps=1e-5, prenorm=False, residual_in_fp32=False, **more):
            assert not residual_in_fp32
            return reference(x, weight, bias, residual=residual, eps=eps, prenorm=prenorm, **more)

        return call

    def gated(x, g, weight, bias, activation="swish", residual=None, prenorm=False, residual_in_fp32=False, eps=1e-6):
        assert (residual, prenorm, residual_in_fp32) == (None, False, False)
        gate = torch.sigmoid(g) if activation == "sigmoid" else F.silu(g)
        return norms.rms_norm_ref(x, weight, bias, eps=eps) * gate

    def normed_linear(x, norm_weight, norm_bias, linear_weight, linear_bias, eps=1e-5):
        return F.linear(norms.rms_norm_ref(x, norm_weight, norm_bias, eps=eps), linear_weight, linear_bias)

    def convolved(x, weight, bias=None, activation=None, initial_state=None, cu_seqlens=None, residual=None, **_):
        assert (initial_state, cu_seqlens, residual) == (None, None, None)
        channels, taps = weight.shape
        y = F.conv1d(F.pad(x.transpose(1, 2), (taps - 1, 0)), weight[:, None], bias, groups=channels).transpose(1, 2)
        return (y if activation is None else F.silu(y)), None

    def turned(x, cos, sin, interleaved=False, seqlen_offsets=0, **_):
        here = slice(seqlen_offsets, seqlen_offsets + x.shape[1])
        return rotary.rotary_embedding_ref(x, cos[here], sin[here], interleaved)

    def shifted(x, cu_seqlens=None, cache=None, output_cache=False, **_):
        assert (cu_seqlens, cache) == (None, None)
        delta = shift.token_shift_ref(x)
        return (delta, None) if output_cache else delta

    def attended(q, k, v, causal=True, window_size=(-1, -1)):
        k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
        i, j = torch.arange(q.shape[1])[:, None], torch.arange(q.shape[1])
        seen = (j <= i) & ((window_size[0] < 0) | (i - j <= window_size[0]))
        scores = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
        return torch.einsum("bhij,bjhd->bihd", scores.masked_fill(~seen, float("-inf")).softmax(-1), v)

    of_norms = "fla.modules.norm.layernorm"
    return [
        (of_norms, "rms_norm", normed(norms.rms_norm_ref)),
        (of_norms, "layer_norm", normed(norms.layer_norm_ref)),
        (of_norms, "group_norm", normed(norms.group_norm_ref)),
        ("fla.modules.norm.fused_norm_gate", "rms_norm_gated", gated),
        (grouped.__name__, "rmsnorm_fn", grouped.rms_norm_ref),
        *((f"fla.layers.{layer}", "rms_norm_linear", normed_linear) for layer in ("gsa", "hgrn2")),
        ("fla.modules.causal_conv1d.ops", "causal_conv1d", convolved),
        ("fla.layers.gated_deltanet", "causal_conv1d", convolved),
        ("fla.modules.rotary.ops", "rotary_embedding", turned),
        ("fla.layers.rwkv7", "token_shift", shifted),
        ("fla.models.rwkv7.modeling_rwkv7", "token_shift", shifted),
        ("fla.layers.rwkv7", "l2_norm", _of_length_one),
        ("fla.modules.mlp", "swiglu", lambda x, y: F.silu(x) * y),
        ("fla.modules.mlp", "swiglu_linear", lambda x, y, weight, bias: F.linear(F.silu(x) * y, weight, bias)),
        ("fla.layers.hgrn", "swiglu", lambda x, y: F.silu(x) * y),
        ("fla.layers.hgrn2", "swish", F.silu),
        ("fla.modules.feature_map", "swish", F.silu),
        ("fla.layers.attn", "flash_attn_func", attended),
    ]


def _of_length_one(x: Tensor, eps: float = 1e-6) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)


def _ops() -> list[Replacement]:
    """By their names in the layers that call them."""
    gla, delta = import_module("fla.ops.gla.naive"), import_module("fla.ops.delta_rule.naive")
    gdn, gdn_gate = (import_module(f"fla.ops.gated_delta_rule.{name}") for name in ("naive", "gate"))
    kda, kda_gate = (import_module(f"fla.ops.kda.{name}") for name in ("naive", "gate"))
    gsa, retention, hgrn = (import_module(f"fla.ops.{name}.naive") for name in ("gsa", "retention", "hgrn"))
    fox, dplr = (import_module(f"fla.ops.{name}.naive") for name in ("forgetting_attn", "generalized_delta_rule.dplr"))
    rwkv = {name: import_module(f"fla.ops.rwkv7.{name}") for name in ("fused_addcmul", "fused_k_update")}
    correction = import_module("fla.ops.rwkv7.gate_output_correction")

    def heads_first(*tensors: Tensor) -> list[Tensor]:
        return [x.transpose(1, 2) for x in tensors]

    def gated_linear(q, k, v, g=None, gk=None, **_):
        return gla.naive_recurrent_gla(q, k, v, gk if g is None else g)

    def delta_rule(q, k, v, beta, use_qk_l2norm_in_kernel, **_):
        assert use_qk_l2norm_in_kernel
        parts = heads_first(_of_length_one(q), _of_length_one(k), v, beta)
        return delta.delta_rule_recurrence(*parts)[0].transpose(1, 2), None

    def strength(beta, allow_neg_eigval):
        return torch.sigmoid(beta) * (2 if allow_neg_eigval else 1)

    def gated_delta_rule(q, k, v, g, beta, A_log, dt_bias, allow_neg_eigval, **_):
        q, k = (_of_length_one(x).repeat_interleave(v.shape[2] // x.shape[2], dim=2) for x in (q, k))
        g, beta = gdn_gate.naive_gdn_gate(g, A_log, dt_bias), strength(beta, allow_neg_eigval)
        return gdn.naive_recurrent_gated_delta_rule(q, k, v, beta, g)

    def kimi_delta_rule(q, k, v, g, beta, A_log, dt_bias, allow_neg_eigval, lower_bound, **_):
        if lower_bound is None:
            g = kda_gate.naive_kda_gate(g, A_log, dt_bias)
        else:
            g = kda_gate.naive_kda_lowerbound_gate(g, A_log, dt_bias, lower_bound)
        beta = strength(beta, allow_neg_eigval)
        return kda.naive_recurrent_kda(_of_length_one(q), _of_length_one(k), v, g, beta)

    def slot_attention(q, k, v, s, g, scale, **_):
        return gsa.naive_recurrent_gsa(q, k, v, s, g, scale)

    def retained(q, k, v, **_):
        return retention.naive_retention(*heads_first(q, k, v)).transpose(1, 2), None

    def rwkv7(r, w, k, v, a, b, scale, **_):
        scaled = r * r.shape[-1] ** 0.5 * scale  # whose scale is another
        return dplr.dplr_recurrence(*heads_first(scaled, k, v, a, b, w))[0].transpose(1, 2), None

    def rwkv7_of_keys(r, w, k, v, kk, a, scale, **_):
        return rwkv7(r, w, k, v, -kk, kk * a, scale)

    functions = {
        ("gla", "gla"): gated_linear, ("hgrn2", "gla"): gated_linear, ("delta_net", "delta_rule"): delta_rule,
        ("gated_deltanet", "gated_delta_rule"): gated_delta_rule, ("kda", "kda"): kimi_delta_rule,
        ("gsa", "gsa"): slot_attention, ("multiscale_retention", "retention"): retained,
        ("hgrn", "hgrn"): lambda x, g, **_: hgrn.naive_recurrent_hgrn(x, g),
    }  # fmt: skip
    both = [
        (f"fla.layers.{layer}", f"{form}_{op}", function)
        for (layer, op), function in functions.items()
        for form in ("chunk", "fused_recurrent")
    ]
    return [
        *both,
        (
            "fla.layers.forgetting_attn",
            "parallel_forgetting_attn",
            lambda q, k, v, g, **_: fox.naive_forgetting_attn(q, k, v, g),
        ),
        ("fla.layers.rwkv7", "chunk_rwkv7", rwkv7),
        ("fla.layers.rwkv7", "fused_mul_recurrent_rwkv7", rwkv7_of_keys),
        ("fla.layers.rwkv7", "fused_addcmul_rwkv7", rwkv["fused_addcmul"].torch_addcmul_rwkv7),
        ("fla.layers.rwkv7", "fused_k_rwkv7", rwkv["fused_k_update"].k_update_ref),
        ("fla.layers.rwkv7", "gate_output_correction", correction.gate_output_correction_ref),
    ]
