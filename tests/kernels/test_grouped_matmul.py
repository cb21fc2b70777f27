"""The grouped matrix product: every backend against its definition, groups of any size, and rows sorted and back."""

import pytest
import torch
from torch.nn import functional as F

from longreach.kernels.dispatch import standing_for
from longreach.kernels.grouped_matmul import (
    Grouping,
    chunked,
    collect,
    grouped_matmul,
    library,
    routed,
    routed_swiglu,
    runs_routed,
    spread,
)
from longreach.kernels.grouped_matmul import triton as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Rows of each group, and rows after the last.
SIZES = {
    "uneven": ([5, 0, 17, 1, 40], 3),
    "one group": ([9], 0),
    "empty first and last": ([0, 33, 0], 1),
    "no row in a group": ([0, 0], 6),
}
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}


def problem(sizes, rest, inputs, outputs, dtype, device=DEVICE):
    """x, weight, ends, and the gradient of the output, which is not 0 after the last end."""
    generator = torch.Generator().manual_seed(len(sizes))
    shapes = (sum(sizes) + rest, inputs), (len(sizes), outputs, inputs), (sum(sizes) + rest, outputs)
    x, weight, dout = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    return x, weight, torch.tensor(sizes, device=device).cumsum(0).int(), dout


def results(x, weight, ends, dout, backend):
    x, weight = (each.clone().requires_grad_() for each in (x, weight))
    out = grouped_matmul(x, weight, ends, backend=backend)
    return out, *torch.autograd.grad(out, (x, weight), dout)


def check(name, backend, dtype, inputs=20, outputs=37, device=DEVICE):
    sizes, rest = SIZES[name]
    x, weight, ends, dout = problem(sizes, rest, inputs, outputs, dtype, device)
    got = results(x, weight, ends, dout, backend)
    starts = [0, *ends.tolist()]
    x, weight, dout = x.double(), weight.double(), dout.double()
    dout[starts[-1] :] = 0
    want = [x.new_zeros(dout.shape), torch.zeros_like(x), torch.zeros_like(weight)]
    for group in range(len(sizes)):
        of = slice(starts[group], starts[group + 1])
        want[0][of] = x[of] @ weight[group].T
        want[1][of] = dout[of] @ weight[group]
        want[2][group] = dout[of].T @ x[of]
    for a, b in zip(got, want, strict=True):
        assert a.dtype == dtype
        assert (a.double() - b).norm() <= TOLERANCES[dtype] * b.norm()
        assert not a[: len(b)].isnan().any()


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize(("backend", "dtype"), [("reference", torch.float64), ("chunked", torch.float64)])
def test_the_product_and_its_gradients(name, backend, dtype):
    check(name, backend, dtype)


@pytest.mark.parametrize("name", SIZES)
def test_the_form_that_reads_no_end(name, monkeypatch):
    monkeypatch.setattr(chunked, "_host_knows", lambda ends: False)
    check(name, "chunked", torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton(name, dtype, monkeypatch, repaired_bf16):
    if DEVICE == "cpu":  # several tiles of everything, the last of them not full
        monkeypatch.setattr(kernels, "PRODUCT", dict.fromkeys((2, 4), (16, 16, 16, 4, 1)))
        monkeypatch.setattr(kernels, "GRADIENT", dict.fromkeys((2, 4), (16, 16, 16, 4, 1)))
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # new memory is NaN
    try:
        check(name, "triton", dtype)
    finally:
        torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torchs_own(dtype):
    if DEVICE == "cuda" and dtype == torch.float32:
        pytest.skip("torch's kernel takes bfloat16 alone on CUDA")
    check("uneven", "library", dtype, inputs=16, outputs=40)


def test_auto_is_torchs_own_where_that_is_faster(monkeypatch):
    """Forward and backward ask for each product, since their sizes differ."""
    asked, taken = [], []
    monkeypatch.setattr(library, "is_faster", lambda *of: asked.append([x.shape[-1] for x in of]) or True)
    for name in ("product", "gradient"):
        original = getattr(library, name)
        monkeypatch.setattr(library, name, lambda *a, of=original: taken.append(of.__name__) or of(*a))
    check("uneven", "auto", torch.bfloat16, inputs=16, outputs=40, device="cpu")
    assert taken == ["product", "product", "gradient"]
    assert asked == [[16, 16], [40, 16], [16, 40]]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dtype": torch.float64}, "must not be 'library' in float64"),
        ({"inputs": 18}, "sizes of matrices must be multiples of 8 for kernels.grouped_matmul=library; got 18"),
    ],
)
def test_what_torchs_own_does_not_take(changes, said):
    with pytest.raises(ValueError, match=said):
        check("uneven", "library", **{"dtype": torch.bfloat16, "inputs": 16, "outputs": 40, **changes})


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        (((4, 3), (2, 5, 4), (2,)), r"weight must be \[E, N, K\] and ends \[E\]"),
        (((4, 3), (2, 5, 3), (3,)), r"weight must be \[E, N, K\] and ends \[E\]"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shapes, said):
    x, weight, ends = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=said):
        grouped_matmul(x, weight, ends.int())


def test_types_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"one type and ends int32; got torch.float32, torch.float32 and torch.int64"):
        grouped_matmul(torch.zeros(4, 3), torch.zeros(2, 5, 3), torch.zeros(2).long())


@pytest.mark.parametrize("left_out", [True, False])
def test_rows_are_sorted_by_group_and_back(left_out):
    generator = torch.Generator().manual_seed(0)
    groups = torch.tensor([[2, 0], [-1, 2], [0, 1], [-1, -1], [2, 1]])
    x, y = torch.randn(5, 3, generator=generator).double(), torch.randn(10, 3, generator=generator).double()
    weights = torch.rand(5, 2, generator=generator).double()
    grouping = Grouping.of(groups, 4)
    assert grouping.ends.tolist() == [2, 4, 7, 7]
    assert grouping.order.tolist() == [1, 4, 5, 9, 0, 3, 8]
    if not left_out:  # as where the host does not know how many have a group
        flat = torch.where(groups.flatten() < 0, 4, groups.flatten())
        grouping = grouping._replace(order=flat.argsort(stable=True))
    y = y[: len(grouping.order)].contiguous()
    y[7:] = 0
    leaves = [each.clone().requires_grad_() for each in (x, y, weights)]
    sorted_rows, out = spread(leaves[0], grouping), collect(leaves[1], leaves[2], grouping)
    torch.testing.assert_close(sorted_rows, x[grouping.rows])
    dsorted, dout = torch.cos(y), torch.sin(torch.arange(15.0)).view(5, 3).double()
    dsorted[7:] = 0
    got = [*torch.autograd.grad(sorted_rows, leaves[0], dsorted), *torch.autograd.grad(out, leaves[1:], dout)]
    want = [torch.zeros(5, 3).double() for _ in range(2)]
    dy, dweights = torch.zeros_like(y), torch.zeros_like(weights)
    for place, choice in enumerate(grouping.order.tolist()[:7]):
        row, which = divmod(choice, 2)
        want[0][row] += weights[row, which] * y[place]
        want[1][row] += dsorted[place]
        dy[place] = weights[row, which] * dout[row]
        dweights[row, which] = y[place] @ dout[row]
    torch.testing.assert_close(out, want[0])
    torch.testing.assert_close(got[0], want[1])
    torch.testing.assert_close(got[1][:7], dy[:7])
    torch.testing.assert_close(got[2], dweights)


def routed_problem(dtype, rows=23):
    """x, weights, gate, up, down of 4 groups, the last without rows, and a row of no group; and the choices."""
    generator = torch.Generator().manual_seed(0)
    shapes = (rows, 5), (rows, 2), (4, 6, 5), (4, 6, 5), (4, 3, 6)
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    chosen = torch.rand(rows, 3, generator=generator).topk(2).indices
    chosen[2, 0] = chosen[7, 0] = chosen[7, 1] = -1
    wide = torch.promote_types(dtype, torch.float32)
    return [x.to(wide if at == 1 else dtype) for at, x in enumerate(tensors)], chosen


def loop_of_swiglus(x, weights, gate, up, down, chosen):
    out = []
    for row, groups in enumerate(chosen.tolist()):
        total = weights.new_zeros(down.shape[1])
        for weight, group in zip(weights[row], groups, strict=True):
            if group >= 0:
                total = total + weight * (down[group] @ (F.silu(gate[group] @ x[row]) * (up[group] @ x[row])))
        out.append(total)
    return torch.stack(out)


@pytest.mark.parametrize("slab", [4, 16, 512])
def test_routed_swiglus_are_a_loop_over_rows(slab, monkeypatch):
    monkeypatch.setattr(routed, "ROWS", slab)
    tensors, chosen = routed_problem(torch.float64)
    ours, loop = ([x.clone().requires_grad_() for x in tensors] for _ in range(2))
    got = routed_swiglu(*ours[:2], Grouping.of(chosen, 4), *ours[2:])
    want = loop_of_swiglus(*loop, chosen)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)
    dout = torch.cos(torch.arange(want.numel()).double()).view_as(want)
    grads = torch.autograd.grad(got, ours, dout), torch.autograd.grad(want, loop, dout)
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=1e-12)
    assert not grads[0][2][3].any()  # a group without rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("learns", range(5))
def test_routed_swiglus_in_narrow_types_and_of_one_tensor_that_learns(learns, dtype, monkeypatch):
    monkeypatch.setattr(routed, "ROWS", 4)
    tensors, chosen = routed_problem(dtype)
    tensors[learns].requires_grad_()
    loop = [x.detach().double().requires_grad_(at == learns) for at, x in enumerate(tensors)]
    got = routed_swiglu(*tensors[:2], Grouping.of(chosen, 4), *tensors[2:])
    want = loop_of_swiglus(*loop, chosen)
    assert got.dtype == torch.float32
    dout = torch.sin(torch.arange(want.numel()).float()).view_as(want)
    (mine,), (theirs,) = (
        torch.autograd.grad(got, tensors[learns], dout),
        torch.autograd.grad(want, loop[learns], dout.double()),
    )
    assert mine.dtype == tensors[learns].dtype
    for a, b in ((got, want), (mine, theirs)):
        assert (a.double() - b).norm() <= TOLERANCES[dtype] * b.norm()


def test_routed_swiglus_keep_two_products_of_each_row():
    tensors, chosen = routed_problem(torch.float32)
    tensors = [x.requires_grad_() for x in tensors]
    grouping, kept = Grouping.of(chosen, 4), []
    given = {x.data_ptr() for x in (*tensors, *grouping)}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        routed_swiglu(*tensors[:2], grouping, *tensors[2:])
    assert [x.shape for x in kept if x.data_ptr() not in given] == [(43, 6), (43, 6)]


@pytest.mark.parametrize("backend", ["reference", "library", "auto"])
def test_routed_swiglus_run_by_torch_on_a_cpu_alone(backend):
    assert runs_routed(torch.zeros(4, 4), backend) == (backend == "auto")
    assert not runs_routed(torch.zeros(4, 4, device="meta"), backend)  # which stands for no CPU
    with standing_for("cpu"):
        assert runs_routed(torch.zeros(4, 4, device="meta")) == runs_routed(torch.zeros(4, 4))
