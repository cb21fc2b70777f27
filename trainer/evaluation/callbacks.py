"""What a run evaluates while it goes: the loss on held-out rows, and a sample of text."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, cast

from ...models.language_model import LanguageModel
from ..callback import Callback
from ..data.corpus import Corpus
from ..data.packing import RowStream
from ..ranks.settings import strategy_of
from ..run import report
from ..run.metrics import BEFORE_STAGE
from .baselines import text_baselines
from .evaluation import Loss, evaluate, evaluate_truncated
from .sample import draw_sample

if TYPE_CHECKING:
    from ..trainer import Trainer


class Validation(Callback):
    """Logs the loss on held-out rows every `evaluation.every` steps, with `evaluation.at_start` before the first one
    too, with `evaluation.positions` also by position. After the last step it adds the comparisons with counting models
    and with a shorter context. Where a stage begins, the loss is logged by its settings too, under the step that ended
    the one before; BEFORE_STAGE in that line tells the two apart.
    """

    def start(self, trainer: Trainer) -> None:
        if trainer.step == trainer.stage.first > 0:  # the run ended where this stage begins
            self.next_stage(trainer)
        if trainer.settings.evaluation.at_start and trainer.step == 0:
            self._before_step(trainer)

    def next_stage(self, trainer: Trainer) -> None:
        if trainer.settings.evaluation.every:
            self._before_step(trainer, {BEFORE_STAGE: True})

    def _before_step(self, trainer: Trainer, more: dict[str, Any] | None = None) -> None:
        cast(LanguageModel, trainer.engine.module).at_step(trainer.step)
        trainer.outputs.validation(_validated(trainer) | (more or {}))

    def after_step(self, trainer: Trainer) -> None:
        chosen = trainer.settings.evaluation
        if not trainer.due(chosen.every):
            return
        record = _validated(trainer)
        if trainer.done and chosen.context is not None:
            record |= _truncated(trainer, chosen.context)
        trainer.outputs.validation(record)
        if trainer.done and trainer.mesh.rank == 0 and (chosen.baselines or chosen.context is not None):
            corpus = trainer.corpus
            if isinstance(corpus, Corpus):
                lines = report.comparison(record, text_baselines(corpus) if chosen.baselines else None)
            else:
                lines = report.recall_comparison(record, corpus.chance if chosen.baselines else None)
            trainer.outputs.say("\n".join(lines))


def _validated(trainer: Trainer) -> dict[str, Any]:
    """The record of a validation."""
    corpus, rows = trainer.corpus, trainer.settings.evaluation.rows
    if isinstance(corpus, Corpus) and corpus.parts:
        return {"step": trainer.step, **_of_mixture(trainer, corpus, rows)}
    loss = _whole(trainer, rows)
    return {"step": trainer.step, "validation_loss": loss.mean, **_measures(trainer, loss), **loss.by_position}


def _of_mixture(trainer: Trainer, corpus: Corpus, most: int | None) -> dict[str, float]:
    """The loss on held-out rows of each source, and of all: about `most`, shared out as those of training are."""
    whole = sum(part.weight for part in corpus.parts.values())
    losses, text, record = list[Loss](), 0.0, {}
    for name, part in corpus.parts.items():
        if part.validation is not None:
            share = math.inf if most is None else max(1, round(most * part.weight / whole))
            loss = _loss(trainer, part.validation, share)
            record[f"validation_loss_{name}"] = loss.mean
            losses.append(loss)
            text += loss.targets * part.bytes_per_token
    total = Loss.of_all(losses)
    measures = {"bits_per_byte": total.bits_per_byte(text / total.targets), "accuracy": total.accuracy}
    return {"validation_loss": total.mean, **measures, **record, **total.by_position}


def _whole(trainer: Trainer, most: int | None) -> Loss:
    """The loss on at most `most` held-out rows."""
    return _loss(trainer, trainer.corpus.validation, most or math.inf)


def _loss(trainer: Trainer, stream: RowStream, most: float) -> Loss:
    settings = trainer.settings
    rows = int(min(stream.rows or 0, most))
    strategy = strategy_of(settings.parallel)
    at_once, positions = settings.data.rows_per_micro_batch, settings.evaluation.positions
    return evaluate(trainer.engine, stream, trainer.layout, strategy, rows, at_once, positions)


def _truncated(trainer: Trainer, context: int) -> dict[str, Any]:
    """The same tokens scored from their last `context` tokens alone, and from the whole context."""
    stream, settings = trainer.corpus.validation, trainer.settings
    rows = min(stream.rows or 0, settings.evaluation.context_rows)
    trainer.outputs.say(f"scoring {rows} held-out rows, each token from its last {context} tokens alone")
    places = trainer.layout.local_length * settings.data.rows_per_micro_batch
    cut = _measures(trainer, evaluate_truncated(trainer.engine, stream, rows, context, places))
    whole = _measures(trainer, _whole(trainer, rows))
    return {
        "truncated_context": context,
        "truncated_rows": rows,
        **{f"truncated_{name}": value for name, value in cut.items()},
        **{f"untruncated_{name}": value for name, value in whole.items()},
    }


def _measures(trainer: Trainer, loss: Loss) -> dict[str, float]:
    """The measures that are logged beside the mean loss; recall problems have no bytes."""
    if not isinstance(trainer.corpus, Corpus):
        return {"accuracy": loss.accuracy}
    scale = trainer.corpus.bytes_per_token("validation")
    return {"bits_per_byte": loss.bits_per_byte(scale), "accuracy": loss.accuracy}


class Sampling(Callback):
    """Draws a sample of text whenever the run validates, and after the last step. text: the newest, "" before one."""

    text = ""

    def after_step(self, trainer: Trainer) -> None:
        chosen = trainer.settings.evaluation
        if not chosen.sample_tokens or not (trainer.done or trainer.due(chosen.every)):
            return
        if not isinstance(trainer.corpus, Corpus):
            return  # there is no text
        if trainer.recovery.in_a_row:
            return  # the weights may be such that nothing can be drawn
        self.text = draw_sample(
            trainer.engine,
            trainer.corpus,
            chosen.prompt,
            tokens=chosen.sample_tokens,
            temperature=chosen.temperature,
            seed=trainer.settings.trainer.seed,
        )
        trainer.outputs.sample(trainer.step, self.text)
