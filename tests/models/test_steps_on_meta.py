"""No mixer and no preset makes the host wait for the device in a step, on one rank and on several."""

import contextlib
from collections.abc import Callable
from functools import partial
from itertools import count

import pytest
import torch
import triton
from model_presets import MODELS, build_model, few_or_many, few_or_slow, small_hybrid, sources
from steps_on_meta import watched_steps
from torch import Tensor

from longreach.models.language_model import LanguageModel
from longreach.models.mixers.linear.lightning_attention import LightningAttention
from longreach.models.mixers.softmax.latent_attention import LatentAttention
from longreach.models.mixers.softmax.softmax_attention import SoftmaxAttention
from longreach.parallel.mesh import Mesh
from longreach.parallel.sequence import Sequence
from longreach.parallel.strategy import Strategy
from longreach.trainer.diagnosis.synchronisation import Synchronisations
from longreach.trainer.optimizers.qk_clip import QKClip

PRESETS = [preset for preset in MODELS if preset.endswith("_tiny")] + ["quickstart"]
BY_GATHER, BY_HEADS = Strategy("gather"), Strategy("ulysses", "ulysses")


def waits(
    build: Callable[[], LanguageModel], world: int = 1, strategy: Strategy | None = None, ulysses: int = 1
) -> list[str]:
    found: list[Synchronisations] = []
    watched_steps(build, found, world, strategy or Strategy(), ulysses)
    assert len(found) == world
    return sorted({str(each) for by_rank in found for each in by_rank})


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_waits_for_nothing(preset: str) -> None:
    assert not waits(partial(build_model, preset))


def layer_of(mixer: str, **changes: str) -> Callable[[], LanguageModel]:
    item, mixers = sources(mixer)
    return partial(small_hybrid, mixer, dtype=torch.bfloat16, depth=1, pattern=[item], mixers=mixers, **changes)


@pytest.mark.parametrize("mixer", few_or_slow())
def test_a_mixer_waits_for_nothing(mixer: str) -> None:
    assert not waits(layer_of(mixer))


@pytest.mark.slow
@pytest.mark.parametrize("mixer", few_or_many())
def test_a_mixer_on_ranks_waits_for_nothing(mixer: str) -> None:
    assert not waits(layer_of(mixer), 2)


@pytest.mark.slow
@pytest.mark.parametrize("mixer", few_or_many())
def test_a_mixer_on_more_ranks_waits_for_nothing(mixer: str) -> None:
    assert not waits(layer_of(mixer), 4)


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "world", "ulysses"), [(BY_GATHER, 2, 1), (BY_HEADS, 2, 2), (BY_HEADS, 4, 2)])
@pytest.mark.parametrize("mixer", ["lightning_attention", "gated_deltanet", "sliding_window_attention"])
def test_other_strategies_wait_for_nothing(mixer: str, strategy: Strategy, world: int, ulysses: int) -> None:
    assert not waits(layer_of(mixer), world, strategy, ulysses)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["full", "mixing"])
@pytest.mark.parametrize("mixer", ["native_sparse_attention", "kimi_delta_attention"])
def test_recomputation_waits_for_nothing(mixer: str, what: str) -> None:
    assert not waits(layer_of(mixer, activation_checkpointing=what), 2)


CLIPPED = {
    "softmax": partial(SoftmaxAttention, heads=2, window=40),
    "latent": partial(LatentAttention, heads=2, **LatentAttention.small),
}


@pytest.mark.parametrize("world", [1, 2])
def test_qk_clip_waits_for_nothing(world: int) -> None:
    clips: list[QKClip] = []

    def build() -> LanguageModel:
        model = small_hybrid("lightning_attention", pattern=list(CLIPPED), mixers=CLIPPED, depth=2)
        clips.append(QKClip(model, 1.0, Mesh(), torch.device("meta")))
        return model

    assert not waits(build, world)
    with Synchronisations("meta") as watched:
        factors, largest = clips[0].factors()
    assert not watched.found
    assert largest.device.type == "meta"
    assert len(factors) == 2


class InBackward(torch.autograd.Function):
    """Does something on the way back."""

    @staticmethod
    def forward(ctx, x, act):
        ctx.act = act
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.act(gradient)
        return gradient, None


class Planted(LightningAttention):
    """A mixer that does something else too, on the way forward or back."""

    def __init__(
        self, *, width: int, layer: int, depth: int, act: Callable[[Tensor], object], backward: bool
    ) -> None:  # fmt: skip
        super().__init__(width=width, heads=2, layer=layer, depth=depth)
        self.act, self.in_backward = act, backward

    def forward(self, x: Tensor, seq: Sequence) -> Tensor:
        if self.in_backward:
            return InBackward.apply(super().forward(x, seq), self.act)
        self.act(x)
        return super().forward(x, seq)


@triton.jit
def kernel(x):
    pass


FAULTS = {
    "item": (lambda x: x[0, 0, 0].item(), "_local_scalar_dense"),
    "cpu": (lambda x: x.cpu(), "a copy from meta to cpu"),
    "tensor of a list": (lambda x: torch.tensor([1.0, 2.0], device=x.device), "tensor of values of the host"),
    "nonzero": (lambda x: x.nonzero(), "nonzero"),
    "a mask": (lambda x: x[x > 0], "index by a mask"),
    "a copy": (lambda x: torch.zeros(3, device="cpu").to(x.device), "a pageable copy to meta"),
    "another device": (
        lambda x: x + torch.zeros(x.shape, device="cpu"),
        "add of tensors on meta and on another device",
    ),
}


def planted(act: Callable[[Tensor], object], backward: bool) -> Callable[[], LanguageModel]:
    mixers = {"planted": partial(Planted, act=act, backward=backward)}
    return partial(small_hybrid, "lightning_attention", pattern=["planted"], mixers=mixers, depth=1)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault: str, backward: bool) -> None:
    (function, operation), found, steps = FAULTS[fault], [], count()

    def act(x: Tensor) -> None:
        if next(steps):  # in the watched step
            function(x)

    with contextlib.suppress(RuntimeError):
        watched_steps(planted(act, backward), found)
    assert [each.operation for each in found[0]] == [operation]
    assert "test_steps_on_meta.py:" in str(found[0].found[0])


@pytest.mark.parametrize("backward", [False, True])
def test_a_kernel_that_gets_a_tensor_of_another_device_is_found(backward: bool) -> None:
    with pytest.raises(RuntimeError, match="kernel must get its tensors on meta; got x on cpu"):
        watched_steps(planted(lambda x: kernel[(1,)](torch.zeros(3, device="cpu")), backward), [])
