"""Settings: the schema of the whole configuration, and the checks that need no data and no model."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..parallel.layout import Layout
from ..parallel.mesh import check_sequence_ranks, check_ulysses_ranks
from ..parallel.strategy import Strategy
from .data.settings import DataSettings
from .engine import EngineSettings, OptimizerSettings
from .schedule import Schedule, ScheduleSettings

DTYPES = ("float32", "bfloat16")
LAYOUTS = {"contiguous": 1, "zigzag": 2}  # spans a rank by default
CHECKPOINTING = ("none", "full", "mixing")
WANDB_MODES = ("auto", "online", "offline", "disabled")
PATHS = ("run.dir", "init_from", "data.path", "data.cache_dir", "data.tokenizer", "checkpoint.resume")


@dataclass
class TrainerSettings:
    """How long, with which numbers, from which seed."""

    steps: int = 1000  # of the optimizer
    seed: int = 0  # of initial values, order of the data and sample
    dtype: str = "float32"  # or bfloat16, with float32 master weights
    clip: float = 1.0  # largest norm of the gradient; 0 = do not clip
    max_skipped_steps: int = 10  # steps in a row whose gradient is not finite and steps nothing; then the run ends
    activation_checkpointing: str = "none"  # full recomputes a block; mixing keeps what the mixing ops computed
    compile: bool = False  # torch.compile what is local to a token
    deterministic: bool = False  # the same bits at every run on CUDA too, at a price: libraries' attention takes longer
    profile_start: int = 0  # first step that torch.profiler records into run.dir/profile; 0 = none
    profile_steps: int = 3  # how many


@dataclass
class ParallelSettings:
    """How the ranks share the rows: `sequence` ranks hold one row together; the rest is data parallel."""

    sequence: int = 1  # ranks that share a row; the others are data parallel
    layout: str = "contiguous"  # or zigzag
    spans: int | None = None  # pieces of a row that a rank holds; null: 1 for contiguous, 2 for zigzag
    attention: str = "ring"  # how softmax attention is shared: ring, gather or ulysses
    recurrent: str = "state_passing"  # how recurrent layers are shared; or ulysses
    ulysses: int | None = None  # ranks that exchange tokens for heads, the rest of `sequence` a ring; null: all of them
    mixers: dict[str, str] = field(default_factory=dict)  # other strategies for layers, by their name in the pattern
    timeout_minutes: float = 10.0  # a rank that has been silent for so long in a collective ends the run


@dataclass
class EvaluationSettings:
    """Validation on held-out documents, and a sample of text."""

    every: int = 100  # steps; 0 = never
    rows: int | None = 16  # held-out rows; null = all of them
    context: int | None = None  # at the end, also score held-out tokens from their last so many tokens alone
    context_rows: int = 8  # held-out rows that this is done on; costs `context` times as much as with whole rows
    baselines: bool = False  # at the end, also count unigrams and bigrams of the training text; recall: chance
    prompt: str = ""  # the sample begins with it; empty: with the start of a document
    sample_tokens: int = 128  # length of the sample; 0 = none, as with data=recall, which has no text
    temperature: float = 0.8  # of the sample; 0 = the likeliest token


@dataclass
class CheckpointSettings:
    """Checkpoints: when, how many, and which one to start from."""

    every: int = 500  # steps, and at the end; 0 = never
    keep: int = 2  # the newest so many; of schedule=wsd also the newest from before its decay, to go on from
    resume: str = "auto"  # auto: the newest good one of run.dir; none; or the path of one, for the run's first start


@dataclass
class WandbSettings:
    """Weights & Biases: `auto` is online when logged in, offline otherwise."""

    mode: str = "auto"  # or online, offline, disabled
    project: str | None = None  # where W&B files the run; null: WANDB_PROJECT, or longreach
    entity: str | None = None  # W&B team; null: WANDB_ENTITY, or your own
    name: str | None = None  # null: WANDB_NAME, or the name of run.dir


@dataclass
class LoggerSettings:
    """What the run tells while it goes; run.dir/metrics.jsonl is always written."""

    print_every: int = 10  # steps between lines where the output is not a terminal
    wandb: WandbSettings = field(default_factory=WandbSettings)


@dataclass
class RunSettings:
    """Where the run lives: null = runs/<name>/<time>, chosen by the first rank."""

    dir: str | None = None  # the run's folder; null: runs/<name>/<time>
    name: str | None = None  # null: the experiment, or the model


@dataclass
class Settings:
    """Everything; `model` is the configuration of a class (`_target_` and its arguments)."""

    model: dict[str, Any] = field(default_factory=dict)
    data: DataSettings = field(default_factory=DataSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    trainer: TrainerSettings = field(default_factory=TrainerSettings)
    parallel: ParallelSettings = field(default_factory=ParallelSettings)
    engine: EngineSettings = field(default_factory=EngineSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    logger: LoggerSettings = field(default_factory=LoggerSettings)
    run: RunSettings = field(default_factory=RunSettings)
    init_from: str | None = None  # a Hugging Face model, a checkpoint or a run, whose weights and tokenizer are taken


def home(path: str, setting: str) -> str:
    """The path with its `~` or `~user` replaced. Raises ValueError for a user that there is not."""
    whole = os.path.expanduser(path)
    if whole.startswith("~"):
        user = whole.partition("/")[0]
        raise ValueError(f"{setting} must begin with the home of a user that exists; got {path}. Check {user}")
    return whole


def expand_paths(settings: Settings) -> None:
    """Replaces `~` in every path of the settings."""
    for setting in PATHS:
        *groups, name = setting.split(".")
        holder: Any = settings
        for group in groups:
            holder = getattr(holder, group)
        if (path := getattr(holder, name)) is not None:
            setattr(holder, name, home(path, setting))


def spans_of(parallel: ParallelSettings) -> int:
    """Spans that a rank holds of each row."""
    return LAYOUTS[parallel.layout] if parallel.spans is None else parallel.spans


def strategy_of(parallel: ParallelSettings) -> Strategy:
    """By which exchange each kind of layer runs on shared rows. Raises ValueError for one that there is not."""
    return Strategy(parallel.attention, parallel.recurrent, tuple(sorted(parallel.mixers.items())))


def ulysses_ranks(parallel: ParallelSettings) -> int:
    """Ranks that exchange tokens for heads: 1 where no strategy asks for it."""
    if not _by_heads(parallel):
        return 1
    return parallel.sequence if parallel.ulysses is None else parallel.ulysses


def _by_heads(parallel: ParallelSettings) -> bool:
    return "ulysses" in (parallel.attention, parallel.recurrent, *parallel.mixers.values())


def layout_of(settings: Settings) -> Layout:
    """The layout of the training rows."""
    return Layout(settings.data.sequence_length, settings.parallel.sequence, spans_of(settings.parallel))


def micro_batches(settings: Settings, data_ranks: int) -> int:
    """Micro-batches that each data-parallel rank computes in a step."""
    return settings.data.rows_per_step // (data_ranks * settings.data.rows_per_micro_batch)


def check(settings: Settings, world_size: int) -> None:
    """Raises ValueError, naming setting and remedy, for what can be known without data, model or device."""
    _check_trainer(settings.trainer)
    _check_parallel(settings, world_size)
    _check_rows(settings, world_size // settings.parallel.sequence)
    _check_engine(settings)
    _check_optimizer(settings.optimizer)
    if settings.init_from is not None and not Path(settings.init_from).expanduser().is_dir():
        raise ValueError(
            f"init_from must be a folder with a Hugging Face model, a checkpoint or a run; got {settings.init_from}. "
            "Check the path, or download a model of the hub first: hf download NAME --local-dir PATH"
        )
    Schedule(settings.schedule, settings.optimizer.learning_rate, settings.trainer.steps)
    _at_least("evaluation.every", settings.evaluation.every, 0)
    _at_least("evaluation.rows", settings.evaluation.rows, 1)
    _at_least("evaluation.context", settings.evaluation.context, 1)
    _at_least("evaluation.context_rows", settings.evaluation.context_rows, 1)
    _at_least("evaluation.sample_tokens", settings.evaluation.sample_tokens, 0)
    if settings.data.source == "recall" and settings.evaluation.prompt:
        prompt = settings.evaluation.prompt
        raise ValueError(f"evaluation.prompt must be left out with data=recall, which has no text; got {prompt!r}")
    _at_least("evaluation.temperature", settings.evaluation.temperature, 0)
    _at_least("checkpoint.every", settings.checkpoint.every, 0)
    _at_least("checkpoint.keep", settings.checkpoint.keep, 1)
    _at_least("logger.print_every", settings.logger.print_every, 1)
    _one_of("logger.wandb.mode", settings.logger.wandb.mode, WANDB_MODES)


def _check_trainer(trainer: TrainerSettings) -> None:
    _at_least("trainer.steps", trainer.steps, 1)
    _at_least("trainer.seed", trainer.seed, 0)
    _one_of("trainer.dtype", trainer.dtype, DTYPES)
    _at_least("trainer.clip", trainer.clip, 0)
    _at_least("trainer.max_skipped_steps", trainer.max_skipped_steps, 1)
    _one_of("trainer.activation_checkpointing", trainer.activation_checkpointing, CHECKPOINTING)
    _at_least("trainer.profile_start", trainer.profile_start, 0)
    _at_least("trainer.profile_steps", trainer.profile_steps, 1)


def _check_parallel(settings: Settings, world_size: int) -> None:
    parallel = settings.parallel
    _one_of("parallel.layout", parallel.layout, tuple(LAYOUTS))
    strategy_of(parallel)
    if parallel.ulysses is not None and not _by_heads(parallel):
        raise ValueError(
            f"parallel.ulysses must be null unless a strategy is ulysses; got {parallel.ulysses}. "
            "Set parallel.attention or parallel.recurrent to ulysses"
        )
    _at_least("parallel.spans", parallel.spans, 1)
    if parallel.timeout_minutes <= 0:
        raise ValueError(f"parallel.timeout_minutes must be positive; got {parallel.timeout_minutes}")
    if parallel.layout == "contiguous" and parallel.spans not in (None, 1):
        raise ValueError(
            f"parallel.spans must be 1 with parallel.layout=contiguous; got {parallel.spans}. "
            "Use parallel.layout=zigzag for more"
        )
    if parallel.layout == "zigzag" and parallel.spans == 1:
        raise ValueError("parallel.spans must be at least 2 with parallel.layout=zigzag; got 1. Use contiguous for 1")
    check_sequence_ranks(parallel.sequence, world_size)
    check_ulysses_ranks(ulysses_ranks(parallel), parallel.sequence)
    _at_least("data.sequence_length", settings.data.sequence_length, 2)
    length, cuts = settings.data.sequence_length, parallel.sequence * spans_of(parallel)
    if length % cuts:
        raise ValueError(
            f"data.sequence_length must be a multiple of {cuts} (parallel.sequence={parallel.sequence} ranks times "
            f"{spans_of(parallel)} spans of parallel.layout={parallel.layout}); got {length}. "
            f"Use {length // cuts * cuts or cuts} or {(length // cuts + 1) * cuts}"
        )


def _check_rows(settings: Settings, data_ranks: int) -> None:
    data = settings.data
    _at_least("data.rows_per_step", data.rows_per_step, 1)
    _at_least("data.rows_per_micro_batch", data.rows_per_micro_batch, 1)
    at_once = data_ranks * data.rows_per_micro_batch
    if data.rows_per_step % at_once:
        raise ValueError(
            f"data.rows_per_step must be a multiple of {at_once} ({data_ranks} data-parallel rank(s) times "
            f"data.rows_per_micro_batch={data.rows_per_micro_batch}); got {data.rows_per_step}. "
            f"Use {(data.rows_per_step // at_once + 1) * at_once}, or let more ranks share a row (parallel.sequence)"
        )


def _check_engine(settings: Settings) -> None:
    stage = settings.engine.zero_stage
    _one_of("engine.zero_stage", stage, (0, 1, 2, 3))
    if stage == 0 and settings.trainer.dtype == "bfloat16":
        raise ValueError(
            "engine.zero_stage must be 1, 2 or 3 with trainer.dtype=bfloat16; got 0, which would keep no float32 "
            "master weights. Use engine.zero_stage=1"
        )


def _check_optimizer(optimizer: OptimizerSettings) -> None:
    if len(optimizer.betas) != 2 or not all(0 <= beta < 1 for beta in optimizer.betas):
        raise ValueError(f"optimizer.betas must be two numbers in [0, 1); got {list(optimizer.betas)}")
    if optimizer.eps <= 0:
        raise ValueError(f"optimizer.eps must be positive; got {optimizer.eps}")
    _at_least("optimizer.weight_decay", optimizer.weight_decay, 0)


def _one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}; got {value!r}")


def _at_least(name: str, value: float | None, minimum: int) -> None:
    if value is not None and not value >= minimum:
        raise ValueError(f"{name} must be at least {minimum}; got {value}")
