"""SeerAttention against its definition, token by token: outputs, its loss, and what that reaches."""

import pytest
import torch
from model_presets import randomise
from oracles import assert_agrees, draw, whole

from longreach.models.mixers.softmax.softmax_attention import SoftmaxAttention
from longreach.models.mixers.sparse.seer_attention import SeerAttention

WIDTH, LENGTH, SIZE, DIM = 24, 37, 4, 6
SIZES = {"width": WIDTH, "heads": 4, "kv_heads": 2, "head_dim": 8}


def built(count=3, **more):
    mixer = SeerAttention(**SIZES, block_size=SIZE, count=count, gate_dim=DIM, **more).double()
    randomise(mixer)
    return mixer


def turned(rotary, x, positions):
    """`[T, …, D]` at positions, by complex numbers."""
    half = x.shape[-1] // 2
    frequencies = rotary.rotation.frequencies()[0].double()
    torch.testing.assert_close(frequencies, 1e4 ** (-torch.arange(half).double() / half), rtol=1e-6, atol=0)
    angles = torch.as_tensor(positions).double()[:, None] * frequencies
    turn = torch.polar(torch.ones_like(angles), angles).view(len(x), *[1] * (x.dim() - 2), half)
    turned = torch.complex(x[..., :half], x[..., half:]) * turn
    return torch.cat([turned.real, turned.imag], dim=-1)


def defined(mixer, x, dense):
    """(output, loss) of one document `[T, width]`."""
    q, k, v = (project(x).unflatten(-1, (-1, 8)) for project in (mixer.query, mixer.key, mixer.value))
    of_groups = q.unflatten(1, (2, 2)).flatten(2).detach()
    gate_q = turned(mixer.gate.rotary, torch.einsum("tgi,goi->tgo", of_groups, mixer.gate.query.weight), range(LENGTH))
    pooled = [k[b : b + SIZE].detach() for b in range(0, LENGTH - SIZE + 1, SIZE)]
    pooled = torch.stack([torch.cat([x.amax(0), x.amin(0), x.mean(0)], dim=-1) for x in pooled])
    gate_k = turned(
        mixer.gate.rotary,
        torch.einsum("bgi,goi->bgo", pooled, mixer.gate.key.weight),
        range(0, LENGTH - SIZE + 1, SIZE),
    )
    q, k = (turned(mixer.rotary, part, range(LENGTH)) for part in (q, k))
    outs, total = [], 0.0
    for t in range(LENGTH):
        whole_blocks, own = [b for b in range(len(gate_k)) if (b + 1) * SIZE <= t + 1], t // SIZE
        for group in range(2):
            scores = {b: (gate_q[t, group] @ gate_k[b, group]) * DIM**-0.5 for b in whole_blocks}
            best = sorted((b for b in scores if b != own), key=lambda b: (-scores[b].item(), b))
            chosen = list(range(own + 1)) if dense else sorted([own, *best[: mixer.gate.rule.count - 1]])
            keys = torch.tensor([s for b in chosen for s in range(b * SIZE, min((b + 1) * SIZE, t + 1))])
            weights = (q[t, 2 * group : 2 * group + 2] @ k[keys, group].T * 8**-0.5).softmax(-1)
            outs.append(weights @ v[keys, group])
            seen = [b for b in chosen if b in scores]
            if seen:
                m = torch.stack([weights[:, keys // SIZE == b].max() for b in seen]).detach()
                logs = torch.stack([scores[b] for b in seen]).log_softmax(-1)
                total = total + (m / m.sum() * ((m / m.sum()).log() - logs)).sum() / 2
    return mixer.output(torch.stack(outs).view(LENGTH, -1)), total


@pytest.mark.parametrize("dense", [False, True])
def test_seer_attention_is_its_definition(dense):
    mixer, seq, x = built(dense_steps=1), whole(1, LENGTH), draw(1, LENGTH, WIDTH).requires_grad_()
    mixer.at_step(0 if dense else 1)
    gate, others = list(mixer.gate.parameters()), [p for n, p in mixer.named_parameters() if not n.startswith("gate.")]
    out, loss = mixer(x, seq)
    expected, divergence = defined(mixer, x[0], dense)
    dout, found = draw(LENGTH, WIDTH, seed=3), []
    for result, of in ((out[0], loss), (expected, divergence)):
        gradients = torch.autograd.grad(result, [x, *others], dout, retain_graph=True)
        found.append([result.detach(), *gradients, of.detach(), *torch.autograd.grad(of, gate, retain_graph=True)])
    assert_agrees("seer_attention", "dense definition, token by token", *found)
    assert loss > 1
    assert all(g is None for g in torch.autograd.grad(loss, [x, *others], allow_unused=True))


def test_dense_steps_are_softmax_attention_with_its_weights():
    mixer, dense, x = built(dense_steps=2), SoftmaxAttention(**SIZES).double(), draw(1, LENGTH, WIDTH)
    randomise(dense)
    missing, unexpected = mixer.load_state_dict(dense.state_dict(), strict=False)
    assert set(missing) == {"gate.query.weight", "gate.key.weight"}
    assert not unexpected
    mixer.at_step(1)
    torch.testing.assert_close(mixer(x, whole(1, LENGTH))[0], dense(x, whole(1, LENGTH)), rtol=0, atol=1e-12)
    mixer.at_step(2)
    assert not torch.allclose(mixer(x, whole(1, LENGTH))[0], dense(x, whole(1, LENGTH)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gate_dim": 0}, "gate_dim must be at least 1"),
        ({"gate_loss": -1.0}, "gate_loss must not be negative"),
        ({"dense_steps": -1}, "dense_steps must not be negative"),
        ({"gate": "head"}, "gate must be null for SeerAttention"),
        ({"count": 2, "local": 3}, "count must have room for the forced blocks"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        SeerAttention(**SIZES, **settings)
