"""Tracking: Weights & Biases as a mirror of metrics.jsonl; it may fail without hurting the run."""

from __future__ import annotations

import html
import netrc
import os
import queue
import threading
import urllib.parse
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from .metrics import BEFORE_STAGE
from .settings import WandbSettings

FAILED_SECONDS = 20.0  # what a run that has failed gives W&B to write what is left
MODES = {"online": "online", "run": "online", "offline": "offline", "dryrun": "offline", "disabled": "disabled"}


class Tracker:
    """One W&B run of the first rank. An error in W&B is reported once, and the training goes on without it.

    history: lines of metrics and samples (`{"step": n, "sample": text}`) of the run until now, in the order of steps.
    mode: what was chosen in the end. directory: where an offline run is kept, to be sent with `wandb sync`.

    W&B takes no step twice: of a run that is resumed, it would drop the steps that are trained again, and what an
    offline run has written later would replace the rest. So a run that goes on writes its whole history once more under
    its id, without W&B's own resumption: whatever part is sent last holds one whole curve. (W&B's rewinding would do it
    on the server, which few have it switched on for.)
    """

    def __init__(
        self,
        settings: WandbSettings,
        run_dir: Path,
        config: dict[str, Any],
        say: Callable[[str], None],
        history: Iterable[dict[str, Any]] = (),
    ) -> None:
        self.mode = choose_mode(settings.mode)
        self.directory: Path | None = None
        self._say = say
        self._run: Any = None
        # A line takes W&B a millisecond, a long history minutes: no rank waits for that.
        self._actions: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()
        self._writer = threading.Thread(target=self._write, name="wandb", daemon=True)
        if self.mode == "disabled":
            return
        self._guard(lambda: self._start(settings, run_dir, config))
        if self._run is None and self.mode == "online":
            self._say("W&B: going on offline")
            self.mode = "offline"
            self._guard(lambda: self._start(settings, run_dir, config))
        if self._run is None:
            return
        self._writer.start()
        for record in history:
            self.sample(record["step"], record["sample"]) if "sample" in record else self.log(record)

    def _start(self, settings: WandbSettings, run_dir: Path, config: dict[str, Any]) -> None:
        import wandb

        identity = run_dir / "wandb" / "run-id.txt"
        identity.parent.mkdir(parents=True, exist_ok=True)
        kept = identity.read_text().strip() if identity.exists() else ""  # empty after a full disk, too
        run_id = os.environ.get("WANDB_RUN_ID") or kept or uuid.uuid4().hex[:8]
        identity.write_text(run_id + "\n")
        self._run = wandb.init(
            project=settings.project or os.environ.get("WANDB_PROJECT") or "longreach",
            entity=settings.entity or os.environ.get("WANDB_ENTITY"),
            name=settings.name or os.environ.get("WANDB_NAME") or run_dir.name,
            id=run_id,
            dir=str(run_dir),
            config=config,
            mode=self.mode,  # type: ignore[arg-type]
            settings=wandb.Settings(silent=True, console="off", init_timeout=60),
        )
        self.directory = Path(self._run.dir).parent

    def log(self, record: dict[str, Any]) -> None:
        """Mirrors a line of metrics at its own step; a list of lines in it is a table.

        Of two values of one name at a step W&B keeps the later one: where a stage begins, names begin with
        `before_stage/`.
        """
        if self._run is None:
            return
        prefix = f"{BEFORE_STAGE}/" if record.get(BEFORE_STAGE) else ""
        known = {key: value for key, value in record.items() if key not in ("step", BEFORE_STAGE)}
        values = {prefix + key: value for key, value in known.items() if value is not None}
        self._actions.put(lambda: self._run.log({key: _shown(x) for key, x in values.items()}, step=record["step"]))

    def sample(self, step: int, text: str) -> None:
        """Shows a sample at its step."""
        if self._run is None:
            return

        def show() -> None:
            import wandb

            page = wandb.Html(f"<pre style='white-space: pre-wrap'>{html.escape(text)}</pre>")
            self._run.log({"sample": page}, step=step)

        self._actions.put(show)

    def close(self, *, failed: bool = False) -> None:
        """Ends the W&B run, as failed if so, once all is written."""
        if self._writer.is_alive():
            if failed:
                self._say = lambda message: None  # the reason of the run's end is what is to be read
            self._actions.put(lambda: self._run.finish(exit_code=int(failed)))
            self._actions.put(None)
            self._writer.join(FAILED_SECONDS if failed else None)

    def _write(self) -> None:
        while (action := self._actions.get()) is not None:
            if self._run is not None:
                self._guard(action)

    def _guard(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:  # its own, those of requests, OSError: none may end a run
            self._say(
                f"W&B: {type(error).__name__}: {error}. metrics.jsonl has everything; training goes on without it"
            )
            self._run = None


def _shown(value: Any) -> Any:
    """A value as W&B shows it."""
    if not (isinstance(value, list) and value and all(isinstance(line, dict) for line in value)):
        return value
    import wandb

    columns = list(dict.fromkeys(name for line in value for name in line))
    return wandb.Table(columns=columns, data=[[line.get(name) for name in columns] for line in value])


def choose_mode(mode: str) -> str:
    """`auto` becomes WANDB_MODE if set, online when a key is found, offline otherwise, so that W&B never asks."""
    if mode != "auto":
        return mode
    if asked := MODES.get(os.environ.get("WANDB_MODE", "").lower()):
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
