"""The plan's memory: constants that are others', and what each pipeline stage holds."""

from moescale.models.config import ModelConfig
from moescale.models.cost.memory import LARGEST_UNPARTITIONED_BUCKET, Workload, rank_bytes, state_bytes
from moescale.models.counts import HeldParameters, count_held, count_parameters
from moescale.moe import MoEConfig
from moescale.parallel.config import ParallelConfig
from moescale.parallel.topology import Topology

MODEL = ModelConfig(layers=8, width=64, heads=4, kv_heads=2)
MOE = MoEConfig(experts=8, active=2, expert_width=32, first_dense=1)


def work(**changes: object) -> Workload:
    settings = {"micro_batch": 2, "seq": 32, "steps": 1, "batch_tokens": 64, "dtype": "fp32", "zero": 1, "moments": 2}
    return Workload(**{**settings, **changes})  # type: ignore[arg-type]


def test_the_bucket_is_as_large_as_deepspeed_makes_it() -> None:
    from deepspeed.runtime.engine import MEMORY_OPT_ALLREDUCE_SIZE

    assert MEMORY_OPT_ALLREDUCE_SIZE == LARGEST_UNPARTITIONED_BUCKET


def test_bytes_of_a_parameter() -> None:
    """ZeRO 0: weight, gradient, moments, and the copy that is reduced. ZeRO 1: what is partitioned is shared out."""
    held, alone = HeldParameters(1000, 0), Topology()
    assert state_bytes(held, work(zero=0, moments=0), alone) == 12_000
    assert state_bytes(held, work(zero=0), alone) == 20_000
    assert state_bytes(held, work(), alone) == 28_000
    assert state_bytes(held, work(dtype="bf16"), alone) == 24_000
    assert state_bytes(held, work(dtype="bf16"), Topology(world=4, data=4)) == 8_000 + 16_000 // 4
    assert state_bytes(HeldParameters(0, 1000), work(), Topology(world=4, data=4, expert=2)) == 12_000 + 16_000 // 2


def test_one_rank_holds_everything_and_stages_share_it_out() -> None:
    for moe in (None, MOE):
        whole = count_parameters(MODEL, moe, 500).all
        assert count_held(MODEL, moe, 500, Topology(), 0).all == whole
        topology = Topology.build(ParallelConfig(pipeline=4, virtual_stages=2), 4)
        held = [count_held(MODEL, moe, 500, topology, stage).all for stage in range(4)]
        assert sum(held) == whole + MODEL.padded_vocab(500) * MODEL.width  # a tied head is there twice


def test_earlier_stages_hold_more_micro_batches() -> None:
    """The first stage of 1F1B holds as many as there are stages, the last one only its own, and the logits."""
    for chunks in (1, 2):
        topology = Topology.build(ParallelConfig(pipeline=4, virtual_stages=chunks), 4)
        sizes = [rank_bytes(MODEL, None, 8, work(micro_batch=64), topology, stage) for stage in range(3)]
        assert sizes == sorted(sizes, reverse=True)
        assert len(set(sizes)) == 3
