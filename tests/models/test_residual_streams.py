"""Hyper-connections and attention residuals against their definitions, and those of transformers and fla."""

import pytest
import torch
from definitions import definitions_of
from model_presets import build_model, randomise, tokens
from oracles import draw, whole
from torch.nn import functional as F

from longreach.kernels.pointwise import depth_attention, doubly_stochastic
from longreach.models.part import FeedForward
from longreach.models.streams.attention_residuals import AttentionResidualBlock
from longreach.models.streams.hyper_connections import HyperConnectionBlock, ManifoldHyperConnectionBlock

LENGTH, WIDTH, STREAMS, EPS = 7, 10, 3, 1e-6
SEQ = whole(2, LENGTH)


class Linear(FeedForward):
    """A part that is one matrix."""

    def __init__(self, width=WIDTH):
        super().__init__()
        self.down = torch.nn.Linear(width, width, bias=False)

    def forward(self, x, seq):
        return self.down(x)


def parts(number):
    return {f"part_{n}": Linear() for n in range(number)}


def blocks_of(kind, depth=2, number=2, **settings):
    """Blocks as a model makes them, of `number` parts each."""
    made = [
        kind(parts=parts(number), width=WIDTH, before=layer * number, last=layer == depth - 1, norm_eps=EPS, **settings)
        for layer in range(depth)
    ]
    for layer, block in enumerate(made):
        randomise(block.double())
        for parameter in block.parameters():
            parameter.data += 0.1 * draw(*parameter.shape, seed=layer)
    return made


def assert_same(blocks, defined):
    """The blocks one behind the other, as a model runs them, and a function: output and every gradient."""
    found = []
    parameters = [parameter for block in blocks for parameter in block.parameters()]
    for call in (run, defined):
        x = draw(2, LENGTH, WIDTH).requires_grad_()
        out = call(blocks, x)
        found.append([out.detach(), *torch.autograd.grad(out, [x, *parameters], draw(*out.shape, seed=2))])
    torch.testing.assert_close(*found, atol=1e-9, rtol=1e-9)


def run(blocks, x, calls=None):
    """The blocks, or what stands in for them, one behind the other as a model runs them."""
    published = {}
    for block, call in zip(blocks, calls or blocks, strict=True):
        result = call(x, SEQ, *(published[name] for name in block.reads))
        x, *given = result if block.publishes else (result,)
        published |= zip(block.publishes, given, strict=True)
    return x


def each_part(blocks):
    return [(block, name) for block in blocks for name in block.names]


def normed(x, weight=1.0):
    return weight * x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()


def test_hyper_connections_are_those_of_the_paper():
    """Its equations, token by token: B, A_m and A_r, each with a static and a dynamic part."""

    def defined(blocks, x):
        h = [x] * STREAMS
        for block, name in each_part(blocks):
            connection, part = getattr(block, f"{name}_connection"), block.part(name)
            n, rows = STREAMS, connection.dynamic.weight
            read_scale, write_scale = connection.scales
            dynamic = [torch.tanh(normed(each, connection.norm.weight) @ rows.T) for each in h]
            static = connection.static
            a_m = [static[i, 0] + read_scale * dynamic[i][..., 0] for i in range(n)]
            a_r = [[static[i, 1 + j] + read_scale * dynamic[i][..., 1 + j] for j in range(n)] for i in range(n)]
            b = [static[i, n + 1] + write_scale * dynamic[i][..., n + 1] for i in range(n)]
            x = sum(a[..., None] * each for a, each in zip(a_m, h, strict=True))
            out = normed(x, block.get_submodule(f"{name}_norm").weight) @ part.down.weight.T
            h = [sum(a_r[i][j][..., None] * h[i] for i in range(n)) + b[j][..., None] * out for j in range(n)]
        return sum(h)

    assert_same(blocks_of(HyperConnectionBlock, streams=STREAMS), defined)


def test_manifold_hyper_connections_are_those_of_the_paper():
    """Its equations; the mix is normalised 6 times, and the first of columns."""

    def coefficients(module, flat, first, last, scale):
        return scale * (normed(flat) @ module.projection.weight[first:last].T) + module.bias[first:last]

    def defined(blocks, x):
        n, streams = STREAMS, torch.stack([x] * STREAMS, dim=2)
        for block, name in each_part(blocks):
            connection, part, flat = getattr(block, f"{name}_connection"), block.part(name), streams.flatten(2)
            alpha = connection.scales
            pre = torch.sigmoid(coefficients(connection, flat, 0, n, alpha[0])) + EPS
            post = 2 * torch.sigmoid(coefficients(connection, flat, n, 2 * n, alpha[1]))
            # H_res maps streams to streams; its transpose is what the weights are arranged for.
            m = coefficients(connection, flat, 2 * n, 2 * n + n * n, alpha[2]).unflatten(-1, (n, n)).exp()
            m = m / m.sum(-1, keepdim=True) + EPS
            m = m / (m.sum(-2, keepdim=True) + EPS)
            for _ in range(5):
                m = m / (m.sum(-1, keepdim=True) + EPS)
                m = m / (m.sum(-2, keepdim=True) + EPS)
            x = (pre[..., None] * streams).sum(2)
            out = normed(x, block.get_submodule(f"{name}_norm").weight) @ part.down.weight.T
            streams = torch.einsum("btij,btid->btjd", m, streams) + post[..., None] * out[:, :, None]
        final, flat = blocks[-1].final, streams.flatten(2)
        read = torch.sigmoid(coefficients(final, flat, 0, n, final.scales[0])) + EPS
        return (read[..., None] * streams).sum(2)

    assert_same(blocks_of(ManifoldHyperConnectionBlock, streams=STREAMS, iterations=6), defined)


def test_manifold_hyper_connections_are_those_of_deepseek_v4():
    modeling = definitions_of("deepseek_v4")
    config = modeling.DeepseekV4Config(hidden_size=WIDTH, hc_mult=STREAMS, hc_sinkhorn_iters=5, rms_norm_eps=EPS)
    (block,) = blocks_of(ManifoldHyperConnectionBlock, depth=1, number=1, streams=STREAMS, iterations=5)
    ours, final = block.part_0_connection, block.final
    theirs, head = modeling.DeepseekV4HyperConnection(config).double(), modeling.DeepseekV4HyperHead(config).double()
    pairs = [
        (theirs.fn, ours.projection.weight), (theirs.base, ours.bias), (theirs.scale, ours.scales),
        (head.hc_fn, final.projection.weight), (head.hc_base, final.bias), (head.hc_scale, final.scales),
    ]  # fmt: skip
    for their, our in pairs:
        their.data.copy_(our.data)

    def as_they_do(blocks, x):
        streams = x.unsqueeze(2).expand(-1, -1, STREAMS, -1).contiguous()
        post, comb, collapsed = theirs(streams)
        out = block.part_0(block.norm("part_0", collapsed), None)
        mixed = post.unsqueeze(-1) * out.unsqueeze(-2) + torch.matmul(comb.transpose(-1, -2), streams)
        return head(mixed)

    x, found = draw(2, LENGTH, WIDTH), []
    for call, parameters in (run, [our for _, our in pairs]), (as_they_do, [their for their, _ in pairs]):
        leaf = x.clone().requires_grad_()
        out = call([block], leaf)
        found.append([out.detach(), *torch.autograd.grad(out, [leaf, *parameters], draw(*out.shape, seed=2).to(out))])
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()  # theirs computes the numbers of connections in float32


@pytest.mark.parametrize("block_size", [1, 2, 3])
def test_attention_residuals_are_those_of_the_paper(block_size):
    def defined(blocks, x):
        sources, growing = [], x
        places = each_part(blocks)
        for number in range(len(places) + 1):
            block, name = places[number] if number < len(places) else (blocks[-1], "final")
            seen = [*sources, growing] if growing is not None else sources
            if number % block_size == 0 and number < len(places):
                sources, growing = seen, None
            if number:
                depth = getattr(block, f"{name}_depth")
                logits = torch.stack([normed(v, depth.weight) @ depth.query for v in seen])
                h = (torch.softmax(logits, 0).unsqueeze(-1) * torch.stack(seen)).sum(0)
            else:
                h = x
            if number == len(places):
                return h
            out = normed(h, block.get_submodule(f"{name}_norm").weight) @ block.part(name).down.weight.T
            growing = out if growing is None else growing + out

    blocks = blocks_of(AttentionResidualBlock, depth=3, block_size=block_size)
    assert_same(blocks, defined)
    for block in blocks[1:]:
        assert len(block.finished) == len(range(0, block.before, block_size))


def test_depth_attention_is_that_of_flash_linear_attention():
    naive = pytest.importorskip("fla.ops.attnres.naive", reason="needs flash-linear-attention")
    sources, query, weight = [draw(2, 5, 12, seed=n) for n in range(4)], draw(12, seed=7), 1 + draw(12, seed=8)
    found = []
    for call in (
        lambda vs, q, w: depth_attention(vs, q, w, 1e-5),
        lambda vs, q, w: naive.naive_attnres(q, vs, w, rms_eps=1e-5),
    ):
        leaves = [x.clone().requires_grad_() for x in (*sources, query, weight)]
        out = call(leaves[:4], *leaves[4:])
        found.append([out.detach(), *torch.autograd.grad(out, leaves, draw(2, 5, 12, seed=9).to(out))])
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()  # theirs computes in float32


def test_gradients_of_the_functions_of_a_token():
    vs = [draw(2, 3, 5, seed=n).requires_grad_() for n in range(3)]
    query, weight = draw(5, seed=4).requires_grad_(), draw(5, seed=5).requires_grad_()
    assert torch.autograd.gradcheck(lambda q, w, *vs: depth_attention(vs, q, w), (query, weight, *vs))
    assert torch.autograd.gradcheck(lambda x: doubly_stochastic(x, 4), (draw(2, 3, 4, 4).requires_grad_(),))
    matrix = doubly_stochastic(draw(2, 3, 4, 4), 20)
    torch.testing.assert_close(matrix.sum(-1), torch.ones(2, 3, 4).double(), atol=1e-4, rtol=0)
    torch.testing.assert_close(matrix.sum(-2), torch.ones(2, 3, 4).double(), atol=1e-4, rtol=0)
    half = [v.detach().bfloat16() for v in vs]
    assert depth_attention(half, query.bfloat16(), weight).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="sources must be alike, one at least; got"):
        depth_attention([vs[0], half[0]], query, weight)


@pytest.mark.parametrize("scheme", [HyperConnectionBlock, ManifoldHyperConnectionBlock, AttentionResidualBlock])
def test_starts_as_a_model_does_that_learns_connections(scheme):
    """Streams start as one pre-norm residual, attention over depth as a mean; every parameter has a gradient soon."""
    model = build_model("llama_tiny", width=32, depth=2, mixers={"softmax": {"heads": 4}}, feed_forward={"hidden": 40},
                        block={"_target_": f"{scheme.__module__}.{scheme.__name__}", "_partial_": True})  # fmt: skip
    model.initialise(0)
    inputs, seq = tokens(1, 12), whole(1, 12)
    hidden = []
    model.norm.register_forward_hook(lambda module, arguments, out: hidden.append(arguments[0].detach()))
    loss, count = model(inputs, seq, inputs.roll(-1, 1))
    (loss / count).backward()
    idle = [name for name, x in model.named_parameters() if x.grad is None]
    assert idle == []
    if scheme is not AttentionResidualBlock:
        plain = build_model(
            "llama_tiny", width=32, depth=2, mixers={"softmax": {"heads": 4}}, feed_forward={"hidden": 40}
        )
        state = model.state_dict()
        plain.load_state_dict({name: state[name] for name in plain.state_dict()})
        plain(inputs, seq)
        plain_hidden = []
        plain.norm.register_forward_hook(lambda module, arguments, out: plain_hidden.append(arguments[0].detach()))
        plain(inputs, seq)
        assert F.cosine_similarity(hidden[0], plain_hidden[0], dim=-1).min() > 0.999


@pytest.mark.parametrize(
    ("scheme", "settings", "message"),
    [
        (HyperConnectionBlock, {"streams": 1}, "model.block.streams must be at least 2; got 1"),
        (ManifoldHyperConnectionBlock, {"iterations": 0}, "model.block.iterations must be at least 1; got 0"),
        (AttentionResidualBlock, {"block_size": 0}, "model.block.block_size must be at least 1; got 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(scheme, settings, message):
    with pytest.raises(ValueError, match=message):
        scheme(parts=parts(1), width=WIDTH, before=0, last=True, **settings)


def test_work_of_the_connections_is_counted():
    seq, places = whole(2, LENGTH), 2 * LENGTH
    of_parts = 2 * 2 * places * WIDTH * WIDTH
    hyper = blocks_of(HyperConnectionBlock, depth=2, streams=STREAMS)
    ways = 2 * places * WIDTH * (2 * (9 + 6)) + 2 * 2 * places * STREAMS * (STREAMS + 2) * WIDTH
    assert [block.flops(seq) - of_parts for block in hyper] == [ways, ways + 2 * places * WIDTH * STREAMS]
    sources = blocks_of(AttentionResidualBlock, depth=2)
    assert [block.flops(seq) - of_parts for block in sources] == [
        6 * places * WIDTH * 2,
        6 * places * WIDTH * (3 + 4 + 5),
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheme", "depth", "settings"),
    [(ManifoldHyperConnectionBlock, 1, {"iterations": 2}), (AttentionResidualBlock, 2, {"block_size": 1})],
)
def test_blocks_are_whole_graphs(scheme, depth, settings):
    torch._dynamo.reset()
    blocks = blocks_of(scheme, depth, 1, **settings)
    graphs = [torch.compile(block, fullgraph=True, backend="aot_eager") for block in blocks]
    parameters = [parameter for block in blocks for parameter in block.parameters()]
    found = []
    for calls in (blocks, graphs):
        x = draw(2, LENGTH, WIDTH).requires_grad_()
        out = run(blocks, x, calls)
        found.append([out.detach(), *torch.autograd.grad(out, [x, *parameters], draw(*out.shape, seed=2))])
    torch.testing.assert_close(*found, atol=1e-9, rtol=1e-9)
