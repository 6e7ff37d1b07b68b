"""Speeds that others published, with the layouts they give, as this package's configurations."""

from dataclasses import dataclass
from typing import Any, Literal

from moescale.models.config import ModelConfig
from moescale.models.cost.hardware import Hardware
from moescale.models.cost.memory import Workload
from moescale.models.counts import flops_per_token
from moescale.moe import MoEConfig
from moescale.parallel.config import ParallelConfig
from moescale.parallel.topology import Topology

BRIDGE = "Megatron-Bridge, docs/performance-summary-archive.md"
BRIDGE_NEWER = "Megatron-Bridge, performance-summary of 2026; layout of qwen3_30b_a3b_pretrain_16gpu_h100_fp8cs_config"
AUTOMODEL = "NeMo AutoModel, docs/performance-summary.md"
MCORE = "Megatron-Core, megatron/core/transformer/moe/README.md"
PTDP = "2104.04473, table 1"


@dataclass(frozen=True)
class Published:
    """One measured speed.

    ``tokens`` a second and device; where ``teraflops`` are published instead, ``formula`` says how they were counted.
    """

    name: str
    source: str
    machine: Literal["A100", "H100", "H100 FP8"]
    model: dict[str, Any]
    moe: dict[str, Any] | None
    vocab: int
    seq: int
    batch: int
    micro_batch: int
    world: int
    layout: dict[str, int]
    tokens: float = 0.0
    teraflops: float = 0.0
    recompute: bool = False
    differs: str = ""

    def parts(self) -> tuple[ModelConfig, MoEConfig | None, Workload, Topology]:
        model = ModelConfig.model_validate(self.model)
        moe = MoEConfig.model_validate(self.moe) if self.moe else None
        topology = Topology.build(ParallelConfig.model_validate(self.layout), self.world, 8)
        work = Workload(self.micro_batch, self.seq, 1, self.batch * self.seq, "bf16", 1, 2, self.recompute)
        return model, moe, work, topology

    @property
    def tokens_per_second(self) -> float:
        """A second and device."""
        if self.tokens:
            return self.tokens
        model, moe, _, _ = self.parts()
        flops = flops_per_token(model, moe, self.vocab, self.seq)
        again = flops.forward - flops.head if self.recompute else 0  # 2104.04473 counts it (appendix)
        return self.teraflops * 1e12 / (flops.total + again)

    def hardware(self, a100: Hardware, h100: Hardware) -> Hardware:
        """FP8: products at twice the peak, of which .709 was reached (mamf-finder); the rest stays in bf16."""
        if self.machine == "H100 FP8":
            doubled = {"bf16_tflops": 1979, "product_share": 0.709, "attention_share": h100.attention_share / 2}
            return h100.model_copy(update=doubled)
        return a100 if self.machine == "A100" else h100


QWEN_30B = {"layers": 48, "width": 2048, "heads": 32, "kv_heads": 4, "head_dim": 128, "qk_norm": "head", "tied": False}
QWEN_MOE = {"experts": 128, "active": 8, "expert_width": 768}
QWEN_235B = {**QWEN_30B, "layers": 96, "width": 4096, "heads": 64}
MOONLIGHT = {
    "layers": 27, "width": 2048, "heads": 16, "ffn": 11264, "tied": False,
    "mla": {"kv_rank": 512, "nope_dim": 128, "rope_dim": 64, "value_dim": 128},
}  # fmt: skip
OSS_120B = {"layers": 36, "width": 2880, "heads": 64, "kv_heads": 8, "head_dim": 64, "tied": False}
OSS_MOE = {"experts": 128, "active": 4, "expert_width": 2880}
LLAMA_70B = {"layers": 80, "width": 8192, "heads": 64, "kv_heads": 8, "ffn": 28672, "tied": False}
MIXTRAL_7B = {"layers": 32, "width": 4096, "heads": 32, "kv_heads": 8, "tied": False}
MIXTRAL_22B = {"layers": 56, "width": 6144, "heads": 48, "kv_heads": 8, "tied": False}


def gpt(layers: int, width: int, heads: int) -> dict[str, Any]:
    """GPT's feed-forward layer has two matrices of 4 width; three of 8/3 width have as many FLOPs."""
    return {"layers": layers, "width": width, "heads": heads, "ffn": round(width * 8 / 3 / 64) * 64}


def _ptdp(
    size: str, shape: tuple[int, int, int], layout: tuple[int, int], world: int, batch: int, speed: int
) -> Published:
    return Published(
        f"GPT {size}", PTDP, "A100", gpt(*shape), None, 51_200, 2048, batch, 1, world,
        {"tensor": layout[0], "pipeline": layout[1]}, teraflops=speed, recompute=True,
        differs="unfused attention, chunks and micro-batch not given (1 and 1 taken), no sequence parallelism",
    )  # fmt: skip


PUBLISHED = [
    _ptdp("1.7B", (24, 2304, 24), (1, 1), 32, 512, 137),
    _ptdp("7.5B", (36, 4096, 32), (4, 1), 128, 512, 142),
    _ptdp("18B", (40, 6144, 48), (8, 1), 256, 1024, 135),
    _ptdp("39B", (48, 8192, 64), (8, 2), 512, 1536, 138),
    _ptdp("76B", (60, 10240, 80), (8, 4), 1024, 1792, 140),
    _ptdp("146B", (80, 12288, 96), (8, 8), 1536, 2304, 148),
    _ptdp("310B", (96, 16384, 128), (8, 16), 1920, 2160, 155),
    _ptdp("1008B", (128, 25600, 160), (8, 64), 3072, 3072, 163),
    Published("Llama 3 70B", BRIDGE, "H100 FP8", LLAMA_70B, None, 128_256, 8192, 128, 1, 64,
              {"tensor": 4, "pipeline": 8, "virtual_stages": 5}, tokens=1602),
    Published("Mixtral 8x7B", MCORE, "H100", MIXTRAL_7B, {"experts": 8, "active": 2, "expert_width": 14336}, 32_000,
              4096, 256, 1, 64, {"pipeline": 4, "virtual_stages": 8, "expert": 8}, teraflops=468),
    Published("Mixtral 8x22B", MCORE, "H100", MIXTRAL_22B, {"experts": 8, "active": 2, "expert_width": 16384}, 32_000,
              4096, 256, 1, 128, {"tensor": 4, "pipeline": 8, "virtual_stages": 7, "expert": 8}, teraflops=445,
              differs="experts cut over tensor 4 x expert 2 there, over 8 expert ranks here"),
    Published("Qwen3 30B-A3B", AUTOMODEL, "H100", QWEN_30B, QWEN_MOE, 151_936, 4096, 512, 4, 8, {"expert": 8},
              tokens=12_040, differs="parameters sharded by FSDP, DeepEP"),
    Published("Moonlight 16B", AUTOMODEL, "H100", MOONLIGHT,
              {"experts": 64, "active": 6, "expert_width": 1408, "shared": 2, "first_dense": 1}, 163_840, 4096, 256, 2,
              8, {"expert": 8}, tokens=22_898, differs="parameters sharded by FSDP, DeepEP"),
    Published("Qwen3 30B-A3B", BRIDGE, "H100 FP8", QWEN_30B, QWEN_MOE, 151_936, 4096, 1024, 1, 16,
              {"pipeline": 2, "virtual_stages": 12, "expert": 8}, tokens=5_113),
    Published("Qwen3 30B-A3B", BRIDGE_NEWER, "H100 FP8", QWEN_30B, QWEN_MOE, 151_936, 4096, 1024, 1, 16, {"expert": 16},
              tokens=8_826, differs="batch and micro-batch not given (1,024 and 1 taken)"),
    Published("GPT-OSS 120B", BRIDGE, "H100", OSS_120B, OSS_MOE, 201_088, 4096, 1280, 1, 64,
              {"pipeline": 4, "expert": 8}, tokens=5_993, differs="half of its layers attend to 128 tokens"),
    Published("Qwen3 235B-A22B", BRIDGE, "H100 FP8", QWEN_235B, QWEN_MOE | {"expert_width": 1536}, 151_936, 4096, 8192,
              1, 256, {"tensor": 2, "pipeline": 8, "virtual_stages": 4, "expert": 32}, tokens=1_633,
              differs="94 layers, the embedding and the loss taking the place of a layer each"),
]  # fmt: skip
