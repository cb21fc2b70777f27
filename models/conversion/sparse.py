"""Softmax attention as attention to selected blocks: by the same weights, or with branches that start at 0."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from ..mixers.softmax.attention import Attention
from ..mixers.sparse.block_sparse_attention import InfLLMv2, MoBA
from ..mixers.sparse.native_sparse_attention import NativeSparseAttention
from .converted import Converted, Weights, check_plain

FORMS: dict[str, type[MoBA] | type[InfLLMv2]] = {"moba": MoBA, "infllm_v2": InfLLMv2}
OF_ATTENTION = tuple(set(inspect.signature(Attention).parameters) - {"width", "name", "occurrence", "share", "keys_of"})
OF_NATIVE = ("heads", "kv_heads", "head_dim", "rope_base", "rope_fraction", "rope_scaling", "norm_eps", "conv_size")
FOLDED = ("width", "qk_norm", "key_multiplier")  # what native sparse attention has in another way


def block_sparse(
    mixer: Attention, settings: Mapping[str, Any], weights: Weights, form: str, given: Mapping[str, Any]
) -> Converted:
    """Softmax attention as MoBA or InfLLM-v2, which have the same parameters.

    Outputs are the same where a query lists every block up to its own, and those of InfLLM-v2 below `dense_length` too.
    given: settings of the new mixer, beside those of attention, which stay. Raises ValueError for attention with
    settings that these have not, such as a window, and for other names in `given`.
    """
    kind = FORMS[form]
    check_plain(mixer, settings, OF_ATTENTION, form)
    _check_given(given, set(inspect.signature(kind).parameters) - set(inspect.signature(Attention).parameters))
    changed = {name: value for name, value in settings.items() if name in OF_ATTENTION} | dict(given)
    with torch.device("meta"):
        made = kind(width=mixer.query.in_features, **changed)
    rule = made.selector.rule
    until = max(rule.block_size * rule.count, made.dense_length)
    return Converted(_settings(kind, changed), dict(weights), {}, until)


def native_sparse(
    mixer: Attention, settings: Mapping[str, Any], weights: Weights, given: Mapping[str, Any]
) -> Converted:
    """Softmax attention as native sparse attention, which starts as its branch of selected blocks alone.

        o = 1/2 compressed(q, k, 0) + 1/2 selected(q, k, 2 v) + 1/2 near(q, k, 0) = selected(q, k, v)

    Every branch gets the keys; values of the compressed and the near branch start at 0, and gates at sigmoid(0), so
    that all of them learn from the first step. Blocks are chosen by the means of the keys of windows, which the
    compressing MLP starts as, since x = gelu(x) - gelu(-x); its further units start with no effect, each at one number
    of the window. Outputs are the same where a query lists every block up to its own.
    given: settings of the new mixer, beside those of attention, which stay. Raises ValueError for attention with
    settings that this has not, for other names in `given`, and for `shared_kv`, and an MLP that is too small.
    """
    check_plain(mixer, settings, OF_NATIVE + FOLDED, "nsa")
    if mixer.qk_norm not in (None, "head"):
        raise ValueError(f"qk_norm must be null or head for form=nsa; got {mixer.qk_norm}. Name other layers in mixers")
    kind, here = NativeSparseAttention, {"width", "qk_norm", "value_dim", "shared_kv", *OF_NATIVE}
    _check_given(given, set(inspect.signature(kind).parameters) - here)
    changed = {name: value for name, value in settings.items() if name in OF_NATIVE} | dict(given)
    changed["qk_norm"] = mixer.qk_norm == "head"
    with torch.device("meta"):
        made = kind(width=mixer.query.in_features, **changed)
    made_of = {name: x for name, x in weights.items() if name.partition(".")[0] in ("query", "output", "query_norm")}
    key, value = weights["key.weight"] * mixer.key_multiplier, weights["value.weight"]
    made_of["key.weight"] = torch.cat([key] * 3)
    made_of["value.weight"] = torch.cat([torch.zeros_like(value), 2 * value, torch.zeros_like(value)])
    made_of["gate.weight"] = torch.zeros(made.gate.weight.shape)
    if made.qk_norm:
        made_of["key_norm.weight"] = weights["key_norm.weight"]
    if mixer.conv is not None:
        q, k, v = weights["conv.weight"].split([len(weights[f"{part}.weight"]) for part in ("query", "key", "value")])
        made_of["conv.weight"] = torch.cat([q, k, k, k, v, v, v])
    new = ["gate"]
    if made.compress_keys is not None:
        new += ["compress_keys", "compress_values"]
        made_of |= {
            f"{layer}.{name}": x
            for layer in new[1:]
            for name, x in _means(made.window_size, mixer.head_dim, made.compress_keys.second.in_features).items()
        }
    until = made.selector.rule.block_size * made.selector.rule.count
    return Converted(_settings(kind, changed), made_of, {}, until, tuple(new))


def _means(size: int, dim: int, hidden: int) -> dict[str, Tensor]:
    """A `Compression` that gives the mean of a window."""
    if hidden < 2 * dim:
        raise ValueError(
            f"mixer.compression_hidden must be at least {2 * dim}, twice head_dim, to begin as a mean; got {hidden}. "
            "Leave it out, or give mixer.compression=mean"
        )
    mean = torch.eye(dim).repeat(1, size) / size  # [dim, size * dim]
    others = torch.eye(size * dim).roll(-dim, 0).repeat(-(-hidden // (size * dim)), 1)[: hidden - 2 * dim]
    back = torch.eye(dim)
    return {
        "places": torch.zeros(size, dim),
        "first.weight": torch.cat([mean, -mean, others]),
        "second.weight": torch.cat([back, -back, torch.zeros(dim, hidden - 2 * dim)], dim=1),
    }


def _settings(kind: type, changed: dict[str, Any]) -> dict[str, Any]:
    return {"_target_": f"{kind.__module__}.{kind.__qualname__}", "_partial_": True, **changed}


def _check_given(given: Mapping[str, Any], known: Collection[str]) -> None:
    if unknown := sorted(set(given) - set(known)):
        raise ValueError(
            f"mixer must hold settings that the new mixer has beside those of attention, {', '.join(sorted(known))}; "
            f"got {unknown[0]}. Remove it"
        )
