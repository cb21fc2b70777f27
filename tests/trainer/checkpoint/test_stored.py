"""Tensors of a stored checkpoint, by their names."""

from pathlib import Path

from longreach.trainer.checkpoint.stored import Stored


def test_renamed_parameters_are_found_by_their_former_names():
    """Those of maps of low rank, with their moments; what the model itself calls so stays."""
    saved = ["a.decay.0.weight", "a.decay.1.bias", "exp_avg/a.decay.0.weight", "b.own.0.weight", "b.own.down.weight"]
    stored = Stored(Path(), {}, 0, {name: (f"file {name}", None, 0) for name in saved})
    names = ["a.decay.down.weight", "a.decay.up.bias", "b.own.0.weight", "b.own.down.weight"]
    found = {key: entry[0] for key, entry in stored.named_for(names).tensors.items()}
    assert found == {
        "a.decay.down.weight": "file a.decay.0.weight",
        "a.decay.up.bias": "file a.decay.1.bias",
        "exp_avg/a.decay.down.weight": "file exp_avg/a.decay.0.weight",
        "b.own.0.weight": "file b.own.0.weight",
        "b.own.down.weight": "file b.own.down.weight",
    }
