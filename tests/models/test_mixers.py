"""What every mixer promises, for every file in conf/mixer."""

import gc
import importlib
import pkgutil
import weakref

import pytest
import torch
from distributed import run_threads
from model_presets import MIXERS, WIDTH, build_mixer, few_or_many, few_or_slow, in_pieces, mixer_partial
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longreach.kernels.documents import Documents
from longreach.models import mixers
from longreach.models.mixer import Mixer
from longreach.parallel.layout import Layout
from longreach.parallel.mesh import Mesh
from longreach.parallel.sequence import Sequence
from longreach.parallel.strategy import Strategy

LENGTH = 48
PACKED = [[9, 22, 1, 11], [LENGTH]]


def draw(batch=2, length=LENGTH):
    return torch.randn(batch, length, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def packed():
    return Sequence.single(Documents.from_lengths(PACKED, LENGTH))


def whole(batch=2, length=LENGTH):
    return Sequence.single(Documents.whole(batch, length))


def test_every_mixer_of_this_package_has_a_file():
    described = {mixer_partial(name).func for name in MIXERS}
    for module in pkgutil.walk_packages(mixers.__path__, f"{mixers.__name__}."):
        for value in vars(importlib.import_module(module.name)).values():
            own = isinstance(value, type) and value.__module__ == module.name and issubclass(value, Mixer)
            assert not own or value.__subclasses__() or value in described, value  # a base class needs none


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keeps_shape_and_dtype(name, dtype):
    mixer, exact = build_mixer(name, dtype), build_mixer(name)
    lists, exact_lists = noted_lists(mixer), noted_lists(exact)
    out = mixer(draw().to(dtype), packed())
    assert out.shape == (2, LENGTH, WIDTH)
    assert out.dtype == dtype
    expected = exact(draw(), packed())
    alike = torch.ones(2, LENGTH, dtype=torch.bool)
    for ours, theirs in zip(lists, exact_lists, strict=True):  # rounded scores may choose other blocks
        alike &= (ours == theirs).all(-1).all(-1)
    assert alike.float().mean() > (0.99 if dtype == torch.float32 else 0.9)
    error = (out.double() - expected)[alike].norm() / expected[alike].norm()
    assert error < (1e-4 if dtype == torch.float32 else 5e-2)


def noted_lists(mixer):
    """The lists of blocks that the mixer's selector, if it has one, will have given."""
    noted = []
    if hasattr(mixer, "selector"):
        mixer.selector.register_forward_hook(lambda module, arguments, lists: noted.append(lists))
    return noted


@pytest.mark.parametrize("name", MIXERS)
@torch.no_grad()
def test_is_causal(name):
    mixer, x, at = build_mixer(name), draw(), 20
    lists = noted_lists(mixer)
    other = x.clone()
    other[:, at] += 1
    moved = (mixer(x, whole()) - mixer(other, whole())).abs().amax(-1)
    assert moved[:, :at].max() < 1e-12
    step = getattr(getattr(mixer, "mask", None), "dilation", 1)  # keys between are not seen
    expected = torch.ones(2, 5, dtype=torch.bool)[:, ::step]
    if lists and mixer.selector.rule.local == 0:  # who lists the token; here a block is a token
        expected = (lists[1][:, at : at + 5] == at).flatten(2).any(-1)
        assert expected.any()
    assert (moved[:, at : at + 5 : step] > 1e-6)[expected].all()


@pytest.mark.parametrize("name", MIXERS)
@torch.no_grad()
def test_documents_of_a_row_do_not_see_each_other(name):
    mixer, x = build_mixer(name), draw()
    other = x.clone()
    other[0, 9:31] += 1  # the second document of the first row
    moved = (mixer(x, packed()) - mixer(other, packed())).abs().amax(-1)
    assert moved[0, 9:31].min() > 1e-6
    moved[0, 9:31] = 0
    assert moved.max() == 0


@pytest.mark.parametrize("name", MIXERS)
@torch.no_grad()
def test_a_packed_document_gives_what_it_gives_alone(name):
    mixer, x = build_mixer(name), draw()
    out, start = mixer(x, packed())[0], 0
    for length in PACKED[0]:
        alone = mixer(x[:1, start : start + length], whole(1, length))[0]
        torch.testing.assert_close(out[start : start + length], alone, atol=1e-9, rtol=1e-9)
        start += length


@pytest.mark.parametrize(
    ("lengths", "name"),
    [
        pytest.param(lengths, *each.values, marks=each.marks, id=f"{how}-{each.values[0]}")
        for how, lengths, names in (
            ("steps", [1] * LENGTH, few_or_many()),
            ("mixed", [7, 1, 25, 1, 1, 13], few_or_slow()),
            ("last", [LENGTH - 1, 1], few_or_many()),
        )
        for each in names
    ],
)
@torch.no_grad()
def test_decoding_in_pieces_gives_the_full_forward(name, lengths):
    mixer, x = build_mixer(name), draw()
    torch.testing.assert_close(in_pieces(mixer, x, lengths), mixer(x, whole()), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", MIXERS)
def test_every_parameter_and_the_input_get_a_gradient(name):
    mixer, x = build_mixer(name), draw().requires_grad_()
    mixer(x, packed()).square().sum().backward()
    for label, tensor in [("input", x), *mixer.named_parameters()]:
        assert tensor.grad is not None, label
        assert tensor.grad.abs().max() > 1e-6, label


class Made(TorchDispatchMode):
    """Every tensor that an operation makes, and the operation."""

    def __init__(self):
        super().__init__()
        self.tensors: list[tuple[weakref.ref[torch.Tensor], str]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.tensors += [(weakref.ref(y), str(func)) for y in tree_leaves(out) if isinstance(y, torch.Tensor)]
        return out

    @property
    def held(self):
        return [(tuple(y.shape), y.dtype, made_by) for of, made_by in self.tensors if (y := of()) is not None]


@pytest.mark.parametrize("name", MIXERS)
def test_a_pass_lets_go_of_its_tensors_when_it_ends(name):
    """No cycle of references holds them until Python's collector comes by, in any number of steps."""
    mixer, x = build_mixer(name), draw()
    forward_and_gradients(mixer, x, packed())  # what is kept for good is made
    mixer.zero_grad()
    collects, made = gc.isenabled(), Made()
    gc.disable()
    try:
        with made:
            forward_and_gradients(mixer, x, packed())
        mixer.zero_grad()
        assert made.tensors
        assert not made.held
    finally:
        if collects:
            gc.enable()


def forward_and_gradients(mixer, x, seq):
    """Output, gradient of the input, and gradients of the parameters for a loss that weighs every element."""
    x = x.clone().requires_grad_()
    mixer.zero_grad()
    out = mixer(x, seq)
    (out * seq.shard(draw().roll(1, dims=0))).sum().backward()
    return [out.detach(), x.grad], [parameter.grad for parameter in mixer.parameters()]


def on_one_of(rank, world, name, layout):
    seq = Sequence.shared(Documents.from_lengths(PACKED, LENGTH), layout, Mesh.create(world), Strategy())
    return forward_and_gradients(build_mixer(name), seq.shard(draw()), seq)


@pytest.mark.parametrize("name", few_or_slow())
def test_four_ranks_give_what_one_gives(name):
    tensors, gradients = forward_and_gradients(build_mixer(name), draw(), packed())
    for spans in (1, 2):
        layout = Layout(LENGTH, 4, spans)
        results = run_threads(4, on_one_of, name, layout)
        for index, expected in enumerate(tensors):
            gathered = layout.unshard([local[index] for local, _ in results])
            torch.testing.assert_close(gathered, expected, atol=1e-9, rtol=1e-9)
        for index, expected in enumerate(gradients):
            total = torch.stack([local[index] for _, local in results]).sum(0)
            torch.testing.assert_close(total, expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", MIXERS)
def test_the_ranks_parts_of_the_work_make_the_whole(name):
    mixer, documents = build_mixer(name), Documents.from_lengths(PACKED, LENGTH)
    group = object()  # counting talks to nobody
    for count in (mixer.mixing_flops, mixer.flops):
        parts = [count(Sequence(documents, Layout(LENGTH, 4, 2), rank, group)) for rank in range(4)]
        assert min(parts) > 0
        assert sum(parts) == count(Sequence.single(documents))
