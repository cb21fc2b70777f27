"""The doctor's checks: they pass on what is right, and name what is planted."""

from pathlib import Path

import hydra
import planted_faults
import pytest
import torch

from longreach.launch.build import build
from longreach.launch.train import to_settings
from longreach.trainer.diagnosis import ranks as rank_processes
from longreach.trainer.diagnosis.cases import make_cases
from longreach.trainer.diagnosis.diagnose import at_most, diagnose
from longreach.trainer.diagnosis.model import complete, fill, reduced
from longreach.trainer.diagnosis.report import FAIL, NOT_TESTED, PASS, Report, Row
from longreach.trainer.settings import ParallelSettings

MODELS = sorted(path.stem for path in (Path(__file__).resolve().parents[2] / "conf" / "model").glob("*.yaml"))


def settings_of(*overrides):
    with hydra.initialize_config_module("longreach.conf", version_base="1.3"):
        return to_settings(hydra.compose("train", list(overrides)), list(overrides), {})


def heads(model):
    return {(name, getattr(mixer, "heads", 0)) for name, mixer in zip(model.names, model.mixers, strict=True)}


def checked(*overrides, prepare=None):
    prepare = prepare and f"{planted_faults.__name__}:{prepare.__name__}"
    return diagnose(settings_of(*overrides), build, prepare=prepare)


@pytest.mark.parametrize("preset", MODELS)
def test_a_reduced_model_has_the_kinds_heads_and_groups_of_the_whole(preset):
    model = settings_of(f"model={preset}").model
    small = reduced(model, build, window=10)
    with torch.device("meta"):
        whole, made = build(complete(model)), build(small)
    assert small["width"] <= 128
    assert len(made.mixers) <= 4
    kinds = {type(mixer) for mixer in whole.mixers}
    assert {type(mixer) for mixer in made.mixers} == kinds
    assert heads(made) == heads(whole)
    assert all(mixer.mask.window in (None, 10) for mixer in made.mixers if hasattr(mixer, "mask"))


def test_filled_parameters_are_the_same_in_every_process_and_none_is_zero():
    model = reduced(settings_of("model=rwkv7_tiny").model, build, window=10)
    first, second = build(model), build(model)
    fill(first)
    fill(second)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.abs().min() > 0


@pytest.mark.parametrize(("ranks", "spans"), [(2, 1), (4, 2), (8, 4)])
def test_cases_have_borders_at_edges_and_inside_spans_and_uneven_targets(ranks, spans):
    cases = make_cases(ranks, spans, 61)
    assert {case.layout.spans for case in cases} == {1, 2, spans}
    assert min(case.layout.span_length for case in cases) == 1
    offsets = set()
    for case in cases:
        start = 0
        for length in case.lengths[1]:
            offsets.add(start % case.layout.span_length)
            start += length
        assert (case.targets[~case.inside] == -100).all()
    assert {0, 1, 4, 6 if ranks * spans <= 32 else 2} <= offsets
    assert any(not case.inside[:, -case.layout.span_length :].any(dim=1).all() for case in cases)


def test_a_large_topology_keeps_its_shape_on_eight_ranks():
    assert at_most(ParallelSettings(sequence=64), 8).sequence == 8
    assert at_most(ParallelSettings(sequence=6), 8).sequence == 6


def test_the_verdict_names_what_tells_most_first():
    report = Report(
        "", [Row("a", PASS), Row("loss", FAIL, precedence=5), Row("op b", FAIL, where="here", precedence=0)]
    )
    assert report.failed
    assert report.verdict() == "FAIL: 2 of 3 checks failed, first to look at: op b: here"
    assert not Report("", [Row("a", PASS), Row("NCCL", NOT_TESTED)]).failed


# Half a minute each: every preset on request, with `-m many`.
OFTEN = [("minimax_01_tiny", 4), ("kimi_linear_tiny", 2)]
RARELY = [(preset, sequence) for preset in MODELS for sequence in (2, 4) if (preset, sequence) not in OFTEN]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "sequence"), [*OFTEN, *(pytest.param(*rare, marks=pytest.mark.many) for rare in RARELY)]
)
def test_presets_pass(preset, sequence):
    report = checked(f"model={preset}", f"parallel.sequence={sequence}")
    assert not report.failed, report.verdict()
    assert {row.check for row in report.rows if row.verdict == NOT_TESTED} >= {"NCCL", "Triton kernels", "flash-attn"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "preset", "culprit"),
    [
        (planted_faults.local_positions, "llama_tiny", "output of layer 0 (softmax, SoftmaxAttention)"),
        (planted_faults.dropped_state, "minimax_01_tiny", "op gated_linear_attention"),
        (planted_faults.transition_through_documents, "mamba2_tiny", "op gated_linear_attention"),
        (planted_faults.loss_averaged_per_rank, "llama_tiny", "ZeRO-1"),
        (planted_faults.missing_halo, "quickstart", "op short_conv"),
        (planted_faults.bfloat16_partials, "llama_tiny", "bfloat16: op softmax_attention"),
        (planted_faults.a_rank_raises, "quickstart", "RuntimeError: out of luck"),
    ],
)
def test_a_planted_fault_is_found_and_named(fault, preset, culprit):
    report = checked(f"model={preset}", "parallel.sequence=2", prepare=fault)
    assert report.failed
    assert culprit in report.verdict()


def silent():
    import time

    time.sleep(60)


@pytest.mark.slow
def test_silent_ranks_are_ended(monkeypatch):
    monkeypatch.setattr(rank_processes, "PRELOADED", ["torch", "torch.distributed"])
    ranks = rank_processes.Ranks(2)
    with pytest.raises(rank_processes.RankFailure, match="silent: no answer in 1 s; rank 0 stands in"):
        ranks.run(silent, timeout=1)
    assert not any(process.is_alive() for process in ranks.processes)
