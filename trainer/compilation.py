"""Compilation: which parts of a model torch.compile makes graphs of."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..models.activations.recomputation import used_modes
from ..models.language_model import LanguageModel
from ..models.part import FeedForward


def compile_blocks(model: LanguageModel, zero_stage: int, backend: str | Callable = "inductor") -> str | None:
    """torch.compile of each block, mixing ops included; blocks that are alike share a graph.

    Where whole blocks cannot be graphs, their feed-forward layers and norms are compiled, and mixers run as they are;
    then the result says why. Graphs are of the shapes of training: decoding and evaluation with a truncated context,
    whose shapes are others, run without them.
    """
    reason = None
    if zero_stage == 3:
        reason = "engine.zero_stage=3 gathers parameters in hooks that no graph can hold"
    elif "mixing" in used_modes(model.activation_checkpointing):
        reason = "trainer.activation_checkpointing=mixing keeps the results of mixing ops, which no graph can"
    # All blocks share one limit. Each kind of block takes a graph for training and one for evaluation, and what its
    # layers set by depth may take more.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 4 * model.depth)
    for _, block in model.composites:
        if reason is None:
            block.compile(backend=backend)
            continue
        norms = [child for child in block.children() if not any(child is part for part in map(block.part, block.names))]
        for part in [*(part for _, part in block.leaves("") if isinstance(part, FeedForward)), *norms]:
            part.compile(backend=backend)
    return reason and f"trainer.compile compiles feed-forward layers and norms, not mixers: {reason}"
