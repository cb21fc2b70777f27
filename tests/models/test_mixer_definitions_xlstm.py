"""xLSTM's sLSTM and its mLSTM block against the recurrences of the paper, and its models as published."""

import pytest
import torch
from model_presets import build_model, randomise
from oracles import assert_agrees, draw, whole, with_gradients
from torch.nn import functional as F

from longreach.models.feed_forward.geglu import GEGLU
from longreach.models.mixers.elementwise.slstm import SLSTM
from longreach.models.mixers.linear.mlstm_block import MLSTMBlock

WIDTH, HEADS, BATCH, LENGTH = 24, 3, 2, 19
X = draw(BATCH, LENGTH, WIDTH)
PAPER = "plain recurrence of the paper"


def assert_is(name, mixer, other):
    """The mixer is `other(x)`, which uses the mixer's own parameters."""
    randomise(mixer)
    parameters = list(mixer.parameters())
    ours = with_gradients(lambda x: mixer(x, whole(BATCH, LENGTH)), X, parameters)
    assert_agrees(name, PAPER, ours, with_gradients(other, X, parameters))


def smoothed(x, conv):
    taps = conv.weight.shape[1]
    padded = F.pad(x, (0, 0, taps - 1, 0))
    return F.silu(sum(padded[:, back : back + LENGTH] * conv.weight[:, back] for back in range(taps)) + conv.bias)


def normed(h, norm):
    """Layer norm within each head `[B, T, H, K]`."""
    return F.layer_norm(h, h.shape[-1:], eps=norm.eps).flatten(-2) * norm.weight


def blockwise(x, weight):
    return F.linear(x, torch.block_diag(*weight))


@pytest.mark.parametrize("conv_size", [4, None])
def test_slstm_is_the_recurrence_of_the_paper(conv_size):
    mixer = SLSTM(width=WIDTH, heads=HEADS, layer=1, depth=4, conv_size=conv_size).double()

    def other(x):
        smooth = x if conv_size is None else smoothed(x, mixer.conv)
        sources = {"input_gate": smooth, "forget_gate": smooth, "cell": x, "output_gate": x}
        raw = [blockwise(source, getattr(mixer, name).weight) for name, source in sources.items()]
        recurrent = mixer.recurrent.unflatten(-1, (4, -1))
        h = c = n = x.new_zeros(BATCH, HEADS, WIDTH // HEADS)
        outputs = []
        for t in range(LENGTH):
            i, f, z, o = (
                gate[:, t].unflatten(-1, (HEADS, -1))
                + torch.einsum("bhk,hkj->bhj", h, recurrent[:, :, number])
                + mixer.bias[:, number]
                for number, gate in enumerate(raw)
            )
            c = f.sigmoid() * c + i.exp() * z.tanh()
            n = f.sigmoid() * n + i.exp()
            h = o.sigmoid() * c / n
            outputs.append(h)
        return normed(torch.stack(outputs, dim=1), mixer.norm)

    assert_is("slstm", mixer, other)


def test_mlstm_block_is_the_recurrence_of_the_paper():
    # The norm's eps is large, for without it biases of input gates, a common factor, would change next to nothing.
    mixer = MLSTMBlock(width=WIDTH, heads=HEADS, expansion=1.5, block=6, norm_eps=0.1).double()
    inner = 36

    def other(x):
        u = F.linear(x, mixer.value.weight)
        s = smoothed(u, mixer.conv)
        sources = {"queries": s, "keys": s, "values": u}
        q, k, v = (blockwise(source, getattr(mixer, name).weight) for name, source in sources.items())
        joined = torch.cat([q, k, v], dim=-1)
        i, f = (F.linear(joined, gate.weight, gate.bias) for gate in (mixer.input_gate, mixer.forget_gate))
        q, k, v = (part.unflatten(-1, (HEADS, -1)) for part in (q, k, v))
        size = inner // HEADS
        state, total = x.new_zeros(BATCH, HEADS, size, size), x.new_zeros(BATCH, HEADS, size)
        outputs = []
        for t in range(LENGTH):
            forget, enter = f[:, t, :, None].sigmoid(), i[:, t, :, None].exp()
            key = k[:, t] / size**0.5
            state = forget[..., None] * state + enter[..., None] * key[..., :, None] * v[:, t, :, None, :]
            total = forget * total + enter * key
            read = torch.einsum("bhk,bhkv->bhv", q[:, t], state)
            outputs.append(read / (q[:, t] * total).sum(-1, keepdim=True).abs().clamp(min=1.0))
        out = normed(torch.stack(outputs, dim=1), mixer.norm) + mixer.skip * s
        return F.linear(out * F.silu(F.linear(x, mixer.gate.weight)), mixer.output.weight)

    assert_is("mlstm_block", mixer, other)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_geglu_is_gated_by_gelu(approximate):
    layer = GEGLU(width=WIDTH, hidden=40, approximate=approximate, bias=True).double()
    expected = layer.down(F.gelu(layer.gate(X), approximate=approximate) * layer.up(X))
    torch.testing.assert_close(layer(X, whole(BATCH, LENGTH)), expected)
    assert layer.down.bias is not None
    with pytest.raises(ValueError, match=r"feed_forward\.approximate must be one of none, tanh; got 'erf'"):
        GEGLU(width=WIDTH, hidden=40, approximate="erf")


def test_gates_start_as_published():
    model = build_model("xlstm_7_1_tiny")
    model.initialise(0)
    slstm, mlstm = model.blocks[3].mixer_1, model.blocks[0].mixer
    assert not slstm.recurrent.any()
    assert not slstm.bias[:, [0, 2, 3]].any()
    forget = slstm.bias[0, 1]
    torch.testing.assert_close(forget[[0, -1]].detach(), torch.tensor([5.0, -7.0]))
    place = 0.3 + 1.3 * 3 / 7
    torch.testing.assert_close(forget[16].item(), 5 - 12 * (16 / 63) ** place, rtol=1e-5, atol=1e-5)
    assert not mlstm.input_gate.weight.any()
    assert not mlstm.forget_gate.weight.any()
    torch.testing.assert_close(mlstm.forget_gate.bias.detach(), torch.linspace(3.0, 6.0, 4))
    assert (mlstm.skip == 1).all()


def test_xlstm_7b_has_the_published_parameters():
    with torch.device("meta"):
        assert build_model("xlstm_7b", vocabulary=50_304).parameter_count() == 6_865_424_896


def test_wrong_settings_are_named():
    with pytest.raises(ValueError, match="heads must divide width=24; got 5"):
        SLSTM(width=WIDTH, heads=5, layer=0, depth=1)
    with pytest.raises(ValueError, match="conv_size must be at least 1; got 0"):
        SLSTM(width=WIDTH, heads=3, layer=0, depth=1, conv_size=0)
    with pytest.raises(ValueError, match=r"block must divide width=48; got 5\. Change it$"):
        MLSTMBlock(width=WIDTH, heads=3, block=5)
