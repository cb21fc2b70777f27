"""The doctor's checks: they pass on what is right, and name what is planted."""

import io
from collections import Counter
from dataclasses import replace
from types import MappingProxyType, SimpleNamespace

import hydra
import planted_faults
import pytest
import torch
from few_families import few_families
from rich.console import Console

from longreach.kernels import pointwise
from longreach.kernels.select_blocks import Rule
from longreach.launch.build import build
from longreach.launch.configuration import model_sizes
from longreach.launch.train import to_settings
from longreach.models.layers.selectors.block_gate import BlockGate
from longreach.models.layers.selectors.indexer import Indexer
from longreach.models.mixers.delta.gated_deltanet import GatedDeltaNet
from longreach.models.mixers.softmax.softmax_attention import SoftmaxAttention
from longreach.parallel.layout import Layout
from longreach.parallel.sequence import Sequence
from longreach.trainer.diagnosis import diagnose as diagnosis
from longreach.trainer.diagnosis import ranks as rank_processes
from longreach.trainer.diagnosis import training, work
from longreach.trainer.diagnosis.bench import Bench
from longreach.trainer.diagnosis.cases import case_of_many, make_cases
from longreach.trainer.diagnosis.checks import exact, inexact, loop, ties
from longreach.trainer.diagnosis.diagnose import at_most, diagnose
from longreach.trainer.diagnosis.model import complete, fill, reduced
from longreach.trainer.diagnosis.report import FAIL, NOT_TESTED, PASS, Report, Row
from longreach.trainer.diagnosis.truth import Call, gradients_of, plain_op
from longreach.trainer.diagnosis.work import Topology
from longreach.trainer.ranks.settings import ParallelSettings

MODELS = [*model_sizes(), "quickstart"]
ONE_PER_KIND = {f"{family}_tiny" for family in few_families()}
FEW, SLOW = ("llama_tiny", "minimax_01_tiny", "moba_tiny", "kimi_linear_tiny"), pytest.mark.slow


def settings_of(*overrides):
    with hydra.initialize_config_module("longreach.conf", version_base="1.3"):
        return to_settings(hydra.compose("train", list(overrides)), list(overrides), {})


def heads(model):
    return {(name, getattr(mixer, "heads", 0)) for name, mixer in zip(model.names, model.mixers, strict=True)}


def checked(*overrides, prepare=None):
    prepare = prepare and f"{planted_faults.__name__}:{prepare.__name__}"
    return diagnose(settings_of(*overrides), build, prepare=prepare)


@pytest.mark.parametrize(
    "preset",
    [
        each if each in FEW else pytest.param(each, marks=SLOW if each in ONE_PER_KIND else pytest.mark.many)
        for each in MODELS
    ],
)
def test_a_reduced_model_has_the_kinds_heads_and_groups_of_the_whole(preset):
    model = settings_of(f"model={preset}").model
    small = reduced(model, build, window=10)
    with torch.device("meta"):
        whole, made = build(complete(model)), build(small)
    assert small["width"] <= max(128, *(8 * count for _, count in heads(whole)))  # which heads of 8 channels need
    assert max(Counter(small["pattern"]).values()) <= 2
    assert len(made.blocks) == len(small["pattern"])
    kinds = {type(mixer) for mixer in whole.mixers}
    assert {type(mixer) for mixer in made.mixers} == kinds
    assert heads(made) == heads(whole)
    masks = [mixer.mask for mixer in made.mixers if hasattr(mixer, "mask")]
    assert all(getattr(mask, name, None) in (None, 10) for mask in masks for name in ("window", "block"))


def test_filled_parameters_are_the_same_in_every_process_and_none_is_zero():
    model = reduced(settings_of("model=rwkv7_hybrid_tiny").model, build, window=10)
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


@pytest.mark.parametrize(
    ("devices", "sequence", "experts", "data_ranks"), [(1, 1, 2, None), (2, 2, 3, None), (3, 1, 2, 2), (7, 2, 3, 3)]
)
def test_devices_are_used_by_so_many_ranks_as_share_rows_and_experts(
    monkeypatch, devices, sequence, experts, data_ranks
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    made, report = [], Report("")
    monkeypatch.setattr(diagnosis, "Bench", lambda topology, count, *rest: made.append(count))
    monkeypatch.setattr(diagnosis, "_attempt", lambda *rest: None)
    topology = Topology(build, {}, ParallelSettings(sequence=sequence, experts=experts))
    diagnosis._on_cuda(topology, 6, report, settings_of("model=mixtral_tiny"), print, None)
    assert made == ([] if data_ranks is None else [data_ranks])
    assert [row.verdict for row in report.rows] == ([NOT_TESTED] * 3 if data_ranks is None else [])


def test_the_verdict_names_what_tells_most_first():
    report = Report(
        "", [Row("a", PASS), Row("loss", FAIL, precedence=5), Row("op b", FAIL, where="here", precedence=0)]
    )
    assert report.failed
    assert report.verdict() == "FAIL: 2 of 3 checks failed, first to look at: op b: here"
    assert not Report("", [Row("a", PASS), Row("NCCL", NOT_TESTED)]).failed


def test_each_rank_may_round_its_part_of_a_sum_that_nearly_cancels():
    case, bench = case_of_many(2, 61), SimpleNamespace(device=torch.device("cpu"), names=["mamba"])
    x, weight, bias = (torch.randn(shape).bfloat16() for shape in ((*case.tokens.shape, 24), (24, 4), (24,)))
    call = Call(0, "mamba", "short_conv", (x, weight), {"bias": bias}, x.shape)
    owner = case.layout.unshard([torch.full_like(case.layout.shard(case.tokens, rank), rank) for rank in range(2)])
    dout = torch.randn(x.shape) * 0.1 + 1.0 - 2.0 * owner[..., None]  # the sums of both ranks are large and opposite
    single = Sequence.single(case.documents)

    def parts(dtype):
        rounded = call.mapped(lambda x: x.to(dtype))
        of_ranks = (dout.bfloat16().to(dtype) * (owner == rank)[..., None] for rank in range(2))
        whole = [gradients_of(plain_op("short_conv", "chunked"), rounded, given, single) for given in of_ranks]
        dx = whole[0][1] + whole[1][1]
        return [
            [case.layout.shard(whole[0][0], rank), case.layout.shard(dx, rank), *whole[rank][2:]] for rank in range(2)
        ]

    def worst(ours, exact=None):
        found = inexact.of_call(bench, case, call, dout.bfloat16(), ours, torch.bfloat16, exact)
        return max(difference.error for difference in found if "bias" in difference.where)

    ours, exact = parts(torch.bfloat16), parts(torch.float64)
    assert worst(ours) > 2.0
    assert worst(ours, exact) <= 0.7
    ours[0][3] *= 1.01  # which is more than rounding
    assert worst(ours, exact) > 2.0


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
        (planted_faults.dropped_state, "minimax_01_tiny", "op gated_linear_attention"),
        (planted_faults.a_rank_raises, "quickstart", "RuntimeError: out of luck"),
    ],
)
def test_a_planted_fault_is_found_and_named(fault, preset, culprit):
    report = checked(f"model={preset}", "parallel.sequence=2", prepare=fault)
    assert report.failed
    assert culprit in report.verdict()


class Pooled(Bench):
    """A bench on ranks that stay for the next."""

    def __init__(self, topology, data_ranks, ranks):
        super().__init__(topology, data_ranks, Report(""), None)
        self.ranks = ranks
        self.run(work.configure, topology)

    def close(self):
        pass


@pytest.fixture(scope="module")
def pools():
    """The ranks that are alive, if any."""
    made = []
    yield made
    for ranks in made:
        ranks.close()


@pytest.fixture
def four_ranks(pools):
    """One pool for all tests, and a new one after a rank has failed."""
    if not pools or not all(process.is_alive() for process in pools[0].processes):
        pools[:] = [rank_processes.Ranks(4)]
    return pools[0]


def bench_of(make, *overrides, change=lambda model: None):
    """A bench of the configuration, made by `make(topology, data ranks)`, and the settings."""
    settings = settings_of(*overrides)
    change(settings.model)
    topology = Topology(build, reduced(settings.model, build, window=10), settings.parallel)
    return make(topology, 4 // settings.parallel.sequence), settings


def two_block_sizes(model):
    """MoBA layers of two kinds, which differ by the size of their blocks alone."""
    moba = model["mixers"]["moba"]
    model["mixers"]["other"] = {**moba, "block_size": 2 * moba["block_size"]}
    model |= {"pattern": ["moba", "other", "softmax", "softmax"], "depth": 4}


def ops(bench, settings):
    exact.one_process(bench)
    exact.operations(bench)


def whole_model(bench, settings):
    ops(bench, settings)
    exact.model(bench)


def bfloat16(bench, settings):
    inexact.rounded(bench, torch.bfloat16)


def groups(bench, settings):
    loop.grid(bench, settings)


SLIDING, BFLOAT16 = ["model=sliding_window_tiny"], "trainer.dtype=bfloat16"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "overrides", "stage", "culprit"),
    [
        ("local_positions", ["model=llama_tiny"], whole_model, "output of every mixer"),
        ("transition_through_documents", ["model=mamba2_hybrid_tiny"], ops, "op gated_linear_attention"),
        ("state_of_long_spans", ["model=minimax_01_tiny"], ops, "op gated_linear_attention"),
        ("missing_halo", ["model=gated_deltanet_hybrid_tiny"], ops, "op short_conv"),
        ("halo_of_one_span", ["model=gated_deltanet_hybrid_tiny"], ops, "op short_conv"),
        ("one_ring_for_all_masks", SLIDING, ops, "op softmax_attention"),
        ("a_window_as_long_as_a_span", SLIDING, ops, "op softmax_attention"),
        ("lost_at_the_last_hop", ["model=mla_tiny"], ops, "op latent_attention: gradient of latent"),
        ("expansion_of_own_rows", ["model=mla_tiny"], ops, "op latent_attention: gradient of expansion"),
        ("bfloat16_partials", ["model=llama_tiny"], bfloat16, "bfloat16: op softmax_attention"),
        ("bfloat16_query_gradients", ["model=llama_tiny"], bfloat16, "bfloat16: op softmax_attention"),
        ("bfloat16_states", ["model=minimax_01_tiny"], bfloat16, "bfloat16: op gated_linear_attention"),
        ("bfloat16_window_means", ["model=infllm_v2_tiny"], bfloat16, "bfloat16: op window_means"),
        (
            "bfloat16_window_means", ["model=nsa_gated_deltanet_tiny", "parallel.sequence=4"], bfloat16,
            "bfloat16: op local_windows",
        ),
        ("bfloat16_positions", ["model=llama_tiny"], bfloat16, "bfloat16: positions from 100,000 on"),
        ("groups_of_strangers", ["model=llama_tiny", "parallel.sequence=4"], groups, "groups of ranks = the grid"),
        ("loss_averaged_per_rank", ["model=llama_tiny"], loop.training_steps, "ZeRO-1: a step of the loop"),
        ("nothing_is_clipped", ["model=llama_tiny"], loop.training_steps, "ZeRO-1: a step of the loop"),
        (
            "experts_averaged_over_all_ranks", ["model=mixtral_tiny", "parallel.experts=2"], loop.training_steps,
            "ZeRO-1: a step of the loop",
        ),
        ("padding_in_the_balancing_loss", ["model=mixtral_tiny"], whole_model, "auxiliary losses and sums"),
        ("norms_decay", ["model=llama_tiny"], loop.training_steps, "ZeRO-1: parameters after the step"),
        ("targets_of_the_token", ["model=llama_tiny"], loop.training_steps, "rows and targets that the loop reads"),
        (
            "every_data_rank_reads_the_same", ["model=llama_tiny"], loop.training_steps,
            "rows and targets that the loop reads",
        ),
        (
            "bfloat16_reduction", ["model=llama_tiny", BFLOAT16], loop.training_steps,
            "ZeRO-1, bfloat16: sum over micro-batches",
        ),
        (
            "bfloat16_accumulation", ["model=llama_tiny", BFLOAT16], loop.training_steps,
            "ZeRO-1, bfloat16: sum over micro-batches",
        ),
    ],
)  # fmt: skip
def test_each_kind_of_fault_is_named(four_ranks, fault, overrides, stage, culprit):
    sequence = [] if any(o.startswith("parallel.sequence") for o in overrides) else ["parallel.sequence=2"]
    bench, settings = bench_of(lambda topology, data: Pooled(topology, data, four_ranks), *overrides, *sequence)
    four_ranks.run(planted_faults.plant, fault, timeout=60)
    try:
        stage(bench, settings)
    finally:
        four_ranks.run(planted_faults.heal, timeout=60)
    (first, *_) = bench.report.culprits
    assert f"{first.check}: {first.where}: ".startswith(culprit)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "parameter"),
    [("bfloat16_sums_of_experts", "experts"), pytest.param("bfloat16_reduction", "norm", marks=pytest.mark.many)],
)
def test_sums_in_bfloat16_are_as_strict_where_ranks_share_out_experts(four_ranks, fault, parameter):
    make = lambda topology, data: Pooled(topology, data, four_ranks)  # noqa: E731
    bench, settings = bench_of(make, "model=mixtral_tiny", "parallel.sequence=2", "parallel.experts=2", BFLOAT16)
    loop.training_steps(bench, settings)
    assert not bench.report.failed, bench.report.verdict()
    four_ranks.run(planted_faults.plant, fault, timeout=60)
    try:
        loop.training_steps(bench, settings)
    finally:
        four_ranks.run(planted_faults.heal, timeout=60)
    (row,) = bench.report.failures
    assert row.check == "ZeRO-1, bfloat16: sum over micro-batches"
    assert parameter in row.where


@pytest.mark.slow
def test_what_is_kept_without_its_setting_meets_another_layer(four_ranks):
    make = lambda topology, data: Pooled(topology, data, four_ranks)  # noqa: E731
    bench, settings = bench_of(make, "model=moba_tiny", "parallel.sequence=2", change=two_block_sizes)
    four_ranks.run(planted_faults.plant, "one_plan_for_all_windows", timeout=60)
    with pytest.raises(rank_processes.RankFailure, match="op window_means of layer 1") as failure:
        ops(bench, settings)
    assert not failure.value.silent


def test_a_detach_in_a_mixer_differs_from_the_loss(monkeypatch):
    original = SoftmaxAttention.attend
    monkeypatch.setattr(SoftmaxAttention, "attend", lambda self, q, k, v, seq: original(self, q.detach(), k, v, seq))
    bench, _ = bench_of(lambda topology, data: Bench(topology, data, Report(""), None), "model=llama_tiny")
    bench.cases = bench.cases[:1]
    exact.one_process(bench)
    assert not bench.report.failed
    exact.differences(bench)
    (row,) = bench.report.failures
    assert row.where.startswith("blocks.1.mixer.query.weight") or row.where.startswith("blocks.0.mixer.query.weight")


@pytest.mark.parametrize(
    ("layer", "preset", "path"), [(Indexer, "minimax_sparse_tiny", "index"), (BlockGate, "seer_tiny", "gate")]
)
def test_an_indexers_loss_that_reaches_attention_is_named(monkeypatch, layer, preset, path):
    original = layer.project

    def leaking(self, *given):
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "detach", lambda tensor: tensor)
            return original(self, *given)

    bench, _ = bench_of(lambda topology, data: Bench(topology, data, Report(""), None), f"model={preset}")
    exact.detached(bench)
    assert not bench.report.failed
    monkeypatch.setattr(layer, "project", leaking)
    exact.detached(bench)
    (row,) = bench.report.failures
    assert row.check == "a detached loss reaches its layer alone"
    assert row.where.startswith("loss blocks.")
    assert f".mixer.{path} reaches " in row.where


def test_lists_are_compared_by_the_scores_of_what_they_name():
    k = torch.tensor([3.0, 1.0, 1.0 + 1e-15, 2.0]).double().view(1, 4, 1, 1)
    rule = Rule(1, 3, score="dot", local=0)
    call = Call(0, "", "select_blocks", (torch.ones_like(k), k), {"rule": rule}, torch.Size((1, 4, 1, 3)))
    case = make_cases(1, 1, 61)[0]
    case = replace(case, lengths=[[4]], layout=Layout(4))

    def lists(*last):
        return torch.tensor([[0, -1, -1], [0, 1, -1], [0, 1, 2], last], dtype=torch.int32).view(1, 4, 1, 3)

    assert ties.difference(call, case, lists(0, 1, 3), lists(0, 2, 3)) < 1e-12
    assert ties.difference(call, case, lists(0, 1, 2), lists(0, 2, 3)) > 0.1
    for wrong in ((0, 3, 3), (0, 3, 4), (0, 3, -1)):
        assert ties.difference(call, case, lists(*wrong), lists(0, 2, 3)) > 0.1


@pytest.mark.slow
def test_scores_that_differ_by_rounding_alone_raise_no_alarm(four_ranks, monkeypatch):
    make = lambda topology, data: Pooled(topology, data, four_ranks)  # noqa: E731
    one_head = "model.mixers.sparse.index_heads=1"  # whose score is 0 for every other token
    bench, _ = bench_of(make, "model=deepseek_sparse_tiny", one_head, "parallel.sequence=2")
    bench.cases = bench.cases[:3]
    exact.one_process(bench)
    four_ranks.run(planted_faults.plant, "rounded_scores", timeout=60)
    try:
        exact.model(bench)
        assert not bench.report.failed
        monkeypatch.setattr(ties, "settled", lambda bench, case, truth, got: truth)
        exact.model(bench)
    finally:
        four_ranks.run(planted_faults.heal, timeout=60)
    assert bench.report.failed  # so the ranks did select otherwise


def test_a_wrong_backward_of_a_function_is_named(monkeypatch):
    original = pointwise.rope

    def unturned(x, *rest, **settings):
        return x + (original(x, *rest, **settings) - x).detach()

    monkeypatch.setattr(pointwise, "rope", unturned)
    bench, _ = bench_of(lambda topology, data: Bench(topology, data, Report(""), None), "model=llama_tiny")
    exact.pointwise_functions(bench)
    assert [row.check for row in bench.report.failures] == ["function rope"]


def test_settings_that_differ_stay_different_and_two_layers_of_each_kind_remain():
    model = settings_of("model=moba_tiny").model
    two_block_sizes(model)
    small = reduced(model, build, window=10)
    assert small["pattern"] == ["moba", "other", "softmax", "softmax"]
    assert small["mixers"]["moba"]["block_size"] == 4
    assert small["mixers"]["other"]["block_size"] == 8


class Demanding(GatedDeltaNet):
    """Whose keys and values must be equally wide, and whose blocks are a size of its own; `extra` ones it has none."""

    small = MappingProxyType({"block": 3, "extra": 3})

    def __init__(
        self, *, width: int, heads: int, key_dim: int = 64, value_dim: int = 64, block: int = 8, extra: int = 0
    ):
        if key_dim != value_dim:
            raise ValueError("value_dim must equal key_dim")
        super().__init__(width=width, heads=heads, key_dim=key_dim, value_dim=value_dim)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"key_dim": 4, "value_dim": 4}, {"key_dim": 4, "value_dim": 4, "block": 3}),  # small enough
        ({"block": 2}, {"block": 2}),  # the usual sizes, made small, do not fit
    ],
)
def test_a_mixer_states_its_own_small_sizes_and_keeps_those_that_do_not_fit(given, expected):
    model = settings_of("model=sliding_window_tiny").model
    model["mixers"]["full"] = {"_target_": f"{__name__}.Demanding", "_partial_": True, "heads": 2, **given}
    small = reduced(model, build, window=10)["mixers"]
    sizes = {name: value for name, value in small["full"].items() if name in ("key_dim", "value_dim", "block", "extra")}
    assert sizes == expected
    assert small["window"]["window"] == 10


def test_the_groups_of_a_larger_world_are_the_grid():
    for sequence, by_heads in ((1, 1), (4, 1), (4, 2), (4, 4), (6, 3)):
        places = training.places(sequence, by_heads, 3 * sequence)
        assert places == [loop.place_of(rank, sequence, by_heads) for rank in range(3 * sequence)]
    assert places[9] == (1, 3, (6, 7, 8, 9, 10, 11), (9, 10, 11), (6, 9))


def test_the_rows_of_the_loop_have_uneven_targets():
    length = 14
    rows = loop.expected_rows([19, 1, 1, 2, 1, 1, 3, 7, *[1] * 7, 2, 7], length, 16, 61)
    counts = [int((row.targets != -100).sum()) for row in rows]
    assert max(counts) >= 12
    assert min(counts) <= 5
    for row in rows:
        assert sum(row.lengths) == length


def wide_report():
    checks = [
        "op softmax_attention", "op short_conv", "output of every mixer", "float32: op short_conv", "ZeRO-1: a step",
    ]  # fmt: skip
    where = "output in layer 0 (softmax, SoftmaxAttention); one long document, and borders at the edges of spans"
    rows = [
        Row(check, FAIL if at in (0, 2, 4) else PASS, 0.3, 1e-9, where, "chunked (cpu), float64", at)
        for at, check in enumerate(checks)
    ]
    rows.append(Row("NCCL", NOT_TESTED, where="2 CUDA device(s) are needed; this machine has 0"))
    return Report("2 layers", rows, ["width 192 -> 24, depth 8 -> 2"])


def shown(report, **settings):
    stream = io.StringIO()
    report.show(Console(file=stream, width=80), **settings)
    return stream.getvalue()


def test_a_failure_is_told_with_what_follows_from_it_in_80_columns():
    report = wide_report()
    text = shown(report)
    assert max(map(len, text.splitlines())) <= 80
    assert [row.check for row in report.culprits] == ["op softmax_attention"]
    assert "FAIL  output of every mixer (follows)" in text
    assert "so too  output of every mixer, ZeRO-1: a step" in " ".join(text.split()).replace("so too ", "so too  ")
    assert "3.0e-01 of the largest expected entry; at most 1.0e-09" in text
    assert "all checks" in shown(report, verbose=True)


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
