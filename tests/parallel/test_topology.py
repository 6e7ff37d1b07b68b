"""Layouts as values: coordinates, groups, and how often each parameter counts in a norm."""

import math
from itertools import product
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moescale.base.errors import UserError
from moescale.parallel.config import ParallelConfig
from moescale.parallel.roles import Role
from moescale.parallel.topology import Topology, group_of


@st.composite
def topologies(draw: st.DrawFn) -> Topology:
    tensor, pipeline, data = (draw(st.sampled_from([1, 2, 3, 4])) for _ in range(3))
    over: Literal["dp", "dp_tp"] = draw(st.sampled_from(["dp", "dp_tp"]))
    ranks = data if over == "dp" else tensor * data
    expert = draw(st.sampled_from([n for n in range(1, ranks + 1) if ranks % n == 0]))
    virtual = draw(st.sampled_from([1, 2, 3])) if pipeline > 1 else 1
    parallel = ParallelConfig(tensor=tensor, pipeline=pipeline, expert=expert, expert_over=over, virtual_stages=virtual)
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


@given(topologies())
def test_every_kind_of_group_is_told_by_its_coordinates(topology: Topology) -> None:
    """A group holds the ranks that differ in one coordinate only."""
    coordinates = {
        "tensor": topology.tensor_rank,
        "data": topology.data_rank,
        "pipeline": topology.pipeline_rank,
    }
    groups = {
        "tensor": topology.tensor_groups(),
        "data": topology.data_groups(),
        "pipeline": topology.pipeline_groups(),
    }
    for kind, found in groups.items():
        others = [coordinate for name, coordinate in coordinates.items() if name != kind]
        for rank in range(topology.world):
            alike = [r for r in range(topology.world) if all(c(r) == c(rank) for c in others)]
            assert group_of(rank, found) == alike


@given(topologies(), st.sampled_from([1, 2]))
def test_every_layer_is_held_once_and_chunks_take_turns(topology: Topology, layers_of_chunk: int) -> None:
    layers = topology.pipeline * topology.virtual_stages * layers_of_chunk
    firsts = range(0, topology.world, topology.stage_ranks)  # a rank of each stage
    in_turn = [
        layer
        for chunk in range(topology.virtual_stages)
        for rank in firsts
        for layer in topology.layers(rank, chunk, layers)
    ]
    assert in_turn == list(range(layers))


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
    # An expert's ranks among data x tensor, or among data alone with a copy on each tensor rank.
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
        "virtual_stages": 1,
        "data": 4,
        "expert": 2,
        "expert_data": 4,
        "expert_over": "dp_tp",
        "sequence": True,
        "nodes": 1,
    }


def test_experts_on_all_tensor_ranks_worked_out_by_hand() -> None:
    topology = Topology.build(ParallelConfig(tensor=2, expert=2, expert_over="dp"), 8, node_ranks=4)
    assert (topology.data, topology.expert_data) == (4, 2)
    assert topology.expert_groups() == [[0, 2], [4, 6], [1, 3], [5, 7]]
    assert topology.expert_data_groups() == [[0, 4], [2, 6], [1, 5], [3, 7]]
    assert [topology.expert_rank(rank) for rank in range(8)] == [0, 0, 1, 1, 0, 0, 1, 1]
    assert [topology.nodes_of(group) for group in topology.expert_groups()] == [1, 1, 1, 1]
    assert [topology.nodes_of(group) for group in topology.expert_data_groups()] == [2, 2, 2, 2]


def test_the_expert_group_stays_inside_a_node_as_long_as_it_fits() -> None:
    parallel = ParallelConfig(tensor=2, expert=8)
    inside = Topology.build(parallel, 32, node_ranks=8)
    assert {inside.nodes_of(group) for group in inside.expert_groups()} == {1}
    across = Topology.build(parallel, 32, node_ranks=4)
    assert {across.nodes_of(group) for group in across.expert_groups()} == {2}


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
        (
            {"tensor": 2, "expert": 4, "expert_over": "dp"},
            4,
            r"parallel.expert \(4\) must divide the 2 data ranks \(parallel.expert_over: dp\); try 1, 2",
        ),
        ({"virtual_stages": 2}, 4, r"parallel.virtual_stages \(2\) needs parallel.pipeline above 1"),
    ],
)
def test_sizes_that_do_not_fit(keys: dict[str, Any], world: int, said: str) -> None:
    with pytest.raises(UserError, match=said):
        Topology.build(ParallelConfig(**keys), world)
