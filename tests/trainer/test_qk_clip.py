"""QK-clip: heads above the bound are brought to it, all else stays bit for bit, alike on ranks and ZeRO stages."""

import math
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from distributed import run_ranks
from small_model import ADAM, full, make_engine
from test_trainer import lines, settings, train
from torch import nn
from torch.nn import functional as F

from longreach.kernels.documents import Documents
from longreach.kernels.masks import Mask
from longreach.kernels.softmax.largest_logits import SHARPNESS
from longreach.models.feed_forward.swiglu import SwiGLU
from longreach.models.language_model import LanguageModel
from longreach.models.mixer import Mixer
from longreach.models.mixers.linear.lightning_attention import LightningAttention
from longreach.models.mixers.softmax.attention import Attention
from longreach.models.mixers.softmax.cosine_attention import CosineAttention
from longreach.models.mixers.softmax.differential_attention import DifferentialAttention
from longreach.models.mixers.softmax.forgetting_attention import ForgettingAttention
from longreach.models.mixers.softmax.latent_attention import LatentAttention
from longreach.models.mixers.softmax.softmax_attention import SoftmaxAttention
from longreach.models.mixers.sparse.block_sparse_attention import MoBA
from longreach.models.mixers.sparse.native_sparse_attention import NativeSparseAttention
from longreach.models.part import Clipped
from longreach.parallel import ops
from longreach.parallel.layout import Layout
from longreach.parallel.mesh import Mesh
from longreach.parallel.sequence import Sequence
from longreach.trainer.data.settings import DataSettings, RecallSettings
from longreach.trainer.evaluation.settings import EvaluationSettings
from longreach.trainer.optimizers.qk_clip import QKClip, check_clipping
from longreach.trainer.optimizers.settings import OptimizerSettings
from longreach.trainer.preparation import check_model
from longreach.trainer.settings import Settings

LENGTH, VOCABULARY, WINDOW, MOST = 24, 31, 9, 2.0
LENGTHS = [[7, 12], [24]]  # row 0 ends in padding


class Windowed(Attention):
    """As a user writes it: the base class's projections, and a mask of its own."""

    measures_logits = True

    def attend(self, q, k, v, seq):
        return ops.softmax_attention(q, k, v, seq=seq, mask=Mask(window=WINDOW), largest=self.largest_logits)


class Plain(Mixer):
    """Without the base class."""

    def __init__(self, *, width, heads=4):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.output = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x, seq):
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)) for layer in (self.query, self.key, self.value))
        return self.output(ops.softmax_attention(q, k, v, seq=seq, largest=self.largest_logits).flatten(-2))

    def mixing_flops(self, seq):
        return 0


class Stated(Plain):
    def clipped(self):
        return Clipped(self.query, self.heads)


class Forgetful(SoftmaxAttention):
    """Inherits the word that its logits are measured, and does not keep it."""

    def attend(self, q, k, v, seq):
        return ops.softmax_attention(q, k, v, seq=seq)


class Unmeasured(Attention):
    def attend(self, q, k, v, seq):
        return ops.softmax_attention(q, k, v, seq=seq)


class Bare(Attention):
    """Attends as the base class does."""


MIXERS = {
    "softmax": partial(SoftmaxAttention, heads=4, kv_heads=2, rope_base=None, window=WINDOW, bias=True),
    "latent": partial(LatentAttention, heads=2, latent_rank=6, query_rank=5, rope_dim=0, rope_base=None, value_dim=3),
    "lightning": partial(LightningAttention, heads=2),
}
LOUD = {"blocks.0.mixer": 1, "blocks.1.mixer": 0}  # the head whose queries are planted large


def make_model(checkpointing="none", mixers=MIXERS):
    model = LanguageModel(
        vocabulary=VOCABULARY,
        width=16,
        depth=len(mixers),
        pattern=list(mixers),
        mixers=dict(mixers),
        feed_forward=partial(SwiGLU, hidden=20),
        activation_checkpointing=checkpointing,
        initial_std=0.1,
    )
    model.initial_value = partial(initial_value, model.initial_value)
    return model


def initial_value(original, name, shape, seed):
    """The model's own, with one loud head in each layer of softmax attention, whose biases are not 0 either."""
    value = original(name, shape, seed)
    path, _, layer = name.rpartition(".query.")
    if path in LOUD:
        value = value + 0.01 if layer == "bias" else value
        value.unflatten(0, (2 if path == "blocks.1.mixer" else 4, -1))[LOUD[path]] *= 200
    return value


def batch():
    return torch.randint(VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(0))


def logits_of(mixer, x):
    """The largest logit of each head, by every pair."""
    split = (2, LENGTH, mixer.heads, -1)
    if isinstance(mixer, LatentAttention):
        q = mixer.query(mixer.query_norm(mixer.query_down(x))).view(split)
        rows = mixer.attend.weight.view(mixer.heads, -1, 6)[:, : mixer.key_dim]
        k = torch.einsum("btc,hkc->bthk", mixer.latent_norm(mixer.latent(x)), rows)
    else:
        q = F.linear(x, mixer.query.weight, mixer.query.bias).view(split)
        k = mixer.key(x).view(2, LENGTH, 2, -1).repeat_interleave(2, dim=2)
    logits = torch.einsum("bihk,bjhk->bhij", q, k) / math.sqrt(q.shape[-1])
    place, window = torch.arange(LENGTH), WINDOW if isinstance(mixer, SoftmaxAttention) else LENGTH
    for row, lengths in enumerate(LENGTHS):
        ids = torch.full((LENGTH,), -1)
        ids[: sum(lengths)] = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
        back = place[:, None] - place
        seen = (ids[:, None] == ids) & (ids >= 0) & (back >= 0) & (back < window)
        logits[row] = logits[row].masked_fill(~seen, -math.inf)
    return logits.amax((0, 2, 3))


@torch.no_grad()
def inputs_of(model):
    """What each layer of softmax attention reads of the batch."""
    read, handles = {}, []
    for path in LOUD:
        hook = lambda module, args, path=path: read.update({path: args[0]})  # noqa: E731
        handles.append(model.get_submodule(path).register_forward_pre_hook(hook))
    model(batch(), Sequence.single(Documents.from_lengths(LENGTHS, LENGTH)))
    for handle in handles:
        handle.remove()
    return read


@pytest.mark.parametrize("checkpointing", ["none", "full", "mixing"])
def test_loud_heads_are_brought_to_the_bound(checkpointing):
    model = make_model(checkpointing)
    model.initialise(0)
    read = inputs_of(model)
    clip = QKClip(model, MOST, SimpleNamespace(world_size=1), torch.device("cpu"))
    for row, lengths in enumerate(LENGTHS):  # micro-batches
        tokens, seq = batch()[row : row + 1], Sequence.single(Documents.from_lengths([lengths], LENGTH))
        loss, _ = model(tokens, seq, tokens)
        loss.backward()
    factors, largest = clip.factors()
    before = {path: logits_of(model.get_submodule(path), x) for path, x in read.items()}
    torch.testing.assert_close(largest, max(x.max() for x in before.values()), rtol=1e-4, atol=0)
    for path, head in LOUD.items():
        mixer = model.get_submodule(path)
        assert {head} == set((before[path] > MOST).nonzero().flatten().tolist())
        for parameter in mixer.query.parameters():
            assert [x == 1 for x in factors.pop(parameter).tolist()] == [each != head for each in range(mixer.heads)]
            with torch.no_grad():
                parameter.unflatten(0, (mixer.heads, -1))[head] *= MOST / before[path][head]
        after = logits_of(mixer, read[path])
        torch.testing.assert_close(after[head], torch.tensor(MOST), rtol=1e-5, atol=0)
    assert not factors
    assert clip.factors()[1] == -math.inf  # the next step begins anew


KINDS = {
    "rotated": partial(SoftmaxAttention, heads=4, kv_heads=1, bias=True),
    "convolved": partial(SoftmaxAttention, heads=4, kv_heads=2, conv_size=3, log_length=4),
    "differential": partial(DifferentialAttention, heads=2),
    "forgetting": partial(ForgettingAttention, heads=4, qk_norm=None),
    "latent": partial(LatentAttention, heads=4, latent_rank=6, rope_dim=4, rope_heads=2, sink_logits=True),
    "own mask": partial(Windowed, heads=4, kv_heads=2),
    "own class": partial(Bare, heads=4),
    "own mixer": Stated,
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_rows_of_a_head_scale_its_logits_alone(kind):
    model = make_model(mixers={kind: KINDS[kind]})
    model.initialise(0)
    (_, part), seq = next(model.leaves()), Sequence.single(Documents.from_lengths(LENGTHS, LENGTH))
    queries, heads = part.clipped()
    found = []
    for factor in (1.0, 0.5):
        with torch.no_grad():
            for parameter in queries.parameters():
                parameter.unflatten(0, (heads, -1))[2] *= factor
        part.largest_logits = torch.full((heads,), -math.inf)
        model(batch(), seq)
        found.append(part.largest_logits)
    assert found[0].min() > 0.1
    assert torch.equal(found[1][[0, 1, 3]], found[0][[0, 1, 3]])
    above = math.log(LENGTH) / SHARPNESS  # of which each has some
    assert (found[1][2] - found[0][2] / 2).abs() < above
    assert found[1][2] < found[0][2] - above


def step_on(rank, world, cases):
    """By stage, dtype and number of sequence ranks: the float32 values, those that the model has, and the factors."""
    results = []
    for stage, dtype, sequence in cases:
        config = {"zero_optimization": {"stage3_param_persistence_threshold": 0}} if stage == 3 else {}
        if (stage, dtype) == (1, "float32"):
            config = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
        optimizer = replace(ADAM, kind="muon" if stage == 2 else "adamw")
        engine = make_engine(stage, model=make_model, dtype=dtype, config=config, optimizer=optimizer)
        before = {name: value.clone() for name, value in full(engine).items()}
        mesh, layout = Mesh.create(sequence), Layout(LENGTH, sequence, 2)
        clip = QKClip(engine.module, MOST, mesh, torch.device("cpu"))
        for row in range(mesh.data_rank, 2, mesh.data_ranks):
            documents = Documents.from_lengths(LENGTHS[row : row + 1], LENGTH)
            seq = Sequence(documents, layout, mesh.sequence_rank, mesh.sequence_group)
            tokens = seq.shard(batch()[row : row + 1])
            engine.backward(engine(tokens, seq, tokens)[0], 40)
        factors, largest = clip.factors()
        names = {parameter: name for name, parameter in engine.named_parameters()}
        engine.step(0.0, factors)  # which moves nothing
        seen = {}
        for name, parameter in engine.named_parameters():
            with engine.gather([parameter]):
                seen[name] = parameter.detach().clone()
        by_name = {names[parameter]: factor for parameter, factor in factors.items()}
        results.append((before, full(engine), seen, by_name, float(largest)))
    return results


CASES = [(stage, dtype, sequence) for stage in (1, 2, 3) for dtype, sequence in (("float32", 2), ("bfloat16", 1))]


@pytest.mark.slow
def test_ranks_and_stages_clip_alike():
    one = run_ranks(1, step_on, [(0, "float32", 1), (1, "float32", 1), (3, "bfloat16", 1)])[0]
    for of_rank in (one, *run_ranks(2, step_on, [(0, "float32", 2), *CASES])):
        for before, after, seen, factors, largest in of_rank:
            bfloat16 = next(iter(seen.values())).dtype == torch.bfloat16
            assert largest == pytest.approx(one[0][4], rel=3e-2 if bfloat16 else 1e-4)
            assert set(factors) == {
                f"blocks.{i}.mixer.query.{of}" for i, of in ((0, "weight"), (0, "bias"), (1, "weight"))
            }
            for name, value in before.items():
                assert torch.equal(seen[name], after[name].to(seen[name].dtype)), name
                factor = factors.get(name, torch.ones(1))
                rows = value.unflatten(0, (len(factor), -1))
                by_head = factor.view(-1, *[1] * (rows.dim() - 1))
                assert torch.equal(after[name], (rows * by_head).view(value.shape)), name
                assert int((factor != 1).sum()) == (name in factors)
                torch.testing.assert_close(
                    factor, one[0][3].get(name, torch.ones(1)), rtol=3e-2 if bfloat16 else 1e-4, atol=0
                )


@pytest.mark.slow
def test_a_run_logs_the_largest_logit_and_keeps_to_the_bound(tmp_path):
    """Its first step is alike with a bound and without; one that no logit reaches changes no number."""
    data = DataSettings("recall", sequence_length=32, rows_per_step=4, vocabulary_size=32)
    data = replace(data, recall=RecallSettings(pairs=2, length=16))
    losses, logits = {}, {}
    for name, most in (("off", None), ("far", 1e6), ("near", 1e-3)):
        chosen = settings(tmp_path, tmp_path / name, optimizer__qk_clip=most, trainer__steps=3, parallel__sequence=2)
        chosen.data, chosen.evaluation = data, EvaluationSettings(every=0)
        run_ranks(2, train, chosen)
        losses[name] = [line["loss"] for line in lines(tmp_path / name) if "loss" in line]
        logits[name] = [line.get("qk_largest_logit") for line in lines(tmp_path / name) if "loss" in line]
    assert logits["off"] == [None] * 3
    assert losses["off"] == losses["far"] != losses["near"]
    assert losses["near"][0] == losses["off"][0]
    assert logits["far"][0] == logits["near"][0]
    assert min(logits["far"]) > 1e-3
    assert logits["near"][2] < logits["far"][2]


@pytest.mark.parametrize(
    ("mixer", "why"),
    [
        (partial(SoftmaxAttention, heads=2, qk_norm="head"), "whose qk_norm .head. bounds logits"),
        (partial(SoftmaxAttention, heads=2, softcap=30.0), "whose softcap bounds logits already"),
        (partial(Unmeasured, heads=2), "whose largest logits are not measured"),
        (partial(CosineAttention, heads=2), "whose largest logits are not measured"),
        (partial(MoBA, heads=2, block_size=4, top_k=2), "whose largest logits are not measured"),
        (
            partial(NativeSparseAttention, heads=2, **NativeSparseAttention.small),
            "whose largest logits are not measured",
        ),
    ],
)
def test_attention_that_cannot_be_clipped_is_refused(mixer, why):
    with torch.device("meta"):
        model = make_model(mixers={"softmax": MIXERS["softmax"], "other": mixer})
    said = rf"optimizer.qk_clip must be null with model.mixers.other \({mixer.func.__name__}\), {why}.*; got 100.0"
    with pytest.raises(ValueError, match=said):
        check_clipping(model, 100.0, [])
    check_clipping(model, None, [])


@pytest.mark.parametrize(
    ("mixer", "why"),
    [
        (partial(Forgetful, heads=2), r"\(Forgetful\), which says how it is clipped and does not raise"),
        (Plain, r"\(Plain\), which runs softmax_attention and does not say how it is clipped"),
        (Stated, None),
        (partial(Windowed, heads=2), None),
        (partial(Bare, heads=2), None),
        (partial(LightningAttention, heads=2), None),
    ],
)
def test_a_mixer_of_ones_own_is_clipped_or_refused_by_name(mixer, why):
    def build(configuration):
        return make_model(mixers={"softmax": MIXERS["softmax"], "latent": MIXERS["latent"], "other": mixer})

    chosen = Settings(optimizer=OptimizerSettings(qk_clip=100.0))
    chosen.data.sequence_length = LENGTH
    refused = nullcontext() if why is None else pytest.raises(ValueError, match=rf"^optimizer.qk_clip .*other {why}")
    with refused:
        check_model(build, {"vocabulary": VOCABULARY}, chosen)
    chosen.optimizer = OptimizerSettings()
    check_model(build, {"vocabulary": VOCABULARY}, chosen)


def test_what_has_no_effect_is_refused():
    with torch.device("meta"):
        linear, softmax = (make_model(mixers={name: MIXERS[name]}) for name in ("lightning", "softmax"))
    with pytest.raises(ValueError, match="qk_clip must be null for a model without softmax attention"):
        check_clipping(linear, 100.0, [])
    with pytest.raises(ValueError, match=r"null where optimizer.only leaves out the queries of model.mixers.s"):
        check_clipping(softmax, 100.0, [softmax.get_submodule("blocks.0.mixer").query.weight])
    check_clipping(softmax, 100.0, [softmax.head.weight])


@pytest.mark.parametrize("most", [0.0, -1.0, math.inf])
def test_a_bound_is_positive(most):
    replace(ADAM, qk_clip=100.0).check()
    with pytest.raises(ValueError, match="qk_clip must be positive"):
        OptimizerSettings(qk_clip=most).check()
