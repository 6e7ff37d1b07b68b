"""What a device computes, moves and reaches: the ``hardware`` section of a cluster file."""

import math

from pydantic import BaseModel, Field

_TERA, _GIGA, _MICRO = 1e12, 1e9, 1e-6


class Hardware(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """Figures of one device (of one core, where ranks run on cores), as its data sheet has them, and what is reached.

    Bandwidths are of one device in one direction. The shares belong to the machine and its libraries, not to a model:
    none of them is chosen for a run.
    """

    bf16_tflops: float = Field(gt=0, description="peak of products in bf16, 1e12 FLOP/s, without sparsity")
    fp32_tflops: float = Field(gt=0, description="peak of products in fp32")
    memory_gb_s: float = Field(gt=0, description="bandwidth of its memory, 1e9 bytes/s")
    node_gb_s: float = Field(gt=0, description="bandwidth to devices of its node")
    network_gb_s: float = Field(gt=0, description="bandwidth to other nodes")
    node_latency_us: float = Field(10.0, ge=0, description="of a collective inside a node, microseconds")
    network_latency_us: float = Field(20.0, ge=0, description="of a collective between nodes")
    call_us: float = Field(3.0, ge=0, description="what every operation costs beside its work")
    units: int = Field(1, ge=1, description="parts that each compute one tile of a product: multiprocessors")
    tile: int = Field(1, ge=1, description="rows and columns of a tile; 1: products of any shape are as efficient")
    product_share: float = Field(0.8, gt=0, le=1, description="of the peak, that a large product reaches")
    attention_share: float = Field(0.5, gt=0, le=1, description="of the peak, that fused attention reaches")
    memory_share: float = Field(0.9, gt=0, le=1, description="of memory_gb_s, that a copy reaches")
    link_share: float = Field(0.8, gt=0, le=1, description="of node_gb_s and network_gb_s, that a collective reaches")

    def flops(self, dtype: str) -> float:
        """Peak, FLOP/s."""
        return (self.bf16_tflops if dtype == "bf16" else self.fp32_tflops) * _TERA

    @property
    def memory(self) -> float:
        """Bytes a second that memory delivers."""
        return self.memory_gb_s * self.memory_share * _GIGA

    @property
    def call(self) -> float:
        """Seconds that every operation costs beside its work."""
        return self.call_us * _MICRO

    def link(self, ranks: int, inside: int) -> float:
        """Bytes a second of a rank in a ring of ``ranks``, ``inside`` of them on each node.

        A ring leaves a node through as many network adapters as it has ranks there, each ring taking its own.
        """
        near = self.node_gb_s
        speed = near if ranks <= inside else min(near, self.network_gb_s * inside)
        return speed * self.link_share * _GIGA

    def latency(self, ranks: int, inside: int) -> float:
        """Seconds before a collective of ``ranks`` moves anything: as many hops as a tree of them is high."""
        hop = self.node_latency_us if ranks <= inside else self.network_latency_us
        return hop * _MICRO * math.ceil(math.log2(ranks)) if ranks > 1 else 0.0

    def exchange(self, size: float, ranks: int, inside: int) -> tuple[float, float]:
        """Seconds of an all-to-all of ``size`` bytes a rank: inside the node, and between nodes. The two overlap."""
        if ranks == 1:
            return 0.0, 0.0
        speed = self.link_share * _GIGA
        near = size * (inside - 1) / ranks / (self.node_gb_s * speed)
        far = size * (ranks - inside) / ranks / (self.network_gb_s * speed)
        latency = self.latency(ranks, inside)
        return (near + latency, 0.0) if ranks <= inside else (near, far + latency)
