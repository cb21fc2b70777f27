"""The mixers of conf/ with small sizes, and its models, with parameters far from zero."""

import ast
import inspect
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from longreach.launch import configuration
from longreach.models.feed_forward.swiglu import SwiGLU
from longreach.models.language_model import LanguageModel
from longreach.models.mixer import Mixer, construct, small_sizes
from longreach.models.part import FeedForward, Part, cast_parameters
from longreach.parallel.sequence import DecodingCache, Sequence

configuration.register_sizes()
CONF = Path(__file__).resolve().parents[2] / "conf"
# What makes a mixer's memory or keys, by the mixer: tests run it before.
SOURCES: dict[str, tuple[str, dict[str, Any]]] = {
    "cross_attention": ("hidden_states", {}),
    "cross_decoder_attention": ("key_values", {}),
    "gated_memory_unit": ("mamba", {"publish": True}),
}
MIXERS = sorted({path.stem for path in (CONF / "mixer").glob("*.yaml")}.difference(["hidden_states", "key_values"]))
SIZES = configuration.model_sizes()
MODELS = [*SIZES, "quickstart"]
WIDTH = 32
# Settings that tests add to the small sizes: what no preset uses, and blocks longer than the spans that tests change.
ODD: dict[str, dict[str, Any]] = {
    "aft_full": {"max_length": 4096},
    "cosformer": {"kv_heads": 2, "max_length": 300_000},
    "deepseek_sparse_attention": {"kv_heads": 2, "index_rope_fraction": 0.5},
    "diag_attention": {"kv_heads": 1, "block": 16},
    "dilated_attention": {"kv_heads": 1, "window": 17, "dilation": 3},
    "fast_weights": {"kv_heads": 1, "key_dim": 6},
    "gated_memory_unit": {"memory_of": "memory"},
    "gated_short_convolution": {"conv_size": 5},
    "gated_slot_attention": {"kv_heads": 2, "value_dim": 10},
    "h3": {"head_dim": 2},
    "hedgehog": {"kv_heads": 2, "value_dim": 10},
    "hgrn2": {"key_dim": 6},
    "infllm_v2": {"kv_heads": 1, "block_size": 16, "count": 2, "window_size": 8, "window_stride": 4, "initial": 0},
    "latent_attention": {
        "query_rank": 10,
        "value_dim": 10,
        "rope_heads": 2,
        "gate": "head",
        "sink_logits": True,
        "bias": True,
        "query_bias": True,
        "output_bias": True,
    },
    "linear_attention": {"kv_heads": 2, "value_dim": 10, "bias": True},
    "log_linear_mamba2": {"groups": 2, "levels": 5},
    "mamba2": {"groups": 2},
    "mamba3": {"groups": 2, "rank": 2, "rope_fraction": 0.4},
    "minimax_sparse_attention": {"block_size": 5},
    "moba": {"block_size": 16},
    "native_sparse_attention": {"value_dim": 10, "block_size": 8, "qk_norm": True, "conv_size": 3},
    "performer": {"kv_heads": 2},
    "polaformer": {"kv_heads": 2},
    "rfa": {"kv_heads": 2},
    "seer_attention": {"block_size": 6},
    "sliding_window_attention": {
        "kv_heads": 1,
        "window": 16,
        "sink_tokens": 2,
        "sink_logits": True,
        "gate": "channel",
        "gate_rank": 6,
        "gate_bias": True,
    },
    "sparse_latent_attention": {
        "query_rank": 10,
        "value_dim": 10,
        "rope_heads": 2,
        "gate": "head",
        "bias": True,
    },
    "transnormer": {"kv_heads": 2, "key_dim": 6},
    "transnormer_llm": {"kv_heads": 2, "lrpe_layers": 2, "value_dim": 10},
}


def mixer_partial(name: str, **more: Any) -> partial[nn.Module]:
    """The mixer of conf/mixer with this name, with small sizes."""
    settings: dict[str, Any] = OmegaConf.to_container(OmegaConf.load(CONF / "mixer" / f"{name}.yaml"))  # type: ignore[assignment]
    mixer = get_class(settings["_target_"])
    for size, small in small_sizes(mixer).items():
        value = settings.get(size, inspect.signature(mixer).parameters[size].default)
        if type(value) is int:
            settings[size] = min(value, small)
    return instantiate({**settings, **ODD.get(name, {}), **more}, _convert_="all")


def source_partial(name: str) -> partial[nn.Module]:
    """What makes the memory or the keys that this mixer reads, with small sizes."""
    source, more = SOURCES[name]
    return mixer_partial(source, **more)


@cache
def ops_of(name: str) -> frozenset[tuple[str, str | None]]:
    """The ops that the code of this mixer and of its layers calls, each alone and with each setting that it gets."""
    mixer = construct(mixer_partial(name), f"mixer {name}", width=WIDTH, layer=1, depth=4, norm_eps=1e-6)
    parts = [mixer, *([source_of(name, mixer)] if name in SOURCES else [])]
    modules = {each.__module__ for part in parts for module in part.modules() for each in type(module).__mro__}
    return frozenset[Any]().union(*(_calls_of_ops(each) for each in modules if each.startswith("longreach.models.")))


@cache
def _calls_of_ops(module: str) -> frozenset[tuple[str, str | None]]:
    calls = [node for node in ast.walk(ast.parse(inspect.getsource(sys.modules[module]))) if isinstance(node, ast.Call)]
    named = [(ast.unparse(call.func), [None, *(setting.arg for setting in call.keywords)]) for call in calls]
    return frozenset((op, setting) for op, settings in named if op.startswith("ops.") for setting in settings)


@cache
def few_mixers() -> frozenset[str]:
    """Some mixers that together use every op, with every setting, that any mixer uses."""
    left = frozenset[Any]().union(*map(ops_of, MIXERS))
    # Whose op is also in the code of sparse_latent_attention, for dense steps, which tests pass by.
    chosen = ["latent_attention"]
    left -= ops_of(*chosen)
    while left:
        chosen.append(max(MIXERS, key=lambda name: len(ops_of(name) & left)))
        left -= ops_of(chosen[-1])
    return frozenset(chosen)


def few_or_many() -> list[Any]:
    """Every mixer, all but the few behind `many`: for what an op does alike in every mixer, and which takes long."""
    return _few_or(pytest.mark.many)


def few_or_slow() -> list[Any]:
    """Every mixer, all but the few marked slow: for what `make check` would spend most of its time on."""
    return _few_or(pytest.mark.slow)


def _few_or(mark: pytest.MarkDecorator) -> list[Any]:
    return [pytest.param(name, marks=() if name in few_mixers() else mark) for name in MIXERS]


def source_of(name: str, mixer: nn.Module, partial: Callable[..., nn.Module] | None = None, width: int = WIDTH) -> Part:
    """The part that publishes what this mixer reads, called as the mixer wants it to be."""
    called = read_by(mixer)
    made = construct(partial or source_partial(name), called, name=called, width=width, layer=0, depth=4)
    assert isinstance(made, Part)
    return made


def read_by(mixer: nn.Module) -> str:
    """The mixer, by its name in the pattern, whose publication this one reads."""
    assert isinstance(mixer, Mixer)
    return mixer.reads[0].rpartition(".")[0]


class Fed(Mixer):
    """A mixer after the part whose publication it reads, of one input, as one mixer; their outputs are summed."""

    def __init__(self, source: Part, mixer: Mixer) -> None:
        super().__init__()
        self.source, self.mixer = source, mixer
        self.mask = getattr(mixer, "mask", None)

    def forward(self, x: Tensor, seq: Sequence) -> Tensor:
        out, *read = self.source(x, seq)
        return out + self.mixer(x, seq, *read)

    def mixing_flops(self, seq: Sequence) -> int:
        return self.source.mixing_flops(seq) + self.mixer.mixing_flops(seq)


def sources(name: str) -> tuple[str, dict[str, Any]]:
    """The item of a pattern that runs this mixer, after what it reads, and the mixers that it names."""
    mixers = {name: mixer_partial(name)}
    if name not in SOURCES:
        return name, mixers
    called = read_by(construct(mixers[name], name, width=WIDTH, layer=1, depth=4, norm_eps=1e-6))
    return f"{called}|{name}", {called: source_partial(name), **mixers}


def build_mixer(name: str, dtype: torch.dtype = torch.float64) -> Mixer:
    """With random parameters; in bfloat16 as the trainer has it, which leaves those in float32 that its layers name."""
    mixer = construct(mixer_partial(name), f"mixer {name}", width=WIDTH, layer=1, depth=4, norm_eps=1e-6)
    assert isinstance(mixer, Mixer)
    if name in SOURCES:
        mixer = Fed(source_of(name, mixer), mixer)
    mixer.to(torch.promote_types(dtype, torch.float32))
    cast_parameters(mixer, dtype)
    give_output_alone(mixer)
    randomise(mixer)
    return mixer


def give_output_alone(mixer: Mixer) -> None:
    """From now on the mixer returns its output without what it publishes or reports; a backward of the output is one of
    its losses too."""

    def output(module: Mixer, arguments: Any, outputs: tuple[Tensor, ...]) -> Tensor:
        first = 1 + len(module.publishes)
        return _WithLosses.apply(outputs[0], *outputs[first : first + len(module.losses)])

    if mixer.gives:
        mixer.register_forward_hook(output)


class _WithLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, *losses: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.losses = [torch.ones_like(loss) for loss in losses]
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, ...]:
        return dout, *ctx.losses


def as_new(mixer: str | Mixer) -> Mixer:
    """A mixer, by the name of its YAML or itself, with the values that a run begins with, none of them zero.

    So gates are open and states last: what `randomise` gives forgets within a few tokens.
    """
    item, mixers = sources(mixer) if isinstance(mixer, str) else ("it", {"it": lambda: mixer})
    settings = {"vocabulary": 3, "width": WIDTH, "depth": 1, "pattern": [item], "mixers": mixers}
    model = LanguageModel(**settings, feed_forward=feed_forward(8), initial_std=WIDTH**-0.5)
    model.initialise(0)
    parts = [part for _, part in model.leaves() if not isinstance(part, FeedForward)]
    generator, made = torch.Generator().manual_seed(3), Fed(*parts) if len(parts) > 1 else parts[0]
    assert isinstance(made, Mixer)
    with torch.no_grad():
        for parameter in made.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += 0.1 * noise * (1 if parameter.dim() < 2 else parameter.shape[1] ** -0.5)
    give_output_alone(made)
    return made


def compose_model(preset: str) -> DictConfig:
    with hydra.initialize_config_module(version_base="1.3", config_module="longreach.conf"):
        settings = hydra.compose(f"model/{preset}")
    OmegaConf.set_struct(settings, False)
    return settings.model


def build_model(preset: str = "quickstart", *, vocabulary: int = 61, **changes: Any) -> LanguageModel:
    changes = {"vocabulary": vocabulary, "_partial_": True, **changes}  # called here, so that errors come as they are
    return instantiate(OmegaConf.merge(compose_model(preset), changes), _convert_="all")()


def small_hybrid(name: str, *, dtype: torch.dtype = torch.float64, **changes: Any) -> LanguageModel:
    """Two layers of the mixer `name`, each followed by one of softmax attention."""
    softmax = mixer_partial("softmax_attention")
    item, mixers = sources(name)
    settings: dict[str, Any] = {
        "vocabulary": 61,
        "width": WIDTH,
        "depth": 4,
        "pattern": [item, "softmax"],
        "mixers": {**mixers, "softmax": softmax},
        "feed_forward": feed_forward(),
        **changes,
    }
    model = LanguageModel(**settings).to(dtype)
    randomise(model)
    return model


def total_loss(model: LanguageModel, *inputs: Any) -> tuple[Tensor, Tensor]:
    """The loss with the auxiliary ones, by their weights but without their counts, and the number of targets."""
    loss, count, reports = model(*inputs, False, True)
    return loss + sum(weight * reports[path] for path, weight in model.losses.items()), count


def feed_forward(hidden: int = SwiGLU.small["hidden"]) -> Callable[..., nn.Module]:
    return partial(SwiGLU, hidden=hidden)


@torch.no_grad()
def randomise(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.copy_(1 + 0.2 * noise if parameter.dim() == 1 else noise * parameter.shape[1] ** -0.5)


def tokens(batch: int, length: int, vocabulary: int = 61) -> Tensor:
    return torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(length))


def in_pieces(run: Callable[[Tensor, Sequence], Tensor], x: Tensor, lengths: list[int]) -> Tensor:
    """`run` over x cut along the time, each piece continuing from the cache that the earlier ones left."""
    cache, parts = DecodingCache(), []
    for piece in x.split(lengths, dim=1):
        parts.append(run(piece, Sequence.decoding(cache, piece.shape[0], piece.shape[1])))
        cache.advance(piece.shape[1])
    return torch.cat(parts, dim=1)
