"""Long decays, and the hardest inputs of every op with a state: what is chunked is as exact as the plain recurrence."""

import pytest
import torch
from torch.nn import functional as F

from longreach.kernels.delta_rule import delta_rule
from longreach.kernels.diagonal_scan import diagonal_scan
from longreach.kernels.documents import Documents
from longreach.kernels.gated_linear import gated_linear_attention
from longreach.kernels.log_linear import log_linear_attention
from longreach.kernels.selective_scan import selective_scan

H, K, V = 2, 4, 3
LENGTH = 16_384
LAST_PLACES = 4 * torch.finfo(torch.float32).eps
OFTEN = ("decay of a key channel", "general delta rule", "selective scan")  # the others with -m many
LONG, SHORT = -3e-4, -20.0  # the mean logarithm of a decay: a state lasts for 3,000 tokens, or for none


class Drawn:
    """The inputs of an op: `decay` is the mean logarithm of a decay, `keys` scales keys and what is written."""

    def __init__(self, length: int, decay: float, keys: float = 1.0):
        self.generator = torch.Generator().manual_seed(0)
        self.length, self.mean, self.scale = length, decay, keys

    def normal(self, *shape):
        return torch.randn(1, self.length, *shape, dtype=torch.float64, generator=self.generator)

    def heads(self, dims):
        return self.normal(H, dims)

    def key(self, dims=K):
        return self.scale * self.normal(H, dims)

    def unit_key(self):
        return self.scale * F.normalize(self.normal(H, K), dim=-1)

    def decay(self, *shape):
        return self.mean * (0.5 + torch.rand(1, self.length, *shape, dtype=torch.float64, generator=self.generator))

    def share(self, *shape):
        return torch.sigmoid(self.normal(*shape))


# By name: what makes the inputs from what is drawn, and the op on them.
CASES = {
    "fixed decay": (
        lambda d: (d.heads(K), d.key(), d.heads(V), d.decay(H)[0, 0]),
        gated_linear_attention,
    ),
    "decay of a head": (lambda d: (d.heads(K), d.key(), d.heads(V), d.decay(H)), gated_linear_attention),
    "decay of a key channel": (lambda d: (d.heads(K), d.key(), d.heads(V), d.decay(H, K)), gated_linear_attention),
    "decay of a value channel": (
        lambda d: (d.heads(K), d.key(), d.heads(V), d.decay(H, V)),
        lambda q, k, v, decay, **more: gated_linear_attention(q, k, v, value_log_decay=decay, **more),
    ),
    "exclusive read with a bonus": (
        lambda d: (d.heads(K), d.key(), d.heads(V), d.decay(H, K), d.heads(K)[0, 0]),
        lambda q, k, v, decay, bonus, **more: gated_linear_attention(
            q, k, v, decay, read="exclusive", bonus=bonus, **more
        ),
    ),
    "normaliser": (
        lambda d: (d.heads(K).exp(), d.key().abs(), d.heads(V), d.decay(H)),
        lambda *x, **more: gated_linear_attention(*x, normaliser="sum", **more),
    ),
    "input gates": (
        lambda d: (d.heads(K), d.key(), d.heads(V), d.decay(H), 4 * d.normal(H)),
        lambda q, k, v, decay, gate, **more: gated_linear_attention(
            q, k, v, decay, log_input=gate, normaliser="at_least_one", **more
        ),
    ),
    "levels": (
        lambda d: (d.heads(K), d.key(), d.heads(V), d.decay(H), d.share(H, 16)),
        log_linear_attention,
    ),
    "delta rule": (lambda d: (d.heads(K), d.unit_key(), d.heads(V), d.share(H)), delta_rule),
    "delta rule, decay of a head": (
        lambda d: (d.heads(K), d.unit_key(), d.heads(V), d.share(H), d.decay(H)),
        delta_rule,
    ),
    "delta rule, decay of a key channel": (
        lambda d: (d.heads(K), d.unit_key(), d.heads(V), d.share(H), d.decay(H, K)),
        delta_rule,
    ),
    "general delta rule": (
        lambda d: (d.heads(K), d.key(), d.heads(V), d.decay(H, K), d.unit_key(), d.share(H, 1)),
        lambda q, k, v, decay, a, rate, **more: delta_rule(q, k, v, None, decay, erase=(-a, a * rate), **more),
    ),
    "scan": (lambda d: (d.key(K)[:, :, 0], d.decay(K)), diagonal_scan),
    "selective scan": (
        lambda d: (
            d.normal(K),
            -d.decay(K),
            -torch.arange(1.0, 4, dtype=torch.float64).expand(K, -1),
            d.key()[:, :, 0, :3],
            d.normal(3),
        ),
        selective_scan,
    ),
    "longhorn": (  # of which 1 - delta b^2 is the decay
        lambda d: (d.normal(K), -d.decay(K).clamp(-0.5), d.share(3) * d.scale, d.normal(3)),
        lambda x, delta, b, c, **more: selective_scan(x, delta, None, b, c, decay="longhorn", **more),
    ),
}


def relative(actual, expected):
    return float((actual.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in OFTEN else pytest.mark.many) for name in CASES]
)
@torch.no_grad()
def test_errors_of_16384_tokens_are_those_of_the_plain_recurrence(name):
    """Of outputs and final states; how roundings add up is chance, and may differ by a quarter.

    Where both are a few units of float32's last place, as with the triangular systems of the delta rule, that is all
    that is asked.
    """
    make, op = CASES[name]
    inputs = [x.bfloat16() for x in make(Drawn(LENGTH, LONG))]
    exact = op(*(x.double() for x in inputs), backend="chunked")  # other tests hold it to the reference by 1e-9
    for dtype in (torch.float32, torch.bfloat16):
        found = [op(*(x.to(dtype) for x in inputs), backend=backend) for backend in ("chunked", "reference")]
        chunked, plain = (list(map(relative, results, exact)) for results in found)
        assert all(a <= max(1.25 * b, LAST_PLACES) for a, b in zip(chunked, plain, strict=True)), (
            dtype,
            chunked,
            plain,
        )


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    "hard",
    [{"decay": SHORT}, {"keys": 0.0}, {"documents": Documents.from_lengths([[1] * 70])}],
    ids=["decays of -20", "keys of 0", "documents of one token"],
)
def test_hard_inputs_give_what_the_plain_recurrence_gives(name, hard):
    """Outputs, states and gradients: all finite in float32, and those of float64."""
    hard = dict(hard)
    documents = hard.pop("documents", None)
    make, op = CASES[name]
    inputs, found = make(Drawn(70, **{"decay": LONG, **hard})), []
    for dtype, backend in ((torch.float32, "chunked"), (torch.float64, "reference")):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        out, state = op(*leaves, backend=backend, documents=documents)
        found.append([out, state, *torch.autograd.grad(out.sum() + state.sum(), leaves)])
    for actual, expected in zip(*found, strict=True):
        assert actual.isfinite().all()
        torch.testing.assert_close(actual.double(), expected, atol=1e-4, rtol=1e-4)
