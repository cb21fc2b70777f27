"""python -m longreach.launch.audit run=DIR — proves that a run has read each token once an epoch, and left none out."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf

from ..trainer.data.audit.proof import prove
from ..trainer.settings import home
from . import configuration


@dataclass
class AuditSettings:
    """`run` is the folder of a run with data.audit=true."""

    run: str | None = None  # the folder of a run with data.audit=true


configuration.register("audit_settings", AuditSettings)


@hydra.main(version_base="1.3", config_path=configuration.CONFIGURATIONS, config_name="audit")
def compose(config: DictConfig) -> None:
    settings = OmegaConf.to_object(config)
    assert isinstance(settings, AuditSettings)
    try:
        if not settings.run:
            raise ValueError("run must be given; got none. Name a run's folder: run=runs/NAME/TIME")
        proof = prove(Path(home(settings.run, "run")))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    print("\n".join(proof.table()))
    if not proof.holds:
        sys.exit(1)


def main() -> None:
    configuration.run_once()
    configuration.quiet_libraries()
    configuration.run_main(compose, "audit", configuration.texts_of(AuditSettings))


if __name__ == "__main__":
    main()
