"""Links: how long what a rank sends takes, and over which links it goes."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from ...parallel.alone import Sending
from .cluster import ClusterSettings

NODE, NETWORK = "within nodes", "between nodes"


@dataclass(frozen=True)
class Travelled:
    """Seconds, and bytes by link. Neighbouring ranks of a row are neighbours in the cluster."""

    seconds: float
    bytes: Counter[str]


def travel(sends: tuple[Sending, ...], cluster: ClusterSettings, rank: int) -> Travelled:
    """Of one call by the rank of a row, whose first rank is the first GPU of a node.

    Messages of an exchange follow one another. Collectives are rings over all members; over several nodes, all GPUs of
    a node send at once, each over its own network card.
    """
    seconds, by_link = 0.0, Counter[str]()
    for each in sends:
        if each.peer is not None:
            crosses = each.peer // cluster.gpus_per_node != rank // cluster.gpus_per_node
            rate, latency = cluster.link(crosses)
            seconds += latency + each.bytes / rate
            by_link[NETWORK if crosses else NODE] += each.bytes
        elif each.kind == "all to all":
            here = sum(member // cluster.gpus_per_node == rank // cluster.gpus_per_node for member in each.members)
            away = (len(each.members) - here) / max(1, len(each.members) - 1)
            within, between = (1 - away) * each.bytes, away * each.bytes
            rates = [cluster.link(crosses) for crosses in (False, True)]
            seconds += max(within / rates[0][0], between / rates[1][0]) + rates[away > 0][1]
            by_link[NODE] += round(within)
            by_link[NETWORK] += each.bytes - round(within)
        else:
            taken = ring(each.bytes, each.members, cluster)
            seconds += taken.seconds
            by_link.update(taken.bytes)
    return Travelled(seconds, by_link)


def ring(sent: int, members: tuple[int, ...] | range, cluster: ClusterSettings) -> Travelled:
    """Of a collective of these ranks in which each sends so many bytes, as the mean of its members."""
    if len(members) < 2:
        return Travelled(0.0, Counter())
    held = Counter(member // cluster.gpus_per_node for member in members)
    within = cluster.link(False)[0]
    if len(held) == 1:
        return Travelled(sent / within + cluster.node_latency * math.log2(len(members)), Counter({NODE: sent}))
    rate = min(within, cluster.link(True)[0] * min(held.values()))
    between = sent * len(held) // len(members)
    seconds = sent / rate + cluster.network_latency * math.log2(len(members))
    return Travelled(seconds, Counter({NODE: sent - between, NETWORK: between}))
