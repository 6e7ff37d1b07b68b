"""What the best models for a budget would cost on a cluster."""

from pathlib import Path
from typing import Any

import pytest

from moescale.base.config import validate
from moescale.base.errors import UserError
from moescale.launch.cluster_config import load_cluster
from moescale.launch.frontier_plan import plan_frontier
from moescale.scaling.fitted import Estimate
from moescale.scaling.frontier import Best
from moescale.training.config import RunConfig

H100 = load_cluster(Path("clusters/h100.yaml"))
BF16 = ["training.dtype=bf16"]


def run(**changes: Any) -> RunConfig:
    content = {
        "name": "small",
        "data": {"domains": {"stdlib": {"source": "stdlib"}}, "tokenizer": {"vocab": 1024}},
        "model": {"shape": "d48", "tied": False, "qk_norm": "head"},
        "optimizer": {"lr": 0.01},
        "training": {"seq": 128, "batch": 4, "flops": 1e12},
        "noise": {"every": 25, "small_batch": 1},
        **changes,
    }
    return validate(RunConfig, content, "small")


def best(compute: float, n: float, b: float | None = None) -> Best:
    size = Estimate(n, None, None)
    return Best("E8G4", compute, size, n, compute / 6 / n, 32, 4, 4, 0.875, b, 0.01, None, None, "small",
                "law of n and d", ())  # fmt: skip


def test_a_mixture_is_brought_to_size_and_timed() -> None:
    runs = {"small": run(moe={"experts": 32, "active": 4, "expert_width": 48})}
    plan = plan_frontier([best(1e21, 400e6, b=1e6)], runs, H100, 64, [*BF16, "training.seq=2048"])
    (row,) = plan.rows
    assert row.name == "E8G4-350M-1e+21"
    assert row.n_active == pytest.approx(400e6, rel=0.15)
    assert row.n_total > 5 * row.n_active  # experts grow with the model
    assert row.flops == pytest.approx(1e21, rel=0.01)
    assert row.tokens / row.steps == pytest.approx(1e6, rel=0.01)
    assert row.layout["world"] == 64
    assert row.speed is not None
    peak = 64 * H100.hardware.bf16_tflops * 1e12
    assert row.speed.device_hours == pytest.approx(64 * row.seconds / 3600)
    assert row.speed.mfu == pytest.approx(row.flops / row.seconds / peak, rel=0.02)
    assert 0.05 < row.speed.mfu < 0.7


def test_what_is_open_is_as_in_the_study_and_what_is_set_is_not() -> None:
    runs = {"small": run()}
    as_studied = plan_frontier([best(1e15, 5e6)], runs, H100, 1, [])
    assert as_studied.rows[0].tokens / as_studied.rows[0].steps == 4 * 128
    other = plan_frontier([best(1e15, 5e6)], runs, H100, 1, ["training.batch=64", "model.shape=d128"])
    assert other.rows[0].tokens / other.rows[0].steps == 64 * 128
    assert other.rows[0].n_active < as_studied.rows[0].n_active


def test_refusals() -> None:
    runs = {"small": run()}
    with pytest.raises(UserError, match=r"training.seq \('x'\)"):
        plan_frontier([best(1e15, 5e6)], runs, H100, 1, ["training.seq=x"])
    with pytest.raises(UserError, match="the leanest needs"):
        plan_frontier([best(1e25, 1e11)], runs, H100, 1, BF16)


def test_on_the_command_line(main, tmp_path) -> None:
    result = main("study", "frontier", tmp_path, "--compute", 1e15, "--set", "training.dtype=bf16")
    assert result.returncode == 2
    assert "--world and --set are for the models on a cluster: give --cluster too" in result.stderr
