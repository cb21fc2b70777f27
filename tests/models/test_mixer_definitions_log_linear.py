"""Log-linear Mamba-2 around the published code of its op, and around the paper's sums, token by token."""

import pytest
import torch
from model_presets import randomise
from oracles import assert_agrees, draw, whole, with_gradients
from torch.nn import functional as F

from longreach.models.mixers.state_space.log_linear_mamba2 import LogLinearMamba2

WIDTH, HEAD_DIM, STATE, GROUPS, BATCH, LENGTH = 24, 8, 5, 2, 2, 83
HEADS = 2 * WIDTH // HEAD_DIM
X = draw(BATCH, LENGTH, WIDTH)


def made(levels, **settings):
    sizes = {"head_dim": HEAD_DIM, "state": STATE, "groups": GROUPS}
    mixer = LogLinearMamba2(width=WIDTH, levels=levels, **sizes, **settings).double()
    randomise(mixer)
    return mixer


def layer(mixer, op):
    """The layer as flash-linear-attention has it, around `op(q, k, v, g, level_scales)`."""

    def call(x):
        z, inner, b, c, step, raw = (
            F.linear(x, part.weight, part.bias)
            for part in (mixer.gate, mixer.value, mixer.key, mixer.query, mixer.step, mixer.level_weight)
        )
        padded, taps = F.pad(torch.cat([inner, b, c], dim=-1), (0, 0, 3, 0)), mixer.conv.weight
        convolved = sum(padded[:, back : back + LENGTH] * taps[:, back] for back in range(4))
        sizes = [inner.shape[-1], b.shape[-1], c.shape[-1]]
        inner, b, c = F.silu(convolved + mixer.conv.bias).split(sizes, dim=-1)
        inner = inner.unflatten(-1, (HEADS, HEAD_DIM))
        b, c = (part.unflatten(-1, (GROUPS, STATE)) for part in (b, c))
        step = F.softplus(step + mixer.dt_bias)
        scales = F.softplus(mixer.scales * raw.unflatten(-1, (HEADS, -1)))
        y = op(c, b, inner * step[..., None], -mixer.A_log.exp() * step, scales) + mixer.D[:, None] * inner
        gated = (y.flatten(-2) * F.silu(z)).unflatten(-1, (GROUPS, -1))
        normed = gated * (gated.square().mean(-1, keepdim=True) + mixer.norm.eps).rsqrt()
        return F.linear(normed.flatten(-2) * mixer.norm.weight, mixer.output.weight, mixer.output.bias)

    return call


def buckets(t, levels):
    """The tokens of each level that token t sees: the intervals of the paper, by the bits of t from the lowest on."""
    held, stop = [range(t, t + 1)], t
    for bit in range(levels - 1):
        start = stop - (1 << bit) if t >> bit & 1 else stop
        start = 0 if bit == levels - 2 else start  # the last one holds what is left
        held.append(range(start, stop))
        stop = start
    return held


def sums(q, k, v, g, level_scales):
    """The paper's sums over the tokens of each level."""
    q, k = (x.repeat_interleave(HEADS // GROUPS, dim=2) for x in (q, k))
    outputs = []
    for t in range(LENGTH):
        out = torch.zeros_like(v[:, t])
        for level, held in enumerate(buckets(t, level_scales.shape[-1])):
            for s in held:
                score = (q[:, t] * k[:, s]).sum(-1) * g[:, s + 1 : t + 1].sum(1).exp() * level_scales[:, t, :, level]
                out = out + score[..., None] * v[:, s]
        outputs.append(out)
    return torch.stack(outputs, dim=1)


def compared(mixer, op):
    parameters = list(mixer.parameters())
    ours = with_gradients(lambda x: mixer(x, whole(BATCH, LENGTH)), X, parameters)
    return ours, with_gradients(layer(mixer, op), X, parameters)


@pytest.mark.parametrize("bias", [False, True])
def test_log_linear_mamba2_is_the_layer_of_flash_linear_attention(bias):
    naive = pytest.importorskip("fla.ops.log_linear_attn.naive", reason="needs flash-linear-attention")
    oracle = "flash-linear-attention, naive_log_linear_attn"
    assert_agrees("log_linear_mamba2", oracle, *compared(made(8, bias=bias), naive.naive_log_linear_attn))


@pytest.mark.slow
def test_with_fewer_levels_the_last_one_holds_what_is_left():
    assert_agrees("log_linear_mamba2", "plain sums of the paper", *compared(made(5), sums))


def test_wrong_levels_are_named():
    with pytest.raises(ValueError, match="levels must be at least 1; got 0"):
        LogLinearMamba2(width=WIDTH, head_dim=HEAD_DIM, levels=0)
