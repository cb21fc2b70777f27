"""python -m longreach.launch.harness --model longreach --model_args checkpoint=PATH --tasks … — benchmarks.

This is the command of lm-evaluation-harness, which takes its settings, with the model added.
"""

from __future__ import annotations

from lm_eval.__main__ import cli_evaluate  # type: ignore[import-not-found]

from . import LongReachLM as LongReachLM

if __name__ == "__main__":
    cli_evaluate()
