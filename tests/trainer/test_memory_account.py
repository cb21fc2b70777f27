"""The account of a step's memory: what the model allocates on `meta` is what it allocates in a real step."""

import importlib
from functools import partial

import pytest
import torch

from longreach.kernels.documents import Documents
from longreach.models.feed_forward.experts import MixtureOfExperts
from longreach.models.feed_forward.swiglu import SwiGLU
from longreach.models.language_model import LanguageModel
from longreach.models.mixers.linear.lightning_attention import LightningAttention
from longreach.models.mixers.softmax.softmax_attention import SoftmaxAttention
from longreach.parallel.sequence import Sequence
from longreach.trainer.engine_config import EngineSettings
from longreach.trainer.memory.account import PEAK, account, account_of_run, size
from longreach.trainer.memory.allocations import Allocations
from longreach.trainer.memory.states import BUFFERS, SAVING, states_of
from longreach.trainer.optimizers.settings import OptimizerSettings
from longreach.trainer.settings import Settings

WIDTH, DEPTH, VOCABULARY, LENGTH = 16, 4, 512, 2048
CPU = torch.device("cpu")
MIXERS = {
    "lightning": partial(LightningAttention, heads=2),
}
FEED_FORWARD = {
    "swiglu": partial(SwiGLU, hidden=48),
    "experts": partial(MixtureOfExperts, hidden=24, experts=4, balance=0.1),
}


@pytest.fixture(autouse=True)
def few_logits(monkeypatch):
    """The loss needs little: else all of these models would be at their peak there."""
    module = importlib.import_module("longreach.kernels.pointwise.cross_entropy")
    monkeypatch.setattr(module, "CPU_LOGIT_BYTES", 2**16)
    monkeypatch.setattr(module, "LEAST_TOKENS", 32)


def make_model(mixer="lightning", hidden=48, vocabulary=VOCABULARY, feed_forward=None, **settings):
    return LanguageModel(
        vocabulary=vocabulary,
        width=WIDTH,
        depth=DEPTH,
        pattern=[f"{mixer}*3", "window"],
        mixers={mixer: MIXERS[mixer], "window": partial(SoftmaxAttention, heads=2, window=64)},
        feed_forward=feed_forward or partial(SwiGLU, hidden=hidden),
        **settings,
    )


def account_of(build, *, tile=None, length=LENGTH, ranks=1, device=CPU, **engine):
    settings = Settings(engine=EngineSettings(**engine))
    settings.data.sequence_length, settings.trainer.tile_tokens = length, tile
    return account(build, settings, ranks, device, shortest=LENGTH // 2)


def measured(build, length):
    """What a real step allocates at most beyond parameters, gradients and the tokens."""
    torch.manual_seed(0)
    model = build()
    model.initialise(0)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    tokens = torch.randint(VOCABULARY, (1, length))
    seq = Sequence.single(Documents.whole(1, length))
    allocations = Allocations("cpu")
    allocations.leave_out([*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters()), tokens])
    with allocations:
        loss, _, reports = model(tokens, seq, tokens, False, True)
        (loss + sum(reports[path] for path in model.losses)).backward()
    return allocations.peak


@pytest.mark.slow  # half a minute together
@pytest.mark.parametrize(
    ("mixer", "feed_forward", "checkpointing", "tile"),
    [
        ("lightning", "swiglu", "none", None),
        ("lightning", "swiglu", "mixing", 256),
        ("lightning", "experts", {"window": "full"}, 256),
    ],
)
def test_the_account_is_what_a_step_allocates(mixer, feed_forward, checkpointing, tile):
    build = partial(
        make_model, mixer, feed_forward=FEED_FORWARD[feed_forward], activation_checkpointing=checkpointing,
        tile_tokens=tile,
    )  # fmt: skip
    expected = account_of(build, tile=tile)
    assert expected.exact
    assert expected.activations() == pytest.approx(measured(build, LENGTH), rel=0.05)


def slope(build, **settings):
    """Bytes per token of all activations."""
    made = account_of(build, **settings)
    return made.activations(2 * LENGTH) - made.activations(LENGTH)


@pytest.mark.slow
def test_feed_forward_and_loss_are_a_constant_in_tiles():
    settings = {"activation_checkpointing": "full", "tile_tokens": 32}
    base, wider, more = (
        slope(partial(make_model, **changes, **settings), tile=32)
        for changes in ({}, {"hidden": 480}, {"vocabulary": 2 * VOCABULARY})
    )
    assert base == wider == more
    without = partial(make_model, activation_checkpointing="full")
    assert slope(without) < slope(partial(without, hidden=480))


@pytest.mark.slow
def test_full_checkpointing_keeps_one_tensor_per_block():
    kept = {share.part: share for share in account_of(partial(make_model, activation_checkpointing="full")).kept}
    # Each block's output, and for the last norm one number per token: its root mean square.
    blocks = kept["kept: residual stream and norms"].per_token
    assert blocks == pytest.approx(DEPTH * WIDTH * 4, abs=2 * 4)
    # The embedding's output, and the gradient of what the head has read.
    assert kept["kept: embedding and loss"].per_token == 2 * WIDTH * 4
    assert kept["kept: embedding and loss"].fixed == pytest.approx(VOCABULARY * WIDTH * 4, abs=2 * 4)
    assert "kept: feed-forward" not in kept


@pytest.mark.slow
def test_what_is_offloaded_is_on_the_host():
    stays, leaves = (
        account_of(partial(make_model, activation_checkpointing="full", offload_activations=away))
        for away in (False, True)
    )
    (host,) = (share for share in leaves.kept if share.host)
    assert host.per_token == (DEPTH - 1) * WIDTH * 4  # the last block's input stays
    assert leaves.activations() < stays.activations()


def test_states_by_zero_stage():
    def states(**engine):
        shares = states_of(make_model(), Settings(engine=EngineSettings(**engine)), 4)
        return {share.part: (round(share.fixed), share.host) for share in shares}

    number = sum(parameter.numel() for parameter in make_model().parameters())
    saving = {SAVING: (3 * number, True)}
    assert states(zero_stage=0) == saving | {
        "parameters": (4 * number, False), "gradients": (4 * number, False), "moments": (8 * number, False)
    }  # fmt: skip
    bucket = {BUFFERS: (2 * 10**9, False)}
    assert states(zero_stage=2) == saving | bucket | {
        "parameters": (4 * number, False), "gradients": (number, False), "float32 masters": (number, False),
        "moments": (2 * number, False),
    }  # fmt: skip


def test_states_by_optimizer():
    """Two moments per number, one with Lion and of the matrices that Muon steps; all are in the copy for saving."""
    model = make_model()
    number = sum(parameter.numel() for parameter in model.parameters())
    inner = sum(x.numel() for name, x in model.named_parameters() if name.startswith("blocks") and x.dim() == 2)
    assert 0 < inner < number
    for kind, moments in (("adamw", 8 * number), ("lion", 4 * number), ("muon", 8 * number - 4 * inner)):
        settings = Settings(optimizer=OptimizerSettings(kind=kind))
        held = {share.part: share.fixed for share in states_of(model, settings, 1)}
        assert (held["moments"], held[SAVING]) == (moments, moments + 4 * number)


def test_ranks_that_share_a_row_are_rehearsed():
    settings = Settings()
    settings.parallel.sequence, settings.data.sequence_length = 2, 2 * LENGTH
    made = account(partial(make_model, activation_checkpointing="full"), settings, 2, torch.device("cuda"))
    assert not made.exact
    assert made.tokens == LENGTH
    assert made.kept[0].per_token > 0


def test_allocations_count_each_storage_once_until_it_is_let_go():
    with Allocations("cpu") as allocations:
        x = torch.empty(100)
        y = x.view(10, 10) + 1
        z = y[0]
        assert (allocations.live, allocations.peak) == (800, 800)
        del x, y
        assert allocations.live == 400
        del z
    assert (allocations.live, allocations.peak) == (0, 800)


def test_sizes_are_read_by_people():
    assert [size(n) for n in (1023, 2048, 3 * 2**20, 5 * 2**40)] == ["1,023 B", "2.0 KiB", "3.0 MiB", "5,120.00 GiB"]


class Reads(SwiGLU):
    """Asks for a value where it runs the code of a CPU."""

    def forward(self, x, seq):
        if seq.backend == "chunked":
            x.sum().item()
        return super().forward(x, seq)


def test_what_is_not_counted_is_said():
    build = partial(make_model, feed_forward=partial(Reads, hidden=48))
    made = account_of(build, length=64)
    assert not made.exact
    assert made.missing.startswith("what ops need meanwhile, as model.feed_forward (Reads), layer 0 reads values (")
    assert made.lines()[-1] == f"not counted: {made.missing}"
    assert made.missing in made.summary()


def test_the_account_of_a_run_is_a_dictionary_of_bytes_and_never_an_error(monkeypatch):
    settings = Settings()
    settings.data.sequence_length = 64
    made = account_of_run(make_model, settings, 1, CPU)
    figures = made.figures()
    assert figures[PEAK] == made.peak()
    assert figures["parameters"] == 4 * sum(parameter.numel() for parameter in make_model().parameters())
    assert {"kept: lightning", "kept: feed-forward"} < set(figures)

    class Unable(SwiGLU):
        def forward(self, x, seq):
            raise ValueError("no, I will not\nat all")

    assert "no, I will not" in account_of_run(
        partial(make_model, feed_forward=partial(Unable, hidden=8)), settings, 1, CPU
    )
    monkeypatch.setattr(importlib.import_module("longreach.trainer.memory.account"), "SECONDS", 0.0)
    assert account_of_run(make_model, settings, 1, CPU) == "counting has taken too long"
