"""--help: one page of what a command does, what may be chosen, and every setting with its default and meaning."""

from __future__ import annotations

import importlib
import sys

import pytest

from longreach.launch.configuration import help_page, page

OF_TRAINING = ("doctor", "memory", "plan")
COMMANDS = ("train", "doctor", "memory", "generate", "export", "convert", "audit", "evaluate", "plan")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_one_page_with_a_meaning_for_every_setting(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = importlib.import_module(f"longreach.launch.{command}")
    monkeypatch.setattr(sys, "argv", [f"{command}.py", "--help"])
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(module.configuration, "quiet_libraries", lambda: None)
    monkeypatch.setattr(module.configuration, "join_launcher", lambda: None, raising=False)
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"python -m longreach.launch.{command} ")
    assert "powered by Hydra" not in printed
    assert max(map(len, printed.splitlines())) <= 120
    settings = [line.split() for line in printed.splitlines() if line[:1].isalpha() and line.startswith(line.lower())]
    assert all(len(words) > 2 for words in settings), [words for words in settings if len(words) <= 2]
    assert (page.OF_TRAINING in printed) == (command in OF_TRAINING)


def test_help_of_training_lists_sizes_mixers_and_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    words = " ".join(help_page("about", "train").split())
    model, _, rest = words.partition(" data= ")
    assert " llama_{125m,1b,8b,tiny}, " in model
    assert " quickstart, " in model
    assert " gated_deltanet, " in rest.partition("+mixer@model.mixers.NAME= ")[2]
    assert " data.sequence_length 4096 tokens " in rest


def test_meanings_are_those_behind_the_fields_of_all_bases() -> None:
    from longreach.launch.convert import ConvertSettings

    said = page.comments(ConvertSettings)
    assert said["form"].startswith("grouped")
    assert said["to"] == "a new folder"
    assert "from" in {name for name, _, _ in page.rows(ConvertSettings())}
