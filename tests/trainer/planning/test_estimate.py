"""Estimates: from measured tables and the model's own counts; refusals are those of training."""

import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from distributed import run_threads
from test_sending import LENGTH, build, settings_of

from longreach.kernels import softmax
from longreach.kernels.documents import Documents
from longreach.launch.configuration import CONFIGURATIONS
from longreach.parallel.alone import Sending
from longreach.parallel.mesh import Mesh
from longreach.parallel.sequence import Sequence
from longreach.trainer.memory.account import account
from longreach.trainer.memory.allocations import Allocations
from longreach.trainer.planning.cluster import ClusterSettings
from longreach.trainer.planning.estimate import Estimator
from longreach.trainer.planning.links import NETWORK, NODE, travel
from longreach.trainer.planning.ranking import ranked
from longreach.trainer.planning.sending import calls
from longreach.trainer.planning.zero import zero_sends
from longreach.trainer.ranks.settings import layout_of, strategy_of

ROOT = Path(__file__).resolve().parents[3]
RESULTS = ROOT / "benchmarks" / "results"


def cluster_of(**changes) -> ClusterSettings:
    rates = {"memory_gb": 80.0, "tflops": 1000.0, "memory_gbps": 3000.0, "node_gbps": 400.0, "network_gbps": 50.0}
    shares = {"matmul": 0.8, "memory": 0.9, "other": 0.5}
    rates |= {"host_gbps": 60.0, "host_memory_gb": 2000.0, "link_share": 1.0}
    return ClusterSettings(name="test", gpus_per_node=4, efficiency=shares, **(rates | changes))


def estimator_of(*mixers: str) -> Estimator:
    return Estimator(lambda model: build(tuple(model["pattern"]), model.get("activation_checkpointing", "none")),
                     {"pattern": list(mixers), "depth": len(mixers)})  # fmt: skip


def test_shares_of_the_peak_are_the_measured_ones() -> None:
    """floor / ours of the table of ops, times the rate of a plain matrix product over the peak."""
    from omegaconf import OmegaConf

    known = OmegaConf.to_container(OmegaConf.load(ROOT / "launch" / CONFIGURATIONS / "cluster" / "_hopper.yaml"))
    tables = [part["tables"] for part in json.loads((RESULTS / "h200_2026-11-27_5.json").read_text())["parts"]]
    rows = [row for table in tables for each in table for row in each["rows"] if row.get("tokens") == 131072]
    ratio = {row["op"]: row["floor"] / row["ours"] for row in rows if "floor" in row}
    machine = json.loads((RESULTS / "h200_2026-11-27_2.json").read_text())["parts"][0]["tables"][1]["rows"]
    plain = next(row["rate"] for row in machine if "matrix product" in row["what"]) / 989
    names = {"softmax": "softmax_attention", "selective_scan": "selective_scan"}
    names |= {
        f"gated_linear {kind}": f"gated_linear_attention, {kind}" for kind in ("constant", "scalar", "per channel")
    }
    names |= {f"delta_rule {kind}": f"delta_rule, {kind}" for kind in ("scalar", "per channel")}
    for op, name in names.items():
        assert known["efficiency"][name] == pytest.approx(ratio[op] * plain, rel=0.01), name
        assert "h200_2026-11-27_5.json" in known["measured"][name]
    assert known["efficiency"]["matmul"] == pytest.approx(plain, rel=0.01)
    steps = json.loads((RESULTS / "h200_2026-11-27_6.json").read_text())["parts"][0]["tables"]
    (rows,) = (table["rows"] for table in steps if "kernels of a step of llama_125m" in json.dumps(table))
    seconds = sum(row["ms"] for row in rows if "sdpa" in row["kernel"]) / 1e3
    pairs = 131072 * 131073 // 2
    flops = 12 * 3.5 * softmax.flops(pairs, heads=12, key_dim=64, value_dim=64)  # layers, forward and backward
    assert known["efficiency"]["softmax_attention, heads of 64"] == pytest.approx(flops / seconds / 989e12, rel=0.01)


def test_an_estimate_adds_up() -> None:
    settings, cluster = settings_of(4, "ring", "state_passing", None), cluster_of()
    settings.data.rows_per_step = 2
    estimator = estimator_of("softmax", "lightning")
    made = estimator.estimate(settings, cluster)
    model = build(("softmax", "lightning"), "none")
    assert made.work.flops == model.flops(Documents.whole(1, LENGTH))
    assert made.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert made.micro_batches == 2
    assert made.mfu == pytest.approx(3 * 2 * made.work.flops / (made.step * 4 * cluster.peak))
    assert made.refusal() is None
    faster = estimator.estimate(settings, cluster_of(node_gbps=4000.0))
    assert faster.step <= made.step
    tight = estimator.estimate(settings, cluster_of(memory_gb=4.0))
    assert "of 4 GB a GPU" in (tight.refusal() or "")


def test_what_is_recomputed_is_sent_again() -> None:
    """By the rule of the estimate as by the calls of a recomputed model."""
    settings = settings_of(4, "ring", "state_passing", None)
    estimator, mixers = estimator_of("softmax", "delta"), ("softmax", "delta")
    for mode in ("none", "mixing", "full"):
        settings.trainer.activation_checkpointing = mode
        sent, _ = estimator.sent(settings, cluster_of())
        counted = calls(partial(build, mixers, "none" if mode == "mixing" else mode), settings, 3)
        assert sum(sum(of.bytes.values()) for of in sent.values()) == sum(c.bytes * n for c, n in counted.items())


def test_links_by_nodes() -> None:
    """4 GPUs a node, latencies of 0: a message to the next node takes its network card, a gather all of them."""
    cluster = cluster_of(node_latency=0.0, network_latency=0.0)
    row = tuple(range(8))
    within = travel((Sending("exchange", 400, row, 2),), cluster, 3)
    across = travel((Sending("exchange", 400, row, 4),), cluster, 3)
    assert (within.bytes, across.bytes) == ({NODE: 400}, {NETWORK: 400})
    assert across.seconds == pytest.approx(8 * within.seconds)
    gathered = travel((Sending("gather", 800, row),), cluster, 3)
    assert gathered.bytes == {NODE: 600, NETWORK: 200}
    assert gathered.seconds == pytest.approx(800 / 200e9)
    exchanged = travel((Sending("all to all", 700, row),), cluster, 3)
    assert exchanged.bytes == {NODE: 300, NETWORK: 400}
    assert exchanged.seconds == pytest.approx(400 / 50e9)


def test_zero_sends_what_its_stage_needs() -> None:
    model, settings = build(("softmax",), "none"), settings_of(1, "ring", "state_passing", None, "contiguous")
    held = 4 * sum(parameter.numel() for parameter in model.parameters())
    sent = {}
    for stage in range(3):
        settings.engine = type(settings.engine)(zero_stage=stage)
        sent[stage] = sum(each.bytes for each in zero_sends(model, settings, 2))
    assert sent == {0: held, 1: held + held // 2, 2: held + held // 2}
    assert not zero_sends(model, settings, 1)


@pytest.mark.parametrize("share", [{"link_share": 2.0}, {"efficiency": {"matmul": 0.0, "memory": 0.9, "other": 0.5}}])
def test_shares_are_above_nothing_and_at_most_all(share) -> None:
    with pytest.raises(ValueError, match=r"must be a share, above 0 and at most 1; got [02]\.0"):
        replace(cluster_of(), **share).check()


@pytest.mark.slow
def test_what_training_refuses_is_refused() -> None:
    settings = settings_of(4, "ulysses", "state_passing", 4)
    settings.data.rows_per_step = 1
    estimator = Estimator(lambda model: build(("latent",), "none"), {"pattern": ["latent"], "depth": 1})
    assert estimator.estimate(settings, cluster_of()).sent
    lines = list(ranked(estimator_of("softmax"), settings, cluster_of(nodes=2), 3))
    assert any("heads must be a multiple of the 8 ranks" in line for line in lines)
    assert any(re.search(r"^\d+ of \d+ layouts fit", line) for line in lines)
    assert lines[-1].startswith("as given: ")
    with pytest.raises(ValueError, match=r"parallel\.ulysses|parallel\.attention"):  # no layer has use for it
        estimator_of("lightning").refuse(settings)


def peak_of(rank: int, world: int, model, settings) -> int:
    """What a real step of a rank allocates at most beyond parameters, gradients and the tokens."""
    layout = layout_of(settings.parallel, settings.data.sequence_length)
    mesh, documents = Mesh.create(world), Documents.whole(1, layout.length)
    seq = Sequence.shared(documents, layout, mesh, strategy_of(settings.parallel))
    tokens = torch.zeros(1, layout.local_length, dtype=torch.int64)
    allocations = Allocations("cpu")
    allocations.leave_out([*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters()), tokens])
    with allocations:
        model(tokens, seq, tokens)[0].backward()
    return allocations.peak


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["none", "full", "mixing"])
@pytest.mark.parametrize("mixers", [("softmax", "lightning"), ("delta", "window")])
def test_the_account_of_a_shared_row_is_what_its_ranks_allocate(mixers, checkpointing) -> None:
    """By the largest of the ranks: threads copy what they send."""
    settings = settings_of(2, "ring", "state_passing", None)
    settings.data.sequence_length = 4096
    make = partial(build, mixers, checkpointing)
    model = make()
    model.initialise(0)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    made = account(make, settings, 2, torch.device("cpu"), shortest=2048)
    assert made.exact
    assert made.activations() == pytest.approx(max(run_threads(2, peak_of, model, settings)), rel=0.15)
