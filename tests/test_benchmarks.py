"""What benchmarks say of what they measured."""

from collections import Counter
from functools import partial

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from longreach.benchmarks.steps import peers, unavoidable
from longreach.benchmarks.steps.unavoidable import Product, Softmax
from longreach.kernels.pointwise import swiglu
from longreach.models.feed_forward.experts import MixtureOfExperts
from longreach.models.feed_forward.swiglu import SwiGLU
from longreach.models.language_model import LanguageModel
from longreach.models.mixers.linear.lightning_attention import LightningAttention
from longreach.models.mixers.softmax.softmax_attention import SoftmaxAttention

MIB = 2**20


@pytest.mark.parametrize(
    ("row", "seconds", "peaks", "end"),
    [
        ("8192", (2, 5, 1), (MIB, 2 * MIB), "2.50 | 2.5 | met | 1.00 s | 5.00 | 1 MiB | 2 MiB | 0.50 | 0.5 | met |"),
        ("8192", (2, 4.9, 1), (0, MIB), "2.45 | 2.5 | NOT met | 1.00 s | 4.90 | 0 MiB | 1 MiB | 0.00 | 0.5 | met |"),
        (
            "8192", (2.0, 4.8, 2.0), (MIB, MIB),
            "2.40 | 2.5 | NOT met (bound 2.40) | 2.00 s | 2.40 | 1 MiB | 1 MiB | 1.00 | 0.5 | NOT met |",
        ),
        ("2048", (2.0, 3.6, 1.8), (MIB, MIB), "1.80 | 1.8 | met | 1.80 s | 2.00 | 1 MiB | 1 MiB | 1.00 |  |  |"),
        ("packed", (2.0, 1.0, 0.5), (MIB, MIB), "0.50 |  |  | 0.50 s | 2.00 | 1 MiB | 1 MiB | 1.00 |  |  |"),
    ],
)  # fmt: skip
def test_a_line_says_how_many_times_as_fast_and_which_goals_are_met_or_out_of_reach(row, seconds, peaks, end):
    times = dict(zip(("LongReach", "transformers", peers.ALONE), seconds, strict=True))
    line = peers.line("mamba2", row, 3, times, dict(zip(peers.ORDER, peaks, strict=True)), (3e-5, 4e-4))
    assert line == f"| mamba2 | {row} | 3 | {seconds[0]:.2f} s | {seconds[1]:.2f} s | {end} 3e-05 | 4e-04 |"
    assert line.count("|") == peers.HEAD.splitlines()[0].count("|") == peers.HEAD.splitlines()[1].count("|")


def test_unavoidable_work_is_every_product_once_and_attention():
    mixers = {
        "lightning": partial(LightningAttention, heads=4),
        "softmax": partial(SoftmaxAttention, heads=4, kv_heads=2),
    }
    experts = partial(MixtureOfExperts, hidden=24, experts=8, experts_per_token=2)
    sizes = {"vocabulary": 48, "width": 32, "depth": 3, "pattern": ["lightning*2", "softmax"]}
    with torch.device("meta"):
        model = LanguageModel(**sizes, mixers=mixers, feed_forward=experts)
    work = unavoidable.work_of(model, [40, 12, 12])
    assert Counter(work.parts) == {
        Product(64, 32, (32, 32, 32, 32)): 2,  # queries, keys, values and gates
        Product(64, 32, (32, 16, 16)): 1,
        Product(64, 32, (32,)): 3,  # outputs
        Product(64, 32, (8,)): 3,  # routers
        Product(16, 32, (24, 24)): 24,
        Product(16, 24, (32,)): 24,
        Product(64, 32, (48,)): 1,
        Softmax(40, heads=4, kv_heads=2, key_dim=8, value_dim=8): 1,  # of each document
        Softmax(12, heads=4, kv_heads=2, key_dim=8, value_dim=8): 2,
    }
    assert work.parameters == sum(parameter.numel() for parameter in model.parameters())


def test_unavoidable_work_refuses_a_model_with_products_that_it_does_not_know():
    sizes, softmax = (
        {"vocabulary": 48, "width": 32, "depth": 1, "pattern": ["softmax"]},
        partial(SoftmaxAttention, heads=4),
    )

    class Unknown(SwiGLU):
        def each(self, x):
            return self.down(swiglu(F.linear(x, self.gate.weight), self.up(x)))

    with torch.device("meta"):
        model = LanguageModel(**sizes, mixers={"softmax": softmax}, feed_forward=partial(Unknown, hidden=24))
    with pytest.raises(ValueError, match="products must have the"):
        unavoidable.work_of(model, [64])


@pytest.mark.parametrize("rows", [40, 1024])
def test_all_ways_to_time_a_product_give_the_same(rows):
    forward, of_inputs, of_weights = unavoidable.ways(rows, 16, 24)
    for runs, shape in ((forward, (rows, 24)), (of_inputs, (rows, 16))):
        results = [torch.cat(run()).clone() for run in runs]
        for result in results:
            assert result.shape == shape
            assert_close(result, results[0], rtol=1e-4, atol=1e-4)
    for run in of_weights:
        assert {frozenset(result.shape) for result in run()} == {frozenset((24, 16))}
    if rows == 40:
        results = [run()[0].clone() for run in of_weights]
        for result in results:
            assert_close(result if result.shape == (24, 16) else result.T, results[0], rtol=1e-4, atol=1e-4)


def test_products_of_layers_are_timed_together_or_one_by_one():
    passes = unavoidable.product_passes(Product(40, 16, (24, 8)))
    assert (len(passes.forward), len(passes.backward)) in ((1, 2), (2, 4))
    assert passes.seconds > 0
