"""Sparse latent attention against transformers' DeepSeek-V3.2 and dense code; its loss, and what that reaches."""

from functools import partial

import pytest
import torch
from definitions import definitions_of
from distributed import run_threads
from latent_oracles import HEADS, KEY, LENGTH, OURS, RANK, ROPE, SIZES, WIDTH, angles, as_ours, exact, model_as_ours
from model_presets import feed_forward, randomise
from oracles import assert_agrees, draw, whole, with_gradients
from torch.nn import functional as F

from longreach.kernels.documents import Documents
from longreach.kernels.latent import expand
from longreach.models.language_model import LanguageModel
from longreach.models.mixers.softmax.latent_attention import LatentAttention
from longreach.models.mixers.sparse.sparse_latent_attention import SparseLatentAttention
from longreach.parallel.layout import Layout
from longreach.parallel.mesh import Mesh
from longreach.parallel.sequence import DecodingCache, Sequence
from longreach.parallel.strategy import Strategy

INDEX = {"top_k": 7, "index_heads": 8, "index_dim": 16}
THEIRS = {"index_topk": 7, "index_n_heads": 8, "index_head_dim": 16, "q_lora_rank": 10}
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16,
    "beta_fast": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip
SCALING = {"kind": "yarn", "factor": 4.0, "original_length": 16, "beta_fast": 4.0, "attention_factor": 1.0}
NAME = "sparse_latent_attention"


def built(**more):
    mixer = SparseLatentAttention(width=WIDTH, query_rank=10, **{**OURS, **INDEX, **more}).double()
    randomise(mixer)
    return mixer


def attention_parameters(mixer):
    return [p for name, p in mixer.named_parameters() if not name.startswith("indexer.")]


def causal(length):
    return torch.ones(length, length, dtype=torch.bool).tril()


def test_it_is_the_attention_of_deepseek_v3_2_in_transformers():
    """Whose indexer scores in float32, which decides nothing here."""
    modeling = definitions_of("deepseek_v32")
    config = modeling.DeepseekV32Config(**SIZES, **THEIRS, rope_parameters=YARN, attn_implementation="sdpa")
    theirs, rotary = exact(modeling.DeepseekV32Attention(config, 0)), modeling.DeepseekV32RotaryEmbedding(config)
    assert theirs.scaling != (KEY + ROPE) ** -0.5
    mixer = built(rope_scaling=SCALING, scale=theirs.scaling)
    mixer.load_state_dict(as_ours({name: x.detach() for name, x in theirs.named_parameters()}, True))
    position, mask = angles(torch.arange(LENGTH)[None], rotary), causal(LENGTH).expand(2, 1, -1, -1)
    trained = {name: x for name, x in theirs.named_parameters() if not name.startswith("indexer.")}
    x = draw(2, LENGTH, WIDTH)
    expected = with_gradients(lambda x: theirs(x, position, mask)[0], x, trained.values())
    gradients = as_ours(dict(zip(trained, expected[2:], strict=True)), True)
    found = with_gradients(lambda x: mixer(x, whole(2, LENGTH))[0], x, attention_parameters(mixer))
    wanted = [gradients[name] for name, _ in mixer.named_parameters() if name in gradients]
    assert_agrees(NAME, "transformers, DeepseekV32Attention", found, [*expected[:2], *wanted])


def test_a_model_of_it_is_deepseek_v3_2_in_transformers():
    """Logits, loss and all gradients, of the dense layers with which such a model begins."""
    modeling = definitions_of("deepseek_v32")
    config = modeling.DeepseekV32Config(
        **SIZES, **THEIRS, vocab_size=61, num_hidden_layers=2, first_k_dense_replace=2, intermediate_size=48,
        attn_implementation="sdpa",
    )  # fmt: skip
    theirs = exact(modeling.DeepseekV32ForCausalLM(config))
    mixer = partial(SparseLatentAttention, query_rank=10, **OURS, **INDEX)
    ours = LanguageModel(
        vocabulary=61, width=WIDTH, depth=2, pattern=["mla"], mixers={"mla": mixer}, feed_forward=feed_forward(48)
    ).double()
    ours.load_state_dict(model_as_ours(theirs, {name: x.detach() for name, x in theirs.named_parameters()}))
    tokens = torch.randint(61, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    targets = tokens.roll(-1, dims=1).index_fill(1, torch.tensor([LENGTH - 1]), -100)
    expected = theirs(tokens, labels=tokens, use_cache=False)
    torch.testing.assert_close(ours(tokens, whole(2, LENGTH)), expected.logits, atol=1e-9, rtol=1e-9)
    loss, count = ours(tokens, whole(2, LENGTH), targets)
    their_loss = F.cross_entropy(expected.logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(loss / count, their_loss, atol=1e-9, rtol=1e-9)
    (loss / count).backward()
    their_loss.backward()
    trained = {name: x.grad for name, x in theirs.named_parameters() if x.grad is not None}
    gradients = model_as_ours(theirs, trained)
    for name, parameter in ours.named_parameters():
        if ".indexer." in name:
            assert name not in gradients
            assert parameter.grad is None or not parameter.grad.any()
            continue
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-9, rtol=1e-9)


def dense_loss(mixer, x, seq, lists):
    """The loss as the paper has it, of expanded keys and of one document per row."""
    with torch.no_grad():
        compressed = mixer.compressed(x)
        q, rows = mixer.queries(compressed, seq), mixer.rows(x, seq)
        k, _ = expand(rows, mixer.attend.weight, heads=HEADS, key_dim=KEY + ROPE)
    index = mixer.indexer.project(x, seq, compressed)
    products = torch.einsum("btid,bsd->bits", index.q, index.k.squeeze(2)) * index.q.shape[-1] ** -0.5
    products = torch.einsum("bits,bti->bts", products.relu(), index.weights)
    seen = causal(LENGTH).expand(products.shape)
    if lists is not None:
        seen = seen & (lists.squeeze(2).unsqueeze(-1) == torch.arange(LENGTH)).any(2)
    scores = torch.einsum("bthk,bshk->bhts", q, k) * (KEY + ROPE) ** -0.5
    p = scores.masked_fill(~seen.unsqueeze(1), -torch.inf).softmax(-1).sum(1)
    p = p / p.sum(-1, keepdim=True)
    logs = products.masked_fill(~seen, -torch.inf).log_softmax(-1).masked_fill(~seen, 0.0)
    return F.kl_div(logs, p, reduction="none").sum()


@pytest.mark.parametrize("dense", [True, False])
def test_the_loss_is_the_divergence_from_attention_and_reaches_the_indexer_alone(dense):
    mixer, seq, x = built(dense_steps=1), whole(2, LENGTH), draw(2, LENGTH, WIDTH)
    mixer.at_step(0 if dense else 1)
    lists = mixer.lists(mixer.indexer.project(x, seq, mixer.compressed(x)), seq)
    own, leaf = list(mixer.indexer.parameters()), x.clone().requires_grad_()
    loss = mixer(leaf, seq)[1]
    expected = dense_loss(mixer, x, seq, lists)
    found, wanted = ([of.detach(), *torch.autograd.grad(of, own, retain_graph=True)] for of in (loss, expected))
    assert_agrees(NAME, "dense divergence of the paper", found, wanted)
    assert loss > 1
    reached = torch.autograd.grad(loss, [leaf, *attention_parameters(mixer)], allow_unused=True)
    assert all(gradient is None for gradient in reached)


def test_dense_steps_and_full_lists_are_latent_attention():
    """Whose parameters it takes."""
    seq, x = whole(2, LENGTH), draw(2, LENGTH, WIDTH)
    mixer, full = built(dense_steps=3), LatentAttention(width=WIDTH, query_rank=10, **OURS).double()
    randomise(full)
    expected = with_gradients(lambda x: full(x, seq), x, full.parameters())
    for module in (mixer, listing := built(top_k=LENGTH)):
        missing, unexpected = module.load_state_dict(full.state_dict(), strict=False)
        assert all(key.startswith("indexer.") for key in missing)
        assert not unexpected
    mixer.at_step(2)
    flops = [mixer.mixing_flops(seq)]
    for each in (mixer, listing):
        found = with_gradients(lambda x, each=each: each(x, seq)[0], x, attention_parameters(each))
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    mixer.at_step(3)
    assert not torch.allclose(mixer(x, seq)[0], expected[0])
    assert mixer.mixing_flops(seq) not in flops


PACKED = Documents.from_lengths([[31, 17], [5, 1, 36]], 48)


def trained(mixer, x, seq):
    """Output and gradient of the input, of this rank's tokens; the loss and the gradients of parameters, for a sum."""
    leaf = seq.shard(x).clone().requires_grad_()
    out, loss = mixer(leaf, seq)
    weighed = (out * seq.shard(x.roll(1, 0))).sum() + loss
    gradients = torch.autograd.grad(weighed, [leaf, *mixer.parameters()], materialize_grads=True)
    return [out.detach(), gradients[0]], [loss.detach(), *gradients[1:]]


@pytest.mark.parametrize(
    ("dense", "world", "strategy"),
    [(True, 2, "ring"), (True, 3, "gather"), (True, 4, "ulysses"), *((False, world, "ring") for world in (2, 3, 4))],
)
def test_ranks_give_what_one_gives(dense, world, strategy):
    """In both stages, of packed documents that cross ranks."""
    mixers = [built(dense_steps=1) for _ in range(world)]
    for each in mixers:
        each.at_step(0 if dense else 1)
    x, layout = draw(2, 48, WIDTH), Layout(48, world, 2)

    def run(rank, world):
        mesh = Mesh.create(world, world if strategy == "ulysses" else 1)
        return trained(mixers[rank], x, Sequence.shared(PACKED, layout, mesh, Strategy(strategy)))

    parts, sums = zip(*run_threads(world, run), strict=True)
    expected, expected_sums = trained(mixers[0], x, Sequence.single(PACKED))
    found = [layout.unshard([each[index] for each in parts]) for index in range(2)]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    for ours, theirs in zip(zip(*sums, strict=True), expected_sums, strict=True):
        torch.testing.assert_close(sum(ours), theirs, rtol=1e-9, atol=1e-9)


def test_decoding_keeps_rows_and_keys_of_the_indexer_alone():
    mixer, cache = built(), DecodingCache()
    x = draw(1, LENGTH, WIDTH)
    outputs = []
    for piece in x.split([21, 1, 14, 1], dim=1):
        outputs.append(mixer(piece, Sequence.decoding(cache, 1, piece.shape[1]))[0])
        cache.advance(piece.shape[1])
    torch.testing.assert_close(torch.cat(outputs, 1), mixer(x, whole(1, LENGTH))[0], rtol=1e-9, atol=1e-9)
    kept = [(rows.kept, x.shape[2:].numel()) for rows in cache.rows.values() for x in rows.tensors if rows.kept]
    assert sorted(kept) == [(LENGTH, INDEX["index_dim"]), (LENGTH, ROPE + RANK)]


def test_gate_and_biases_are_those_of_latent_attention():
    more = {"gate": "head", "bias": True, "query_bias": True, "output_bias": True, "rope_heads": 2}
    seq, x = whole(2, LENGTH), draw(2, LENGTH, WIDTH)
    mixer = built(top_k=LENGTH, **more)
    full = LatentAttention(width=WIDTH, query_rank=10, **OURS, **more).double()
    full.load_state_dict({name: each for name, each in mixer.state_dict().items() if not name.startswith("indexer.")})
    torch.testing.assert_close(mixer(x, seq)[0], full(x, seq), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": 0}, "top_k must be at least 1; got 0"),
        ({"index_heads": 0}, "index_heads must be at least 1; got 0"),
        ({"index_dim": 6}, "index_dim must be at least rope_dim=8, as so many dims turn; got 6"),
        ({"dense_steps": -1}, "dense_steps must not be negative"),
        ({"sink_logits": True}, "sink_logits must be false"),
        ({"latent_rank": 0}, "latent_rank must be at least 1; got 0"),
    ],
)
def test_bad_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        SparseLatentAttention(width=WIDTH, **{**OURS, **INDEX, **change})
