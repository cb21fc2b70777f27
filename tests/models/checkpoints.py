"""What tests of Hugging Face checkpoints share: small models of transformers, and how ours are read and written.

What a test measures of a family it notes by `noted` or `assert_near`; `checkpoint_table.py` makes the table of
docs/checkpoints.md of it.
"""

import copy
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_table import NOTES
from covering import few_with_all
from definitions import definitions_alone
from hydra.utils import instantiate
from torch import nn
from torch.overrides import TorchFunctionMode

from longreach.kernels.documents import Documents
from longreach.models import hf
from longreach.models.hf.checkpoint import Checkpoint
from longreach.parallel.sequence import Sequence

ORIGINAL, LENGTH = 32, 80  # positions go far beyond the length that the scalings extend
SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4 * ORIGINAL,
    "rms_norm_eps": 1e-5,
    "attention_dropout": 0.0,
}


def config_of(family: str, more: dict[str, Any], small: dict[str, Any] = SMALL) -> Any:
    transformers = pytest.importorskip("transformers")
    kind = transformers.CONFIG_MAPPING[family]
    implementations = {"attn_implementation": "eager", "experts_implementation": "eager"}
    return kind(**{**implementations, **small, **json.loads(json.dumps(more))})


@contextmanager
def own_classes() -> Iterator[None]:
    """transformers' automatic classes are its own meanwhile: importing a library may have put others in their place."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    registered = [mapping._extra_content for mapping in (CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING)]
    kept = [dict(each) for each in registered]
    for each in registered:
        each.clear()
    yield
    for each, content in zip(registered, kept, strict=True):
        each.update(content)


def random_model(config: Any) -> Any:
    """A small transformers model, `filled`."""
    from transformers import AutoModelForCausalLM

    with definitions_alone():
        return filled(AutoModelForCausalLM.from_config(config))


def filled(model: Any) -> Any:
    """The model in float32, its parameters, norms, biases and buffers too, far from neutral values."""
    model = model.float().eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            neutral = parameter.mean().round()  # 1 for norms, or 0 for those whose weights 1 is added to
            size = 0.3 if parameter.dim() > 1 or "norm" in name else 0.5
            parameter.copy_(size * noise + (neutral if "norm" in name else 0.0))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
    return model


def load(path, dtype=torch.float32):
    model = instantiate(hf.read_settings(path), _convert_="all").to(dtype)
    hf.load(path, model)
    return model.eval()


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens, Sequence.single(Documents.whole(*tokens.shape)))


def their_logits(model, tokens):
    with torch.no_grad():
        return model(tokens, use_cache=False).logits


def tokens(length=LENGTH):
    return torch.randint(SMALL["vocab_size"], (2, length), generator=torch.Generator().manual_seed(5))


class InFloat64(TorchFunctionMode):
    """What transformers computes in float32 whatever the type, such as norms and routers, it computes in float64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def wide(value):
            return torch.float64 if value is torch.float32 else value

        if func is torch.Tensor.float:
            return args[0].double()
        return func(*map(wide, args), **{name: wide(value) for name, value in (kwargs or {}).items()})


def in_float64(model):
    """The model in float64, with what it computed of its settings in float32 computed anew."""
    model.double()
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    for module in model.modules():
        if hasattr(module, "get_slope_rate"):
            module.slope_rate = module.get_slope_rate()
            module.query_decay, module.key_decay, module.diagonal_decay = module.decay_factors(module.slope_rate)
        if hasattr(module, "scalar_embed_scale"):
            module.embed_scale = torch.tensor(module.scalar_embed_scale)
    torch.set_default_dtype(default)
    return model


def saved(model, path, **more):
    model.save_pretrained(path, **more)
    return path


def state_of(model: nn.Module):
    return (*model.named_parameters(), *model.named_buffers())


def write(model, settings, path, **more):
    hf.write(state_of(model), settings, path, max_positions=4 * ORIGINAL, **more)
    return path


def family_of(model):
    """The argument `family`, which families that yield to another one need: a Mistral without windows is a Llama."""
    name = model.config.model_type
    return name if hf.known_families()[name].yields_to else None


class Imported:
    """A model of transformers, saved as `folder`, and ours that is read of it, each made when it is first asked for.

    Tests share it: what changes a model copies it before.
    """

    def __init__(self, case: str, family: str, reference: Any, folder: Path) -> None:
        self.case, self.family, self.reference, self.folder = case, family, reference, saved(reference, folder)

    @cached_property
    def settings(self) -> dict[str, Any]:
        return hf.read_settings(self.folder)

    @cached_property
    def ours(self) -> nn.Module:
        return load(self.folder)

    @cached_property
    def ours_in_float64(self) -> nn.Module:
        return load(self.folder, torch.float64)

    @cached_property
    def theirs_in_float64(self) -> Any:
        return in_float64(copy.deepcopy(self.reference))


def noted(family: str, column: str, measured: float) -> None:
    """Notes what a test has measured for a column of docs/checkpoints.md, which shows the largest."""
    if NOTES in os.environ:
        with Path(os.environ[NOTES]).open("a") as file:
            file.write(json.dumps({"family": family, "column": column, "measured": measured}) + "\n")


def assert_near(family: str, column: str, ours, theirs, tolerance: float, name: str = "") -> None:
    """Asserts that no element differs by more than `tolerance` times 1 + its size, and notes the largest such ratio."""
    torch.testing.assert_close(
        ours, theirs, atol=tolerance, rtol=tolerance, msg=lambda text: f"{column} {name}: {text}"
    )
    noted(family, column, float(((ours - theirs).abs() / (1 + theirs.abs())).max()))


def assert_written_back(imported: Imported, ours: nn.Module, path: Path, chosen: str | None = None) -> set[str]:
    """Writes ours in float32 as the folder `path`, whose tensors must be those that were read; names those not read.

    chosen: the family to write, where several may express the model alike.
    """
    family = hf.known_families()[imported.family]
    out = write(ours, imported.settings, path, family=chosen or family_of(imported.reference), dtype=torch.float32)
    before, after = (Checkpoint(folder, family.aliases) for folder in (imported.folder, out))
    unread = before.headers.keys() - after.headers.keys()
    assert all(any(re.search(pattern, name) for pattern in family.ignored) for name in unread), unread
    for name in after.headers:
        if "olmo" not in family.model_type or "conv1d" not in name:  # which they cut into parts of equal size
            assert torch.equal(after.read(name), before.read(name)), name
    assert hf.read_settings(out) == imported.settings
    return unread


def few_checkpoints(names: Iterable[str]) -> list[str]:
    """Families that together have every block, mixer and feed-forward layer of these; the first ones have most."""

    def parts(family: hf.Family) -> frozenset[Any]:
        components = (family.model, family.block, *family.mixers.values(), *family.feed_forwards.values())
        return frozenset(component.target for component in components)

    return few_with_all({name: parts(hf.known_families()[name]) for name in names})


def targets_of(rows, documents):
    """Of rows with documents of these lengths, the next token; none follows the last of a document."""
    targets = rows.roll(-1, dims=1)
    for row, lengths in enumerate(documents):
        targets[row, [end - 1 for end in accumulate(lengths)]] = -100
    return targets


def loss_and_gradients(model, seq, rows, targets):
    """The sum of the losses of the rows' tokens that this rank has, and the gradient of each parameter."""
    loss, count = model(seq.shard(rows), seq, seq.shard(targets))
    assert int(count) == int((seq.shard(targets) >= 0).sum())
    parameters = tuple(model.parameters())
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    nothing = (torch.zeros_like(parameter) for parameter in parameters)
    return loss.detach(), [zero if each is None else each for each, zero in zip(gradients, nothing, strict=True)]
