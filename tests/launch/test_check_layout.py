"""study plan --check-layout: whole layouts pass, broken ones are told, worlds of any size take seconds."""

import json
import math
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moescale.base.config import SHIPPED
from moescale.launch.layout_options import smallest_world
from moescale.launch.ownership import Box, Holding, replica_faults, tiling_faults
from moescale.parallel.config import ParallelConfig
from moescale.parallel.topology import Topology


@st.composite
def tilings(draw: st.DrawFn) -> list[Box]:
    """A tensor of one to three dimensions, cut along each of them."""
    cuts = draw(st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=3), min_size=1, max_size=3))
    shape = tuple(sum(sizes) for sizes in cuts)
    spans = [[(sum(sizes[:i]), size) for i, size in enumerate(sizes)] for sizes in cuts]
    return [Box("t", shape, tuple(a for a, _ in box), tuple(n for _, n in box)) for box in product(*spans)]


@given(tilings(), st.data())
def test_boxes_must_make_up_their_tensor_once(boxes: list[Box], data: st.DataObject) -> None:
    assert tiling_faults(boxes) == []
    victim = data.draw(st.sampled_from(boxes))
    others = [box for box in boxes if box != victim]
    size = math.prod(victim.extent)
    if others:
        assert tiling_faults(others) == [f"t: {size} of {math.prod(victim.shape)} elements are on no rank"]
    shifted = Box("t", victim.shape, (victim.start[0] + 1, *victim.start[1:]), victim.extent)
    assert any("overlap" in fault or "outside" in fault for fault in tiling_faults([*boxes, shifted]))
    assert "disagree" in tiling_faults([*boxes, Box("t", (99,), (0,), (99,))])[0]


def test_a_box_is_held_by_whole_groups_and_counted_once() -> None:
    topology = Topology.build(ParallelConfig(tensor=2, expert=2), 8)
    box = Box("t", (4,), (0,), (4,))

    def faults(expert: bool, weight: float, *ranks: int) -> list[str]:
        return replica_faults([Holding(box, expert, weight, ranks)], topology)

    assert faults(False, 0.5, *range(8)) == []  # a norm's gain: a copy in each tensor rank's data group
    assert faults(False, 1.0, 0, 2, 4, 6) == []  # a tensor rank's share
    assert faults(True, 1.0, 1, 3, 5, 7) == []  # an expert
    assert faults(False, 1.0, *range(8)) == ["t[0:4]: norms count its gradient 2 times"]
    (fault,) = faults(False, 1.0, 0, 2, 4)
    assert "rank 6 reduces its gradient with [0, 2, 4, 6] and does not hold it" in fault


def test_the_smallest_world_holds_the_layout_and_no_smaller_one_does() -> None:
    for tensor, pipeline, expert, over in product([1, 2, 4], [1, 2], [1, 2, 3, 8], ["dp", "dp_tp"]):
        parallel = ParallelConfig(tensor=tensor, pipeline=pipeline, expert=expert, expert_over=over)
        world = smallest_world(parallel)
        Topology.build(parallel, world)
        for smaller in range(1, world):
            with pytest.raises(Exception, match=r"parallel\.(tensor|expert)"):
                Topology.build(parallel, smaller)


@pytest.fixture(scope="module")
def checked(environment: dict[str, str]) -> dict[str, Any]:
    worker = Path(__file__).with_name("layout_worker.py")
    done = subprocess.run([sys.executable, str(worker)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_every_kind_of_layout_holds_the_model_whole(checked: dict[str, Any]) -> None:
    for name, found in checked.items():
        if not name.startswith("broken"):
            assert found["faults"] == [], name
            assert found["parameters"] == found["counted"], name
    assert checked["alone"]["parameters_held"] == checked["alone"]["counted"]
    everything = checked["everything"]
    assert everything["ranks_built"] == 4
    assert everything["parameters_held"] < checked["alone"]["parameters_held"] / 2
    assert everything["fullest_rank"] == 16  # the first of the last stage, which has the head and the logits


def test_what_is_broken_is_told(checked: dict[str, Any]) -> None:
    assert any("elements are on no rank" in fault for fault in checked["broken cut"]["faults"])
    said = " ".join(checked["broken experts"]["faults"])
    assert "and does not hold it" in said
    assert "and the plan counts" in said


def test_a_hundred_billion_parameters_on_1024_ranks(moescale: Any) -> None:
    study = SHIPPED / "studies" / "large.yaml"
    options = ("--check-layout", "--world", 1024, "--node-ranks", 8, "--json")
    result = moescale("study", "plan", study, *options)
    assert result.returncode == 0, result.stderr
    planned = json.loads(result.stdout)
    (row,), (found,) = planned["runs"], planned["layouts"]
    assert found["layout"]["world"] == row["layout"]["world"] == 1024
    assert found["runs"] == [row["name"]]
    assert found["faults"] == []
    assert found["parameters"] > row["n_total"] > 100e9
    assert found["memory_bytes"] == row["memory_bytes"]
    assert any(
        "expert groups over several nodes" in warning and "(8 nodes)" in warning for warning in planned["warnings"]
    )
    assert not any("tensor groups" in warning for warning in planned["warnings"])


def test_a_world_that_does_not_fit_is_refused(main: Any) -> None:
    result = main("study", "plan", SHIPPED / "studies" / "large.yaml", "--world", 48)
    assert result.returncode == 2
    assert "parallel.tensor (4) x parallel.pipeline (8) = 32 must divide the number of ranks (48)" in result.stderr
