"""What step 1 would fail on is told before anything is made: a forward and backward on tensors without data."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longreach.models.feed_forward.swiglu import SwiGLU
from longreach.models.language_model import LanguageModel
from longreach.models.mixer import Mixer, PartError
from longreach.models.mixers.linear.lightning_attention import LightningAttention
from longreach.models.mixers.softmax.softmax_attention import SoftmaxAttention
from longreach.models.mixers.state_space.mamba import Mamba
from longreach.parallel import ops
from longreach.parallel.sequence import Sequence
from longreach.trainer.preparation import check_model
from longreach.trainer.ranks.settings import ParallelSettings
from longreach.trainer.settings import Settings


class Plain(Mixer):
    """Linear attention, as a user writes it."""

    def __init__(self, *, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.output = (nn.Linear(width, width, bias=False) for _ in range(4))

    def projected(self, x: Tensor) -> list[Tensor]:
        return [layer(x).unflatten(-1, (self.heads, -1)) for layer in (self.query, self.key, self.value)]

    def forward(self, x: Tensor, seq: Sequence) -> Any:
        return self.output(ops.gated_linear_attention(*self.projected(x), seq=seq).flatten(-2))

    def mixing_flops(self, seq: Sequence) -> Any:
        return 0


class Scaled(Plain):
    def __init__(self, *, width: int) -> None:
        super().__init__(width=width)
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, seq: Sequence) -> Tensor:
        return super().forward(x * self.scale, seq)


class Unanswered(Scaled):
    def initialise_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> Any:
        tensor.fill_(1.0)


class Normed(Plain):
    def __init__(self, *, width: int) -> None:
        super().__init__(width=width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, seq: Sequence) -> Tensor:
        return super().forward(self.norm(x), seq)


class Twice(Plain):
    def forward(self, x: Tensor, seq: Sequence) -> Tensor:
        q, k, v = self.projected(x)
        both = [ops.gated_linear_attention(*order, seq=seq) for order in ((q, k, v), (k, q, v))]
        return self.output(sum(both).flatten(-2))  # type: ignore[union-attr]


class Shifted(Plain):
    def forward(self, x: Tensor, seq: Sequence) -> Tensor:
        return super().forward(ops.token_shift(ops.token_shift(x, seq=seq), seq=seq), seq)


class Wide(Plain):
    def __init__(self, *, width: int) -> None:
        super().__init__(width=width)
        self.output = nn.Linear(width, 2 * width)


class Silent(Plain):
    def forward(self, x: Tensor, seq: Sequence) -> None:
        super().forward(x, seq)


class Float32(Plain):
    def forward(self, x: Tensor, seq: Sequence) -> Tensor:
        return super().forward(x, seq).float()


class Publishing(Plain):
    publishes = ("values",)


class Misspelt(Plain):
    def forward(self, x: Tensor, seq: Sequence) -> Tensor:
        return self.ouput(x)


class WithoutSequence(Plain):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return x


class WithoutHeads(Plain):
    def forward(self, x: Tensor, seq: Sequence) -> Tensor:
        return self.output(ops.gated_linear_attention(self.query(x), self.key(x), self.value(x), seq=seq))


class WrongDecay(Plain):
    def forward(self, x: Tensor, seq: Sequence) -> Tensor:
        q, k, v = self.projected(x)
        return self.output(ops.gated_linear_attention(q, k, v, F.logsigmoid(self.query(x)), seq=seq).flatten(-2))


class Uncounted(Plain):
    def mixing_flops(self, seq: Sequence) -> None:
        pass


class Late(Plain):
    def at_step(self) -> None:  # type: ignore[override]
        pass


class Idle(Plain):
    def __init__(self, *, width: int) -> None:
        super().__init__(width=width)
        self.unused = nn.Linear(width, width, bias=False)


class Scattered(Plain):
    def __init__(self, *, width: int) -> None:
        super().__init__(width=width)
        self.table = torch.ones(width)
        self.register_buffer("average", torch.zeros(width))
        self.placed = nn.Parameter(torch.zeros(width, width, device="cpu"))
        self.last, self.output = self.output, nn.Identity()

    def forward(self, x: Tensor, seq: Sequence) -> Tensor:
        q, k, v = self.projected(x @ self.placed)
        return self.last(ops.gated_linear_attention(q, k, v, seq=seq).flatten(-2) * self.table)


class Counting(Plain):
    def __init__(self, *, width: int) -> None:
        super().__init__(width=width)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))


class Curious(Plain):
    def forward(self, x: Tensor, seq: Sequence) -> Tensor:
        return super().forward(x if x.abs().max().item() < 1e9 else x * 0, seq)


class Blocks(Plain):
    """Works on a whole number of blocks of 4,096 tokens."""

    def forward(self, x: Tensor, seq: Sequence) -> Tensor:
        return super().forward(x.unflatten(1, (-1, 4096)).flatten(1, 2), seq)


def checked(part: Any, *, dtype: str = "float32", length: int = 64, **parallel: Any) -> list[str]:
    settings, notes = Settings(), []
    settings.parallel = ParallelSettings(**parallel)
    settings.data.sequence_length, settings.trainer.dtype = length, dtype

    def build(model: dict[str, Any]) -> LanguageModel:
        mixers = {"mine": part if isinstance(part, partial) else partial(part)}
        return LanguageModel(pattern=["mine"], mixers=mixers, feed_forward=partial(SwiGLU, hidden=48), **model)

    check_model(build, {"vocabulary": 61, "width": 32, "depth": 2}, settings, notes.append)
    return notes


def test_a_sound_mixer_says_nothing() -> None:
    assert checked(Plain) == checked(Plain, dtype="bfloat16") == checked(Plain, sequence=4, length=128) == []
    assert checked(Normed) == []  # the weights of torch's norms start at 1


def test_a_mixer_may_ask_for_the_whole_length() -> None:
    assert checked(Blocks, length=1 << 17, sequence=8) == []


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (Scaled, "blocks.0.mixer.scale of model.mixers.mine must get its initial value from initialise_parameter"),
        (Unanswered, "blocks.0.mixer.scale must be answered for with True or False; got None"),
        (Wide, r"model.mixers.mine \(Wide\), layer 0: forward must return .* \[1, 64, 32\] .* got \[1, 64, 64\]"),
        (Silent, r"model.mixers.mine \(Silent\), layer 0: .* got nothing. End with a return"),
        (Publishing, r"must return its output and what it publishes, values; got \[1, 64, 32\]"),
        (Counting, "buffers must be float32 to be in checkpoints; got blocks.0.mixer.steps in int64, "),
        (Uncounted, r"model.mixers.mine \(Uncounted\), layer 0: mixing_flops must count .* as a number; got None"),
    ],
)
def test_what_a_mixer_leaves_out_is_one_line(part: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checked(part)


def test_an_output_of_another_type_is_refused_where_it_is_another() -> None:
    assert checked(Float32) == []
    with pytest.raises(ValueError, match=r"in bfloat16; got \[1, 64, 32\] in float32. .* cast back"):
        checked(Float32, dtype="bfloat16")


@pytest.mark.parametrize(
    ("part", "kind", "message"),
    [
        (Misspelt, AttributeError, "has no attribute 'ouput'"),
        (WithoutSequence, TypeError, "takes 2 positional arguments but 3 were given"),
        (Late, TypeError, "at_step"),
        (WithoutHeads, PartError, r"q must be \[B, T, G, K\]"),
        (WrongDecay, PartError, r"log_decay must be \[H\]"),
        (Twice, PartError, "slot must differ between the ops that a mixer calls; got 'state' twice"),
        (Shifted, PartError, "got 'shift' twice. Name one of them otherwise: slot='shift 2'"),
    ],
)
def test_errors_in_forward_come_as_they_are_with_the_mixers_name(
    part: Any, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message) as error:
        checked(part)
    said = f"{error.value} {getattr(error.value, '__notes__', '')}"
    assert f"model.mixers.mine ({part.__name__}), layer 0" in said


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_slot_used_twice_is_told_on_any_number_of_ranks(ranks: int) -> None:
    for part in (Twice, Shifted):
        with pytest.raises(PartError, match="slot must differ"):
            checked(part, sequence=ranks)


def test_what_is_no_error_but_hardly_meant_is_noted() -> None:
    (idle,) = checked(Idle)
    assert "Idle learns nothing in unused.weight" in idle
    noted = "\n".join(checked(Scattered))
    for what in ("plain tensors", "(table)", "(placed)", "no layer called output"):
        assert what in noted
    assert "keeps plain tensors, which do not move with the model (average)" not in noted


def test_a_mixer_that_looks_at_values_is_left_to_step_one() -> None:
    (note,) = checked(Curious)
    assert "model.mixers.mine (Curious), layer 0 cannot be tried before step 1" in note


def attention(heads: int, kv_heads: int) -> Any:
    return partial(SoftmaxAttention, heads=heads, kv_heads=kv_heads, head_dim=8)


ULYSSES, LINEAR = {"attention": "ulysses"}, {"recurrent": "ulysses"}


@pytest.mark.parametrize(
    ("part", "parallel", "got"),
    [
        (attention(1, 1), {"sequence": 2, **ULYSSES}, "heads must be a multiple of the 2 ranks .* got 1"),
        (attention(6, 2), {"sequence": 4, **ULYSSES}, "heads must be a multiple of the 4 ranks .* got 6"),
        (attention(6, 3), {"sequence": 2, **ULYSSES}, "key/value heads .* of the 2 ranks .* got 3"),
        (attention(2, 2), {"sequence": 4, "mixers": {"mine": "ulysses"}}, "heads must be a multiple of the 4"),
        (partial(LightningAttention, heads=1), {"sequence": 2, **LINEAR}, "heads must be a multiple of the 2"),
        (partial(LightningAttention, heads=4), {"sequence": 8, **LINEAR}, "heads must be a multiple of the 8"),
        (partial(Mamba, expansion=1), {"sequence": 64, **LINEAR}, "channels must be .* the 64 ranks"),
    ],
)  # fmt: skip
def test_heads_that_ranks_do_not_divide_are_refused_before_they_start(
    part: Any, parallel: dict[str, Any], got: str
) -> None:
    with pytest.raises(ValueError, match=rf"^model.mixers.mine \(.*\), layer 0: {got}.* lower parallel.ulysses"):
        checked(part, **parallel)


@pytest.mark.parametrize(
    ("part", "parallel"),
    [
        (attention(4, 1), {"sequence": 2, **ULYSSES}),
        (attention(6, 2), {"sequence": 2, **ULYSSES}),
        (attention(2, 2), {"sequence": 4, "ulysses": 2, **ULYSSES}),
        (attention(1, 1), {"sequence": 2}),
        (partial(LightningAttention, heads=1), {"sequence": 2}),
        (partial(LightningAttention, heads=2), {"sequence": 2, **LINEAR}),
        (partial(Mamba, expansion=1), {"sequence": 32, **LINEAR}),
    ],
)
def test_heads_that_ranks_divide_pass(part: Any, parallel: dict[str, Any]) -> None:
    assert checked(part, **parallel) == []
