"""Tracking: Weights & Biases as a mirror of metrics.jsonl; it may fail without hurting the run."""

from __future__ import annotations

import html
import netrc
import os
import urllib.parse
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .settings import WandbSettings


class Tracker:
    """One W&B run of the first rank. Whatever goes wrong in W&B is said once, and the training goes on without it.

    mode: what was chosen in the end. directory: where an offline run is kept, to be sent with `wandb sync`.
    """

    def __init__(
        self, settings: WandbSettings, run_dir: Path, config: dict[str, Any], say: Callable[[str], None]
    ) -> None:
        self.mode = choose_mode(settings.mode)
        self.directory: Path | None = None
        self._say = say
        self._run: Any = None
        if self.mode == "disabled":
            return
        self._guard(lambda: self._start(settings, run_dir, config))
        if self._run is None and self.mode == "online":
            self._say("W&B: going on offline")
            self.mode = "offline"
            self._guard(lambda: self._start(settings, run_dir, config))

    def _start(self, settings: WandbSettings, run_dir: Path, config: dict[str, Any]) -> None:
        import wandb

        # An offline resume makes a new directory of the same id: `wandb sync` joins them, since each step is named.
        identity = run_dir / "wandb" / "run-id.txt"
        identity.parent.mkdir(parents=True, exist_ok=True)
        run_id = identity.read_text().strip() if identity.exists() else uuid.uuid4().hex[:8]
        identity.write_text(run_id + "\n")
        self._run = wandb.init(
            project=settings.project,
            entity=settings.entity,
            name=settings.name or run_dir.name,
            id=run_id,
            resume="allow" if self.mode == "online" else None,
            dir=str(run_dir),
            config=config,
            mode=self.mode,  # type: ignore[arg-type]
            settings=wandb.Settings(silent=True, console="off", init_timeout=60),
        )
        self.directory = Path(self._run.dir).parent

    def log(self, record: dict[str, Any]) -> None:
        """Mirrors a line of metrics at its own step."""
        if self._run is not None:
            values = {key: value for key, value in record.items() if key != "step" and value is not None}
            self._guard(lambda: self._run.log(values, step=record["step"]))

    def sample(self, step: int, text: str) -> None:
        if self._run is not None:
            import wandb

            page = wandb.Html(f"<pre style='white-space: pre-wrap'>{html.escape(text)}</pre>")
            self._guard(lambda: self._run.log({"sample": page}, step=step))

    def close(self, *, failed: bool = False) -> None:
        """Ends the W&B run, as failed if so."""
        if self._run is not None:
            self._guard(lambda: self._run.finish(exit_code=int(failed)))
            self._run = None

    def _guard(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:  # its own, those of requests, OSError: none may end a run
            self._say(
                f"W&B: {type(error).__name__}: {error}. metrics.jsonl has everything; training goes on without it"
            )
            self._run = None


def choose_mode(mode: str) -> str:
    """`auto` becomes WANDB_MODE if set, online when a key is found, offline otherwise, so that W&B never asks."""
    if mode != "auto":
        return mode
    if (asked := os.environ.get("WANDB_MODE", "")) in ("online", "offline", "disabled"):
        return asked
    return "online" if logged_in() else "offline"


def logged_in() -> bool:
    """Whether W&B would find a key without asking for it."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urllib.parse.urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
