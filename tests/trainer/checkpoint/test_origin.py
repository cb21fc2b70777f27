"""What a Hugging Face model says of itself goes through every stage of training, where ids still mean the same."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from tokenizers import AddedToken

from longreach.trainer.checkpoint.origin import Origin, read_origin
from longreach.trainer.data.tokenizers import Tokenizer, byte_tokenizer, load_tokenizer, train_bpe

CONFIG = {"model_type": "llama", "max_position_embeddings": 512, "pad_token_id": 7, "of_another": {"kept": True}}
GENERATION = {"temperature": 0.5, "eos_token_id": [256, 9], "suppress_tokens": [3]}


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    folder = tmp_path / "theirs"
    byte_tokenizer().save(folder)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    return folder


def stage(folder: Path, begun: Path, tokenizer: Tokenizer, length: int, *, old: bool = False) -> Path:
    """A checkpoint, as far as it matters here; an old one does not hold its origin."""
    origin = read_origin(begun, tokenizer)
    tokenizer.save(folder / "tokenizer")
    (folder / "index.json").write_text("{}")
    run = {"model": {}, "data": {"sequence_length": length}, "init_from": str(begun)}
    (folder / "config.yaml").write_text(yaml.safe_dump(run))
    if not old:
        replace(origin, longest_row=max(origin.longest_row, length)).save(folder)
    return folder


def test_it_outlives_its_folder_and_any_number_of_stages(theirs: Path, tmp_path: Path) -> None:
    first = stage(tmp_path / "1", theirs, byte_tokenizer(), 1024)
    shutil.rmtree(theirs)
    second = stage(tmp_path / "2", first, load_tokenizer(first / "tokenizer"), 64)
    shutil.rmtree(first)
    third = read_origin(stage(tmp_path / "3", second, load_tokenizer(second / "tokenizer"), 32), byte_tokenizer())
    assert third == Origin(CONFIG, GENERATION, 1024)
    assert third.positions == 1024
    assert replace(third, longest_row=64).positions == 512


def test_checkpoints_from_before_say_where_they_began(theirs: Path, tmp_path: Path) -> None:
    first = stage(tmp_path / "1", theirs, byte_tokenizer(), 64, old=True)
    second = stage(tmp_path / "2", first, byte_tokenizer(), 32, old=True)
    assert read_origin(second, byte_tokenizer()) == Origin(CONFIG, GENERATION, 64)
    shutil.rmtree(theirs)
    assert read_origin(second, byte_tokenizer()) == Origin({}, {}, 64)


def test_ids_of_another_tokenizer_are_left_out(theirs: Path, tmp_path: Path) -> None:
    longer = byte_tokenizer()
    longer.library.add_tokens([AddedToken("<tool>")])
    assert read_origin(theirs, longer) == Origin(CONFIG, GENERATION)
    other = train_bpe([["some text to learn from"]], 260)
    kept = {key: value for key, value in CONFIG.items() if key != "pad_token_id"}
    for begun in (theirs, stage(tmp_path / "1", theirs, byte_tokenizer(), 64)):
        found = read_origin(begun, other)
        assert (found.config, found.generation) == (kept, {"temperature": 0.5})
