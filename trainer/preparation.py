"""Preparation: from settings to a model under its engine, with everything checked before weights are allocated."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from ..models import hf
from ..models.activations.recomputation import SETTINGS as MEMORY
from ..models.language_model import LanguageModel
from ..models.moved import with_current_paths
from ..models.published import check_unread
from ..parallel.mesh import Mesh
from .checkpoint import checkpoint
from .checkpoint.choice import read_config
from .compilation import compile_blocks
from .data.corpus import Corpus
from .data.recall import RecallCorpus
from .data.tokenizers import SMALLEST_VOCABULARY
from .engine import Engine, Gather, saved_buffers
from .optimizers.groups import frozen_parameters, matched
from .optimizers.qk_clip import check_clipping
from .ranks.exchange import together
from .rehearsal import rehearse
from .schedule import ScheduleSettings, extended
from .settings import Settings, TrainerSettings
from .zero.experts import check_experts

log = logging.getLogger("longreach")
STAND_IN = 61  # tokens, where a model is examined before its tokenizer is known
Build = Callable[[dict[str, Any]], LanguageModel]


def model_settings(settings: Settings, corpus: Corpus | RecallCorpus) -> dict[str, Any]:
    """The model's configuration, complete: of `model`, or of the Hugging Face checkpoint that training starts from.

    Raises ValueError where the vocabulary does not hold an id that occurs in the data or begins a prompt. A tokenizer
    may have more ids, or the embedding more rows: that is logged.
    """
    model = configured_model(settings)
    if model.get("vocabulary") is None:
        model["vocabulary"] = corpus.vocabulary_size
    if model["vocabulary"] < corpus.vocabulary_size:
        _check_ids(settings, corpus, model["vocabulary"])
    _note_padding(corpus.vocabulary_size, model["vocabulary"])
    return model


def _check_ids(settings: Settings, corpus: Corpus | RecallCorpus, rows: int) -> None:
    """Of a vocabulary that is smaller than the data's: raises ValueError for an id that is met and has no row."""
    if not isinstance(corpus, Corpus):
        raise ValueError(
            f"model.vocabulary must be at least the data's {corpus.vocabulary_size}; got {rows}. "
            f"Use data.vocabulary_size={rows}"
            + (", or leave model.vocabulary out" if settings.init_from is None else "")
        )
    tokenizer, prompt = corpus.tokenizer, settings.evaluation.prompt
    met = max((corpus.cache.largest_id, *tokenizer.beginning))
    if met >= rows:
        raise ValueError(
            f"model.vocabulary must be at least the data's {met + 1}; got {rows}, without a row for "
            f"{tokenizer.describe(met)} of data.tokenizer={settings.data.tokenizer}. "
            + _remedy(settings, corpus, met, rows)
        )
    if prompt and (met := max(tokenizer.encode_prompt(prompt), default=-1)) >= rows:
        raise ValueError(
            f"evaluation.prompt must have tokens that the model has; got {tokenizer.describe(met)} with an embedding "
            f"of {rows} rows. Leave it out of the prompt"
        )
    log.warning(
        "model.vocabulary: the embedding has %s rows, data.tokenizer %s ids; none without a row occurs in the data",
        f"{rows:,}",
        f"{corpus.vocabulary_size:,}",
    )


def _note_padding(ids: int, rows: int) -> None:
    """Says of a vocabulary that is larger than the data's, as those that are rounded up are, what is not trained."""
    if rows > ids:
        text = "model.vocabulary: the embedding has %s rows, the data %s ids; the other rows are of no token"
        log.info(text, f"{rows:,}", f"{ids:,}")


def _remedy(settings: Settings, corpus: Corpus, met: int, rows: int) -> str:
    """What can be done about the id `met` in a model of fewer `rows`."""
    origin, tokenizer, chosen = settings.init_from, corpus.tokenizer, settings.data.tokenizer
    if met in tokenizer.beginning:
        return "Use data.bos=false, so that nothing begins with it"
    ways = []
    if origin is None:
        ways.append(f"leave model.vocabulary out or raise it to {met + 1}")
    elif checkpoint.is_one(origin) and chosen != str(Path(origin) / "tokenizer"):
        ways.append("leave data.tokenizer out, to take that of init_from")
    if chosen == "bpe" and rows >= SMALLEST_VOCABULARY:
        ways.append(f"use data.vocabulary_size={rows}")
    else:
        ways.append("name a data.tokenizer with smaller ids")
    if met != tokenizer.end_of_text:
        ways.append("leave the documents with this token out of the data")
    if origin is not None and not checkpoint.is_one(origin):
        ways.append(
            f"give the model {met + 1} rows first, with transformers: model.resize_token_embeddings({met + 1}) and "
            "model.save_pretrained(OTHER_PATH)"
        )
    text = ", or ".join(ways)
    return text[0].upper() + text[1:]


def configured_model(settings: Settings) -> dict[str, Any]:
    """The model's configuration as it is given, by `model` or by a Hugging Face checkpoint: perhaps without vocabulary.

    Beside the latter, `model` without a `_target_` changes some of its settings. Raises ValueError where there is none.
    """
    origin, model = settings.init_from, dict(settings.model)
    if origin is not None and not checkpoint.is_one(origin):
        model = changed(hf.read_settings(origin), {} if "_target_" in model else model)
    if not model.get("_target_"):
        raise ValueError("model must be a configuration with a _target_; got none. Choose one: model=llama_tiny")
    chosen, usual = settings.trainer, TrainerSettings()
    model |= {name: getattr(chosen, name) for name in MEMORY if getattr(chosen, name) != getattr(usual, name)}
    return model


def changed(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings with some of them changed; settings with a `_target_` or a `kind` take the place of others."""
    made = dict(settings)
    for name, value in changes.items():
        before = made.get(name)
        if isinstance(value, Mapping) and isinstance(before, Mapping) and not {"_target_", "kind"} & set(value):
            value = changed(before, value)
        made[name] = value
    return made


def check_same_model(path: Path, model: dict[str, Any]) -> None:
    """Raises ValueError, naming the settings, if a checkpoint is of a model that is configured otherwise."""
    saved = with_current_paths(checkpoint.verify(path).state["model"])
    differing = [
        f"{name} was {saved.get(name)!r} and is {model.get(name)!r}"
        for name in sorted({*saved, *model})
        if name not in MEMORY and saved.get(name) != model.get(name)
    ]
    if differing:
        raise ValueError(
            f"model must be that of checkpoint {path}; {'; '.join(differing)}. Leave the model as it was, or start a "
            "new run.dir"
        )


def extension_of(settings: Settings, start: Path) -> ScheduleSettings:
    """The schedule's settings for a run that goes on from the checkpoint `start`; see `schedule.extension`."""
    step = int(checkpoint.verify(start).state["step"])
    return extended(settings.schedule, settings.trainer.steps, read_config(start), step)


def check_model(
    build: Build, model: dict[str, Any], settings: Settings, note: Callable[[str], None] = log.warning
) -> None:
    """Tries the model without memory, and before its data are read: what does not fit shows here.

    model: may be without vocabulary. note: gets a line for what the writer of a mixer should know. Raises ValueError
    for the name of a mixer in `parallel.mixers` that the model has not, for a parameter without an initial value, for
    keys or a memory that no layer reads, and what `rehearse` raises.
    """
    model = model | {"vocabulary": model.get("vocabulary") or STAND_IN}
    built = on_meta(build, model)
    if unknown := [name for name in settings.parallel.mixers if name not in built.mixer_names]:
        names = ", ".join(built.mixer_names)
        raise ValueError(f"parallel.mixers must name mixers of the model's pattern, {names}; got {', '.join(unknown)}")
    check_experts(built, settings.parallel.experts)
    built.check_initial_values()
    check_unread(built.leaves())
    check_clipping(built, settings.optimizer.qk_clip, frozen_parameters(built, settings.optimizer.only))
    matched(built, settings.optimizer.rules)
    saved_buffers(built)
    for line in rehearse(lambda: build(model), settings):
        note(line)


def check_origin(build: Build, settings: Settings, *, resuming: bool = False) -> None:
    """Compares what `init_from` names with the model, before data are read, by the headers of its files alone.

    Resuming, nothing is read of it. A checkpoint of LongReach is compared later where the model is without vocabulary
    yet. Raises ValueError that names the tensors that are missing, unexpected or misshapen, and files that are not
    whole.
    """
    origin = settings.init_from
    if origin is None or resuming:
        return
    model = configured_model(settings)
    if not checkpoint.is_one(origin):
        hf.prepare(origin, on_meta(build, model))
    elif model.get("vocabulary") is not None:
        checkpoint.prepare_weights(origin, on_meta(build, model), settings.trainer.seed, bytes_too=False)


def on_meta(build: Build, model: dict[str, Any]) -> LanguageModel:
    """The model without memory, by which the meters count."""
    with torch.device("meta"):
        return build(model)


def make_engine(settings: Settings, build: Build, mesh: Mesh, device: torch.device, *, resuming: bool) -> Engine:
    """The engine, with weights from the seed or from `init_from`; resuming, they are arbitrary and loaded next."""
    trainer = settings.trainer

    def from_checkpoint(model: nn.Module, gather: Gather) -> None:
        origin = str(settings.init_from)
        if checkpoint.is_one(origin):
            together(mesh, lambda: checkpoint.prepare_weights(origin, model, trainer.seed))(gather)
        else:
            together(mesh, lambda: hf.prepare(origin, model))(gather)

    def leave_as_allocated(model: nn.Module, gather: Gather) -> None:
        pass

    load = leave_as_allocated if resuming else from_checkpoint if settings.init_from else None
    engine = Engine(
        lambda: build(settings.model),
        settings=settings.engine,
        optimizer=settings.optimizer,
        dtype=trainer.dtype,
        clip=trainer.clip,
        mesh=mesh,
        device=device,
        seed=trainer.seed,
        load=load,
    )
    if trainer.compile and (note := compile_blocks(cast(LanguageModel, engine.module), settings.engine.zero_stage)):
        log.warning(note)
    return engine
