"""The step model's arithmetic: what hardware and layouts must do to a step's time."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moescale.models.config import ModelConfig
from moescale.models.cost.hardware import Hardware
from moescale.models.cost.memory import Workload, activation_bytes
from moescale.models.cost.products import product_seconds
from moescale.models.cost.step import StepModel, StepTime
from moescale.models.counts import flops_per_token
from moescale.moe import MoEConfig
from moescale.parallel.config import ParallelConfig
from moescale.parallel.topology import Topology

MODEL = ModelConfig(layers=8, width=1024, heads=8, kv_heads=8)
MOE = MoEConfig(experts=16, active=2, expert_width=512, first_dense=1, shared=1)
HARDWARE = Hardware(
    bf16_tflops=300, fp32_tflops=20, memory_gb_s=2000, node_gb_s=300, network_gb_s=25, units=100, tile=128
)
WORK = Workload(1, 2048, 10, 64 * 2048, "bf16", 1, 2)
LAYOUTS = [
    ParallelConfig(),
    ParallelConfig(tensor=2),
    ParallelConfig(pipeline=4),
    ParallelConfig(pipeline=2, virtual_stages=2),
    ParallelConfig(expert=8),
    ParallelConfig(expert=16),
    ParallelConfig(tensor=2, pipeline=2, expert=4),
    ParallelConfig(tensor=2, expert=4, expert_over="dp"),
]


def step(parallel: ParallelConfig, hardware: Hardware = HARDWARE, moe: MoEConfig | None = MOE) -> StepTime:
    return StepModel(MODEL, moe, 32_000, hardware).time(WORK, Topology.build(parallel, 16, 8))


@settings(deadline=None)
@given(
    st.sampled_from(LAYOUTS),
    st.sampled_from(["bf16_tflops", "fp32_tflops", "memory_gb_s", "node_gb_s", "network_gb_s"]),
    st.floats(1, 100),
)
def test_better_hardware_is_never_slower(parallel: ParallelConfig, figure: str, factor: float) -> None:
    better = HARDWARE.model_copy(update={figure: getattr(HARDWARE, figure) * factor})
    assert step(parallel, better).seconds <= step(parallel).seconds * (1 + 1e-12)


@pytest.mark.parametrize("parallel", LAYOUTS)
def test_no_layout_beats_the_peak(parallel: ParallelConfig) -> None:
    found = StepModel(MODEL, MOE, 32_000, HARDWARE)
    topology = Topology.build(parallel, 16, 8)
    time = found.time(WORK, topology)
    flops = flops_per_token(MODEL, MOE, 32_000, WORK.seq)
    share = found.flops_share(WORK, topology, time.seconds)
    assert share == pytest.approx(flops.total * WORK.batch_tokens / (time.seconds * 16 * 300e12))
    assert 0 < share < HARDWARE.product_share
    assert sum(time.shares.values()) == pytest.approx(1)
    assert time.bound == next(iter(time.shares))


def test_each_kind_of_parallelism_pays_for_itself() -> None:
    alone = step(ParallelConfig()).parts
    assert {"tensor", "pipeline bubble", "exchange in nodes", "exchange between nodes"}.isdisjoint(alone)
    assert step(ParallelConfig(tensor=2)).parts["tensor"] > 0
    assert "exchange between nodes" not in step(ParallelConfig(expert=8)).parts
    across = step(ParallelConfig(expert=16)).parts
    assert across["exchange between nodes"] > step(ParallelConfig(expert=8)).parts["exchange in nodes"]
    assert "exchange in nodes" not in across
    assert step(ParallelConfig(expert=16)).parts["gradient reduction"] < alone["gradient reduction"]
    assert not any("exchange" in part for part in step(ParallelConfig(tensor=2), moe=None).parts)


def test_virtual_stages_shorten_the_bubble_and_send_more_messages() -> None:
    plain, virtual = (step(ParallelConfig(pipeline=2, virtual_stages=chunks)).parts for chunks in (1, 2))
    assert virtual["pipeline bubble"] == pytest.approx(plain["pipeline bubble"] / 2, rel=0.01)
    assert virtual["pipeline messages"] == pytest.approx(2 * plain["pipeline messages"])


def test_the_bubble_is_the_papers() -> None:
    """(p - 1) / m of a stage's time where stages are equal (2104.04473, section 2.2); the head makes them unequal."""
    parts = StepModel(MODEL, None, 1, HARDWARE).time(WORK, Topology.build(ParallelConfig(pipeline=4), 16, 8)).parts
    micro_batches = 64 // 4
    work = sum(seconds for part, seconds in parts.items() if part in ("products", "attention", "memory"))
    assert parts["pipeline bubble"] == pytest.approx(work * 3 / micro_batches, rel=0.05)


def test_recomputation_takes_a_forward_pass_and_frees_memory() -> None:
    again = replace(WORK, recompute=True)
    topology = Topology.build(ParallelConfig(pipeline=4), 16, 8)
    times = [StepModel(MODEL, MOE, 32_000, HARDWARE).time(work, topology) for work in (WORK, again)]
    assert 1.1 < times[1].seconds / times[0].seconds < 4 / 3
    assert 5 * activation_bytes(MODEL, MOE, 8, again, topology, 0) < activation_bytes(MODEL, MOE, 8, WORK, topology, 0)


def test_small_products_are_slow() -> None:
    """As many FLOPs in finer experts take longer; a lone tile takes a whole wave."""
    coarse, fine = (product_seconds(4096 / n, 4096, 1024, HARDWARE, "bf16", n) for n in (8, 128))
    assert fine > coarse
    assert product_seconds(1, 1, 64_000, HARDWARE, "bf16") == product_seconds(128, 128, 64_000, HARDWARE, "bf16")
