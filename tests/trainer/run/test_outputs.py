"""What a run shows and keeps, where its files cannot be written."""

import errno
import json
import logging
import logging.config
import os
import shutil

import pytest

from longreach.trainer.run.directory import RunDirectory
from longreach.trainer.run.outputs import Outputs, show_log
from longreach.trainer.run.plots import LossCurves
from longreach.trainer.settings import Settings


def test_a_line_of_metrics_needs_its_step(tmp_path):
    settings = Settings()
    settings.logger.wandb.mode = "disabled"
    outputs = Outputs(settings, RunDirectory(tmp_path), first=True, step=0)
    outputs.log({"step": 3, "mine": 0.5})
    with pytest.raises(ValueError, match=r"must have a step; got .'mine': 0.7"):
        outputs.log({"mine": 0.7})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 3, "mine": 0.5}


def test_a_disk_that_is_full_at_the_start_is_told_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    def no_space(self, config):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(RunDirectory, "write_config", no_space)
    settings = Settings()
    settings.logger.wandb.mode = "disabled"
    outputs = Outputs(settings, RunDirectory(tmp_path), first=True, step=0)
    outputs.training(STEP)
    said = capsys.readouterr().out
    assert said.count("run.dir cannot be written: [Errno 28] No space left on device") == 1
    assert "free space" in said
    assert '"step": 1' in (tmp_path / "metrics.jsonl").read_text()
    assert outputs.unkept() == [
        "config.yaml could not be written: [Errno 28] No space left on device; free space or check run.dir"
    ]
    monkeypatch.undo()
    assert outputs.unkept() == []  # there is room again
    assert "trainer:" in (tmp_path / "config.yaml").read_text()
    outputs.close()


def line(step):
    return {
        "step": step,
        "loss": 5.0 / step,
        "grad_norm": 1.0,
        "learning_rate": 0.1,
        "tokens_per_second": 1.0,
        "seconds": 1.0,
    }


def test_the_plot_goes_on_where_a_run_does_and_metrics_are_not_read_again(tmp_path):
    settings = Settings()
    settings.logger.wandb.mode = "disabled"
    first = Outputs(settings, RunDirectory(tmp_path), first=True, step=0)
    for step in range(1, 8):
        first.training(line(step))
    first.close()
    resumed = Outputs(settings, RunDirectory(tmp_path), first=True, step=5)
    (tmp_path / "metrics.jsonl").unlink()
    resumed.training(line(6))
    resumed.validation({"step": 6, "validation_loss": 1.5, "accuracy": 0.5})
    resumed.close()
    assert [point.mean for point in resumed.curves.training.points] == [(step, 5.0 / step) for step in range(1, 7)]
    assert [point.mean for point in resumed.curves.validation.points] == [(6, 1.5)]
    assert (tmp_path / "plots" / "loss.png").stat().st_size > 1000


def test_notes_are_shown_though_hydra_has_switched_loggers_off(capsys):
    log = logging.getLogger("longreach")
    before = log.disabled, log.level, log.propagate, list(log.handlers)
    try:
        logging.config.dictConfig({"version": 1, "disable_existing_loggers": True})
        log.handlers.clear()
        show_log(first=True)
        log.warning("some documents were left out")
        assert capsys.readouterr().out == "some documents were left out\n"
    finally:
        log.disabled, log.level, log.propagate, log.handlers = before


STEP = {"step": 1, "loss": 2.0, "grad_norm": 1.0, "learning_rate": 0.1, "tokens_per_second": 1.0, "seconds": 1.0}


def test_a_folder_that_has_gone_does_not_come_back_in_part(tmp_path, capsys):
    settings = Settings()
    settings.logger.wandb.mode = "disabled"
    directory = RunDirectory(tmp_path / "run")
    directory.path.mkdir()
    outputs = Outputs(settings, directory, first=True, step=0)
    shutil.rmtree(directory.path)
    outputs.training(STEP)
    outputs.sample(1, "text")
    outputs.plot()
    (said,) = outputs.unkept()
    assert "the last 1 line(s) of metrics.jsonl could not be written" in said
    assert "put the folder back" in said
    assert "free space" not in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_metrics_that_cannot_be_brought_back_to_a_checkpoint_are_one_clear_error(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    settings = Settings()
    settings.logger.wandb.mode = "disabled"
    with pytest.raises(ValueError, match=r"run\.dir must be a folder that can be written; got .*metrics\.jsonl"):
        Outputs(settings, RunDirectory(tmp_path), first=True, step=0)


def test_a_full_disk_leaves_the_configuration_and_the_plot_that_are_there(tmp_path, monkeypatch):
    directory = RunDirectory(tmp_path)
    directory.write_config({"trainer": 1})
    curves = LossCurves()
    curves.add(STEP)
    curves.draw(directory.plot)
    before = directory.plot.read_bytes()
    monkeypatch.setattr(os, "replace", no_replace)
    with pytest.raises(OSError, match="No space"):
        directory.write_config({"trainer": 2})
    with pytest.raises(OSError, match="No space"):
        curves.draw(directory.plot)
    assert (tmp_path / "config.yaml").read_text() == "trainer: 1\n"
    assert directory.plot.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "plots"]
    assert list(directory.plot.parent.iterdir()) == [directory.plot]


def no_replace(source, target):
    raise OSError(errno.ENOSPC, "No space left on device")
