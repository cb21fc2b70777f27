"""From a Hugging Face folder through the engine and a checkpoint to another one."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import hydra
import pytest
import torch
import yaml
from distributed import run_ranks
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing

from longreach.kernels.documents import Documents
from longreach.launch.build import build
from longreach.launch.export import ExportSettings, export
from longreach.launch.train import to_settings
from longreach.models import hf
from longreach.parallel.mesh import Mesh
from longreach.parallel.sequence import Sequence
from longreach.trainer.checkpoint import checkpoint
from longreach.trainer.checkpoint.choice import locate, read_config
from longreach.trainer.checkpoint.stored import verify
from longreach.trainer.data.tokenizers import byte_tokenizer
from longreach.trainer.engine import Engine, EngineSettings, OptimizerSettings
from longreach.trainer.settings import Settings
from longreach.trainer.trainer import Trainer

pytestmark = pytest.mark.slow  # engines on several ranks: a minute together

CONFIG = {
    "model_type": "qwen3",
    "vocab_size": 264,  # more than the tokenizer's 257, as real models have
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rope_theta": 10000.0,
    "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    """A Hugging Face folder with a tokenizer."""
    return save_model(tmp_path_factory.mktemp("origin"), CONFIG)


def save_model(folder, config):
    settings = hf.known_families()[config["model_type"]].settings(config)
    model = build(settings)
    model.initialise(seed=4)
    byte_tokenizer().save(folder / "tokenizer")
    (folder / "tokenizer" / "generation_config.json").write_text('{"temperature": 0.5, "do_sample": true}')
    hf.write(
        model.named_parameters(),
        settings,
        folder / "model",
        hf.tokenizer_files(folder / "tokenizer"),
        max_positions=512,
        family=config["model_type"],
    )
    return folder / "model"


def read_and_save(rank, world, origin, folder, stage, model=None):
    """An engine with the weights of `origin`, and a checkpoint of it as the trainer writes one."""
    settings = Settings(model=model or hf.read_settings(origin), init_from=str(origin))
    settings.data.sequence_length, settings.data.tokenizer = 64, str(origin)
    engine = Engine(
        lambda: build(settings.model),
        settings=EngineSettings(stage),
        optimizer=OptimizerSettings(),
        mesh=Mesh.create(),
        device=torch.device("cpu"),
        load=None if model else partial(hf.load, origin),
    )

    def beside(path):
        byte_tokenizer().save(path / "tokenizer")
        (path / "config.yaml").write_text(yaml.safe_dump(asdict(settings)))

    folder.parent.mkdir(parents=True, exist_ok=True)  # the run's
    return checkpoint.save(engine, folder, {"step": 3}, keep=1, beside=beside)


@pytest.fixture
def saved(origin, tmp_path):
    return run_ranks(1, read_and_save, origin, tmp_path / "run" / "checkpoints", 1)[0]


def same_tensors(a, b):
    a, b = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(("world", "stage"), [(1, 0), (2, 3)])
def test_what_is_read_into_an_engine_and_exported_keeps_every_bit(origin, world, stage, tmp_path):
    run_ranks(world, read_and_save, origin, tmp_path / "run" / "checkpoints", stage)
    out = export(ExportSettings(checkpoint=str(tmp_path / "run"), path=str(tmp_path / "out")))
    assert same_tensors(origin, out)
    assert hf.read_settings(out) == hf.read_settings(origin)
    before, after = (json.loads((path / "config.json").read_text()) for path in (origin, out))
    assert after == {**before, "eos_token_id": 256, "bos_token_id": None}
    names = {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json", "model.safetensors"}
    assert {file.name for file in out.iterdir()} == names


def test_transformers_generates_from_what_was_exported(saved, tmp_path):
    transformers = pytest.importorskip("transformers")
    settings = ExportSettings(str(saved), str(tmp_path / "out"), dtype="bfloat16", max_positions=96, shard_bytes=4000)
    out = export(settings)
    assert len(list(out.glob("*.safetensors"))) > 1
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert model.dtype == torch.bfloat16
    assert model.config.max_position_embeddings == 96
    assert model.config.eos_token_id == tokenizer.eos_token_id == 256
    ids = tokenizer("Ähnlich", return_tensors="pt").input_ids
    assert ids.tolist() == [list("Ähnlich".encode())]
    assert model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None).shape[1] == ids.shape[1] + 3


def test_what_cannot_be_exported_is_refused_and_leaves_nothing(saved, origin, tmp_path):
    good = ExportSettings(str(saved), str(tmp_path / "out"))
    for changes, message in (
        ({"checkpoint": None}, "checkpoint must be given"),
        ({"checkpoint": str(tmp_path / "none")}, "checkpoint must be a checkpoint's folder"),
        ({"path": None}, "path must be a new folder"),
        ({"path": str(origin)}, "path must be a new or empty folder"),
        ({"family": "gpt2"}, "family must be one of .*llama, .*; got 'gpt2'"),
        (
            {"family": "llama"},
            r"got llama, which does not by .*qk_norm='head'.*Choose .*qwen3.*, or leave family out$",
        ),
        ({"dtype": "int8"}, "dtype must be one of float32, bfloat16, float16; got 'int8'"),
        ({"max_positions": 0}, "max_positions must be at least 1; got 0"),
        ({"shard_bytes": 0}, "shard_bytes must be at least 1; got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            export(replace(good, **changes))
    weights = next(saved.glob("weights-*"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ValueError, match=r"must be complete and undamaged; the bytes of .* have changed"):
        export(good)
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def test_a_model_that_began_as_a_mistral_is_exported_as_one_unless_family_says_otherwise(tmp_path):
    """Without a window it is a Llama too, and would be written as one if it had begun from nothing."""
    config = {**CONFIG, "model_type": "mistral", "sliding_window": None}
    origin = save_model(tmp_path / "origin", config)
    (saved,) = run_ranks(1, read_and_save, origin, tmp_path / "run" / "checkpoints", 1)
    for family, expected in ((None, "mistral"), ("llama", "llama")):
        out = export(ExportSettings(str(saved), str(tmp_path / expected), family=family))
        written = json.loads((out / "config.json").read_text())
        assert (written["model_type"], "sliding_window" in written) == (expected, expected == "mistral")
        assert same_tensors(origin, out)


def test_a_hybrid_is_not_exported(origin, tmp_path):
    model = hf.read_settings(origin)
    mixers = {"retnet": {"_target_": "longreach.models.mixers.linear.retnet.RetNet", "_partial_": True, "heads": 2}}
    model |= {"pattern": ["full", "retnet"], "mixers": {**model["mixers"], **mixers}}
    (saved,) = run_ranks(1, read_and_save, origin, tmp_path / "run" / "checkpoints", 1, model)
    with pytest.raises(
        ValueError,
        match=r"must be one that a Hugging Face family expresses; got one that none does: not .*qwen3.* by .*RetNet'",
    ):
        export(ExportSettings(str(saved), str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_the_tensors_of_any_model_are_written_by_their_own_names(origin, tmp_path):
    """Of a hybrid, whose checkpoint two ranks have shared out."""
    model = hf.read_settings(origin)
    mixers = {"retnet": {"_target_": "longreach.models.mixers.linear.retnet.RetNet", "_partial_": True, "heads": 2}}
    model |= {"pattern": ["full", "retnet"], "mixers": {**model["mixers"], **mixers}}
    saved, _ = run_ranks(2, read_and_save, origin, tmp_path / "run" / "checkpoints", 3, model)
    (saved / "origin.json").write_text("{}")
    stored = verify(saved)
    names = {name for name, (file, *_) in stored.tensors.items() if not file.startswith("moments")}
    for dtype, shard_bytes in (("float32", 10**9), ("bfloat16", 4000)):
        form = {"family": "own", "dtype": dtype, "shard_bytes": shard_bytes}
        out = export(ExportSettings(str(saved), str(tmp_path / dtype), **form))
        files = list(out.glob("*.safetensors"))
        assert (len(files) == 1) == (dtype == "float32")
        tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
        assert tensors.keys() == names
        for name, tensor in tensors.items():
            assert torch.equal(tensor, stored.map(name).to(getattr(torch, dtype)))
        assert read_config(out)["model"] == model
        assert (out / "tokenizer" / "tokenizer.json").is_file()
    with pytest.raises(ValueError, match="max_positions must be left out with family=own; got 64"):
        export(ExportSettings(str(saved), str(tmp_path / "more"), family="own", max_positions=64))


def test_a_model_with_a_mixer_of_the_users_own_is_refused_too(saved, tmp_path, monkeypatch):
    (tmp_path / "its_own.py").write_text(
        "from longreach.models.mixers.softmax.softmax_attention import SoftmaxAttention\n"
        "class Mine(SoftmaxAttention):\n    pass\n"
    )
    monkeypatch.chdir(tmp_path)
    run = yaml.safe_load((saved / "config.yaml").read_text())
    run["model"]["mixers"]["full"]["_target_"] = "its_own.Mine"
    (saved / "config.yaml").write_text(yaml.safe_dump(run))
    with pytest.raises(ValueError, match=r"none does: not .* by model\.mixers\.full\._target_='its_own\.Mine'\. Other"):
        export(ExportSettings(str(saved), str(tmp_path / "out")))


def test_a_refusal_says_what_can_be_done_instead(origin, tmp_path):
    model = hf.read_settings(origin)
    model["mixers"]["full"] |= {"qk_norm": "full"}
    (saved,) = run_ranks(1, read_and_save, origin, tmp_path / "run" / "checkpoints", 1, model)
    with pytest.raises(
        ValueError, match=r"llama, .* by [^;]*qk_norm='full'.*\. Other models stay .*generate.*init_from"
    ) as told:
        export(ExportSettings(str(saved), str(tmp_path / "out"), max_positions=64))
    assert str(told.value).endswith(f"safetensors by parameter name in {saved}")


ORIGINAL = {
    **CONFIG,
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 258,  # one less than the tokenizer's ids
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 2.0,
        "original_max_position_embeddings": 32,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
    "max_position_embeddings": 64,
    "initializer_range": 0.01,
    "pad_token_id": 9,
    "bos_token_id": 257,
    "eos_token_id": [256, 9],
    "use_cache": False,
    "of_a_tool": {"kept": [1, 2]},
}


def save_original(folder):
    """A small Llama with BOS in its template, a chat template, and a token that it has no row for."""
    tokenizer = byte_tokenizer()
    tokenizer.library.add_special_tokens(["<s>"])
    tokenizer.library.add_tokens(["<tool>"])
    tokenizer.library.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 257)])
    tokenizer.save(folder / "tokenizer")
    told = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(told))
    (folder / "tokenizer" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    generation = {"temperature": 0.5, "do_sample": True, "bos_token_id": 257, "eos_token_id": [256, 9]}
    (folder / "tokenizer" / "generation_config.json").write_text(json.dumps(generation))
    settings = hf.known_families()["llama"].settings(ORIGINAL)
    model = build(settings)
    model.initialise(seed=4)
    files = hf.tokenizer_files(folder / "tokenizer")
    hf.write(model.named_parameters(), settings, folder / "model", files, max_positions=64, origin=ORIGINAL)
    return folder / "model"


def train_once(rank, world, overrides):
    with hydra.initialize_config_module("longreach.conf", version_base="1.3"):
        settings = to_settings(hydra.compose("train", overrides), overrides, {})
    Trainer(settings, build, Mesh.create(), torch.device("cpu"), ["train"]).run()


def test_what_the_origin_said_goes_through_two_stages(tmp_path):
    """Rows of 128 tokens, then of 32; the folder that all began with has gone by then."""
    origin = save_original(tmp_path / "origin")
    before = {file.name: file.read_bytes() for file in origin.iterdir()}
    assert json.loads(before["config.json"]) == {**json.loads(before["config.json"]), **ORIGINAL}
    for number in range(6):
        (tmp_path / f"{number}.txt").write_text(f"{number} is a number. " * 40)
    begun = origin
    for stage, length in (("first", 128), ("second", 32)):
        overrides = [
            f"init_from={begun}", "data=text", f"data.path='{tmp_path}/*.txt'", f"data.cache_dir={tmp_path / 'cache'}",
            f"data.sequence_length={length}", "data.rows_per_step=1", "trainer.steps=1", "evaluation.sample_tokens=4",
            "evaluation.prompt=4", f"run.dir={tmp_path / stage}", "logger.wandb.mode=disabled",
        ]  # fmt: skip
        run_ranks(1, train_once, overrides)
        shutil.rmtree(begun)
        begun = tmp_path / stage
    out = export(ExportSettings(str(begun), str(tmp_path / "out")))
    after = {file.name: file.read_bytes() for file in out.iterdir()}
    assert after.keys() == before.keys()
    told = {
        name: (json.loads(before[name]), json.loads(after[name])) for name in before if name.endswith("config.json")
    }
    assert told["config.json"][1] == {**told["config.json"][0], "max_position_embeddings": 128}
    assert told["generation_config.json"][1] == told["generation_config.json"][0]
    assert told["tokenizer_config.json"][1] == told["tokenizer_config.json"][0]
    assert after["chat_template.jinja"] == before["chat_template.jinja"]

    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert tokenizer("größe").input_ids == [257, *"größe".encode()]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == "Hi"
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert model.generation_config.temperature == 0.5
    assert (model.config.bos_token_id, model.generation_config.bos_token_id) == (257, 257)
    assert model.generate(max_new_tokens=3, do_sample=False).tolist()[0][0] == 257


def test_a_trained_model_of_experts_has_the_same_logits_in_transformers(tmp_path):
    for number in range(6):
        (tmp_path / f"{number}.txt").write_text(f"{number} is a number. " * 40)
    overrides = [
        "model=mixtral_tiny", "model.width=32", "model.depth=2", "model.mixers.softmax.heads=4",
        "model.mixers.softmax.kv_heads=2", "model.feed_forward.hidden=24", "data=text", f"data.path='{tmp_path}/*.txt'",
        f"data.cache_dir={tmp_path / 'cache'}", "data.tokenizer=bytes", "data.sequence_length=64",
        "data.rows_per_step=2", "trainer.steps=5", "optimizer.learning_rate=0.02",
        "evaluation.sample_tokens=4", "evaluation.prompt=4", f"run.dir={tmp_path / 'run'}",
        "logger.wandb.mode=disabled",
    ]  # fmt: skip
    run_ranks(1, train_once, overrides)
    out = export(ExportSettings(str(tmp_path / "run"), str(tmp_path / "out")))
    stored = verify(locate(tmp_path / "run", "checkpoint"))
    ours = build(read_config(stored.path)["model"])
    first = build(read_config(stored.path)["model"])
    first.initialise(seed=0)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            parameter.copy_(stored.map(name))
    tokens = torch.randint(256, (2, 48), generator=torch.Generator().manual_seed(0))
    seq = Sequence.single(Documents.whole(*tokens.shape))
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert type(theirs).__name__ == "MixtralForCausalLM"
    with torch.no_grad():
        expected = theirs(tokens).logits
        torch.testing.assert_close(ours(tokens, seq), expected, atol=1e-4, rtol=1e-4)
        assert (first(tokens, seq) - expected).abs().max() > 0.1  # it has learned something


def test_yarns_length_is_its_own_whatever_was_trained(origin):
    settings = hf.read_settings(origin)
    assert hf.max_positions(settings, 64) == hf.max_positions(settings, 4096) == 512
    settings["mixers"]["full"]["rope_scaling"] = None
    assert hf.max_positions(settings, 4096) == 4096


@pytest.mark.slow
def test_a_model_that_training_continues_comes_out_as_it_went_in(origin, tmp_path):
    """Two sequence ranks, ZeRO-3, one step that moves nothing: init_from, train and export by their commands."""
    text = tmp_path / "text"
    text.mkdir()
    for number in range(20):
        (text / f"{number}.txt").write_text(f"{number} is a number. " * 40)
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    train = [
        *("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "longreach.launch.train"),
        *(f"init_from={origin}", "data=text", f"data.path={text}", f"data.cache_dir={tmp_path / 'cache'}"),
        *("data.sequence_length=256", "data.rows_per_step=1", "parallel.sequence=2", "engine.zero_stage=3"),
        *("trainer.steps=1", "optimizer.learning_rate=1e-30", "logger.wandb.mode=disabled"),
        *(f"run.dir={tmp_path / 'run'}", "evaluation.sample_tokens=4"),
    ]
    subprocess.run([sys.executable, *train], check=True, env=environment, cwd=tmp_path, timeout=300)
    out = tmp_path / "out"
    command = ["-m", "longreach.launch.export", f"checkpoint={tmp_path / 'run'}", f"path={out}"]
    done = subprocess.run([sys.executable, *command], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"written to {out}"
    assert same_tensors(origin, out)
    again = subprocess.run([sys.executable, *command], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 1
    assert again.stderr.startswith("error: path must be a new or empty folder")
    assert Path(out, "tokenizer.json").is_file()
