"""Effects: a setting that changes nothing in the model that is configured is an error, told before memory is taken."""

from __future__ import annotations

from typing import NamedTuple

from ..models.activations.recomputation import used_modes
from ..models.language_model import LanguageModel
from ..models.mixer import name_of
from ..models.part import FeedForward
from ..parallel.strategy import ATTENTION, RECURRENT, Strategy
from .ranks.settings import strategy_of
from .settings import Settings

STRATEGIES = {"attention": ATTENTION, "recurrent": RECURRENT}
# Within a graph of a whole block these are torch's operations, whatever was chosen.
TRACED = ("rms_norm", "swiglu", "short_conv")


class Uses(NamedTuple):
    """What a model runs: the ops by name, and (mixer by its name in the pattern, kind) of ops under a strategy."""

    ops: set[str]
    exchanges: set[tuple[str, str]]


def chooses(settings: Settings) -> bool:
    """Whether any setting is there that some models do not use."""
    return any(backend != "auto" for backend in vars(settings.kernels).values()) or (
        strategy_of(settings.parallel) != Strategy()
    )


def check_effects(settings: Settings, model: LanguageModel, uses: Uses) -> None:
    """Raises ValueError for a backend of an op, or a strategy of a kind of op, that the model does not have.

    And for `trainer.tile_tokens` with a feed-forward layer that does not compute in tiles.
    """
    for _, part in model.leaves():
        if isinstance(part, FeedForward) and part.tile is not None and not part.in_tiles:
            raise ValueError(
                f"trainer.tile_tokens must be null with {part.setting} ({name_of(type(part))}), which computes all "
                f"tokens at once; got {part.tile}. Leave it out, or have the layer compute through `by_tiles`"
            )
    _check_kernels(settings, model, uses.ops)
    _check_strategies(strategy_of(settings.parallel), uses.exchanges)


def _check_kernels(settings: Settings, model: LanguageModel, ops: set[str]) -> None:
    kernels = vars(settings.kernels)
    chosen = {op: backend for op, backend in kernels.items() if backend != "auto"}
    if missing := [op for op in chosen if op not in ops]:
        names, values = " and ".join(f"kernels.{op}" for op in missing), " and ".join(chosen[op] for op in missing)
        raise ValueError(
            f"{names} must be auto for a model that does not have it; got {values}. "
            f"The model has {', '.join(op for op in kernels if op in ops)}"
        )
    mixing = "mixing" in used_modes(model.activation_checkpointing)
    whole = settings.engine.zero_stage != 3 and not mixing  # as `compile_blocks`
    for op in TRACED if settings.trainer.compile and whole else ():
        if chosen.get(op, "chunked") != "chunked":
            raise ValueError(
                f"kernels.{op} must be auto or chunked with trainer.compile, whose graphs hold torch's own operations "
                f"instead; got {chosen[op]}. Leave one of them out"
            )


def _check_strategies(strategy: Strategy, exchanges: set[tuple[str, str]]) -> None:
    default, kinds = Strategy(), {kind for _, kind in exchanges}
    for kind in STRATEGIES:
        usual, chosen = getattr(default, kind), getattr(strategy, kind)
        if chosen != usual and kind not in kinds:
            raise ValueError(
                f"parallel.{kind} must be {usual} for a model without an op that it is for; got {chosen}. Leave it out"
            )
    if any(not mixer for mixer, _ in exchanges):
        return  # a block of the user's own runs its parts itself: which of them an op is of is not known
    for mixer, chosen in strategy.mixers:
        allowed = [each for kind, known in STRATEGIES.items() if (mixer, kind) in exchanges for each in known]
        if chosen not in allowed:
            what = f"be one of {', '.join(dict.fromkeys(allowed))}" if allowed else "be left out"
            raise ValueError(
                f"parallel.mixers.{mixer} must {what}, as no op of this mixer runs by another strategy; got {chosen}"
            )
