"""What runs ask of a cluster, and which of them share an array."""

from typing import Any

import pytest

from moescale.base.errors import UserError
from moescale.launch.cluster_config import ClusterConfig
from moescale.launch.expansion import expand
from moescale.launch.plan import plan_study
from moescale.launch.planned import Expansion, Plan
from moescale.launch.slurm.shapes import Shape, batches_of
from moescale.launch.study_config import StudyConfig

CPU = {"cores": 4, "memory_gb": 16}
GPU = {"cores": 64, "memory_gb": 512, "devices": 8, "device_memory_gb": 80}
MOE = {"moe.experts": 4, "moe.active": 2, "moe.granularity": 2}


def cluster(node: dict[str, Any] = CPU, **changes: Any) -> ClusterConfig:
    return ClusterConfig.model_validate({"name": "c", "node": node, "time_limit_hours": 2, **changes})


def planned(*groups: dict[str, Any], world: int | None = None) -> tuple[Expansion, Plan]:
    run = {
        "data": {"domains": {"text": {"files": ["*.txt"]}}, "tokenizer": {"vocab": 512}},
        "model": {"shape": "d16"},
        "training": {"seq": 16, "batch": 16},
        "optimizer": {"lr": 0.01},
        "runtime": {"threads": 1},
    }
    named = {f"g{n}": {"family": f"f{n}", **group} for n, group in enumerate(groups)}
    study = StudyConfig.model_validate({"name": "s", "run": run, "groups": named})
    expansion = expand(study)
    return expansion, plan_study(study, expansion, world)


def test_runs_of_one_shape_share_an_array_in_parts_that_slurm_takes() -> None:
    expansion, plan = planned({"grid": {"training.steps": [60, 61, 62, 63, 64]}})
    batches = batches_of(expansion.runs, plan.rows, cluster(array_limit=2), {})
    assert [len(batch.runs) for batch in batches] == [2, 2, 1]
    assert {batch.shape for batch in batches} == {Shape(1, 1, 1, 2048, 0, 120)}
    assert sum((batch.runs for batch in batches), ()) == tuple(run.name for run in expansion.runs)


def test_ranks_fill_nodes_evenly_and_devices_follow_them() -> None:
    spread = {"set": {**MOE, "training.steps": 60, "parallel.expert": 4}}
    expansion, plan = planned(spread, {"set": {"training.steps": 60}}, world=8)
    shape = {batch.runs[0]: batch.shape for batch in batches_of(expansion.runs, plan.rows, cluster(GPU), {})}
    assert set(shape.values()) == {Shape(1, 8, 8, 512 * 1024, 8, 120)}
    on_cpu = batches_of(expansion.runs, plan.rows, cluster({"cores": 3, "memory_gb": 16}, max_nodes=4), {})
    assert [(batch.shape.nodes, batch.shape.ranks) for batch in on_cpu] == [(4, 2)]  # 3 would not divide 8


def test_branches_wait_for_their_trunks() -> None:
    wsd = {"schedule.kind": "wsd", "schedule.warmup": 5}
    branching = {"branch": True, "set": wsd, "grid": {"training.steps": [60, 100]}}
    expansion, plan = planned(branching)
    trunk, branches = batches_of(expansion.runs, plan.rows, cluster(), {})
    assert (trunk.name, trunk.after) == ("runs-1", ())
    assert (branches.name, branches.after) == ("branches-1", ("runs-1",))
    alone = [run for run in expansion.runs if run.trunk]  # the trunk is done: nothing to wait for
    assert [batch.after for batch in batches_of(alone, plan.rows, cluster(), {})] == [()]


def test_memory_after_a_lack_of_it_grows_up_to_the_node() -> None:
    expansion, plan = planned({"set": {"training.steps": 60}})
    name = expansion.runs[0].name
    for least, asked in ((0, 2048), (4096, 4096), (1 << 20, 16 * 1024)):
        (batch,) = batches_of(expansion.runs, plan.rows, cluster(), {name: least})
        assert batch.shape.memory_mb == asked


@pytest.mark.parametrize(
    ("node", "more", "words"),
    [
        ({"cores": 1, "memory_gb": 16}, {}, "8 ranks, 1 a node, need 8 nodes and max_nodes of cluster c is 1"),
        ({"cores": 8, "memory_gb": 4}, {}, "8 ranks on a node need about"),
        ({**GPU, "device_memory_gb": 1e-5}, {}, "node.device_memory_gb of cluster c is 1e-05"),
    ],
)
def test_what_does_not_fit_is_refused(node: dict[str, Any], more: dict[str, Any], words: str) -> None:
    expansion, plan = planned({"grid": {"training.steps": [60, 61]}}, world=8)
    with pytest.raises(UserError) as raised:
        batches_of(expansion.runs, plan.rows, cluster(node, **more), {})
    assert str(raised.value).count(words) == 2  # both runs are named


def test_more_threads_than_a_node_has_cores() -> None:
    expansion, plan = planned({"set": {"training.steps": 60, "runtime.threads": 8}})
    with pytest.raises(UserError, match=r"runtime\.threads \(8\) exceeds node\.cores \(4\)"):
        batches_of(expansion.runs, plan.rows, cluster(), {})
