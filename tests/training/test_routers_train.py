"""Every router option as a run of its own: it trains, evaluates, and recomputation changes nothing."""

from typing import Any

import pytest

from moescale.base.config import validate
from moescale.training.config import RunConfig

MIXTURE = {"experts": 4, "active": 2, "expert_width": 16, "first_dense": 1}
AHEAD = {"grouping": "sequence", "allow_future_leak": True}
OPTIONS: dict[str, dict[str, Any]] = {
    "sigmoid": {"score": "sigmoid"},
    "groups": {"score": "sigmoid_normalized", "groups": 2, "weight_scale": 2.0, "bias_rate": 0.01},
    "jitter": {"jitter": 0.1},
    "hash": {"router": "hash"},
    "forced": {"router": "forced", "skew": 1.0},
    "choice at a position": {"router": "expert_choice"},
    "choice in a sequence": {"router": "expert_choice", **AHEAD},
    "sinkhorn at a position": {"router": "sinkhorn"},
    "sinkhorn in a sequence": {"router": "sinkhorn", **AHEAD},
}
STEPS = 6


def trained(config: RunConfig, groups: Any) -> tuple[list[Any], float]:
    """Results of the first steps, and the evaluation loss after them, which is asked for twice."""
    from moescale.training.evaluate import evaluate
    from moescale.training.setup import build
    from moescale.training.step import take_step

    setup = build(config, groups)
    results = []
    for step in range(STEPS):
        results.append(take_step(setup, step, config.optimizer.lr, measure_noise=False, stop_asked=False))
        scores = [evaluate(setup.passes, groups, held_out, config.training.seq) for held_out in setup.held_out.values()]
    again = [evaluate(setup.passes, groups, held_out, config.training.seq) for held_out in setup.held_out.values()]
    assert scores == again
    return results, scores[0].loss


@pytest.mark.parametrize("name", OPTIONS)
def test_a_run_of_each_option(name: str, small_run: Any, one_rank: Any) -> None:
    def config(recompute: str) -> RunConfig:
        training = {"micro_batch": 4, "recompute": recompute}
        return validate(RunConfig, small_run(moe={**MIXTURE, **OPTIONS[name]}, training=training), name)

    results, loss = trained(config("none"), one_rank)
    assert all(result.finite for result in results)
    assert results[-1].loss < results[0].loss - 0.1
    assert loss < results[0].loss
    recomputed, loss_recomputed = trained(config("full"), one_rank)
    assert loss_recomputed == pytest.approx(loss, rel=1e-6)
    for plain, twice in zip(results, recomputed, strict=True):
        assert twice.loss == pytest.approx(plain.loss, rel=1e-6)
        assert twice.squares.total == pytest.approx(plain.squares.total, rel=1e-4)
        assert twice.router == [pytest.approx(load, rel=1e-5) for load in plain.router]
