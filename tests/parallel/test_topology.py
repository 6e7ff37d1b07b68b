"""Layouts as values: coordinates, groups, and how often each parameter counts in a norm."""

import math
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moescale.base.errors import UserError
from moescale.parallel.config import ParallelConfig
from moescale.parallel.roles import Role
from moescale.parallel.topology import Topology


@st.composite
def topologies(draw: st.DrawFn) -> Topology:
    tensor, pipeline, data = (draw(st.sampled_from([1, 2, 3, 4])) for _ in range(3))
    stage = tensor * data
    expert = draw(st.sampled_from([n for n in range(1, stage + 1) if stage % n == 0]))
    parallel = ParallelConfig(tensor=tensor, pipeline=pipeline, expert=expert)
    return Topology.build(parallel, tensor * pipeline * data)


@given(topologies())
def test_coordinates_name_each_rank_once(topology: Topology) -> None:
    found = [(topology.pipeline_rank(r), topology.data_rank(r), topology.tensor_rank(r)) for r in range(topology.world)]
    # Tensor innermost, then data, then pipeline.
    assert found == list(product(range(topology.pipeline), range(topology.data), range(topology.tensor)))


@given(topologies())
def test_expert_groups_cover_the_world_and_cross_once(topology: Topology) -> None:
    across, replicas = topology.expert_groups(), topology.expert_data_groups()
    for groups, size in ((across, topology.expert), (replicas, topology.expert_data)):
        assert sorted(rank for group in groups for rank in group) == list(range(topology.world))
        assert all(len(group) == size for group in groups)
    for group in across:
        assert [topology.expert_rank(rank) for rank in group] == list(range(topology.expert))
        assert len({topology.pipeline_rank(rank) for rank in group}) == 1
    for group in replicas:
        assert len({topology.expert_rank(rank) for rank in group}) == 1
        assert len({topology.pipeline_rank(rank) for rank in group}) == 1
    for first, second in product(across, replicas):
        assert len(set(first) & set(second)) <= 1


@given(topologies(), st.sampled_from([0, 1]))
def test_every_element_counts_once_in_a_norm(topology: Topology, zero: int) -> None:
    """Sum over a stage's ranks of weight x the share of the parameter's elements that the rank holds."""
    stage = range(topology.stage_ranks)

    def total(role: Role, copies: int, shard: int) -> float:
        # Under ZeRO 1 each of `copies` replicas holds an equal slice of what the rank's shard is.
        held = 1 / shard / (copies if zero else 1)
        return sum(role.norm_weight(topology, zero) * held for _ in stage)

    assert math.isclose(total(Role(tensor_sharded=True), topology.data, topology.tensor), 1)
    assert math.isclose(total(Role(tensor_summed=True), topology.data, 1), 1)
    assert math.isclose(total(Role(expert=True), topology.expert_data, topology.expert), 1)
    assert total(Role(tensor_sharded=True, tied_copy=True), topology.data, topology.tensor) == 0


def test_a_layout_worked_out_by_hand() -> None:
    topology = Topology.build(ParallelConfig(tensor=2, pipeline=2, expert=2), 16)
    assert (topology.data, topology.stage_ranks, topology.expert_data) == (4, 8, 4)
    assert [topology.tensor_rank(5), topology.data_rank(5), topology.pipeline_rank(5)] == [1, 2, 0]
    assert topology.expert_groups()[:2] == [[0, 1], [2, 3]]
    assert topology.expert_data_groups() == [[0, 2, 4, 6], [1, 3, 5, 7], [8, 10, 12, 14], [9, 11, 13, 15]]
    assert topology.describe() == {
        "world": 16,
        "tensor": 2,
        "pipeline": 2,
        "data": 4,
        "expert": 2,
        "expert_data": 4,
    }


@pytest.mark.parametrize(
    ("keys", "world", "said"),
    [
        (
            {"tensor": 2, "pipeline": 3},
            4,
            r"parallel.tensor \(2\) x parallel.pipeline \(3\) = 6 must divide the number of ranks \(4\); start 6 ranks",
        ),
        (
            {"tensor": 2, "expert": 3},
            4,
            r"parallel.expert \(3\) must divide the 4 data x tensor ranks of a pipeline stage; try 1, 2, 4",
        ),
    ],
)
def test_sizes_that_do_not_fit(keys: dict[str, int], world: int, said: str) -> None:
    with pytest.raises(UserError, match=said):
        Topology.build(ParallelConfig(**keys), world)
