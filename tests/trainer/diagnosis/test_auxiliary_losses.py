"""The doctor's results hold auxiliary losses, and their gradients."""

from functools import partial

import pytest
import torch
from distributed import run_threads

from longreach.models.feed_forward.swiglu import SwiGLU
from longreach.models.language_model import LanguageModel
from longreach.models.mixers.linear.lightning_attention import LightningAttention
from longreach.parallel.mesh import Mesh
from longreach.parallel.sequence import Sequence
from longreach.trainer.diagnosis.cases import make_cases
from longreach.trainer.diagnosis.checks import comparison
from longreach.trainer.diagnosis.model import fill, layer_names
from longreach.trainer.diagnosis.truth import Result, run, truth_of, with_auxiliary

RANKS, VOCABULARY = 2, 61
CASE = make_cases(RANKS, 1, VOCABULARY)[0]
PATH = "multi_token_prediction.0.multi_token_prediction_1"


def make_model():
    model = LanguageModel(
        vocabulary=VOCABULARY, width=16, depth=1, pattern=["lightning"], feed_forward=partial(SwiGLU, hidden=20),
        mixers={"lightning": partial(LightningAttention, heads=2)}, multi_token_prediction=1,
    )  # fmt: skip
    fill(model)
    return model.double()


def on_one_of(rank, world):
    """The result of a rank, without `run`, which changes ops that threads share."""
    seq = Sequence(CASE.documents, CASE.layout, rank, Mesh.create(world).sequence_group)
    model, tokens = make_model(), seq.shard(CASE.tokens)
    loss, count, reports = model(tokens, seq, seq.shard(CASE.targets), False, True)
    with_auxiliary(model, loss, reports).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return Result(loss.detach(), int(count), gradients, [], tokens, {PATH: reports[PATH].detach()})


def test_what_a_module_reports_is_compared():
    model = make_model()
    truth = truth_of(model, CASE)
    got = comparison.together(run_threads(RANKS, on_one_of), CASE.layout)
    names = layer_names(model)
    assert names[1] == "multi-token prediction 1 (lightning, LightningAttention)"
    assert {call.layer for call in truth.calls} == {0, 1}
    assert comparison.of_loss(got, truth, CASE).error < 1e-12
    assert len(truth.layers) == len(names) == 2
    assert max(d.error for d in comparison.of_gradients(got.gradients, truth.gradients, "")) < 1e-12
    assert truth.gradients["multi_token_prediction.0.projection.weight"].any()
    got.reports[PATH] *= 1.01
    found = comparison.of_loss(got, truth, CASE)
    assert found.error == pytest.approx(0.01)
    assert PATH in found.where


def test_gradients_are_of_the_shares_of_auxiliary_losses_that_are_asked_for():
    model, seq = make_model(), Sequence.single(CASE.documents)
    none, one, two = (
        run(model, seq, CASE.tokens, CASE.targets, {PATH: share}).gradients["embedding.weight"] for share in (0, 1, 2)
    )
    torch.testing.assert_close(two - one, one - none, atol=1e-12, rtol=1e-9)
    assert (one - none).any()
    ours = run(model, seq, CASE.tokens, CASE.targets).gradients["embedding.weight"]
    torch.testing.assert_close(ours, none + 0.3 * (one - none), atol=1e-12, rtol=1e-9)
