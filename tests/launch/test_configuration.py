"""Overrides as users write them, and what they are told when they are wrong."""

import io
import json
import random
import sys
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from longreach.launch import configuration
from longreach.launch.build import build
from longreach.launch.configuration import model_sizes
from longreach.launch.doctor import Configuration
from longreach.launch.export import ExportSettings
from longreach.launch.generate import GenerationSettings
from longreach.launch.train import TEXTS, to_settings
from longreach.trainer.preparation import configured_model
from longreach.trainer.settings import PATHS, Settings
from longreach.trainer.stages.plan import plan_of


def compose(*overrides: str, name: str = "train") -> DictConfig:
    GlobalHydra.instance().clear()
    with hydra.initialize_config_module(version_base="1.3", config_module="longreach.conf"):
        return hydra.compose(config_name=name, overrides=list(overrides))


def model(*overrides: str) -> dict[str, Any]:
    return OmegaConf.to_container(compose(*overrides).model)  # type: ignore[return-value]


def settings(*overrides: str) -> Settings:
    return to_settings(compose(*overrides), list(overrides), {"model": "llama_tiny", "experiment": None})  # type: ignore[dict-item]


def complaint(monkeypatch: pytest.MonkeyPatch, *overrides: str, rank: int = 0) -> str:
    """What `run_main` prints for these overrides."""
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setattr(configuration.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(sys, "argv", ["train", *overrides])
    printed = io.StringIO()
    with redirect_stderr(printed), pytest.raises(SystemExit) as ended:
        configuration.run_main(lambda: compose(*overrides), "train", TEXTS)
    assert ended.value.code == 1
    return printed.getvalue()


def test_the_contract_names_exist() -> None:
    got = settings(
        "model=minimax_01_tiny", "data=text", "data.path=/x", "data.sequence_length=64", "data.rows_per_step=4",
        "data.rows_per_micro_batch=2", "optimizer.learning_rate=1e-3", "schedule=wsd", "evaluation.every=7",
        "trainer.steps=3", "trainer.seed=5", "trainer.dtype=bfloat16", "trainer.clip=0.5",
        "trainer.activation_checkpointing=mixing", "trainer.compile=true", "parallel.sequence=2",
        "parallel.layout=zigzag", "parallel.spans=4", "parallel.attention=ring", "engine.zero_stage=3",
        "+engine.config.zero_optimization.overlap_comm=true", "checkpoint.every=9", "checkpoint.keep=4",
        "checkpoint.resume=none", "logger.wandb.mode=offline", "run.dir=runs/x",
    )  # fmt: skip
    assert (got.data.source, got.data.path, got.schedule.kind) == ("text", "/x", "wsd")
    assert got.optimizer.learning_rate == 1e-3
    assert got.engine.config == {"zero_optimization": {"overlap_comm": True}}
    assert (got.parallel.sequence, got.parallel.layout, got.parallel.spans) == (2, "zigzag", 4)
    assert (got.checkpoint.every, got.checkpoint.keep, got.checkpoint.resume) == (9, 4, "none")
    assert got.model["_target_"].endswith("LanguageModel")
    assert got.model["vocabulary"] is None


def test_a_size_has_a_short_name_on_the_command_line_and_in_defaults(tmp_path: Path) -> None:
    assert {"llama_1b": "llama/1b", "minimax_01_tiny": "minimax_01/tiny"}.items() <= model_sizes().items()
    short, path, larger = (model(f"model={name}") for name in ("llama_1b", "llama/1b", "llama_8b"))
    assert short == path != larger
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("defaults: [llama_1b]\ndepth: 3\n")
    assert model("model=mine", f"hydra.searchpath=[file://{tmp_path}]") == {**short, "depth": 3}


def test_a_mixer_of_conf_is_added_to_a_model_in_one_line() -> None:
    mixed = model("model=llama_tiny", "+mixer@model.mixers.mamba=mamba2", "model.pattern=[softmax,mamba]")
    assert build({**mixed, "vocabulary": 61}).names == ["softmax", "mamba"] * 2
    assert mixed["mixers"]["mamba"]["state"] == 128
    assert mixed["mixers"]["softmax"] == model("model=llama_tiny")["mixers"]["softmax"]
    lightning = model("model=minimax_01_tiny", "mixer@model.mixers.lightning=retnet")["mixers"]["lightning"]
    assert lightning["_target_"].endswith("RetNet")
    assert lightning["heads"] == 6  # the size's own, whichever mixer has them


def test_a_preset_that_leaves_settings_open_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"model.width must be given; got \?\?\?. Give model.width=…"):
        settings("model=llama/_base")


def options(group: str) -> list[str]:
    GlobalHydra.instance().clear()
    with hydra.initialize_config_module(version_base="1.3", config_module="longreach.conf"):
        return GlobalHydra.instance().config_loader().get_group_options(group)


@pytest.mark.parametrize(
    "group",
    ["model", "model/llama", "data", "optimizer", "schedule", "parallel", "engine", "logger", "experiment"],
)
@pytest.mark.slow
def test_every_choice_of_a_group_composes(group: str) -> None:
    compose_each(group, [name for name in options(group) if name not in model_sizes() or name.endswith("_tiny")])


@pytest.mark.many
def test_every_size_of_a_model_composes() -> None:
    compose_each("model", options("model"))


def compose_each(group: str, names: list[str]) -> None:
    chosen = [name for name in names if not name.startswith("_")]
    assert chosen
    group, _, family = group.partition("/")
    for name in chosen:
        assert isinstance(settings(f"{group}={family and f'{family}/'}{name}"), Settings)


def test_the_quickstart_is_what_it_promises() -> None:
    short, long = settings("experiment=quickstart"), settings("experiment=quickstart_long")
    for got in (short, long):
        assert got.parallel.sequence == 2
        assert got.engine.zero_stage == 1
        assert got.data.sequence_length >= 4096
        assert got.evaluation.context == 16
        assert got.evaluation.baselines
    assert long.trainer.steps > 4 * short.trainer.steps
    assert settings("experiment=quickstart", "trainer.steps=3").trainer.steps == 3


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        (
            "trainer.stepps=3",
            ["trainer.stepps must be the name of a setting; got trainer.stepps=3. Did you mean trainer.steps"],
        ),
        ("learning_rate=3", ["got learning_rate=3. Did you mean optimizer.learning_rate?"]),
        ("data.seqence_length=4", ["Did you mean data.sequence_length"]),
        ("model.widht=4", ["Did you mean model.width", "To add one that the configuration leaves out: +model.widht=4"]),
        (
            "engine.config={a: 1}",
            ["engine.config must get what it has not yet by +; got engine.config={a: 1}. Write +eng"],
        ),
        ("steps=5", ["error: steps must be the name of a setting; got steps=5. Did you mean trainer.steps"]),
        (
            "model=lama_tiny",
            ["model must be one of the files of conf/model; got 'lama_tiny'. Did you mean model=llama_tiny"],
        ),
        ("model=lama/1b", ["got 'lama/1b'. Did you mean model=llama_1b"]),
        ("model/llama=1b", ["Did you mean model=llama/1b?"]),
        ("+mixer@model.mixers.m=mamba4", [" or +mixer@model.mixers.m=mamba2"]),
        ("schedule=wds", ["error: schedule must be one of cosine, wsd; got 'wds'. Did you mean schedule=wsd?"]),
        ("trainer.steps=abc", ["error: trainer.steps must be an integer; got abc"]),
        ("trainer.compile=maybe", ["error: trainer.compile must be true or false; got maybe"]),
        ("~trainer.steps", ["error: trainer.steps must stay, with a value; got ~trainer.steps. Leave"]),
        (
            "+model.width=4",
            ["error: model.width must be set without +, since it is there; got +model.width=4. Write model.width=4"],
        ),
        ("evaluation.lengths=[ten]", ["error: evaluation.lengths must be a list of integers; got [ten]"]),
        ("evaluation.lengths=512", ["evaluation.lengths must be a list; got 512. Write 'evaluation.lengths=[512]'"]),
        ("evaluation.tasks=needle", ["evaluation.tasks must be a list; got needle. Write 'evaluation.tasks=[needle]'"]),
        ("evaluation.tasks={task: needle}", ["evaluation.tasks must be a list; got {task: needle}. Write "]),
        ("checkpoint.every=null", ["checkpoint.every must have a value; got null. Leave it out for its default"]),
        ("experiment=", ["experiment must be one of llama_4k_to_131k, ", "; got ''. "]),
        ("stages.7.steps=1", ["stages.7.steps must name an item that the list has by its number, counted from 0"]),
        ("stages.x.steps=1", ["stages.x.steps must name an item", "; got stages.x.steps=1. Or give all of it"]),
        ("model.pattern.x=softmax", ["model.pattern.x must name an item", "; got model.pattern.x=softmax"]),
        ("stages[0].steps=1", ["an item of a list must be named by a dot", "[0].steps=1. Write stages.0.steps=1"]),
        ("evaluation=x", ["evaluation must be settings, each by its name; got x. Write evaluation.NAME=VALUE"]),
        ("trainer.steps", ["error: an argument must be NAME=VALUE; got 'trainer.steps'"]),
        ("--steps=5", ["error: an argument must be NAME=VALUE; got --steps=5. Settings are written without dashes"]),
    ],
)
def test_wrong_overrides_are_named_with_what_is_near(
    monkeypatch: pytest.MonkeyPatch, override: str, parts: list[str]
) -> None:
    printed = complaint(monkeypatch, override)
    for part in parts:
        assert part in printed
    assert "Traceback" not in printed
    assert printed.startswith("error: ")
    assert printed.count("\n") == 1, "more than a line"


def test_what_an_entry_of_stages_does_not_have_yet_is_added(monkeypatch: pytest.MonkeyPatch) -> None:
    printed = complaint(monkeypatch, "experiment=moba_stages", "stages.1.data.sequence_length=64")
    assert printed.rstrip().endswith("; got stages.1.data.sequence_length=64. Write +stages.1.data.sequence_length=64")
    assert printed.count("\n") == 1
    changed = settings("experiment=moba_stages", "+stages.1.data.sequence_length=64", "stages.0.steps=3")
    first, second, _ = plan_of(changed).stages
    assert (first.stop, second.settings.data.sequence_length) == (3, 64)


def test_only_the_first_rank_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    assert complaint(monkeypatch, "trainer.stepps=3", rank=1) == ""


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["+trainer.stepps=4"], "trainer.stepps must be a setting; .* Did you mean trainer.steps?"),
        (["+foo=4"], "foo must be a setting"),
        (["init_from=/x", "model=llama_tiny"], "model must not be given with init_from of Hugging Face"),
        (["init_from=/x", "+mixer@model.mixers.m=mamba"], "model must not be given with init_from of Hugging Face"),
        (["init_from=/x", "model.width=8"], r"model must not be given with init_from.* got model\.width=8"),
    ],
)
def test_settings_without_effect_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(*overrides)


def test_single_settings_of_the_model_of_init_from_can_be_changed(tmp_path: Path) -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    config = {
        "model_type": "llama", "vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3,
        "num_attention_heads": 4, "max_position_embeddings": 256, "rope_scaling": scaling,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))

    def model(*overrides: str) -> dict[str, Any]:
        return configured_model(settings(f"init_from={tmp_path}", *overrides))

    read = model()
    made = model("+model.mixers.full.rope_base=1e6", "++model.mixers.full.rope_scaling.factor=8")
    assert made["mixers"]["full"] == read["mixers"]["full"] | {
        "rope_base": 1e6,
        "rope_scaling": read["mixers"]["full"]["rope_scaling"] | {"factor": 8},
    }
    assert {**made, "mixers": None} == {**read, "mixers": None}
    linear = model("+model.mixers.full.rope_scaling={kind: linear, factor: 2}", "+model.multi_token_prediction=1")
    assert linear["mixers"]["full"]["rope_scaling"] == {"kind": "linear", "factor": 2}
    assert linear["multi_token_prediction"] == 1


def test_the_tokenizer_comes_with_init_from_unless_it_is_given() -> None:
    assert settings("init_from=/x").data.tokenizer == "/x"
    assert settings("init_from=/x", "data.tokenizer=bytes").data.tokenizer == "bytes"


def test_what_launchers_add_is_taken_away() -> None:
    given = ["--local_rank=1", "a=1", "--local-rank=2", "--local_rank", "0", "b=2", "--cfg", "job"]
    assert configuration.without_launcher_arguments(given) == ["a=1", "b=2", "--cfg", "job"]


AWKWARD = [
    "def f(x):",
    "it's",
    "a\\",
    "a\\'b",
    "x,y",
    "${x}",
    "line\nbreak",
    "",
    "42",
    'say "hi"',
    "a=b",
    "[1,2]",
    "{a: b}",
]


@pytest.mark.parametrize("text", [*AWKWARD, "\\", "\\\\'", " lead ", "*.txt", "×"])
def test_texts_arrive_as_they_are_written(text: str) -> None:
    override = OverridesParser.create().parse_override(configuration.quoted(f"prompt={text}", ("prompt",)))
    assert OmegaConf.create({"prompt": override.value()}).prompt == text


def test_any_text_arrives_as_it_is_written() -> None:
    random_ = random.Random(0)
    for _ in range(400):
        text = "".join(random_.choices("\\\\'\"${}x,:= \n[](1_0#~é", k=random_.randrange(9)))
        if configuration.QUOTED.fullmatch(text) is None:
            override = OverridesParser.create().parse_override(
                configuration.quoted(f"prompt={text}", {"prompt": False})
            )
            assert OmegaConf.create({"prompt": override.value()}).prompt == text


WORDS = ("2024_10", "007", "1e5", "true", "None", "off", "~", '"Yes," she said', '"a" and "b"', "a=b", "${oc.env:HOME}")


def test_every_setting_of_text_takes_text() -> None:
    names = ("run.name", "evaluation.prompt", "logger.wandb.project", "data.column", "init_from", "schedule.kind")
    for words in (WORDS[::2], WORDS[1::2]):
        given = dict(zip(names, words, strict=False))
        config = compose(*[configuration.quoted(f"{name}={word}", TEXTS) for name, word in given.items()])
        for name, word in given.items():
            assert OmegaConf.select(config, name) == word
    config = compose(configuration.quoted("data.tokenizer='a,b'", TEXTS), configuration.quoted("run.name=null", TEXTS))
    assert config.data.tokenizer == "a,b"
    assert config.run.name is None


def test_a_prompt_of_the_word_null_is_a_prompt() -> None:
    assert compose(configuration.quoted("evaluation.prompt=null", TEXTS)).evaluation.prompt == "null"
    texts = configuration.texts_of(GenerationSettings)
    assert compose(configuration.quoted("prompt=null", texts), name="generate").prompt == "null"
    assert compose(configuration.quoted("checkpoint=null", texts), name="generate").checkpoint is None
    assert {"run.dir", "doctor.whole"} & configuration.texts_of(Configuration).keys() == {"run.dir"}
    nullable = {"checkpoint": True, "path": True, "family": True, "dtype": False}
    assert configuration.texts_of(ExportSettings) == nullable


def test_home_is_known_in_every_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    got = settings(*[configuration.quoted(f"{setting}=~/there", TEXTS) for setting in PATHS])
    for setting in PATHS:
        assert OmegaConf.select(OmegaConf.structured(got), setting) == "/home/someone/there"
    with pytest.raises(
        ValueError, match=r"run\.dir must begin with the home of a user that exists; got ~nobody-here/x"
    ):
        settings(configuration.quoted("run.dir=~nobody-here/x", TEXTS))


def test_every_path_among_the_settings_is_known() -> None:
    paths = {name for name in TEXTS if name.endswith((".dir", "_dir", ".path", "init_from", "tokenizer", "resume"))}
    assert paths == set(PATHS)


@pytest.mark.parametrize("flag", ["-m", "--multirun", "--multi", "hydra.mode=MULTIRUN", "+hydra.mode=multirun"])
def test_sweeps_are_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch, flag: str) -> None:
    printed = complaint(monkeypatch, "trainer.seed=1", flag)
    assert printed.startswith(f"error: {flag} must be left out; a command is one run")
    assert "for x in" in printed


def test_a_list_of_values_is_not_answered_with_the_advice_to_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    printed = complaint(monkeypatch, "trainer.seed=1,2")
    assert "Ambiguous value for argument 'trainer.seed=1,2'" in printed
    assert "key='value1,value2'" in printed
    assert "multirun" not in printed


def test_other_values_keep_their_grammar() -> None:
    assert configuration.quoted("data.path=null", TEXTS) == "data.path=null"
    assert configuration.quoted("run.dir='a,b'", TEXTS) == "run.dir='a,b'"
    assert configuration.quoted("optimizer.betas=[0.9,0.99]", TEXTS) == "optimizer.betas=[0.9,0.99]"


def test_another_checkout_around_the_working_directory_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "train.py").touch()
    inner = tmp_path / "kernels" / "softmax"
    inner.mkdir(parents=True)
    assert configuration.other_checkout(inner) == tmp_path
    assert configuration.other_checkout(configuration.PACKAGE / "kernels") is None
    monkeypatch.chdir(inner)
    told = complaint(monkeypatch, "trainer.stepps=3")
    assert f"note: this runs the LongReach in {configuration.PACKAGE}, not the one in {tmp_path}" in told
    assert f"bash {tmp_path}/launch/torchrun.sh" in told
    monkeypatch.chdir(configuration.PACKAGE)
    assert "note:" not in complaint(monkeypatch, "trainer.stepps=3")


def test_generation_has_a_schema_too() -> None:
    got = configuration.to_schema(compose("temperature=0", "stop=[a,'b,c']", name="generate"), GenerationSettings)
    assert got.stop == ["a", "b,c"]
    assert got.temperature == 0
