"""Cluster: what GPUs and links can do, by conf/cluster/, and at which share of it kernels run."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..requirements import at_least


@dataclass
class ClusterSettings:
    """A cluster of nodes of one kind. Rates are those of one GPU, in units of 10^9 unless they say otherwise."""

    name: str = ""  # of the GPU, as lines show it
    nodes: int = 1  # with gpus_per_node GPUs each
    gpus_per_node: int = 8  # joined by the fast links
    memory_gb: float = 0.0  # of a GPU
    reserved_gb: float = 4.0  # of it, for CUDA, the allocator's fragments and buffers of collectives
    tflops: float = 0.0  # bf16 without sparsity, 10^12 a second
    memory_gbps: float = 0.0  # bytes a second that a GPU reads and writes of its own memory
    node_gbps: float = 0.0  # bytes a second that a GPU sends to others of its node, in one direction
    network_gbps: float = 0.0  # bytes a second that a GPU sends to other nodes
    host_gbps: float = 0.0  # bytes a second between a GPU and its host, in one direction
    host_memory_gb: float = 0.0  # of a node
    link_share: float = 0.8  # of the links' rates that large messages reach; an assumption
    node_latency: float = 1e-5  # seconds that a message within a node takes at least; an assumption
    network_latency: float = 2e-5  # the same between nodes
    efficiency: dict[str, float] = field(default_factory=dict)  # of tflops, by op: forward, and backward as 2.5 of it
    measured: dict[str, str] = field(default_factory=dict)  # by op, where its efficiency was measured; else assumed

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def peak(self) -> float:
        """FLOP/s."""
        return self.tflops * 1e12

    def check(self) -> None:
        """Raises ValueError for numbers that no cluster has."""
        at_least("cluster.nodes", self.nodes, 1)
        at_least("cluster.gpus_per_node", self.gpus_per_node, 1)
        for name in ("memory_gb", "tflops", "memory_gbps", "node_gbps", "network_gbps", "host_gbps"):
            if getattr(self, name) <= 0:
                raise ValueError(
                    f"cluster.{name} must be positive; got {getattr(self, name)}. Choose a cluster, as "
                    "cluster=h100_node, or give all its numbers"
                )
        shares = {"link_share": self.link_share, **{f"efficiency.{name}": x for name, x in self.efficiency.items()}}
        for name, share in shares.items():
            if not 0 < share <= 1:
                raise ValueError(f"cluster.{name} must be a share, above 0 and at most 1; got {share}")
        for name in ("reserved_gb", "host_memory_gb", "node_latency", "network_latency"):
            at_least(f"cluster.{name}", getattr(self, name), 0)
        for name in ("matmul", "other", "memory"):
            if name not in self.efficiency:
                raise ValueError(f"cluster.efficiency must say that of {name}; got none. See conf/cluster")

    def entry(self, kernel: str) -> str:
        """Under which name the efficiency of a kernel stands: its own, that without its variant, or "other"."""
        return next(name for name in (kernel, kernel.partition(",")[0], "other") if name in self.efficiency)

    def share(self, kernel: str) -> tuple[float, str]:
        """The share of the peak that a kernel reaches, and how that is known."""
        name = self.entry(kernel)
        known, text = self.measured.get(name), f"{self.efficiency[name]:.1%} of the peak"
        return self.efficiency[name], f"{text}, {f'measured: {known}' if known else 'assumed'}"

    def link(self, crosses: bool) -> tuple[float, float]:
        """Bytes a second that a GPU sends by a link, and the latency; `crosses`: to another node."""
        rate = self.network_gbps if crosses else self.node_gbps
        return rate * 1e9 * self.link_share, self.network_latency if crosses else self.node_latency
