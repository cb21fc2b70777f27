"""RWKV-4, 5 and 6, their channel mixing and a whole RWKV-4, against published code or the plain recurrence."""

import math

import pytest
import torch
from definitions import definitions_of
from distributed import run_threads
from model_presets import build_model, in_pieces, randomise, tokens
from oracles import assert_agrees, draw, whole, with_gradients
from torch import nn
from torch.nn import functional as F

from longreach.kernels.documents import Documents
from longreach.models.feed_forward.rwkv import RWKVChannelMixing
from longreach.models.mixers.elementwise.rwkv4 import RWKV4
from longreach.models.mixers.linear.rwkv5 import RWKV5
from longreach.models.mixers.linear.rwkv6 import RWKV6
from longreach.parallel.layout import Layout
from longreach.parallel.mesh import Mesh
from longreach.parallel.sequence import Sequence
from longreach.parallel.strategy import Strategy

WIDTH, LENGTH, HEADS, HEAD_DIM = 32, 45, 4, 8
PLACE = {"width": WIDTH, "layer": 1, "depth": 3}


def transformers_rwkv():
    return definitions_of("rwkv")


def stacked_mixes(theirs, names):
    """The mixes of transformers' RWKV, which are the parts of the token itself, as ours: those of the token before."""
    return torch.stack([1 - theirs.get_parameter(name).view(-1) for name in names])


def assert_alike(mixer, oracle, ours, theirs, x, expected_of, names, mixes, tolerance):
    """Outputs and the gradients of x and of all parameters; `mixes` are theirs, of which ours are 1 - m."""
    own = dict(ours.named_parameters())
    with torch.no_grad():
        own["mix"].copy_(stacked_mixes(theirs, mixes))
        for name, other in names.items():
            own[name].copy_(theirs.get_parameter(other))
    assert set(own) == {"mix", *names}
    actual = with_gradients(lambda x: ours(x, whole(*x.shape[:2])), x, [own["mix"], *(own[name] for name in names)])
    given = [theirs.get_parameter(name) for name in (*mixes, *names.values())]
    out, dx, *gradients = with_gradients(expected_of, x, given)
    dmix = -torch.stack([each.view(-1) for each in gradients[: len(mixes)]])
    assert_agrees(mixer, oracle, actual, [out, dx, dmix, *gradients[len(mixes) :]], tolerance=tolerance)


def test_rwkv4_is_the_one_in_transformers():
    modeling = transformers_rwkv()
    config = modeling.RwkvConfig(hidden_size=WIDTH, num_hidden_layers=3)
    theirs = modeling.RwkvSelfAttention(config, 1).double()
    randomise(theirs)
    with torch.no_grad():
        theirs.time_decay.copy_(torch.linspace(-4, 2, WIDTH))
    ours = RWKV4(**PLACE).double()
    names = {"decay": "time_decay", "bonus": "time_first"} | {
        f"{name}.weight": f"{name}.weight" for name in ("receptance", "key", "value", "output")
    }
    mixes = ["time_mix_receptance", "time_mix_key", "time_mix_value"]
    x = 2 * draw(2, LENGTH, WIDTH)
    oracle = "transformers, RwkvSelfAttention"  # its keys and sums are float32
    assert_alike("rwkv4", oracle, ours, theirs, x, lambda x: theirs(x)[0], names, mixes, 1e-5)


def test_rwkv4_starts_as_in_transformers():
    """But for the bonus, of which transformers keeps no more than ones."""
    modeling = transformers_rwkv()
    model = modeling.RwkvModel(modeling.RwkvConfig(hidden_size=WIDTH, num_hidden_layers=3, vocab_size=20))
    for layer, block in enumerate(model.blocks):
        theirs = block.attention
        expected = {
            "mix": stacked_mixes(theirs, ["time_mix_receptance", "time_mix_key", "time_mix_value"]),
            "decay": theirs.time_decay,
            "bonus": torch.tensor([math.log(0.3) + 0.5 * ((i + 1) % 3 - 1) for i in range(WIDTH)]),
        }
        ours = RWKV4(width=WIDTH, layer=layer, depth=3)
        for name, value in expected.items():
            found = torch.empty_like(value)
            assert ours.initialise_parameter(name, found, torch.Generator())
            torch.testing.assert_close(found, value.detach())
        mixing = RWKVChannelMixing(width=WIDTH, hidden=64, layer=layer, depth=3)
        found = torch.empty(2, WIDTH)
        assert mixing.initialise_parameter("mix", found, torch.Generator())
        names = ["time_mix_key", "time_mix_receptance"]
        torch.testing.assert_close(found, stacked_mixes(block.feed_forward, names).detach())


def before(x):
    return F.pad(x[:, :-1], (0, 0, 1, 0))


def recurrence(r, k, v, log_decay, bonus):
    """S_t = diag(e^w) S_(t-1) + k_t^T v_t, read before it is written, with u of the token itself."""
    state, outs = torch.zeros(r.shape[0], HEADS, HEAD_DIM, HEAD_DIM, dtype=r.dtype), []
    for t in range(r.shape[1]):
        written = k[:, t, :, :, None] * v[:, t, :, None, :]
        outs.append(torch.einsum("bhk,bhkv->bhv", r[:, t], state + bonus[..., None] * written))
        state = log_decay[:, t].exp()[..., None] * state + written
    return torch.stack(outs, dim=1)


def test_rwkv5_is_the_recurrence_of_the_paper():
    ours = RWKV5(**PLACE, head_dim=HEAD_DIM).double()
    randomise(ours)

    def expected_of(x):
        r, k, v, g = (
            layer(m * before(x) + (1 - m) * x)
            for m, layer in zip(ours.mix, (ours.receptance, ours.key, ours.value, ours.gate), strict=True)
        )
        r, k, v = (each.unflatten(-1, (HEADS, HEAD_DIM)) for each in (r, k, v))
        log_decay = -ours.decay.exp().expand_as(r)
        out = recurrence(r, k, v, log_decay, ours.bonus).flatten(2)
        # Divided by 8 for heads of 64, before a norm whose eps is 1e-5.
        out = (out / HEAD_DIM**0.5).flatten(0, 1)
        normed = F.group_norm(out, HEADS, ours.norm.weight, ours.norm.bias, eps=1e-5).view_as(x)
        return ours.output(normed * F.silu(g))

    x, parameters = draw(2, LENGTH, WIDTH), list(ours.parameters())
    actual = with_gradients(lambda x: ours(x, whole(2, LENGTH)), x, parameters)
    assert_agrees("rwkv5", "plain recurrence of the paper", actual, with_gradients(expected_of, x, parameters))


def their_rwkv6(monkeypatch):
    """flash-linear-attention's layer with its plain functions, in float64 but for the recurrence."""
    pytest.importorskip("fla", reason="flash-linear-attention is not installed; it is an oracle here and nothing else")
    from fla.layers import rwkv6 as modeling
    from fla.modules.token_shift import token_shift_ref
    from fla.ops.rwkv6.recurrent_naive import naive_recurrent_rwkv6

    def naive(*, r, k, v, w, u, scale, **_):
        ahead = (x.transpose(1, 2) for x in (r, k, v, w))
        return naive_recurrent_rwkv6(*ahead, u, scale=scale)[0].transpose(1, 2).double(), None

    class GroupNorm(nn.GroupNorm):
        def forward(self, x):
            return super().forward(x.flatten(0, 1)).view_as(x)

    monkeypatch.setattr(modeling, "fused_recurrent_rwkv6", naive)
    monkeypatch.setattr(modeling, "chunk_rwkv6", naive)
    monkeypatch.setattr(modeling, "token_shift", lambda x, *_, **__: token_shift_ref(x))
    theirs = modeling.RWKV6Attention(
        hidden_size=WIDTH, expand_k=1.0, num_heads=HEADS, proj_low_rank_dim=3, gate_low_rank_dim=5, layer_idx=1
    )
    theirs.gate_fn = F.silu
    theirs.g_norm = GroupNorm(HEADS, WIDTH, eps=1e-5 * HEAD_DIM)
    return theirs.double()


def test_rwkv6_is_the_one_in_flash_linear_attention(monkeypatch):
    theirs = their_rwkv6(monkeypatch)
    randomise(theirs)
    with torch.no_grad():
        theirs.w_proj.linear.lora[2].bias.copy_(torch.linspace(-4, 1, WIDTH))
    ours = RWKV6(**PLACE, head_dim=HEAD_DIM, mix_rank=3, decay_rank=5).double()
    ours_order = [0, 2, 3, 4, 1]  # theirs is r, w, k, v, g; ours r, k, v, g, w
    ups = theirs.x_proj[2].weight.view(WIDTH, 5, 3)
    downs = theirs.x_proj[0].linear.weight.view(5, 3, WIDTH)
    own = dict(ours.named_parameters())
    names = {
        "bonus": "bonus", "norm.weight": "g_norm.weight", "norm.bias": "g_norm.bias", "output.weight": "o_proj.weight",
        "receptance.weight": "r_proj.linear.weight", "key.weight": "k_proj.linear.weight",
        "value.weight": "v_proj.linear.weight", "gate.weight": "g_proj.linear.weight",
        "decay.down.weight": "w_proj.linear.lora.0.weight", "decay.up.weight": "w_proj.linear.lora.2.weight",
        "decay.up.bias": "w_proj.linear.lora.2.bias",
    }  # fmt: skip

    def as_ours(mix, first, down, up):
        """Their parameters of the shift, or gradients of them, in our order."""
        return [
            torch.cat([mix[ours_order], first[None]]), down.view(5, 3, WIDTH)[ours_order].flatten(0, 1),
            *up.view(WIDTH, 5, 3)[:, ours_order].unbind(1),
        ]  # fmt: skip

    shift = [own["mix"], own["mix_down.weight"], *(own[f"mix_up.{i}.weight"] for i in range(5))]
    theirs_shift = [theirs.x_bias, theirs.x_proj[0].mu, theirs.x_proj[0].linear.weight, theirs.x_proj[2].weight]
    assert ups.shape[1] == downs.shape[0] == 5
    with torch.no_grad():
        for target, value in zip(shift, as_ours(*theirs_shift), strict=True):
            target.copy_(value)
        for name, other in names.items():
            own[name].copy_(theirs.get_parameter(other))
    assert len(shift) + len(names) == len(own)

    x = draw(2, LENGTH, WIDTH)
    actual = with_gradients(lambda x: ours(x, whole(2, LENGTH)), x, [*shift, *(own[name] for name in names)])
    given = [*theirs_shift, *(theirs.get_parameter(other) for other in names.values())]
    out, dx, *gradients = with_gradients(lambda x: theirs(x)[0], x, given)
    expected = [out, dx, *as_ours(*gradients[:4]), *gradients[4:]]
    oracle = "flash-linear-attention, RWKV6Attention with naive_recurrent_rwkv6"  # which computes in float32
    assert_agrees("rwkv6", oracle, actual, expected, tolerance=1e-5)


def test_rwkv6_is_the_recurrence_of_the_paper():
    ours = RWKV6(**PLACE, head_dim=HEAD_DIM, mix_rank=3, decay_rank=5).double()
    randomise(ours)

    def expected_of(x):
        moved = before(x) - x
        *mixes, first = ours.mix
        hidden = torch.tanh(ours.mix_down(x + moved * first)).unflatten(-1, (5, 3)).unbind(2)
        inputs = [
            x + moved * (mix + each @ up.weight.T) for mix, up, each in zip(mixes, ours.mix_up, hidden, strict=True)
        ]
        layers = (ours.receptance, ours.key, ours.value)
        r, k, v = (layer(each).unflatten(-1, (HEADS, HEAD_DIM)) for layer, each in zip(layers, inputs, strict=False))
        speed = torch.tanh(inputs[4] @ ours.decay.down.weight.T) @ ours.decay.up.weight.T + ours.decay.up.bias
        out = recurrence(r, k, v, -speed.exp().view_as(r), ours.bonus).flatten(2)
        normed = F.group_norm(out.flatten(0, 1), HEADS, ours.norm.weight, ours.norm.bias, eps=1e-5 * HEAD_DIM).view_as(
            x
        )
        return ours.output(normed * F.silu(ours.gate(inputs[3])))

    x, parameters = draw(2, LENGTH, WIDTH), list(ours.parameters())
    actual = with_gradients(lambda x: ours(x, whole(2, LENGTH)), x, parameters)
    assert_agrees("rwkv6", "plain recurrence of the paper", actual, with_gradients(expected_of, x, parameters))


def test_channel_mixing_is_the_one_in_transformers():
    modeling = transformers_rwkv()
    theirs = modeling.RwkvFeedForward(modeling.RwkvConfig(hidden_size=WIDTH, intermediate_size=50), 1).double()
    randomise(theirs)
    ours = RWKVChannelMixing(**PLACE, hidden=50).double()
    names = {"up.weight": "key.weight", "receptance.weight": "receptance.weight", "down.weight": "value.weight"}
    mixes = ["time_mix_key", "time_mix_receptance"]
    own = dict(ours.named_parameters())
    with torch.no_grad():
        own["mix"].copy_(stacked_mixes(theirs, mixes))
        for name, other in names.items():
            own[name].copy_(theirs.get_parameter(other))
    x = draw(2, LENGTH, WIDTH)
    actual = with_gradients(lambda x: ours(x, whole(2, LENGTH)), x, [own["mix"], *(own[name] for name in names)])
    given = [theirs.get_parameter(name) for name in (*mixes, *names.values())]
    out, dx, dk, dr, *gradients = with_gradients(lambda x: theirs(x)[0], x, given)
    for found, right in zip(actual, [out, dx, -torch.stack([dk.view(-1), dr.view(-1)]), *gradients], strict=True):
        torch.testing.assert_close(found, right, atol=1e-9, rtol=1e-9)


def test_channel_mixing_of_rwkv7_has_no_receptance():
    ours = RWKVChannelMixing(**PLACE, hidden=50, receptance=False).double()
    randomise(ours)
    x = draw(2, LENGTH, WIDTH)
    mixed = x + (before(x) - x) * ours.mix[0]
    torch.testing.assert_close(ours(x, whole(2, LENGTH)), ours.down(F.relu(ours.up(mixed)) ** 2))
    value = torch.empty(1, WIDTH)
    assert ours.initialise_parameter("mix", value, torch.Generator())
    torch.testing.assert_close(value[0], 1 - (torch.arange(WIDTH) / WIDTH) ** ((1 - 1 / 3) ** 4))


def test_a_whole_rwkv4_is_the_one_in_transformers():
    """Blocks, layer norms, the one after the embedding, and the head."""
    modeling = transformers_rwkv()
    config = modeling.RwkvConfig(
        hidden_size=WIDTH, num_hidden_layers=2, vocab_size=61, intermediate_size=48, rescale_every=0
    )
    theirs = modeling.RwkvForCausalLM(config).double()
    randomise(theirs)
    ours = build_model("rwkv4_tiny", width=WIDTH, depth=2, feed_forward={"hidden": 48}).double()
    values = {
        "embedding.weight": theirs.rwkv.embeddings.weight, "head.weight": theirs.head.weight,
        "embedding_norm": theirs.rwkv.blocks[0].pre_ln, "norm": theirs.rwkv.ln_out,
    }  # fmt: skip
    for number, block in enumerate(theirs.rwkv.blocks):
        at, ffn = f"blocks.{number}", block.feed_forward
        values |= {
            f"{at}.mixer_norm": block.ln1, f"{at}.feed_forward_norm": block.ln2,
            f"{at}.mixer.decay": block.attention.time_decay, f"{at}.mixer.bonus": block.attention.time_first,
            f"{at}.mixer.mix": stacked_mixes(
                block.attention, ["time_mix_receptance", "time_mix_key", "time_mix_value"]
            ),
            f"{at}.feed_forward.mix": stacked_mixes(ffn, ["time_mix_key", "time_mix_receptance"]),
            f"{at}.feed_forward.up": ffn.key, f"{at}.feed_forward.down": ffn.value,
            f"{at}.feed_forward.receptance": ffn.receptance,
        }  # fmt: skip
        values |= {f"{at}.mixer.{name}": getattr(block.attention, name) for name in MATRICES}
    state = {}
    for name, value in values.items():
        parts = value.named_parameters() if isinstance(value, nn.Module) else [("", value)]
        state |= {f"{name}.{part}".rstrip("."): x.detach() for part, x in parts}
    ours.load_state_dict(state)
    inputs = tokens(2, LENGTH)
    found, expected = ours(inputs, whole(2, LENGTH)), theirs(inputs).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)  # their sums are float32


def small_model(version, **changes):
    """A pure model of two layers, with its channel mixing."""
    rwkv = {} if version == 4 else {"rwkv": {"head_dim": HEAD_DIM}}
    sizes = {"width": WIDTH, "depth": 2, "mixers": rwkv, "feed_forward": {"hidden": 48}}
    model = build_model(f"rwkv{version}_tiny", **sizes, **changes).double()
    randomise(model)
    return model


@pytest.mark.parametrize("version", [4, 5, 6, 7])
@torch.no_grad()
def test_models_decode_what_they_compute_at_once(version):
    model, inputs = small_model(version), tokens(2, LENGTH)
    found = in_pieces(model, inputs, [7, 1, 1, LENGTH - 9])
    torch.testing.assert_close(found, model(inputs, whole(2, LENGTH)), atol=1e-9, rtol=1e-9)


ROWS = Documents.from_lengths([[5, 30, 13], [48]], 48)


def loss_and_gradients(model, seq):
    inputs = tokens(2, 48)
    loss, _ = model(seq.shard(inputs), seq, seq.shard(inputs.roll(-1, dims=1)))
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters())]


def on_one_of(rank, world, version):
    seq = Sequence.shared(ROWS, Layout(48, world, 2), Mesh.create(world), Strategy())
    return loss_and_gradients(small_model(version, activation_checkpointing="mixing"), seq)


@pytest.mark.slow
@pytest.mark.parametrize("version", [4, 5, 6, 7])
def test_models_on_ranks_are_those_on_one(version):
    parts = run_threads(3, on_one_of, version)
    for found, expected in zip(
        map(sum, zip(*parts, strict=True)), loss_and_gradients(small_model(version), Sequence.single(ROWS)), strict=True
    ):
        torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)


MATRICES = ("receptance", "key", "value", "output")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RWKV5(**PLACE), "head_dim must divide width=32; got 64"),
        (lambda: RWKV6(**PLACE, head_dim=8, mix_rank=0), "mix_rank and decay_rank must be at least 1; got 0 and 64"),
        (lambda: RWKVChannelMixing(**PLACE, hidden=0), "feed_forward.hidden must be at least 1; got 0"),
        (lambda: build_model("rwkv4_tiny", tied_embeddings=True), "model.embedding_std must be null with tied_emb"),
        (lambda: build_model("rwkv4_tiny", norm="batch"), "model.norm must be one of rms, .*layer.*; got 'batch'"),
    ],
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
