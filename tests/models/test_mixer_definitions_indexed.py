"""Indexed attention against transformers, flash-linear-attention and dense code; its loss, and what that reaches."""

import pytest
import torch
from definitions import definitions_of
from model_presets import randomise
from oracles import assert_agrees, draw, whole
from torch.nn import functional as F

from longreach.kernels.documents import Documents
from longreach.models.mixers.softmax.softmax_attention import SoftmaxAttention
from longreach.models.mixers.sparse.indexed_attention import DeepSeekSparseAttention, MiniMaxSparseAttention
from longreach.parallel.sequence import Sequence

WIDTH, BATCH, LENGTH = 24, 2, 37
X = draw(BATCH, LENGTH, WIDTH)
SIZES = {"width": WIDTH, "heads": 4, "kv_heads": 2, "head_dim": 8}
SMALL = {
    "minimax_sparse_attention": lambda **more: MiniMaxSparseAttention(
        **SIZES, block_size=4, count=3, index_dim=8, **more
    ),
    "deepseek_sparse_attention": lambda **more: DeepSeekSparseAttention(
        **SIZES, top_k=7, index_heads=3, index_dim=8, **more
    ),
}  # fmt: skip


def built(name, **more):
    mixer = SMALL[name](**more).double()
    randomise(mixer)
    return mixer


def of_output(mixer, x, seq, tensors):
    """The output and its gradients, of the input first."""
    x = x.clone().requires_grad_()
    out, _ = mixer(x, seq)
    return [out.detach(), *torch.autograd.grad(out, [x, *tensors], draw(*out.shape, seed=9))]


def attention_parameters(mixer):
    return [p for name, p in mixer.named_parameters() if not name.startswith("indexer.")]


def turned(length, dims, base):
    angles = torch.arange(length).double()[:, None] * base ** (-torch.arange(0, dims, 2).double() / dims)
    angles = torch.cat([angles, angles], dim=-1).expand(BATCH, -1, -1)
    return angles.cos(), angles.sin()


def test_minimax_sparse_attention_is_the_one_in_transformers():
    modeling = definitions_of("minimax_m3_vl")
    config = modeling.MiniMaxM3VLTextConfig(
        hidden_size=WIDTH, num_attention_heads=4, num_key_value_heads=2, head_dim=8, index_n_heads=2, index_head_dim=8,
        index_block_size=4, index_topk_blocks=3, index_local_blocks=2, layer_types=["minimax_m3_sparse"],
        num_hidden_layers=1, rms_norm_eps=1e-6,
    )  # fmt: skip
    config._attn_implementation = "eager"
    other = modeling.MiniMaxM3VLAttention(config, 0).double()
    randomise(other)
    mixer = built("minimax_sparse_attention", local=2, qk_norm="head", rope_fraction=0.5, rope_base=5e6)
    weights = {
        ours: f"{theirs}_proj.weight" for ours, theirs in zip(("query", "key", "value", "output"), "qkvo", strict=True)
    }
    state = {f"{ours}.weight": other.get_parameter(theirs) for ours, theirs in weights.items()}
    state |= {
        f"indexer.{ours}.weight": other.get_parameter(f"indexer.{ours[0]}_proj.weight") for ours in ("query", "key")
    }
    for ours, theirs in (("", other), ("indexer.", other.indexer)):
        state |= {
            f"{ours}query_norm.weight": 1 + theirs.q_norm.weight,
            f"{ours}key_norm.weight": 1 + theirs.k_norm.weight,
        }
    mixer.load_state_dict({name: x.detach() for name, x in state.items()})
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril().expand(BATCH, 1, -1, -1)

    x = X.clone().requires_grad_()
    expected = other(x, turned(LENGTH, 4, 5e6), mask)[0]
    wanted = [x, *map(other.get_parameter, weights.values()), other.q_norm.weight, other.k_norm.weight]
    theirs = [expected.detach(), *torch.autograd.grad(expected, wanted, draw(*expected.shape, seed=9))]
    named = [
        *(mixer.get_parameter(f"{name}.weight") for name in weights),
        mixer.query_norm.weight,
        mixer.key_norm.weight,
    ]
    ours = of_output(mixer, X, whole(BATCH, LENGTH), named)
    # Their norms, and their softmax, round to float32.
    assert_agrees(
        "minimax_sparse_attention", "transformers, MiniMaxM3VLAttention", ours, theirs, tolerance=1e-6, of_elements=1e-4
    )


def test_the_lightning_indexer_is_the_one_in_transformers():
    modeling = definitions_of("deepseek_v32")
    config = modeling.DeepseekV32Config(
        hidden_size=WIDTH, q_lora_rank=WIDTH, index_n_heads=3, index_head_dim=8, index_topk=7, qk_rope_head_dim=4,
    )  # fmt: skip
    other = modeling.DeepseekV32Indexer(config, 0).double()
    randomise(other)
    mixer = built("deepseek_sparse_attention")
    names = {"query.weight": "wq_b.weight", "key.weight": "wk.weight", "weight.weight": "weights_proj.weight"}
    names |= {f"key_norm.{each}": f"k_norm.{each}" for each in ("weight", "bias")}
    mixer.indexer.load_state_dict({ours: other.get_parameter(theirs).detach() for ours, theirs in names.items()})
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril().expand(BATCH, -1, -1)
    seq = whole(BATCH, LENGTH)
    index = mixer.indexer.project(X, seq)
    ours = chosen_scores(index, mixer.indexer.select(index, seq).squeeze(2))
    theirs = chosen_scores(index, other(X, X, turned(LENGTH, 4, 1e4), mask, None))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)  # they score in float32
    indices = pytest.importorskip("fla.ops.dsa.naive", reason="needs flash-linear-attention").naive_dsa_indexer(
        index.q, index.k.squeeze(2), index.weights, 7, activation="relu"
    )
    torch.testing.assert_close(ours, chosen_scores(index, indices), rtol=1e-5, atol=1e-5)


def chosen_scores(index, lists):
    """Of the tokens in lists `[B, T, M]`, in order: where no head is positive, several tokens have the score 0."""
    products = (torch.einsum("btid,bsd->bits", index.q, index.k.squeeze(2)) * index.q.shape[-1] ** -0.5).relu()
    scores = torch.einsum("bits,bti->bts", products, index.weights)
    scores = scores.masked_fill(~torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril(), -9.0)
    scores = F.pad(scores, (0, 1), value=-9.0)
    return scores.gather(-1, lists.long() % (LENGTH + 1)).sort(-1).values


@pytest.mark.parametrize("top_k", [7, 2, 50])
def test_deepseek_sparse_attention_is_the_naive_one_of_flash_linear_attention(top_k):
    naive = pytest.importorskip("fla.ops.dsa.naive", reason="needs flash-linear-attention").naive_dsa
    mixer, seq = (
        DeepSeekSparseAttention(**SIZES, top_k=top_k, index_heads=3, index_dim=8).double(),
        whole(BATCH, LENGTH),
    )
    randomise(mixer)
    wanted = attention_parameters(mixer)
    ours = of_output(mixer, X, seq, wanted)
    x = X.clone().requires_grad_()
    q, k, v = mixer.project(x, seq)
    lists = mixer.indexer.select(mixer.indexer.project(x, seq), seq).squeeze(2)
    out = mixer.output(naive(q, k, v, None, None, indices=lists.long(), topk=top_k).double().flatten(2))
    theirs = [out.detach(), *torch.autograd.grad(out, [x, *wanted], draw(*out.shape, seed=9))]
    name = "flash-linear-attention, naive_dsa"
    assert_agrees("deepseek_sparse_attention", name, ours, theirs, tolerance=1e-6, of_elements=1e-5)


def dense_loss(mixer, x, seq, lists):
    """The loss as the papers have it, of one document per row."""
    with torch.no_grad():
        q, k, _ = mixer.project(x, seq)
    index, length = mixer.indexer.project(x, seq), x.shape[1]
    products = torch.einsum("btid,bsd->bits", index.q, index.k.squeeze(2)) * index.q.shape[-1] ** -0.5
    if index.weights is not None:
        products = torch.einsum("bits,bti->bts", products.relu(), index.weights).unsqueeze(1)
    seen = torch.ones(length, length, dtype=torch.bool).tril().expand(products.shape)
    if lists is not None:
        size = mixer.indexer.rule.block_size
        of_key = torch.arange(length) // size  # every row has one document, whose blocks are counted from 0
        seen = seen & (lists.unsqueeze(-1) == of_key).any(3).transpose(1, 2)
    scores = torch.einsum("bthk,bshk->bhts", q, k.repeat_interleave(2, dim=2)) * q.shape[-1] ** -0.5
    each = 4 // seen.shape[1]
    p = scores.masked_fill(~seen.repeat_interleave(each, dim=1), -torch.inf).softmax(-1).unflatten(1, (-1, each)).sum(2)
    p = p / p.sum(-1, keepdim=True)
    logs = products.masked_fill(~seen, -torch.inf).log_softmax(-1).masked_fill(~seen, 0.0)
    return F.kl_div(logs, p, reduction="none").sum(-1).mean(1).sum()


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("name", SMALL)
def test_the_loss_is_the_divergence_from_attention_and_reaches_the_indexer_alone(name, dense):
    mixer, seq = built(name, dense_steps=1), whole(BATCH, LENGTH)
    mixer.at_step(0 if dense else 1)
    lists = None if dense else mixer.indexer.select(mixer.indexer.project(X, seq), seq)
    x, own = X.clone().requires_grad_(), list(mixer.indexer.parameters())
    loss = mixer(x, seq)[1]
    expected = dense_loss(mixer, X, seq, lists)
    found, wanted = ([of.detach(), *torch.autograd.grad(of, own, retain_graph=True)] for of in (loss, expected))
    assert_agrees(name, "dense divergence of the paper", found, wanted)
    assert loss > 1
    reached = torch.autograd.grad(loss, [x, *attention_parameters(mixer)], allow_unused=True)
    assert all(gradient is None for gradient in reached)
    assert mixer.loss_count("index", seq) == BATCH * LENGTH


@pytest.mark.parametrize("name", SMALL)
def test_dense_steps_are_softmax_attention_and_end(name):
    mixer, dense, seq = built(name, dense_steps=3), SoftmaxAttention(**SIZES).double(), whole(BATCH, LENGTH)
    randomise(dense)
    missing, unexpected = mixer.load_state_dict(dense.state_dict(), strict=False)
    assert all(key.startswith("indexer.") for key in missing)
    assert not unexpected
    outputs = []
    for step in (0, 2, 3):
        mixer.at_step(step)
        outputs.append((mixer(X, seq)[0], mixer.mixing_flops(seq)))
    torch.testing.assert_close(outputs[1][0], dense(X, seq), rtol=0, atol=1e-12)
    assert torch.equal(outputs[0][0], outputs[1][0])
    assert not torch.allclose(outputs[1][0], outputs[2][0])
    assert outputs[1][1] != outputs[2][1]


@pytest.mark.parametrize("name", SMALL)
def test_the_output_has_a_gate_where_it_is_asked_for(name):
    mixer, plain, heads = built(name, gate="channel"), built(name), []
    plain.load_state_dict(mixer.state_dict(), strict=False)
    plain.output.register_forward_pre_hook(lambda _, inputs: heads.append(inputs[0]))
    plain(X, whole(BATCH, LENGTH))
    expected = plain.output(torch.sigmoid(mixer.gate.project(X)) * heads[0])
    torch.testing.assert_close(mixer(X, whole(BATCH, LENGTH))[0], expected, rtol=0, atol=1e-12)


def test_a_warmed_indexer_finds_what_attention_wants():
    mixer, seq = built("deepseek_sparse_attention"), Sequence.single(Documents.whole(BATCH, LENGTH))
    mixer.dense = True
    adam = torch.optim.Adam(mixer.indexer.parameters(), lr=0.02)
    losses = []
    for _ in range(60):
        loss = mixer(X, seq)[1]
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(float(loss))
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DeepSeekSparseAttention(**SIZES, top_k=0), "top_k must be at least 1"),
        (lambda: DeepSeekSparseAttention(**SIZES, index_heads=0), "index_heads must be at least 1"),
        (lambda: DeepSeekSparseAttention(**SIZES, dense_steps=-1), "dense_steps must not be negative"),
        (lambda: MiniMaxSparseAttention(**SIZES, index_dim=0), "index_dim must be at least 1"),
        (lambda: MiniMaxSparseAttention(**SIZES, index_loss=-0.5), "index_loss must not be negative"),
        (lambda: MiniMaxSparseAttention(**SIZES, count=2, local=3), "count must have room for the forced blocks"),
        (lambda: MiniMaxSparseAttention(**SIZES, index_dim=7), "rope_fraction must leave an even number"),
    ],
)
def test_bad_settings_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()
