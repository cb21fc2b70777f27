"""Report: what a run shows in the terminal before its first step and after its last."""

from __future__ import annotations

import os
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.choice import read_config
from ..checkpoint.stored import is_complete, step_of, steps, verify
from ..data.corpus import Corpus
from ..evaluation.baselines import Baselines
from ..ranks import launchers
from ..schedule import Schedule, schedule_in, schedule_of
from ..settings import Settings
from .directory import RunDirectory
from .progress import count

if TYPE_CHECKING:
    from ...models.language_model import LanguageModel
    from ..stages.plan import Plan
    from ..trainer import Trainer


def parameters(model: LanguageModel) -> str:
    """How many parameters a model has, and how many of them a token uses, where these are fewer."""
    total, active = model.parameter_count(), model.parameter_count(active=True)
    return f"{count(total)} parameters" + (f", {count(active)} active" if active < total else "")


def introduction(trainer: Trainer, start: Path | None, notes: list[str]) -> list[str]:
    """What a run shows before its first step: where it is, what is trained on what, and where it goes on from.

    start: the checkpoint that it starts from, with notes about that choice.
    """
    settings, corpus, step = trainer.settings, trainer.corpus, trainer.step
    source = "mixture" if settings.data.mixture else settings.data.source
    lines = [
        f"run           {trainer.directory.path}",
        f"model         {parameters(trainer.shape)}, {settings.trainer.dtype}",
        f"data          {source}: {corpus.summary}, vocabulary {corpus.vocabulary_size}",
        *(["stages", *trainer.plan.table(), f"stage         {trainer.stage.name}"] if trainer.plan.staged else []),
        f"a step        {_a_step(trainer)}",
        *_memory(trainer),
        *notes,
    ]
    if start is not None:
        lines.append(f"going on after step {step} from {start}")
        if changed := changed_schedule(trainer.plan, start, step):
            lines.append(changed)
    if trainer.done:
        lines.append(f"nothing is left to do: trainer.steps={settings.trainer.steps}")
    return lines


def next_stage(trainer: Trainer) -> str:
    """What a run shows where a stage begins."""
    began = f"stage         {trainer.stage.name}, after step {trainer.step}: {_a_step(trainer)}"
    return "\n".join([began, *_memory(trainer)])


def _memory(trainer: Trainer) -> list[str]:
    """What a step holds, by the account; nothing where nobody asked."""
    made = trainer.memory
    if made is None:
        return []
    return [f"memory        {f'no account: {made}' if isinstance(made, str) else made.summary()}"]


def _a_step(trainer: Trainer) -> str:
    """What a step reads, and on which ranks."""
    settings, mesh = trainer.settings, trainer.mesh
    parallel = f"{mesh.data_ranks} data x {mesh.sequence_ranks} sequence rank(s), {settings.parallel.layout}"
    if mesh.experts is not None:
        parallel += f", experts over {mesh.experts.ranks} ranks"
    rows = f"{settings.data.rows_per_step} rows of {settings.data.sequence_length} tokens"
    return f"{rows} on {parallel}, ZeRO-{settings.engine.zero_stage}, {trainer.device.type}"


def summary(trainer: Trainer, problems: list[str]) -> str:
    """What a run shows after its last step: a sample, where its files are, and how to go on."""
    directory, saved, tracker = trainer.directory, trainer.saving.saved, trainer.outputs.tracker
    lines = [""]
    if trainer.sampling.text:
        lines += ["sample", *(f"  {line}" for line in trainer.sampling.text.splitlines()), ""]
    tracked = (tracker.mode, tracker.directory) if tracker else ("disabled", None)
    lines += whereabouts(directory, saved, tracked, problems)
    prompt = (trainer.settings.evaluation.prompt or "Once") if isinstance(trainer.corpus, Corpus) else None
    lines += commands(trainer.command, directory, saved, trainer.settings, prompt)
    return "\n".join(lines)


def comparison(record: dict[str, Any], baselines: Baselines | None) -> list[str]:
    """Bits per byte of the held-out text: counting models, the model, and the model with its context cut short."""
    lines = []
    if baselines is not None:
        names = {"byte_unigram": "byte unigram", "token_unigram": "token unigram", "token_bigram": "token bigram"}
        counted = [(names[key], value) for key, value in asdict(baselines).items()]
        lines += _table("held-out text", counted, ("this model", record["bits_per_byte"]))
    if "truncated_bits_per_byte" in record:
        title = f"is context used? {record['truncated_rows']} held-out rows"
        cut = (f"this model, last {record['truncated_context']} tokens", record["truncated_bits_per_byte"])
        lines += _table(title, [cut], ("this model, whole context", record["untruncated_bits_per_byte"]))
    return lines


def recall_comparison(record: dict[str, Any], chance: float | None) -> list[str]:
    """Accuracy on held-out recall problems: by chance, the model's, and the model's with its context cut short."""
    lines = []
    if chance is not None:
        lines += [f"held-out problems, {_ACCURACY}", f"  {'a value by chance':<28} {chance:7.2%}"]
        lines += [f"  {'this model':<28} {record['accuracy']:7.2%}"]
    if "truncated_accuracy" in record:
        cut = f"this model, last {record['truncated_context']} tokens"
        lines += [f"is context used? {record['truncated_rows']} held-out rows, {_ACCURACY}"]
        lines += [f"  {cut:<28} {record['truncated_accuracy']:7.2%}"]
        lines += [f"  {'this model, whole context':<28} {record['untruncated_accuracy']:7.2%}"]
    return lines


_ACCURACY = "share of right answers (more is better)"


def _table(title: str, others: list[tuple[str, float]], own: tuple[str, float]) -> list[str]:
    lines = [f"{title}, bits per byte (less is better)"]
    lines += [f"  {name:<28} {value:7.4f}   the model needs {own[1] / value:.1%} of it" for name, value in others]
    return [*lines, f"  {own[0]:<28} {own[1]:7.4f}"]


def whereabouts(
    directory: RunDirectory, checkpoint: Path | None, tracked: tuple[str, Path | None], problems: list[str]
) -> list[str]:
    """Where the run's files are, and what could not be kept."""
    lines = [
        f"run           {directory.path}",
        *([f"loss curve    {directory.plot}"] if directory.plot.exists() else []),
        *([f"samples       {directory.samples}"] if directory.samples.exists() else []),
    ]
    mode, folder = tracked
    if mode == "offline" and folder is not None:
        parts = f"{shlex.quote(str(folder.parent))}/offline-run-*"  # one for each start of the run; the last is whole
        lines.append(f"W&B offline   {folder}   (send it: wandb sync {parts})")
    if checkpoint is not None:
        lines.append(f"checkpoint    {checkpoint}")
    return [*lines, *(f"NOT KEPT      {problem}" for problem in problems)]


def commands(
    command: list[str], directory: RunDirectory, saved: Path | None, settings: Settings, prompt: str | None
) -> list[str]:
    """How to generate from the run, if its data are text (`prompt` is one), and how to go on with it."""
    lines = []
    if saved is not None:
        if prompt is not None:
            words = [f"checkpoint={saved}", f"prompt={prompt}"]
            lines.append(f"more text     python -m longreach.launch.generate {shlex.join(words)}")
        ended = saved == directory.checkpoints / saved.name and step_of(saved) == settings.trainer.steps
        if ended and settings.stages:
            lines.append("to go on      the same command with one more entry at the end of stages")
        elif ended:
            more, how = continuation(command, directory, settings)
            lines += [f"to resume     {more}", f"              ({how})"]
        else:
            lines.append(f"to resume     {resume_command(command, directory, saved)}")
    return lines


def continuation(command: list[str], directory: RunDirectory, settings: Settings) -> tuple[str, str]:
    """A command that goes on with a run that has trained and saved its last step, and how its learning rate follows.

    wsd goes on from before its decay, in a new folder, since this one keeps the end of the run. What has decayed goes
    on at the rate that it ended at, and where that is nothing much, a new stage warms up again.
    """
    schedule = Schedule(settings.schedule, settings.optimizer.learning_rate, settings.trainer.steps)
    steps, more = schedule.steps, 2 * schedule.steps
    changes: dict[str, object] = {"run.dir": directory.path, "trainer.steps": more}
    if (start := _before_decay(directory, schedule)) is not None:
        changes["schedule.warmup_steps"] = schedule.warmup
        if step_of(start) < steps:
            changes |= {"run.dir": f"{directory.path}-to-{more}", "checkpoint.resume": start}
        changed = _changed(command, changes, "checkpoint.resume")
        return changed, f"from step {step_of(start)}, before the decay, at the learning rate that it had"
    last = schedule(steps - 1)
    if last >= SMALL_FRACTION * schedule.peak:
        changes |= {"optimizer.learning_rate": f"{last:.6g}", "schedule": "wsd", "schedule.warmup_steps": 0}
        changed = _changed(command, changes, "checkpoint.resume", "schedule")
        return changed, f"from step {steps} at the learning rate that it ended at, {last:.3g}, which decays at the end"
    warmup = max(schedule.warmup, min(steps // 10, steps - schedule.decay))
    changes = {"run.dir": f"{directory.path}-next", "init_from": directory.path, "schedule.warmup_steps": warmup}
    changes["trainer.seed"] = settings.trainer.seed + 1
    if settings.data.vocabulary_size is not None:
        changes["data.vocabulary_size"] = "null"  # the tokenizer comes with the weights
    changed = _changed(command, changes, "checkpoint.resume")
    return changed, "the learning rate has decayed: a new stage from these weights, which warms up again"


def changed_schedule(plan: Plan, start: Path, step: int) -> str | None:
    """The notice for a run that goes on from a checkpoint, after `step`, by another schedule than before.

    With stages it is about the schedule of the last of these steps: one that a later stage names is no change.
    """
    try:
        before = schedule_in(verify(start).state) if plan.staged else schedule_of(read_config(start))
    except ValueError as error:
        return f"whether the schedule has changed is not known: {error}"
    said = plan.behind(step).schedule.announcement(before, step, plan.at(step).schedule)
    return said.replace("trainer.steps", "its number of steps") if said and plan.staged else said


SMALL_FRACTION = 0.01  # of the peak: at a smaller learning rate there is little to go on with


def _before_decay(directory: RunDirectory, schedule: Schedule) -> Path | None:
    end = schedule.extendable
    if end is None:
        return None
    there = (path for path in reversed(steps(directory.checkpoints)) if step_of(path) <= end)
    return next((path for path in there if is_complete(path)), None)


def resume_command(command: list[str], directory: RunDirectory, saved: Path | None) -> str:
    """The command (launcher, module, overrides) with this run's folder, to go on from its newest checkpoint."""
    own = saved is not None and saved.parent == directory.checkpoints
    return _changed(command, {"run.dir": directory.path}, *(["checkpoint.resume"] if own else []))


def _changed(command: list[str], changes: dict[str, object], *dropped: str) -> str:
    """The command with these settings instead of those that it has of them, and of the groups or names `dropped`."""

    def stays(word: str) -> bool:
        name, equals, _ = word.lstrip("+").partition("=")
        return not equals or not (name in changes or any(name == d or name.startswith(f"{d}.") for d in dropped))

    return shlex.join([*filter(stays, command), *(f"{name}={value}" for name, value in changes.items())])


def launch_command(module: str, arguments: list[str]) -> list[str]:
    """The command line that started this process: the script that said so, srun, mpirun, torchrun, or python."""
    if script := os.environ.get("LONGREACH_COMMAND"):
        return [*shlex.split(script), *arguments]
    if launcher := launchers.command():
        return [*launcher, "python", "-m", module, *arguments]
    ranks = os.environ.get("LOCAL_WORLD_SIZE", "1")
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return ["torchrun", "--standalone", "--nproc-per-node", ranks, "-m", module, *arguments]
    if "RANK" in os.environ:
        ranks = os.environ.get("LOCAL_SIZE", ranks)
        return ["deepspeed", "--num_gpus", ranks, "--module", module, *arguments]
    return ["python", "-m", module, *arguments]
