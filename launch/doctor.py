"""python -m longreach.launch.doctor OVERRIDES — whether training with these overrides computes what one device does."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace

import hydra
from omegaconf import DictConfig
from rich.console import Console

from ..trainer.diagnosis.diagnose import checked, diagnose
from ..trainer.run import failure
from ..trainer.settings import Settings
from ..trainer.stages.opening import check_models
from ..trainer.stages.plan import Stage, plan_of
from . import configuration
from .build import build
from .train import to_settings


@dataclass
class DoctorSettings:
    """The doctor's own settings; all others are those of training."""

    whole: bool = False  # keep the model as large as it is
    verbose: bool = False  # a table with every check's numbers, and the time that each part takes


@dataclass
class Configuration(Settings):
    """The settings of training, and `doctor`."""

    doctor: DoctorSettings = field(default_factory=DoctorSettings)


configuration.register("doctor_settings", Configuration)


PREPARE = "longreach.launch.configuration.working_directory:use"  # so that ranks can import what the model is built of


def examine(settings: Settings, chosen: DoctorSettings) -> bool:
    """Prints the report, one for each stage that differs from those before it; whether all that was tested passed.

    Raises ValueError, with the stage in front, for what any of them cannot be, before the first is examined.
    """
    console = Console(width=None if sys.stdout.isatty() else 160)
    plan = plan_of(settings)
    for stage in plan.stages:
        with stage.checked():
            checked(stage.settings)
    check_models(build, plan)
    passed, examined = True, list[tuple[Stage, Settings]]()
    for stage in plan.stages:
        own = _looked_at(stage.settings)
        same = next((other for other, seen in examined if seen == own), None)
        if plan.staged:
            told = f": as {same.setting}, but for rows, steps and learning rate" if same is not None else ""
            console.print(f"{stage.setting}{told}", markup=False)
        if same is None:
            examined.append((stage, own))
            passed &= _passes(replace(stage.settings, stages=[]), chosen, console)
    return passed


def _looked_at(settings: Settings) -> Settings:
    """The settings without those that change nothing in what is examined, which has rows and steps of its own."""
    usual = Settings()
    optimizer = replace(settings.optimizer, learning_rate=usual.optimizer.learning_rate)
    kept = {"schedule": usual.schedule, "evaluation": usual.evaluation, "checkpoint": usual.checkpoint}
    return replace(settings, data=usual.data, optimizer=optimizer, stages=[], **kept)


def _passes(settings: Settings, chosen: DoctorSettings, console: Console) -> bool:
    if chosen.verbose:
        report = diagnose(settings, build, whole=chosen.whole, say=console.print, prepare=PREPARE)
    else:
        with console.status("one process") as status:  # on a terminal, and gone when the report comes
            report = diagnose(settings, build, whole=chosen.whole, say=status.update, prepare=PREPARE)
    report.show(console, verbose=chosen.verbose)
    return not report.failed


def main() -> None:
    configuration.run_once()
    configuration.quiet_libraries()

    @hydra.main(version_base="1.3", config_path=configuration.CONFIGURATIONS, config_name="doctor")
    def compose(config: DictConfig) -> None:
        chosen = DoctorSettings(bool(config.doctor.whole), bool(config.doctor.verbose))
        try:
            passed = examine(to_settings(config, configuration.overrides(), configuration.choices()), chosen)
        except Exception as error:
            print(failure.message(error, started=False), file=sys.stderr)
            sys.exit(1)
        except KeyboardInterrupt:
            sys.exit(130)
        sys.exit(0 if passed else 1)

    configuration.run_main(compose, "doctor", configuration.texts_of(Configuration))


if __name__ == "__main__":
    main()
