"""python -m longreach.launch.train model=… data=… — pretraining, alone or under torchrun, DeepSpeed, Slurm."""

from __future__ import annotations

import os
import re
import sys

import hydra
from omegaconf import DictConfig, OmegaConf

from ..kernels.dispatch import choose as choose_kernels
from ..models.moved import with_current_paths
from ..parallel.mesh import Mesh
from ..trainer.checkpoint.choice import own_checkpoint, read_config
from ..trainer.preparation import changed
from ..trainer.ranks import processes
from ..trainer.ranks.exchange import gather_numbers, together
from ..trainer.ranks.settings import ulysses_ranks
from ..trainer.run import failure
from ..trainer.run.report import launch_command
from ..trainer.settings import Settings, expand_paths
from ..trainer.stages.plan import plan_of
from ..trainer.trainer import Trainer
from . import configuration
from .build import build, build_callbacks

TEXTS = configuration.texts_of(Settings)

configuration.register("settings", Settings)
configuration.register_sizes()


def to_settings(config: DictConfig, overrides: list[str], choices: dict[str, str]) -> Settings:
    """The schema's objects, with the defaults that depend on which settings the command line sets.

    `init_from` brings the model and the tokenizer where none is given; beside a checkpoint of LongReach the model may
    be another with the same parameters. `+model.NAME=VALUE` alone changes a setting of the model that `init_from`
    brings. Raises ValueError for a model given beside one of Hugging Face.
    """
    if OmegaConf.is_missing(config.model, "vocabulary"):
        config.model.vocabulary = None  # the tokenizer's
    settings = configuration.to_schema(config, Settings)
    settings.model = with_current_paths(settings.model)
    expand_paths(settings)
    if settings.run.name is None:
        settings.run.name = (choices.get("experiment") or choices.get("model") or "run").replace("/", "-")
    if settings.init_from is not None:
        _start_from(settings, settings.init_from, overrides)
    if settings.stages and any(item.lstrip("+").startswith("trainer.steps=") for item in overrides):
        raise ValueError(
            "trainer.steps must be left out with stages, whose steps add up to it; got both. Say how long each stage is"
        )
    return settings


def _start_from(settings: Settings, origin: str, overrides: list[str]) -> None:
    models = [item for item in overrides if re.match(r"[+~]*([\w/]+@)?model[=.]", item)]
    others = [item for item in models if not re.match(r"\++model\.", item)]
    changes = {} if others else configuration.values_of(models, "model")
    own = own_checkpoint(origin)
    if own is not None:
        settings.init_from = str(own)
        if not others:
            settings.model = changed(read_config(own)["model"], changes)
    elif others:
        raise ValueError(
            f"model must not be given with init_from of Hugging Face, which brings its own; got {', '.join(others)}. "
            "Remove one, or change single settings of its model: +model.NAME=VALUE"
        )
    elif changes:
        settings.model = changes
    with_text = settings.data.source != "recall"
    if with_text and not any(item.lstrip("+").startswith("data.tokenizer=") for item in overrides):
        if own is not None and not (own / "tokenizer").is_dir():
            raise ValueError(
                "data.tokenizer must be given with init_from of a checkpoint without the folder tokenizer, as those of "
                f"data=recall are; got {own}. Name one that the model has rows for"
            )
        settings.data.tokenizer = origin if own is None else str(own / "tokenizer")


def train(settings: Settings, command: list[str]) -> int:
    """Joins the ranks and runs the trainer on this one; `command` is what started it. Returns the exit status."""
    failure.catch_termination()
    plan = plan_of(settings)
    plan.check(int(os.environ.get("WORLD_SIZE", "1")))
    callbacks = build_callbacks(settings.callbacks)
    parallel = plan.stages[0].settings.parallel
    device = processes.start(parallel.timeout_minutes, deterministic=settings.trainer.deterministic)
    mesh = Mesh.create(parallel.sequence, ulysses_ranks(parallel), parallel.experts, parallel.timeout_minutes)
    together(mesh, lambda: choose_kernels(vars(settings.kernels), device))
    trainer = Trainer(settings, build, mesh, device, command, callbacks)
    trainer.run()
    if trainer.interrupted:
        gather_numbers([0.0], mesh)  # launchers end all ranks at the first status that is not 0: W&B is closed by now
    processes.end()
    return failure.AGAIN if trainer.interrupted else 0


def main() -> None:
    configuration.quiet_libraries()
    configuration.join_launcher()
    command = launch_command("longreach.launch.train", configuration.without_launcher_arguments(sys.argv[1:]))

    @hydra.main(version_base="1.3", config_path=configuration.CONFIGURATIONS, config_name="train")
    def compose(config: DictConfig) -> None:
        try:
            status = train(to_settings(config, configuration.overrides(), configuration.choices()), command)
        except BaseException as error:
            failure.report(error, started=False)
            processes.leave(1)
        if status:
            processes.leave(status)

    configuration.run_main(compose, "train", TEXTS)
    processes.leave(0)


if __name__ == "__main__":
    main()
