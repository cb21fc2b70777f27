"""Old paths of classes, as in older checkpoints and YAML files."""

import pytest
from hydra.utils import get_class

from longreach.models.moved import with_current_paths

MIXERS = "longreach.models.mixers"
OLD = [
    f"{MIXERS}.block_sparse_attention.InfLLMv2",
    f"{MIXERS}.block_sparse_attention.MoBA",
    f"{MIXERS}.gated_deltanet.GatedDeltaNet",
    f"{MIXERS}.gated_linear_attention.GatedLinearAttention",
    f"{MIXERS}.kimi_delta_attention.KimiDeltaAttention",
    f"{MIXERS}.lightning_attention.LightningAttention",
    f"{MIXERS}.mamba.Mamba",
    f"{MIXERS}.mamba2.Mamba2",
    f"{MIXERS}.mlstm.MLSTM",
    f"{MIXERS}.native_sparse_attention.NativeSparseAttention",
    f"{MIXERS}.retnet.RetNet",
    f"{MIXERS}.rwkv7.RWKV7",
    f"{MIXERS}.softmax_attention.SoftmaxAttention",
    "longreach.models.feed_forward.SwiGLU",
]


@pytest.mark.parametrize("path", OLD)
def test_an_old_path_becomes_the_current_one(path: str) -> None:
    settings = with_current_paths({"mixers": {"a": {"_target_": path, "heads": 4}}, "pattern": ["a*3"]})
    target = settings["mixers"]["a"].pop("_target_")
    assert get_class(target).__name__ == path.rpartition(".")[2]
    assert settings == {"mixers": {"a": {"heads": 4}}, "pattern": ["a*3"]}


@pytest.mark.parametrize("path", [f"{MIXERS}.mamba3.Mamba", f"{MIXERS}.mamba.Mamba9", "mamba.Mamba", "Mamba", None, 3])
def test_other_paths_stay_as_they_are(path: object) -> None:
    assert with_current_paths([{"_target_": path}]) == [{"_target_": path}]
