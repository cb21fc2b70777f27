"""Settings: the schema of the whole configuration, composed of what each wing defines, and its checks."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..kernels.dispatch import LIBRARIES
from ..models.activations.recomputation import check_modes
from . import engine_config
from .checkpoint.settings import CheckpointSettings
from .data.settings import DataSettings
from .engine_config import EngineSettings
from .evaluation.settings import EvaluationSettings
from .optimizers.settings import OptimizerSettings
from .ranks.settings import ParallelSettings
from .requirements import at_least, one_of
from .run.settings import LoggerSettings, RunSettings
from .schedule import Schedule, ScheduleSettings

PATHS = ("run.dir", "init_from", "data.path", "data.cache_dir", "data.tokenizer", "checkpoint.resume")
SEEDS = 2**64


@dataclass
class TrainerSettings:
    """How long, with which numbers, from which seed."""

    steps: int = 1000  # of the optimizer
    seed: int = 0  # of initial values, order of the data and sample
    dtype: str = "float32"  # or bfloat16, with float32 master weights
    clip: float = 1.0  # largest norm of the gradient; 0 = do not clip
    max_skipped_steps: int = 10  # steps in a row whose loss or gradient is not finite, or a spike; then: max_rollbacks
    max_rollbacks: int = 2  # times that the run goes back to a checkpoint then, past the rows since; then it ends
    spike_deviations: float = 0.0  # skip a step whose loss is so many standard deviations above the mean; 0: none is
    spike_window: int | None = None  # steps of which mean and deviation are; null: 128
    activation_checkpointing: Any = "none"  # full: recompute blocks; mixing: but keep what ops computed; or by mixers
    tile_tokens: int | None = None  # tokens that feed-forward layers compute at once, and again in backward; null: all
    offload_activations: bool = False  # what recomputed blocks keep is on the host meanwhile, and comes back ahead
    compile: bool = False  # torch.compile the blocks, or where it cannot, what is local to a token
    deterministic: bool | None = None  # the same bits at every run; null: on a CPU. On CUDA attention takes longer then
    profile_start: int = 0  # first step that torch.profiler records into run.dir/profile; 0 = none
    profile_steps: int = 3  # how many

    def check(self) -> None:
        """Raises ValueError for what cannot be; `trainer.dtype` is checked with the engine's settings."""
        at_least("trainer.steps", self.steps, 1)
        if not 0 <= self.seed < SEEDS:
            raise ValueError(f"trainer.seed must lie within 0..2^64-1; got {self.seed}. Choose another")
        at_least("trainer.clip", self.clip, 0)
        at_least("trainer.max_skipped_steps", self.max_skipped_steps, 1)
        at_least("trainer.max_rollbacks", self.max_rollbacks, 0)
        at_least("trainer.spike_deviations", self.spike_deviations, 0)
        at_least("trainer.spike_window", self.spike_window, 2)
        if self.spike_window is not None and not self.spike_deviations:
            raise ValueError(
                f"trainer.spike_window must be left out without trainer.spike_deviations; got {self.spike_window}. "
                "Set both, as trainer.spike_deviations=6"
            )
        check_modes("trainer.activation_checkpointing", self.activation_checkpointing)
        at_least("trainer.tile_tokens", self.tile_tokens, 1)
        if self.tile_tokens is not None and self.compile:
            raise ValueError(
                f"trainer.tile_tokens must be null with trainer.compile, whose graphs hold no tiles; got "
                f"{self.tile_tokens}. Leave one of them out"
            )
        at_least("trainer.profile_start", self.profile_start, 0)
        at_least("trainer.profile_steps", self.profile_steps, 1)


@dataclass
class KernelSettings:
    """What runs each op: auto, which suits the device, triton, chunked (torch), reference, and for some library.

    `launch.train` says so to the process (`longreach.kernels.dispatch.choose`); a library is tried against the
    reference before it is used.
    """

    softmax_attention: str = "auto"  # auto, triton, chunked (torch), reference, or library: flash-attn, cuDNN, torch's
    block_sparse_attention: str = "auto"  # of NSA, MoBA, InfLLM-v2 and what an indexer or a gate selects
    select_blocks: str = "auto"  # the choice of those blocks
    index_divergence: str = "auto"  # the loss of indexers; no Triton
    gate_divergence: str = "auto"  # the loss of SeerAttention's gate; no Triton
    gated_linear_attention: str = "auto"  # library: flash-linear-attention, where no ranks share a row
    delta_rule: str = "auto"  # library: flash-linear-attention, where no ranks share a row
    diagonal_scan: str = "auto"  # of mixers whose state is a vector
    diagonal_ssm: str = "auto"  # of S4D and H3
    selective_scan: str = "auto"  # of Mamba
    wkv: str = "auto"  # of RWKV-4 and AFT-simple
    slstm: str = "auto"  # of xLSTM
    log_linear_attention: str = "auto"  # of log-linear Mamba-2
    slot_attention: str = "auto"  # of GSA and ABC
    mesa: str = "auto"  # of MesaNet; reference solves exactly
    short_conv: str = "auto"  # before mixers, and the previous token of RWKV
    grouped_matmul: str = "auto"  # of mixtures of experts; library: torch's own, in bfloat16 on a GPU
    rms_norm: str = "auto"  # auto, triton, chunked, or library: Liger-Kernel
    swiglu: str = "auto"  # auto, triton, chunked, or library: Liger-Kernel
    cross_entropy: str = "auto"  # auto, triton, chunked, or library: Liger-Kernel, for which the host waits

    def check(self) -> None:
        """Raises ValueError for what no op, or this one, does not have."""
        for op, backend in vars(self).items():
            known = ("auto", "triton", "chunked")
            if op not in ("rms_norm", "swiglu", "cross_entropy"):
                known += ("reference",)
            if op == "softmax_attention" or op in LIBRARIES:
                known += ("library",)
            one_of(f"kernels.{op}", backend, known)


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
    kernels: KernelSettings = field(default_factory=KernelSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    logger: LoggerSettings = field(default_factory=LoggerSettings)
    run: RunSettings = field(default_factory=RunSettings)
    callbacks: dict[str, Any] = field(default_factory=dict)  # hooks of your own: +callbacks.NAME._target_=module.Class
    stages: list[dict[str, Any]] = field(default_factory=list)  # one after another: steps of each, and what it changes
    init_from: str | None = None  # a Hugging Face model, a checkpoint or a run, whose weights and tokenizer are taken


def home(path: str, setting: str) -> str:
    """The path with its `~` or `~user` replaced. Raises ValueError for a user that does not exist."""
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
    for name, source in settings.data.mixture.items():
        if source.path is not None:
            source.path = home(source.path, f"data.mixture.{name}.path")


def check(settings: Settings, world_size: int, device: torch.device | None = None) -> None:
    """Raises ValueError, naming setting and remedy, for what can be known without data, model and perhaps device."""
    trainer, data, parallel, engine = settings.trainer, settings.data, settings.parallel, settings.engine
    trainer.check()
    if trainer.offload_activations and device is not None and device.type != "cuda":
        raise ValueError(
            f"trainer.offload_activations must be false on {device.type}, which has the host's memory; got true. Leave "
            "it out"
        )
    parallel.check(world_size, data.sequence_length)
    data.check_rows(world_size // parallel.sequence)
    engine_config.configuration(engine, trainer.dtype, trainer.clip, world_size)
    settings.kernels.check()
    if trainer.compile and parallel.experts > 1:
        raise ValueError(
            f"parallel.experts must be 1 with trainer.compile, whose graphs do not know how many tokens travel; got "
            f"{parallel.experts}. Leave one of them out"
        )
    settings.optimizer.check()
    if settings.init_from is not None and not Path(settings.init_from).expanduser().is_dir():
        raise ValueError(
            f"init_from must be a folder with a Hugging Face model, a checkpoint or a run; got {settings.init_from}. "
            "Check the path, or download a model of the hub first: hf download NAME --local-dir PATH"
        )
    Schedule(settings.schedule, settings.optimizer.learning_rate, trainer.steps)
    settings.evaluation.check(data.source)
    settings.checkpoint.check()
    settings.logger.check()
