"""python -m longreach.launch.evaluate checkpoint=PATH 'tasks=[needle,mqar]' — alone or under torchrun, as training."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import DictConfig

from ..models.part import cast_parameters
from ..parallel.mesh import Mesh
from ..trainer.evaluation.checkpoints import Reading, Subject, score_documents
from ..trainer.evaluation.documents import LongDocuments, Texts, as_haystack
from ..trainer.evaluation.evaluation import Whole
from ..trainer.evaluation.maps import draw_checkpoint_map, draw_positions, draw_task_maps
from ..trainer.evaluation.suite import Suite, SuiteSettings, metrics, open_suite, table
from ..trainer.ranks import processes
from ..trainer.ranks.exchange import from_first_rank, together
from ..trainer.ranks.settings import ParallelSettings, spans_of, strategy_of, ulysses_ranks
from ..trainer.requirements import at_least, one_of
from ..trainer.run import failure
from ..trainer.run.outputs import show_log
from ..trainer.run.settings import WandbSettings
from ..trainer.run.tracking import Tracker
from ..trainer.settings import home
from . import configuration
from .build import build


@dataclass
class EvaluateSettings:
    """A checkpoint is its folder, a run's, of which the newest is taken, or that of a model of Hugging Face."""

    checkpoint: str | None = None  # a checkpoint, a run, of which the newest is taken, or a Hugging Face model
    checkpoints: list[str] = field(default_factory=list)  # several, in place of one
    tasks: list[Any] = field(default_factory=list)  # docs/evaluation.md lists them; names, or {task: NAME, …}
    lengths: list[int] = field(default_factory=list)  # tokens; empty: those of a row of the checkpoint's run
    problems: int | None = None  # of each task, length and depth; null: 32
    depths: list[float] = field(default_factory=list)  # where needles stand; empty: 0, 0.25, 0.5, 0.75, 1
    questions: str | None = None  # JSON Lines of context, question and answer, for the task question_answering
    seed: int | None = None  # of the problems; null: 0
    documents: int | None = None  # so many long documents are read too: loss by position; null: none
    context: int | None = None  # and each of their tokens from so many tokens before it alone
    text: str | None = None  # files of text: the documents; null: those that the run held out
    rows_at_once: int = 1  # rows of the longest problems that a rank computes at once; more of shorter ones
    path: str | None = None  # a folder for the results; null: runs/evaluation/<time>
    dtype: str = "float32"  # or bfloat16
    device: str = "auto"  # or cpu, cuda
    parallel: ParallelSettings = field(default_factory=ParallelSettings)
    wandb: WandbSettings = field(default_factory=lambda: WandbSettings(mode="disabled"))

    @property
    def suite(self) -> SuiteSettings:
        """What of them is about tasks. Raises ValueError as `SuiteSettings` does."""
        given = {"tasks": self.tasks, "problems": self.problems, "depths": self.depths, "questions": self.questions}
        return SuiteSettings(**given, lengths=self.lengths if self.tasks else (), seed=self.seed)

    def check(self, world_size: int) -> None:
        """Raises ValueError for what can be known without the checkpoints."""
        suite = self.suite
        if bool(self.checkpoint) == bool(self.checkpoints):
            raise ValueError(
                f"checkpoint or checkpoints must say what to evaluate; got {'both' if self.checkpoint else 'neither'}. "
                "Name a run or a checkpoint: checkpoint=runs/NAME/TIME"
            )
        for number, length in enumerate(self.lengths):
            at_least(f"lengths[{number}]", length, 2)
        at_least("documents", self.documents, 1)
        at_least("context", self.context, 1)
        at_least("rows_at_once", self.rows_at_once, 1)
        one_of("dtype", self.dtype, ("float32", "bfloat16"))
        if not self.tasks and self.documents is None:
            raise ValueError("tasks or documents must say what to score; got neither. Give tasks=[needle]")
        if self.seed is not None and not (self.tasks and 0 <= self.seed < 2**64):
            raise ValueError(f"seed must lie within 0..2^64-1, with tasks; got {self.seed}")
        if self.context is not None and self.documents is None:
            raise ValueError(f"context must come with documents, which it is about; got {self.context}. Give documents")
        if self.text is not None and self.documents is None and not suite.reads_documents:
            raise ValueError(
                f"text must come with documents, or with a task of haystack=documents; got {self.text}. Remove it"
            )
        if self.parallel.experts > 1:
            raise ValueError(
                f"parallel.experts must be 1, since every rank has the whole model; got {self.parallel.experts}. "
                "Leave it out"
            )
        self.parallel.check(world_size, 2 * self.parallel.sequence * spans_of(self.parallel))  # rows are padded


configuration.register("evaluate_settings", EvaluateSettings)


@dataclass(frozen=True)
class Plan:
    """What is scored of a checkpoint, with all that can be wrong found."""

    subject: Subject
    lengths: list[int]
    suite: Suite | None
    texts: Texts | None

    @classmethod
    def of(cls, settings: EvaluateSettings, path: str, mesh: Mesh) -> Plan:
        """Raises ValueError, on every rank alike, for what cannot be scored."""
        subject = together(mesh, lambda: Subject.at(home(path, "checkpoint"), "checkpoint"))
        chosen, texts, lengths = settings.suite, None, list(settings.lengths) or [subject.length]
        if settings.documents is not None or chosen.reads_documents:
            texts = subject.texts(None if settings.text is None else home(settings.text, "text"), mesh)
        if texts is not None and settings.documents is not None:
            for length in lengths:
                LongDocuments(texts, length, length, "lengths")

        def suite() -> Suite | None:
            if not chosen.tasks:
                return None
            text, tokenizer = None, subject.tokenizer
            if chosen.reads_documents and texts is not None and tokenizer is not None:
                text = as_haystack(texts, tokenizer, 2 * max(lengths))
            return open_suite(chosen, lengths[0], subject.vocabulary, tokenizer, text)

        return cls(subject, lengths, together(mesh, suite), texts)


def evaluate(settings: EvaluateSettings) -> Path:
    """Scores every checkpoint and writes the results; every rank calls it. Returns their folder.

    Raises ValueError for what cannot be, before a model is made.
    """
    settings.check(int(os.environ.get("WORLD_SIZE", "1")))
    parallel = settings.parallel
    device = processes.start(parallel.timeout_minutes, settings.device)
    mesh = Mesh.create(parallel.sequence, ulysses_ranks(parallel), 1, parallel.timeout_minutes)
    show_log(first=mesh.rank == 0)
    plans = [Plan.of(settings, path, mesh) for path in settings.checkpoints or [str(settings.checkpoint)]]
    results = Results(settings, mesh)
    for plan in plans:
        results.add(plan, score(plan, settings, mesh, device, results.say))
    results.close()
    return results.folder


def score(plan: Plan, settings: EvaluateSettings, mesh: Mesh, device: torch.device, say: Any) -> dict[str, Any]:
    """The record of a checkpoint; every rank calls it."""
    subject, parallel = plan.subject, settings.parallel
    say(f"checkpoint    {subject.path}")
    if (declared := subject.declared) is not None and (beyond := [n for n in plan.lengths if n > declared]):
        some = ", ".join(map(str, beyond))
        say(f"lengths       {some}: beyond the {declared} tokens that its configuration declares")

    def load() -> torch.nn.Module:
        with device:
            model = build(subject.model)
        subject.read(model)
        cast_parameters(model, getattr(torch, settings.dtype))
        return model

    model, ranks, spans = Whole(together(mesh, load), mesh, device), mesh.sequence_ranks, spans_of(parallel)
    record: dict[str, Any] = {"step": subject.step, "checkpoint": str(subject.path)}
    strategy = strategy_of(parallel)
    if plan.suite is not None:
        lines = plan.suite.score(model, ranks, spans, strategy, rows_at_once=settings.rows_at_once)
        say("\n".join(table(lines)))
        record |= metrics(lines)
    if plan.texts is not None and settings.documents is not None:
        reading = Reading(settings.documents, settings.context, ranks, spans, strategy)
        found = score_documents(model, plan.texts, plan.lengths, reading, say)
        for line in found["documents"]:
            say("  ".join(f"{name} {value}" for name, value in line.items()))
        record |= found
    return record


class Results:
    """What the first rank prints and keeps: metrics.jsonl with a line for each checkpoint, maps, and W&B's tables."""

    def __init__(self, settings: EvaluateSettings, mesh: Mesh) -> None:
        self._first, self._scored = mesh.rank == 0, list[tuple[str, list[dict[str, Any]]]]()
        chosen = settings.path and home(settings.path, "path")
        self.folder = Path(from_first_rank(chosen or f"runs/evaluation/{time.strftime('%Y-%m-%d_%H-%M-%S')}", mesh))
        self._tracker: Tracker | None = None
        together(mesh, self._make)
        if self._first:
            config = asdict(settings)
            (self.folder / "settings.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            self._tracker = Tracker(settings.wandb, self.folder, config, self.say)

    def _make(self) -> None:
        try:
            if self._first:
                self.folder.mkdir(parents=True, exist_ok=True)
                (self.folder / "metrics.jsonl").write_text("")
        except OSError as error:
            raise ValueError(f"path must be a folder that can be written; got {error}. Name another") from None

    def say(self, text: str) -> None:
        if self._first:
            print(text, flush=True)

    def add(self, plan: Plan, record: dict[str, Any]) -> None:
        """Keeps the record of a checkpoint."""
        if not self._first:
            return
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if self._tracker is not None:
            # W&B takes no step twice, and none before another.
            shown = {name: value for name, value in record.items() if name != "step"}
            self._tracker.log({"step": len(self._scored), "checkpoint_step": record["step"], **shown})
        folder = self.folder / "plots"
        if len(self._scored):
            folder = folder / f"{len(self._scored) + 1}-{plan.subject.path.name}"  # two may have one name
        folder.mkdir(parents=True, exist_ok=True)
        if "tasks" in record:
            draw_task_maps(record["tasks"], folder)
        if "positions" in record:
            draw_positions(record["positions"], folder / "positions.png")
        self._scored.append((plan.subject.name, record.get("tasks", [])))

    def close(self) -> None:
        """Draws what compares checkpoints, and ends W&B's run."""
        if self._first and len(self._scored) > 1 and self._scored[0][1]:
            draw_checkpoint_map(self._scored, self.folder / "plots" / "checkpoints.png")
        if self._tracker is not None:
            self._tracker.close()
        self.say(f"results       {self.folder}")


def main() -> None:
    configuration.quiet_libraries()
    configuration.join_launcher()

    @hydra.main(version_base="1.3", config_path=configuration.CONFIGURATIONS, config_name="evaluate")
    def compose(config: DictConfig) -> None:
        try:
            evaluate(configuration.to_schema(config, EvaluateSettings))
            processes.end()
        except BaseException as error:
            failure.report(error, started=False)
            processes.leave(1)

    configuration.run_main(compose, "evaluate", configuration.texts_of(EvaluateSettings))
    processes.leave(0)


if __name__ == "__main__":
    main()
