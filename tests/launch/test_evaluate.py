"""The command that evaluates checkpoints: what a run has scored, and refusals before anything is made."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import commands
import matplotlib.image
import pytest
import transformers

from longreach.launch.evaluate import EvaluateSettings
from longreach.trainer.data.tokenizers import byte_tokenizer
from longreach.trainer.evaluation.checkpoints import Subject
from longreach.trainer.evaluation.maps import draw_checkpoint_map
from longreach.trainer.ranks.settings import ParallelSettings

TASKS = "[{task: needle, digits: 4},parity,{task: mqar, pairs: 2}]"
SETTINGS = (
    "data=text",
    "data.tokenizer=bytes",
    "data.validation_fraction=0.3",
    "data.sequence_length=320",
    "data.rows_per_step=1",
    "model=llama_tiny",
    "model.width=16",
    "model.depth=1",
    "model.mixers.softmax.heads=2",
    "model.mixers.softmax.kv_heads=2",
    "model.feed_forward.hidden=16",
    f"evaluation.tasks={TASKS}",
    "evaluation.depths=[0.0,1.0]",
    "evaluation.lengths=[320,365]",
    "evaluation.problems=2",
    "evaluation.sample_tokens=0",
    "evaluation.every=1",
    "checkpoint.every=1",
    "trainer.steps=2",
    "logger.wandb.mode=disabled",
)
PNG = b"\x89PNG"


def run(module: str, *overrides: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    return commands.run(module, *overrides, folder=folder, environment=environment)


@pytest.mark.slow
def test_a_run_and_the_command_score_a_checkpoint_alike(tmp_path: Path) -> None:
    for number in range(30):
        (tmp_path / f"{number}.txt").write_text(f"{number} " + "the text of a document, again and again " * 12)
    done = run("longreach.launch.train", *SETTINGS, f"data.path={tmp_path}/*.txt", "run.dir=run", folder=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "needle_digits_4" in done.stdout
    written = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    scored = [record for record in written if "tasks" in record]
    assert [record["step"] for record in scored] == [1, 2]
    assert len(scored[0]["tasks"]) == 2 * (2 + 1 + 1)
    for name in ("needle_digits_4", "tasks"):
        assert (tmp_path / "run" / "plots" / f"{name}.png").read_bytes().startswith(PNG)

    steps = [f"run/checkpoints/step-{step:08}" for step in (1, 2)]
    done = run(
        "longreach.launch.evaluate",
        f"checkpoints=[{','.join(steps)}]",
        f"tasks={TASKS}",
        "depths=[0.0,1.0]",
        "lengths=[320,365]",
        "problems=2",
        "documents=2",
        "context=8",
        "path=found",
        folder=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    again = [json.loads(line) for line in (tmp_path / "found" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in again] == [1, 2]
    for before, after in zip(scored, again, strict=True):
        for one, other in zip(before["tasks"], after["tasks"], strict=True):
            assert one == {**other, "loss": pytest.approx(one["loss"], rel=1e-5)}
        assert [line["documents"] for line in after["documents"]] == [2, 2]
        for line in after["documents"]:
            own = [bucket for bucket in after["positions"] if bucket["length"] == line["length"]]
            targets = sum(bucket["targets"] for bucket in own)
            assert targets == 2 * line["length"]
            mean = sum(bucket["loss"] * bucket["targets"] for bucket in own) / targets
            assert mean == pytest.approx(line["loss"], rel=1e-9)
            assert line["gain"] == pytest.approx(line["truncated_loss"] - line["loss"])
    for name in ("checkpoints", "needle_digits_4", "positions"):
        assert (tmp_path / "found" / "plots" / f"{name}.png").read_bytes().startswith(PNG)

    assert done.stdout.count("365: beyond the 320 tokens that its configuration declares") == 2
    subject = Subject.at(str(tmp_path / "run"), "checkpoint")
    assert (subject.step, subject.declared) == (2, 320)
    shutil.rmtree(subject.path / "tokenizer")
    with pytest.raises(ValueError, match=r"checkpoint must hold the tokenizer of its text; got .*step-00000002 w"):
        Subject.at(str(subject.path), "checkpoint")

    refused = run(
        "longreach.launch.evaluate", f"checkpoint={steps[0]}", "tasks=[needle]", "lengths=[40]", folder=tmp_path
    )
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: lengths must be at least ")
    assert "Traceback" not in refused.stderr


def test_maps_of_many_checkpoints_stand_one_below_the_other(tmp_path: Path) -> None:
    lines = [
        {"task": name, "length": 512, "depth": None, "accuracy": 0.5, "choice": choice}
        for name, choice in (("parity", 0.5), ("mqar", None))
    ]
    sizes = []
    for count in (4, 12):
        draw_checkpoint_map([(str(step), lines) for step in range(count)], tmp_path / "map.png")
        sizes.append(matplotlib.image.imread(tmp_path / "map.png").shape[:2])
    (low, few), (high, many) = sizes
    assert high > 1.5 * low
    assert many < 1.5 * few


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tasks": ["needle"]}, "checkpoint or checkpoints must say what to evaluate; got neither"),
        ({"checkpoint": "a", "checkpoints": ["b"]}, "checkpoint or checkpoints must .* got both"),
        ({"checkpoint": "a"}, "tasks or documents must say what to score; got neither"),
        ({"checkpoint": "a", "tasks": ["needle"], "context": 4}, "context must come with documents"),
        ({"checkpoint": "a", "tasks": ["needle"], "text": "b"}, "text must come with documents, or with a task"),
        ({"checkpoint": "a", "documents": 2, "seed": 4}, "seed must lie within .*, with tasks; got 4"),
        ({"checkpoint": "a", "documents": 2, "dtype": "float16"}, "dtype must be one of float32, bfloat16"),
        ({"checkpoint": "a", "documents": 0}, "documents must be at least 1; got 0"),
        ({"checkpoint": "a", "documents": 1, "lengths": [1]}, r"lengths\[0\] must be at least 2; got 1"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_read(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvaluateSettings(**given).check(1)


def test_ranks_that_do_not_divide_are_refused_and_lengths_are_padded() -> None:
    settings = EvaluateSettings(checkpoint="a", tasks=["needle"], lengths=[1001])
    settings.parallel = ParallelSettings(sequence=2, layout="zigzag")
    settings.check(2)
    with pytest.raises(ValueError, match=r"parallel\.sequence must divide the number of processes, 3; got 2"):
        settings.check(3)
    settings.parallel = ParallelSettings(experts=2)
    with pytest.raises(ValueError, match=r"parallel\.experts must be 1, since every rank has the whole model"):
        settings.check(2)


@pytest.mark.slow
def test_a_model_of_hugging_face_is_scored_with_its_tokenizer_or_without(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=300, max_position_embeddings=256, **sizes)
    for folder in ("tokens", "text"):
        transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / folder)
    byte_tokenizer().save(tmp_path / "text")
    given = ("checkpoints=[tokens,text]", "tasks=[induction,{task: mqar, pairs: 2}]", "lengths=[128]", "problems=2")
    done = run("longreach.launch.evaluate", *given, "path=found", folder=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    scored = [json.loads(line) for line in (tmp_path / "found" / "metrics.jsonl").read_text().splitlines()]
    assert [{line["task"] for line in record["tasks"]} for record in scored] == [{"induction", "mqar_pairs_2"}] * 2
    needles = ("tasks=[needle]", "lengths=[250]", "problems=1", "depths=[0.5]")
    done = run("longreach.launch.evaluate", "checkpoint=text", *needles, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    done = run("longreach.launch.evaluate", "checkpoint=tokens", *needles, folder=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: tasks (needle): its model must have a tokenizer"), done.stderr
    done = run("longreach.launch.evaluate", "checkpoint=text", "tasks=[induction]", folder=tmp_path)
    assert done.stderr.startswith("error: lengths must be given for a model of Hugging Face")
