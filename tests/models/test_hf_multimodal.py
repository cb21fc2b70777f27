"""The language models within checkpoints of models of more than text, as the hub has them."""

import json
import logging

import pytest
import torch
from checkpoint_cases import CASES
from checkpoints import config_of, load, logits, random_model, their_logits, tokens, write
from definitions import definitions_alone
from safetensors.torch import save_file

from longreach.models import hf

QWEN = {
    "depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 4, "out_hidden_size": 32,
    "num_position_embeddings": 16,
}  # fmt: skip
VISION = {
    "llama4": {
        "hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8,
        "patch_size": 4, "vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16,
    },
    "gemma3": {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8,
        "patch_size": 4,
    },
    "qwen3_5": QWEN,
    "qwen3_5_moe": QWEN,
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
@pytest.mark.parametrize(("kind", "text"), [(kind, f"{kind}_text") for kind in VISION])
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


def test_experts_that_stand_in_one_tensor_are_read_too(tmp_path):
    """As published checkpoints of Qwen3.5 have them, where transformers writes them one by one."""
    theirs = random_model(config_of("qwen3_5_moe_text", CASES["qwen3_5_moe_text"]))
    theirs.config.save_pretrained(tmp_path)
    save_file(
        {f"model.language_{name}": tensor for name, tensor in theirs.model.state_dict(prefix="model.").items()}
        | {"lm_head.weight": theirs.lm_head.weight.detach()},
        tmp_path / "model.safetensors",
    )
    torch.testing.assert_close(logits(load(tmp_path), tokens()), their_logits(theirs, tokens()), atol=1e-4, rtol=1e-4)
