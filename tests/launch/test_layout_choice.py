"""Layouts chosen for a cluster: legal, within memory, what files say kept, the same for plan and submit."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moescale.base.config import SHIPPED, validate
from moescale.base.errors import UserError
from moescale.base.progress import duration
from moescale.launch.check_layout import check_layouts
from moescale.launch.cluster_config import ClusterConfig, load_cluster
from moescale.launch.cluster_fit import GIB, rank_room
from moescale.launch.expansion import expand
from moescale.launch.placing import placed
from moescale.launch.plan import plan_study
from moescale.launch.plan_table import layout_in_short
from moescale.launch.planned import Expansion, PlannedRun
from moescale.launch.study_config import StudyConfig, load_study
from moescale.models.cost.memory import fullest_bytes
from moescale.training.budget import workload

VOCAB = 32_000
RUN: dict[str, Any] = {
    "data": {"domains": {"text": {"files": ["*.txt"]}}, "tokenizer": {"vocab": VOCAB}, "samples": 1e9},
    "training": {"seq": 2048, "batch": 256, "steps": 1000, "dtype": "bf16"},
    "optimizer": {"lr": 0.01},
}
MOE = {"experts": 64, "active": 4, "granularity": 4}


def cluster(name: str = "h100", **changes: Any) -> ClusterConfig:
    return load_cluster(Path(f"clusters/{name}.yaml")).model_copy(update=changes)


def study(grid: dict[str, Any], **run: Any) -> StudyConfig:
    group = {"family": "f", "grid": grid or {"training.seed": [0]}}
    return validate(StudyConfig, {"name": "s", "run": {**RUN, **run}, "groups": {"g": group}}, "study")


def chosen(world: int | None = None, on: ClusterConfig | None = None, **run: Any) -> PlannedRun:
    """The one run, laid out."""
    return only(placed(expand(study({}, **run)), on or cluster(), world))


def only(expansion: Expansion) -> PlannedRun:
    if expansion.impossible:
        raise UserError(expansion.impossible[0].reason)
    (run,) = expansion.runs
    assert run.choice is not None
    return run


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(
    shape=st.sampled_from(["125M", "760M", "2.7B", "13B"]),
    moe=st.sampled_from([None, MOE, {**MOE, "first_dense": 1, "shared": 1}]),
    world=st.sampled_from([8, 16, 64, 128]),
    name=st.sampled_from(["h100", "a100"]),
)
def test_what_is_chosen_is_legal_and_fits(shape: str, moe: dict[str, Any] | None, world: int, name: str) -> None:
    place = cluster(name)
    expansion = placed(expand(study({}, model={"shape": shape}, **({"moe": moe} if moe else {}))), place, world)
    if expansion.impossible:
        assert "the smallest cluster that would do has" in expansion.impossible[0].reason
        return
    run = only(expansion)
    choice, config = run.choice, run.config
    assert choice is not None
    topology = config.check_layout(world, choice.node_ranks)
    work = workload(config, VOCAB, topology)
    assert choice.memory_bytes == fullest_bytes(config.model, config.moe, VOCAB, work, topology)
    assert choice.memory_bytes <= rank_room(place, 8) < (place.node.device_memory_gb or 0) * GIB
    assert 0 < choice.flops_share < 0.9
    assert choice.slower >= 0


def test_a_better_network_is_never_slower() -> None:
    slow = cluster()
    assert slow.hardware is not None
    fast = slow.model_copy(update={"hardware": slow.hardware.model_copy(update={"network_gb_s": 400.0})})
    run = {"model": {"shape": "13B"}, "moe": MOE}
    times = [chosen(128, place, **run).choice.step.seconds for place in (slow, fast)]  # type: ignore[union-attr]
    assert times[1] <= times[0]


def test_what_the_files_say_is_kept() -> None:
    given_keys = {"tensor": 4, "expert": 16}
    run = chosen(
        64, model={"shape": "2.7B"}, moe=MOE, parallel=given_keys, training=RUN["training"] | {"micro_batch": 2}
    )
    assert run.choice is not None
    assert (run.config.parallel.tensor, run.config.parallel.expert, run.config.training.micro_batch) == (4, 16, 2)
    assert set(run.choice.chosen) == {"parallel.pipeline", "parallel.virtual_stages", "training.recompute"}
    before = only(placed(expand(study({}, model={"shape": "2.7B"}, moe=MOE)), cluster(), 64)).config
    assert before.scientific_hash == run.config.scientific_hash


def test_sizes_that_are_no_powers_of_two() -> None:
    run = chosen(model={"layers": 12, "width": 768, "heads": 12}, parallel={"tensor": 1, "pipeline": 3})
    assert run.choice is not None
    assert run.choice.world == 3


def test_recomputation_where_nothing_fits_without() -> None:
    tight = cluster(max_nodes=1)
    tight = tight.model_copy(update={"node": tight.node.model_copy(update={"device_memory_gb": 28.0})})
    run = chosen(8, tight, model={"shape": "7B"}, training=RUN["training"] | {"seq": 8192, "batch": 8})
    assert run.config.training.recompute == "full"
    roomy = chosen(8, model={"shape": "7B"}, training=RUN["training"] | {"batch": 8})
    assert roomy.config.training.recompute == "none"


def test_what_does_not_fit_is_refused_with_the_smallest_cluster_that_would() -> None:
    with pytest.raises(UserError) as error:
        chosen(on=cluster(max_nodes=1), model={"shape": "70B"})
    said = str(error.value)
    assert "on up to 1 nodes of 8 ranks of cluster h100 fits: the leanest needs" in said
    nodes = int(said.split("the smallest cluster that would do has ")[1].split()[0])
    assert chosen(8 * nodes, cluster(max_nodes=nodes), model={"shape": "70B"}).choice is not None
    with pytest.raises(UserError, match="the smallest cluster that would do"):
        chosen(8 * nodes // 2, cluster(max_nodes=nodes), model={"shape": "70B"})


@pytest.mark.parametrize(
    ("world", "run", "says"),
    [
        (256, {}, "need 32 nodes and max_nodes of cluster h100 is 16"),
        (48, {"parallel": {"tensor": 4, "pipeline": 8}}, r"= 32 must divide the number of ranks \(48\)"),
        (16, {"parallel": {"tensor": 3}}, r"parallel\.tensor \(3\)"),
    ],
)
def test_a_layout_that_cannot_be_is_refused_as_ever(world: int, run: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        chosen(world, model={"shape": "125M"}, **run)


def test_a_small_run_takes_one_rank_and_stays_as_it_was() -> None:
    """Micro-batches included: a run's bits do not depend on whether somebody knows the cluster's hardware."""
    small = {"model": {"shape": "d64"}, "training": {"seq": 128, "batch": 8, "steps": 60}, "runtime": {"threads": 1}}
    for name in ("cpu", "laptop"):
        run = chosen(None, cluster(name), **small)
        assert run.choice is not None
        assert run.choice.world == 1
        assert run.config == expand(study({}, **small)).runs[0].config


def test_a_cluster_without_hardware_cannot_be_planned_for() -> None:
    with pytest.raises(UserError, match=r"cluster h100 has no hardware section"):
        chosen(on=cluster(hardware=None), model={"shape": "125M"})


def test_two_thousand_runs_take_seconds() -> None:
    grid = {
        "model.shape": ["d64", "d128", "d256", "125M", "350M", "760M", "1.4B"],
        "training.seed": list(range(12)),
        "optimizer.lr": [1e-4, 2e-4, 4e-4, 8e-4],
        "training.steps": [500, 1000, 2000],
        "moe.active": [2, 4],
    }
    config = study(grid, moe={"experts": 32, "granularity": 4})
    expansion = expand(config)
    began = time.process_time()
    found = placed(expansion, cluster(), None)
    rows = plan_study(config, found).rows
    assert len(rows) == 2016
    assert time.process_time() - began < 20
    assert all(row.speed is not None and row.speed.device_hours > 0 for row in rows)


def test_plan_shows_what_submit_launches(work: Path, main: Any, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        f"run: {{extends: {work}/base.yaml, training: {{batch: 8}}}}\n"
        "groups: {a: {family: E4, set: {moe: {experts: 4, active: 2, granularity: 2}}, grid: {training.steps: [60]}}}\n"
    )
    (tmp_path / "there.yaml").write_text("extends: clusters/cpu.yaml\nsetup: []\n")
    options = [tmp_path / "mine.yaml", "--cluster", tmp_path / "there.yaml", "--world", 4, "--json"]
    planned = main("study", "plan", *options)
    assert planned.returncode == 0, planned.stderr
    (row,) = json.loads(planned.stdout)["runs"]
    assert row["layout"]["world"] == 4
    assert row["speed"]["shares"][row["speed"]["bound"]] == max(row["speed"]["shares"].values())
    submitted = main("study", "submit", *options, "--dry-run", "--out", tmp_path / "out")
    assert submitted.returncode == 0, submitted.stderr
    text = next(script["text"] for script in json.loads(submitted.stdout)["scripts"] if script["runs"])
    assert "--nproc-per-node 4" in text
    shown = main("study", "plan", *options[:-1])
    assert "bound by" in shown.stdout


def test_what_thirty_billion_on_512_devices_would_cost() -> None:
    """The figures of docs/planning.md."""
    config = load_study(SHIPPED / "studies" / "thirty-billion.yaml")
    rows = plan_study(config, placed(expand(config), cluster("h100-512"), 512)).rows
    page = (SHIPPED.parent / "docs" / "planning.md").read_text()
    assert max(row.n_active for row in rows) == pytest.approx(30e9, rel=0.01)
    for row in rows:
        assert row.speed is not None
        size, hours = layout_in_short(row).split(" mb")[0], f"{row.speed.device_hours:,.0f}"
        assert f"| {size} | {row.speed.mfu:.0%} | {hours} | {duration(row.seconds)} |".replace("%", " %") in page


@pytest.mark.slow
def test_layouts_chosen_for_the_large_study_hold_the_model_whole() -> None:
    config = load_study(SHIPPED / "studies" / "thirty-billion.yaml")
    found = placed(expand(config), cluster("h100-512"), 64)
    runs = [(run.config, VOCAB, run.config.check_layout(64, 8)) for run in found.runs]
    assert len(runs) >= 2
    assert [check.faults for check in check_layouts(runs)] == [()] * len(runs)
