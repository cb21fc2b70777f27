"""Opening: what the steps of a stage work with besides the model's weights. All stages are checked before the first."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from ...models.part import named_weights, shape_of
from ...parallel.mesh import Mesh
from ..checkpoint import checkpoint
from ..data.corpus import Corpus, open_corpus
from ..data.recall import RecallCorpus
from ..data.tokenizers import Tokenizer
from ..engine import saved_buffers
from ..evaluation.callbacks import suite_of
from ..preparation import Build, check_model, check_same_model, configured_model, model_settings, on_meta
from ..ranks.exchange import prepare, together
from ..ranks.settings import ParallelSettings, ulysses_ranks
from .plan import Plan, Stage

log = logging.getLogger("longreach")
STAND_IN = 61  # tokens, where models are compared before their tokenizer is known


def check_stages(build: Build, plan: Plan, ranks: int, device: torch.device) -> None:
    """Raises ValueError for what training refuses of any stage, for those who tell of one after the other.

    Without stages the model is made soon anyway.
    """
    plan.check(ranks, device)
    if plan.staged:
        check_models(build, plan)


def check_models(build: Build, plan: Plan) -> None:
    """Tries the model of every stage without memory, before data are read.

    Raises ValueError, with the stage in front, as `check_model` does, and where a stage changes the parameters.
    """
    said: set[str] = set()

    def note(line: str) -> None:
        if line not in said:
            log.warning(line)
        said.add(line)

    before: dict[str, Any] | None = None
    for stage in plan.stages:
        with stage.checked():
            model = configured_model(stage.settings)
            check_model(build, model, stage.settings, note)
            shapes = _shapes(build, model) if plan.borders else {}
            if before is not None and before != shapes:
                differing = sorted(name for name in {*before, *shapes} if before.get(name) != shapes.get(name))
                raise ValueError(
                    f"model must keep its parameters and buffers through all stages; {len(differing)} differ, such as "
                    f"{differing[0]}. Leave sizes and layers as they are, or start another run with init_from"
                )
            before = shapes


def _shapes(build: Build, model: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    made = on_meta(build, model | {"vocabulary": model.get("vocabulary") or STAND_IN})
    shapes = {name: tuple(shape_of(parameter)) for name, parameter in named_weights(made)}
    return shapes | {name: tuple(buffer.shape) for name, buffer in saved_buffers(made).items()}


class Opening:
    """Gives out the ranks and the data of each stage; completes the models of all.

    Made before anything is allocated: it opens the data of every stage, and raises ValueError on every rank, with the
    stage in front, for what cannot be used and for a stage whose data have another tokenizer. mesh: that of the first
    stage. tokenizer: the run's own, for data with `restart`. Every rank makes one and calls its methods.
    """

    def __init__(self, plan: Plan, mesh: Mesh, tokenizer: Tokenizer | None = None) -> None:
        self.plan, self._meshes = plan, {_topology(plan.stages[0].settings.parallel): mesh}
        self._first, self._tokenizer = mesh, tokenizer
        self._corpora: dict[int, Corpus | RecallCorpus] = {}
        for stage in plan.stages:
            with stage.checked():
                stage.settings.model = self._model(stage)
                together(mesh, lambda stage=stage: suite_of(stage.settings, self._corpora[0]))

    def mesh(self, stage: Stage) -> Mesh:
        """The ranks as the stage arranges them; groups of processes are made once."""
        topology, timeout = _topology(stage.settings.parallel), stage.settings.parallel.timeout_minutes
        if topology not in self._meshes:
            self._meshes[topology] = Mesh.create(*topology, timeout)
        return self._meshes[topology]

    def data(self, stage: Stage, start: Path | None) -> tuple[Corpus | RecallCorpus, int]:
        """The data of the stage, and the row that its next step begins with, going on from a checkpoint if given one.

        That may be the last of the stage before. Raises ValueError for one of another model or other data.
        """
        corpus = self._corpus(stage)
        self._corpora = {stage.number: corpus}
        if start is None:
            corpus.train.begin(stage.rows)
            return corpus, 0
        state = checkpoint.verify(start).state
        written = self.plan.behind(state["step"])
        together(self._first, lambda: _check_begun(start, state, written))
        together(self._first, lambda: check_same_model(start, written.settings.model))
        return corpus, together(self._first, lambda: self.row(stage, corpus, state))

    def row(self, stage: Stage, corpus: Corpus | RecallCorpus, state: dict[str, Any]) -> int:
        """The row of the stage that comes after the state of a checkpoint; its data go on from there."""
        if self.plan.behind(state["step"]).number == stage.number:
            return corpus.train.resume(state["data"], restart=stage.settings.data.restart)
        corpus.train.follow(state["data"], stage.rows)
        return 0

    def _model(self, stage: Stage) -> dict[str, Any]:
        """The stage's model, complete; its vocabulary is that of the data of the first stage."""
        settings, others = stage.settings, self.plan.stages[: stage.number]
        # Recall problems depend on the rows' length; other data are the same in rows of any.
        if settings.data.source == "recall" or not any(self._same(stage, other) for other in others):
            corpus = self._corpus(stage)
            model = together(self._first, lambda: model_settings(settings, corpus))
            if not others:
                return model
            if _tokens_of(corpus) != _tokens_of(self._corpora[0]):
                raise ValueError("data must keep the tokenizer, or the vocabulary of recall, through all stages")
        vocabulary = others[0].settings.model["vocabulary"]
        return together(self._first, lambda: configured_model(settings)) | {"vocabulary": vocabulary}

    def _corpus(self, stage: Stage) -> Corpus | RecallCorpus:
        if stage.number not in self._corpora:
            data, seed, tokenizer = stage.settings.data, stage.settings.trainer.seed, self._tokenizer
            if not self._same(stage, self.plan.stages[0]):  # other data in the tokens of the run
                tokenizer = tokenizer or getattr(self._corpus(self.plan.stages[0]), "tokenizer", None)
            self._corpora[stage.number] = prepare(
                self._first, lambda: open_corpus(data, seed=seed, tokenizer=tokenizer)
            )
        return self._corpora[stage.number]

    @staticmethod
    def _same(stage: Stage, other: Stage) -> bool:
        return stage.settings.data.same_documents(other.settings.data)


def _check_begun(start: Path, state: dict[str, Any], written: Stage) -> None:
    """Raises ValueError where the steps of a checkpoint were of another stage than by the plan of now."""
    was = state.get("stage", {"name": "", "first": 0})  # as before there were stages
    if was != written.identity:
        named = [
            f"stage {stage['name']!r}, which began after step {stage['first']}"
            if stage["name"]
            else "a run without any"
            for stage in (was, written.identity)
        ]
        raise ValueError(
            f"stages must keep those that have begun, with their names, and the lengths of those before; step "
            f"{state['step']} of {start} was of {named[0]}, and is of {named[1]} now. Restore them, and add stages at "
            "the end"
        )


def _topology(parallel: ParallelSettings) -> tuple[int, int, int]:
    return parallel.sequence, ulysses_ranks(parallel), parallel.experts


def _tokens_of(corpus: Corpus | RecallCorpus) -> object:
    """What decides what its ids mean."""
    return corpus.tokenizer.identity if isinstance(corpus, Corpus) else corpus.vocabulary_size
