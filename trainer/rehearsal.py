"""Rehearsal: one forward and backward on tensors without data, which shows before a run what step 1 would fail on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.dispatch import noting
from ..kernels.documents import Documents
from ..models.language_model import LanguageModel
from ..models.mixer import Mixer, name_of
from ..models.part import Part, cast_parameters
from ..parallel.layout import Layout
from ..parallel.sequence import Sequence
from .effects import Uses, check_effects, chooses
from .optimizers.qk_clip import Tried
from .ranks.settings import layout_of, strategy_of, ulysses_ranks
from .settings import Settings

LONGEST_SPAN = 2048  # tokens; what is derived from positions takes time on the host
# A part that needs values, a CUDA device or a kernel of its own cannot be rehearsed; that is no fault.
UNREHEARSABLE = ("meta", "cuda", "triton", "device", "pointer", "data_ptr", "storage")


def rehearse(build: Callable[[], LanguageModel], settings: Settings) -> list[str]:
    """Runs a new model on `meta` as the first rank of its topology would; returns what its writer should know.

    No memory is taken and nothing is sent; ops give the shapes and types that they give on as many ranks. Raises, with
    the part in front, whatever a mixer's or another layer's forward raises, and ValueError where its output does not
    fit its input, where two ops of a mixer share a slot, where ranks that exchange tokens for heads do not divide them,
    or where a backend, a strategy or a bound of logits is chosen that this model has no use for. What cannot be
    rehearsed is among the notes.
    """
    with torch.device("meta"):
        model = build()
        notes = _notes_on_tensors(model)
        model.to("meta")
        cast_parameters(model, getattr(torch, settings.trainer.dtype))  # buffers keep their type under the engine too
        for _, part in model.leaves():
            _check_outputs(part)
        model.at_step(0)
        most = settings.optimizer.qk_clip
        clipping = None if most is None else Tried(model)
        layout = layout_of(settings.parallel, settings.data.sequence_length)
        uses, tried = Uses(set(), set()), _shortened(layout)
        error = _attempt(model, tried, settings, uses)
        if error is not None:  # of a layer that asks for the whole length, perhaps
            tried = layout
            error = _attempt(model, tried, settings, uses)
        if error is None:
            notes += _notes_on_gradients(model)
            if chooses(settings):  # a layer may run other ops later
                model.at_step(settings.trainer.steps - 1)
                error = _attempt(model, tried, settings, uses)
    if error is None:
        check_effects(settings, model, uses)
        if most is not None and clipping is not None:
            clipping.check(most)
        return notes
    if isinstance(error, ValueError) or not any(word in str(error).lower() for word in UNREHEARSABLE):
        raise error
    where = "; ".join(getattr(error, "__notes__", ())) or "the model"
    return [*notes, f"{where} cannot be tried before step 1: {str(error).splitlines()[0]}"]


def _attempt(model: LanguageModel, layout: Layout, settings: Settings, uses: Uses) -> Exception | None:
    """A forward and backward under the layout; what they raise. What the model runs joins `uses`."""
    documents = Documents.whole(settings.data.rows_per_micro_batch, layout.length)
    seq = Sequence.rehearsal(documents, layout, strategy_of(settings.parallel), ulysses_ranks(settings.parallel))
    tokens = torch.zeros(documents.batch, layout.local_length, dtype=torch.int64)
    try:
        model.flops(documents)
        with noting() as ops:
            loss, _, reports = model(tokens, seq, tokens, False, True)
        uses.ops.update(ops)
        uses.exchanges.update(seq.exchanges or ())
        torch.stack([loss, *(reports[path].to(loss.dtype) for path in model.losses)]).sum().backward()
    except Exception as error:
        return error
    return None


def _shortened(layout: Layout) -> Layout:
    """The layout with spans halved until they are short: what a layer cuts its tokens by divides them still."""
    span = layout.span_length
    while span > LONGEST_SPAN:
        span //= 2
    return Layout(span * layout.ranks * layout.spans, layout.ranks, layout.spans)


def _check_outputs(part: Part) -> None:
    """Has the part's output checked whenever it runs."""

    def check(module: nn.Module, arguments: tuple[Any, ...], result: Any) -> None:
        if part.gives:
            if not isinstance(result, tuple) or len(result) != 1 + len(part.gives):
                names = ", ".join(part.gives)
                what = "publishes and reports" if part.losses or part.sums else "publishes"
                raise ValueError(f"forward must return its output and what it {what}, {names}; got {_form(result)}")
            for name, loss in zip(part.losses, result[1 + len(part.publishes) :], strict=False):
                if not isinstance(loss, Tensor) or loss.dim():
                    raise ValueError(f"forward must return a scalar for its loss {name}; got {_form(loss)}. Sum it up")
            result = result[0]
        x = arguments[0]
        _check_like(result, x.chunk(2, dim=-1)[0] if part.with_embedding else x)

    part.register_forward_hook(check)


def _check_like(result: Any, x: Tensor) -> None:
    if isinstance(result, Tensor) and (result.shape, result.dtype) == (x.shape, x.dtype):
        return
    hint = "End with a return" if result is None else "Project back to the width, and cast back to the input's type"
    raise ValueError(f"forward must return a tensor like its input, {_form(x)}; got {_form(result)}. {hint}")


def _form(value: Any) -> str:
    """A value's shape and type, as messages say them."""
    if isinstance(value, tuple):
        return f"({', '.join(map(_form, value))})"
    if isinstance(value, Tensor):
        return f"{list(value.shape)} in {str(value.dtype).removeprefix('torch.')}"
    return "nothing" if value is None else f"a {name_of(type(value))}"


def _parts(model: LanguageModel) -> Iterator[tuple[str, Part]]:
    """(setting, part) of each mixer and feed-forward layer, once."""
    yield from {part.setting: part for _, part in reversed(list(model.leaves()))}.items()


def _notes_on_tensors(model: LanguageModel) -> list[str]:
    """Of tensors that neither a move of the model nor a checkpoint finds, and of layers that start too large."""
    notes = []
    for setting, part in _parts(model):
        modules = [(f"{path}." if path else "", module) for path, module in part.named_modules()]
        plain = [path + name for path, module in modules for name, x in vars(module).items() if isinstance(x, Tensor)]
        placed = [name for name, x in (*part.named_parameters(), *part.named_buffers()) if x.device.type != "meta"]
        told = [
            ("keeps plain tensors, which do not move with the model", plain, "register_buffer(…, persistent=False)"),
            ("makes tensors on a device of its own choice, before they are split", placed, "leave out device="),
        ]
        if isinstance(part, Mixer) and not any(name.startswith("output.") for name, _ in part.named_parameters()):
            told.append(
                ("has no layer called output", ["it starts smaller the deeper the model"], "call its last one so")
            )
        notes += [f"{setting}: {name_of(type(part))} {what} ({', '.join(of)}): {hint}" for what, of, hint in told if of]
    return notes


def _notes_on_gradients(model: LanguageModel) -> list[str]:
    notes = []
    for setting, part in _parts(model):
        if idle := [name for name, x in part.named_parameters() if x.requires_grad and x.grad is None]:
            notes.append(
                f"{setting}: {name_of(type(part))} learns nothing in {', '.join(idle)}, which forward does not use or "
                "detaches"
            )
    return notes
