"""The language models within checkpoints of models of more than text, as the hub has them."""

import json
import logging

import pytest
import torch
from checkpoint_cases import CASES
from checkpoints import config_of, load, logits, their_logits, tokens, write
from definitions import definitions_alone

from longreach.models import hf

VISION = {
    "llama4": {
        "hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8,
        "patch_size": 4, "vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16,
    },
}  # fmt: skip


def whole_model(kind, text):
    """A small model of transformers that reads images too, with random weights."""
    transformers = pytest.importorskip("transformers")
    config = transformers.CONFIG_MAPPING[kind](
        text_config=config_of(text, CASES[text]).to_dict(), vision_config=VISION[kind], attn_implementation="eager"
    )
    torch.manual_seed(0)
    with definitions_alone():
        model = transformers.AutoModelForImageTextToText.from_config(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape) + ("norm" in name and parameter.mean().round()))
    return model


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "text"), [("llama4", "llama4_text")])
def test_language_models_are_read_out_of_models_of_more_than_text(kind, text, tmp_path, caplog):
    theirs = whole_model(kind, text)
    theirs.save_pretrained(tmp_path / "whole")
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["model_type"] == kind
    with caplog.at_level(logging.WARNING, "longreach"):
        ours = load(tmp_path / "whole")
    assert "the language model alone is read, not " in caplog.text
    expected = their_logits(theirs, tokens())
    assert expected.std() > 0.3
    torch.testing.assert_close(logits(ours, tokens()), expected, atol=1e-4, rtol=1e-4)
    settings, (origin, _) = hf.read_settings(tmp_path / "whole"), hf.read_configs(tmp_path / "whole")
    folder = write(ours, settings, tmp_path / "ours", origin=origin)
    assert json.loads((folder / "config.json").read_text())["model_type"] == text
    assert torch.equal(logits(load(folder), tokens()), logits(ours, tokens()))
