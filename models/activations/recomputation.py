"""Recomputation: which blocks are computed again in backward, by their mixers, and what is kept for that."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ...kernels.operation import Kept
from ...parallel.sequence import Sequence
from ..pattern import stages
from .offloading import Journey

MODES = ("none", "full", "mixing")
# Settings of a model that change what is kept in memory, and not what is computed; by their names in the model.
SETTINGS = ("activation_checkpointing", "tile_tokens", "offload_activations")
_LEAST_KEPT_LAST = ("none", "mixing", "full")

Modes = str | Mapping[str, str]


def check_modes(setting: str, chosen: Any, mixers: Collection[str] | None = None) -> None:
    """Raises ValueError unless it is a mode, or modes by names of `mixers` (None: not known yet)."""
    must = f"{setting} must be one of {', '.join(MODES)}"
    if not isinstance(chosen, Mapping):
        if chosen not in MODES:
            raise ValueError(f"{must}; got {chosen!r}")
        return
    for name, mode in chosen.items():
        if mixers is not None and name not in mixers:
            near = difflib.get_close_matches(str(name), mixers, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"Known are {', '.join(mixers)}"
            raise ValueError(f"{setting} must name mixers of the model's pattern; got {name!r}. {hint}")
        if mode not in MODES:
            raise ValueError(f"{must} for each mixer; got {mode!r} for {name}")


def used_modes(chosen: Modes) -> set[str]:
    """The modes that are asked for."""
    return {chosen} if isinstance(chosen, str) else set(chosen.values())


def check_recomputation(chosen: Modes, offload: bool, mixers: Collection[str]) -> None:
    """Raises ValueError for modes as `check_modes` does, and for offloading where nothing is recomputed."""
    check_modes("activation_checkpointing", chosen, mixers)
    if offload and used_modes(chosen) <= {"none"}:
        raise ValueError(
            "offload_activations must be false without activation_checkpointing, which says what is kept; got true. "
            "Use trainer.activation_checkpointing=full or mixing"
        )


def mode_of(chosen: Modes, layer: str) -> str:
    """The mode of a layer by its item of the pattern: of several mixers, the mode that keeps least."""
    if isinstance(chosen, str):
        return chosen
    modes = [chosen.get(name, "none") for together in stages(layer) for name in together]
    return max(modes, key=_LEAST_KEPT_LAST.index)


def call(
    module: Callable[..., Any], inputs: tuple[Tensor, ...], seq: Sequence, mode: str, journey: Journey | None = None
) -> Any:
    """module(first, seq, *others) of `inputs`: recomputed in backward, unless `mode` is "none" or there is none.

    journey: takes what is kept to the host and back: the first input, and with "mixing" the results of the ops.
    """
    first, *others = inputs
    if mode == "none" or seq.cache is not None or not torch.is_grad_enabled():
        return module(first, seq, *others)
    arguments = (module, first, replace(seq, kept=Kept(journey)) if mode == "mixing" else seq, *others)
    if journey is None:
        return checkpoint(*arguments, use_reentrant=False, preserve_rng_state=False)
    journey.takes(first)
    with torch.autograd.graph.saved_tensors_hooks(journey.pack_input, journey.unpack):
        return checkpoint(*arguments, use_reentrant=False, preserve_rng_state=False)
