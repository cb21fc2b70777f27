"""Report: an estimate as lines. Each says of what it is; nothing of it is measured but the kernels' efficiency."""

from __future__ import annotations

from ...parallel.ops.experts import Rows
from ..memory.allocations import size
from .estimate import Estimate, kernel_share


def lines(estimate: Estimate, budget: float) -> list[str]:
    """The whole estimate; `budget` in tokens."""
    settings, cluster, of = estimate.settings, estimate.cluster, estimate.work
    head = [
        f"{cluster.gpus:,} x {cluster.name} in {cluster.nodes:,} nodes; {layout(estimate)}",
        f"parameters: {estimate.parameters:,}"
        + (f", {estimate.active:,} of them for a token" if estimate.active != estimate.parameters else ""),
        "",
        "FLOPs a token, forward and backward (a backward as two forwards), rows of "
        f"{settings.data.sequence_length:,} tokens, as the modules state them",
    ]
    flops = [
        f"  {name:<28}{of.per_token(name):>12.4g}   {3 * kind.mixing / of.tokens:>10.4g} of them in ops; "
        f"{kind.layers} layer{'s' * (kind.layers > 1)}"
        for name, kind in of.kinds.items()
    ]
    total = f"  {'all':<28}{3 * of.flops / of.tokens:>12.4g}"
    return [*head, *flops, total, "", *_memory(estimate), "", *_sent(estimate), "", *_seconds(estimate, budget)]


def layout(estimate: Estimate) -> str:
    """The setting in a line."""
    return ", ".join(choices(estimate))


def choices(estimate: Estimate) -> list[str]:
    """What a layout chooses, one by one."""
    settings = estimate.settings
    parallel, trainer = settings.parallel, settings.trainer
    data_ranks = estimate.cluster.gpus // parallel.sequence
    shared = parallel.attention
    if parallel.attention == "ulysses":
        heads = parallel.ulysses or parallel.sequence
        shared = f"ulysses {heads} x ring {parallel.sequence // heads}"
    parts = [f"data {data_ranks:,} x sequence {parallel.sequence:,} ({shared})"]
    if parallel.experts > 1:
        parts.append(f"experts {parallel.experts}")
    parts.append(f"ZeRO-{settings.engine.zero_stage}")
    parts.append(f"checkpointing {trainer.activation_checkpointing}")
    if trainer.tile_tokens:
        parts.append(f"tiles {trainer.tile_tokens}")
    if trainer.offload_activations:
        parts.append("activations offloaded")
    if settings.engine.offload != "none":
        parts.append(f"{settings.engine.offload} offloaded")
    return parts


def _memory(estimate: Estimate) -> list[str]:
    table = ["memory of a GPU at the peak of a step, by the modules run without data"]
    table += [f"  {line}" for line in estimate.account.lines()]
    if estimate.gathered:
        table.append(f"  {'gathered at once by ZeRO-3':<44}{size(estimate.gathered):>42}   by its rules")
    table.append(f"  {'CUDA, fragments':<44}{size(estimate.reserved):>42}   assumed: cluster.reserved_gb")
    fits = estimate.refusal() or "fits"
    table.append(f"  {'all':<44}{size(estimate.memory):>42}   {fits}")
    return table


def _sent(estimate: Estimate) -> list[str]:
    table = ["bytes that a rank sends in a step, by op and link, from the strategies' own exchanges"]
    times = estimate.micro_batches
    for (mixer, op, phase), sent in estimate.sent.items():
        for link, count in sorted(sent.bytes.items()):
            if count:
                known = "; at most, every block listed" if sent.listed else ""
                known = "; assumed: experts have even loads" if mixer == Rows.where else known
                table.append(f"  {mixer + ': ' + op + ', ' + phase:<52}{size(times * count):>14}   {link}{known}")
    for each in estimate.zero:
        among = "all ranks" if each.apart == 1 else "ranks that hold the same experts"
        table.append(f"  {'ZeRO: ' + each.what:<52}{size(each.bytes):>14}   among {among}")
    return table


def _seconds(estimate: Estimate, budget: float) -> list[str]:
    cluster = estimate.cluster
    table = ["seconds of a step"]
    for name, seconds in estimate.seconds.items():
        if not seconds and not estimate.hidden.get(name):
            continue
        note = ""
        kind, _, what = name.partition(": ")
        if what == "linear layers":
            note = f"matmul: {cluster.share('matmul')[1]}"
        elif what == "ops":
            note = kernel_share(estimate, kind)[1]
        elif name in estimate.hidden:
            beside = f"; {hidden:.3g} s more beside computation" if (hidden := estimate.hidden[name]) else ""
            note = f"exposed{beside}; links assumed"
        elif name.startswith(("memory", "optimizer")) and "host" not in name:
            known = cluster.measured.get("memory")
            note = (
                f"{cluster.efficiency['memory']:.0%} of the bandwidth, {'measured: ' + known if known else 'assumed'}"
            )
        elif name.startswith(("offloaded", "optimizer")):
            note = "links and the host's memory assumed"
        table.append(f"  {name:<52}{seconds:>12.4g}   {note}".rstrip())
    days = budget / estimate.tokens_a_day
    return [
        *table,
        f"  {'all':<52}{estimate.step:>12.4g}",
        f"MFU {estimate.mfu:.1%}; {estimate.tokens_a_day:,.0f} tokens a day; {days:,.1f} days for {budget:,.0f} tokens",
    ]
