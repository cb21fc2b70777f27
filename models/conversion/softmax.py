"""The weights of softmax attention as those of attention with fewer key/value heads, or with a latent.

What the algebra allows is exact; the rest is the nearest by least squares, and says how far off it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..mixers.softmax.attention import Attention
from ..mixers.softmax.latent_attention import LatentAttention
from .converted import Converted, Weights, check_plain

CARRIED = ("rope_scaling", "gate", "gate_rank", "gate_bias", "sink_logits")  # settings that stay as they are
LINEAR = (
    "width", "heads", "kv_heads", "head_dim", "rope_base", "rope_fraction", "norm_eps", "bias", "output_bias",
    "key_multiplier",
)  # fmt: skip


def grouped(mixer: Attention, settings: Mapping[str, Any], weights: Weights, kv_heads: int) -> Converted:
    """Attention with fewer key/value heads, each the mean of those that it stands for.

    The mean is the nearest common projection by least squares (Ainslie et al., 2023, arXiv 2305.13245); the error is 0
    where the heads of a group are equal. `settings` are those that `mixer` was made from, `weights` its parameters.
    Raises ValueError where kv_heads does not divide those that there are, and for keys and values that are more than
    projections.
    """
    if kv_heads < 1 or mixer.kv_heads % kv_heads or kv_heads == mixer.kv_heads:
        raise ValueError(
            f"kv_heads must be a smaller divisor of the {mixer.kv_heads} key/value heads that there are; got {kv_heads}"
        )
    rows = mixer.kv_heads * mixer.head_dim
    if any(len(weights[f"{part}.weight"]) != rows for part in ("key", "value")):
        raise ValueError(f"mixers must have a key and a value per head; got {type(mixer).__name__}. Name others")
    if mixer.conv is not None or mixer.qk_norm == "full":
        raise ValueError("mixers must have no conv_size and no qk_norm=full, which mix heads. Name others in mixers")
    made, errors = dict(weights), {}
    for part in ("key", "value"):
        heads = _projection(weights, part).unflatten(0, (kv_heads, -1, mixer.head_dim))
        mean = heads.mean(1, keepdim=True)
        errors[f"{part}s"] = _relative(heads - mean, heads)
        made |= _as_linear(part, mean.flatten(0, 2), bias=f"{part}.bias" in weights)
    return Converted({**settings, "kv_heads": kv_heads}, made, errors)


def latent(
    mixer: Attention,
    settings: Mapping[str, Any],
    weights: Weights,
    *,
    latent_rank: int | None = None,
    rope_heads: int | None = None,
) -> Converted:
    """Grouped attention as latent attention: keys and values become linear in a latent (TransMLA, arXiv 2502.07864).

    With neither number given this is exact: the latent is all values and unrotated parts of keys, and the shared part
    is the rotated parts of all G key heads, of which each query head sees its own.
    rope_heads: keeps fewer rotated heads. For each frequency the heads are turned to their principal axes, which
    changes no score; those of largest weights stay, and the others lose their rotation. latent_rank: the latent is the
    nearest of this rank by least squares, keys and values being given equal weight.
    Raises ValueError for numbers out of range, and for attention that has settings which latent attention has not.
    """
    check_plain(mixer, settings, LINEAR + CARRIED, "latent")
    heads, groups, dim = mixer.heads, mixer.kv_heads, mixer.head_dim
    rotated = 0 if mixer.rotary is None else mixer.rotary.rotation.dims
    kept = _kept_heads(groups if rotated else 0, rope_heads)
    q, k, v = (_projection(weights, part).unflatten(0, (-1, dim)) for part in ("query", "key", "value"))
    k = k * mixer.key_multiplier
    axes = _axes(k[:, :rotated], turn=kept < groups)  # [frequency, head, axis]
    of_head = axes[:, torch.arange(heads) // (heads // groups)]  # [frequency, query head, axis]
    by_frequency = (2, rotated // 2)
    turned = torch.einsum("lja,jcld->acld", axes, k[:, :rotated].unflatten(1, by_frequency)).flatten(1, 2)
    seen = torch.einsum("lha,hcld->hacld", of_head[..., :kept], q[:, :rotated].unflatten(1, by_frequency))
    far = turned[kept:] if rotated else turned[:0]  # of which the rotation is lost
    errors = {"rotation": _relative(far, turned)} if len(far) else {}
    if mixer.rotary is not None:
        far = far * mixer.rotary.rotation.frequencies()[1] ** 2

    content = torch.cat([k[:, rotated:].flatten(0, 1), far.flatten(0, 1), v.flatten(0, 1)])
    expansion = _expansion(heads, groups, dim - rotated, dim, of_head[..., kept:] if len(far) else None)
    content, into, more = _of_rank(content, latent_rank, values=groups * dim)
    own = [q[:, rotated:], q[:, :rotated]] if len(far) else [q[:, rotated:]]
    query = torch.cat([seen.flatten(1, 3), *own], dim=1)
    rows = torch.cat([turned[:kept].flatten(0, 1), content])
    biased = any(f"{part}.bias" in weights for part in ("key", "value"))
    made = {name: x for name, x in weights.items() if name.partition(".")[0] in ("output", "gate")}
    made |= _as_linear("query", query.flatten(0, 1), bias="query.bias" in weights)
    made |= _as_linear("latent", rows, bias=biased)
    made["attend.weight"] = (expansion.flatten(0, 1) @ into).float()
    if "sink_logits" in weights:
        made["attend.sink_logits"] = weights["sink_logits"]
    changed = {
        "latent_rank": len(content), "key_dim": query.shape[1] - kept * rotated, "value_dim": dim,
        "rope_dim": rotated if kept else 0, "rope_heads": max(1, kept), "latent_norm": False, "scale": dim**-0.5,
        "rope_base": mixer.rotary.rotation.base if mixer.rotary is not None and kept else None, "bias": biased,
        "query_bias": "query.bias" in weights, "output_bias": "output.bias" in weights,
    }  # fmt: skip
    return Converted(_settings(mixer, settings, changed), made, errors | more)


def _settings(mixer: Attention, settings: Mapping[str, Any], changed: dict[str, Any]) -> dict[str, Any]:
    target = f"{LatentAttention.__module__}.{LatentAttention.__qualname__}"
    also = {name: settings[name] for name in CARRIED if settings.get(name)}
    return {"_target_": target, "_partial_": True, "heads": mixer.heads, **changed, **also}


def _kept_heads(groups: int, rope_heads: int | None) -> int:
    if rope_heads is None:
        return groups
    if not 1 <= rope_heads <= groups:
        most = f"1 … {groups}, the rotated key heads that there are" if groups else "left out, since no key is rotated"
        raise ValueError(f"rope_heads must be {most}; got {rope_heads}")
    return rope_heads


def _projection(weights: Weights, part: str) -> Tensor:
    """float64 `[outputs, width + 1]`: the matrix, and the bias as its last column."""
    weight = weights[f"{part}.weight"].double()
    bias = weights.get(f"{part}.bias")
    return torch.cat([weight, (torch.zeros(len(weight)) if bias is None else bias).double().unsqueeze(1)], dim=1)


def _as_linear(name: str, matrix: Tensor, *, bias: bool) -> dict[str, Tensor]:
    made = {f"{name}.weight": matrix[:, :-1].float()}
    return {**made, f"{name}.bias": matrix[:, -1].float()} if bias else made


def _axes(keys: Tensor, *, turn: bool) -> Tensor:
    """`[frequencies, G, G]`: for each frequency the principal axes of the heads of keys `[G, R, D]`, largest first.

    Or the heads themselves. All heads turn by the same angles, so that this and the rotation can change places.
    """
    groups, rotated = keys.shape[:2]
    if not turn:
        return torch.eye(groups, dtype=keys.dtype).expand(rotated // 2, groups, groups)
    pairs = keys.unflatten(1, (2, rotated // 2)).permute(2, 0, 1, 3).flatten(2)  # [frequencies, G, 2 D]
    return torch.linalg.eigh(pairs @ pairs.mT).eigenvectors.flip(-1)


def _expansion(heads: int, groups: int, rest: int, dim: int, far: Tensor | None) -> Tensor:
    """`[H, K + V, n]`: of the n numbers of the content, the key and the value of each head.

    far `[frequencies, H, axes]`: how much of each axis that lost its rotation is in the key of each head.
    """
    rotated = dim - rest
    axes = 0 if far is None else far.shape[2]
    key = rest + (rotated if axes else 0)
    made = torch.zeros(heads, key + dim, groups * rest + axes * rotated + groups * dim, dtype=torch.float64)
    for head in range(heads):
        group = head // (heads // groups)
        made[head, :rest, group * rest : (group + 1) * rest] = torch.eye(rest)
        if far is not None:
            for axis in range(axes):
                start = groups * rest + axis * rotated
                made[head, rest:key, start : start + rotated] = torch.diag(far[:, head, axis].repeat(2))
        start = groups * rest + axes * rotated + group * dim
        made[head, key:, start : start + dim] = torch.eye(dim)
    return made


def _of_rank(content: Tensor, rank: int | None, *, values: int) -> tuple[Tensor, Tensor, dict[str, float]]:
    """(latent `[rank, D]`, what makes the content of it `[n, rank]`, relative errors) of content `[n, D]`.

    Its last rows are `values`; those of keys are scaled to as large a norm, so that neither is given up for the other.
    """
    count = len(content)
    most = min(content.shape)
    if rank is None or rank == count:
        return content, torch.eye(count, dtype=content.dtype), {}
    if not 1 <= rank <= most:
        raise ValueError(f"latent_rank must be 1 … {most}, as many numbers as keys and values are made of; got {rank}")
    keys = count - values
    weight = torch.ones(count, 1, dtype=content.dtype)
    if keys and content[:keys].any():
        weight[:keys] = content[keys:].norm() / content[:keys].norm()
    axes = torch.linalg.svd(weight * content, full_matrices=False).U[:, :rank]
    latent, into = axes.T @ (weight * content), axes / weight
    off = into @ latent - content
    errors = {"keys": _relative(off[:keys], content[:keys])} if keys else {}
    return latent, into, {**errors, "values": _relative(off[keys:], content[keys:])}


def _relative(difference: Tensor, whole: Tensor) -> float:
    """The norm of a difference by that of the whole; 0 for what float32 does not tell from 0."""
    size = float(whole.norm())
    error = float(difference.norm()) / size if size else 0.0
    return error if error > 1e-7 else 0.0
