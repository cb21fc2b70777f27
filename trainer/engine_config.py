"""The DeepSpeed configuration: what LongReach's settings say, merged with `engine.config`."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from typing import Any

from .requirements import one_of

OFFLOADS = ("none", "optimizer", "all")
DTYPES = ("float32", "bfloat16")

# What LongReach has a setting of its own for, or what would have no effect.
OWNED = {
    "optimizer": "optimizer.*",
    "scheduler": "schedule",
    "gradient_clipping": "trainer.clip",
    "bf16": "trainer.dtype",
    "fp16": "trainer.dtype",
    "amp": "trainer.dtype",
    "torch_autocast": "trainer.dtype",
    "data_types": "trainer.dtype",
    "train_batch_size": "data.rows_per_step",
    "train_micro_batch_size_per_gpu": "data.rows_per_micro_batch",
    "gradient_accumulation_steps": "data.rows_per_micro_batch",
    "sequence_parallel_size": "parallel.sequence",
    "activation_checkpointing": "trainer.activation_checkpointing",
    "compile": "trainer.compile",
    "checkpoint": "checkpoint.*",
    "wandb": "logger.wandb",
}
# Further settings that have an effect.
ALLOWED = (
    "zero_optimization",
    "communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
    "wall_clock_breakdown",
    "memory_breakdown",
    "steps_per_print",
    "flops_profiler",
    "comms_logger",
    "tensorboard",
    "csv_monitor",
    "aio",
    "timers",
)


@dataclass(frozen=True)
class EngineSettings:
    """DeepSpeed's ZeRO, and `config`: more DeepSpeed settings, merged with those that LongReach sets."""

    zero_stage: int = 1  # what is split over all ranks: 1 optimizer states, 2 gradients too, 3 parameters too
    config: dict[str, Any] = field(default_factory=dict)  # more DeepSpeed settings; conflicts are refused
    offload: str = "none"  # optimizer: states wait and are stepped on the host; all: parameters too, zero_stage=3
    hierarchical: int | None = None  # zero_stage=3: neighbouring ranks that gather for backward among themselves (hpZ)

    def check(self, world_size: int) -> None:
        """Raises ValueError for what does not go together, or not with so many ranks."""
        one_of("engine.zero_stage", self.zero_stage, (0, 1, 2, 3))
        one_of("engine.offload", self.offload, OFFLOADS)
        least = OFFLOADS.index(self.offload) if self.offload != "all" else 3
        if self.zero_stage < least:
            raise ValueError(
                f"engine.zero_stage must be {'3' if least == 3 else '1, 2 or 3'} with engine.offload={self.offload}; "
                f"got {self.zero_stage}. Use engine.zero_stage={least}"
            )
        ranks = self.hierarchical
        if ranks is None:
            return
        if self.zero_stage < 3:
            raise ValueError(
                f"engine.hierarchical must be null without engine.zero_stage=3, which splits parameters; got {ranks}. "
                "Leave it out"
            )
        if not 1 < ranks < world_size or world_size % ranks:
            raise ValueError(
                f"engine.hierarchical must divide the {world_size} ranks into groups of two or more; got {ranks}. Use "
                "the number of ranks of one machine, or leave it out"
            )

    @property
    def zero(self) -> dict[str, Any]:
        """What DeepSpeed calls `zero_optimization`."""
        # DeepSpeed's own linear layer rounds bfloat16 gradients otherwise than torch's, so that stages would differ.
        zero: dict[str, Any] = {"stage": self.zero_stage, "memory_efficient_linear": False}
        if self.offload != "none":
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
        if self.offload == "all":
            zero["offload_param"] = {"device": "cpu", "pin_memory": True}
        if self.hierarchical is not None:
            zero["zero_hpz_partition_size"] = self.hierarchical
        return zero


def configuration(settings: EngineSettings, dtype: str, clip: float, world_size: int) -> dict[str, Any]:
    """The dictionary that DeepSpeed gets.

    Raises ValueError for a stage or a dtype that does not exist, for settings that do not go together, for bfloat16
    without ZeRO, and, naming the key, where `engine.config` contradicts what LongReach sets, names what LongReach has a
    setting for, or names nothing that DeepSpeed would act on.
    """
    settings.check(world_size)
    zero_stage, extra = settings.zero_stage, dict(settings.config)
    one_of("trainer.dtype", dtype, DTYPES)
    if dtype == "bfloat16" and zero_stage == 0:
        raise ValueError(
            "engine.zero_stage must be 1, 2 or 3 with trainer.dtype=bfloat16; got 0, which would keep no float32 "
            "master weights. Use engine.zero_stage=1"
        )
    ours: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # The loop says when a step ends, by calling step.
        "managed_gradient_accumulation": False,
        # On stage 0 the engine clips, because it also needs the norm that DeepSpeed does not tell.
        "gradient_clipping": float(clip) if zero_stage else 0.0,
        # Offloaded states are stepped by torch's AdamW too: DeepSpeed's own would have to be compiled.
        "zero_force_ds_cpu_optimizer": False,
        # Whatever steps groups of parameters by rules of their own is unknown to DeepSpeed.
        "zero_allow_untested_optimizer": True,
        "zero_optimization": settings.zero,
    }
    if "timers" not in extra:
        # DeepSpeed's own meter, which nobody reads, would wait for the device twice a step.
        ours["timers"] = {"throughput": {"enabled": False}}
    if dtype == "bfloat16":
        ours["bf16"] = {"enabled": True, "check_grad_overflow": True}
        ours["data_types"] = {"grad_accum_dtype": "fp32"}
        ours["communication_data_type"] = "fp32"
    for key in extra:
        if key in OWNED:
            raise ValueError(f"engine.config.{key} must not be given; got {extra[key]!r}. Use {OWNED[key]}")
        if key not in ours and key not in ALLOWED:
            near = difflib.get_close_matches(key, ALLOWED, 1)
            hint = f"Did you mean {near[0]}?" if near else f"Known are {', '.join(ALLOWED)}"
            raise ValueError(f"engine.config must name settings of DeepSpeed that act here; got {key}. {hint}")
    _refuse_nvme(extra)
    return _merge(ours, extra, "engine.config")


def _merge(ours: dict[str, Any], extra: dict[str, Any], path: str) -> dict[str, Any]:
    merged = dict(ours)
    for key, value in extra.items():
        setting = f"{path}.{key}"
        if isinstance(merged.get(key), dict) and isinstance(value, dict):
            merged[key] = _merge(merged[key], value, setting)
        elif key in merged and merged[key] != value:
            remedy = "Use engine.zero_stage" if setting.endswith("zero_optimization.stage") else "Leave it out"
            raise ValueError(f"{setting} must be {merged[key]!r}, which LongReach sets; got {value!r}. {remedy}")
        else:
            merged[key] = value
    return merged


def _refuse_nvme(extra: dict[str, Any]) -> None:
    zero = extra.get("zero_optimization")
    if not isinstance(zero, dict):
        return
    for key in ("offload_optimizer", "offload_param"):
        part = zero.get(key)
        if isinstance(part, dict) and part.get("device") == "nvme":
            raise ValueError(
                f"engine.config.zero_optimization.{key}.device must be cpu or none; got nvme, whose states checkpoints "
                "cannot reach"
            )
