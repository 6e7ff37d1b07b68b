"""The ``moe`` section: what it derives and how it refuses."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moescale.base.config import validate
from moescale.base.errors import UserError
from moescale.moe import MoEConfig


def refusal(**content: object) -> str:
    with pytest.raises(UserError) as error:
        validate(MoEConfig, content, "run.yaml")
    return str(error.value)


def test_more_active_than_experts() -> None:
    said = refusal(experts=4, active=5, granularity=4)
    assert said == "run.yaml: moe.active (5) must not exceed moe.experts (4); try 1 to 4"


def test_granularity_or_width() -> None:
    for both in ({}, {"granularity": 4, "expert_width": 64}):
        assert "give exactly one" in refusal(experts=4, active=1, **both)


def test_width_of_experts() -> None:
    assert MoEConfig(experts=4, active=1, granularity=4).width_of_expert(64) == 64
    assert MoEConfig(experts=4, active=1, granularity=1).width_of_expert(64) == 256
    assert MoEConfig(experts=4, active=1, expert_width=40).width_of_expert(64) == 40


@pytest.mark.parametrize(("width", "granularity"), [(48, 16 / 3 * 1.5), (64, 6), (96, 5), (8, 7)])
def test_illegal_granularity_names_legal_ones(width: int, granularity: float) -> None:
    config = MoEConfig(experts=4, active=1, granularity=granularity)
    wanted = 4 * width / granularity
    if wanted % 8 == 0:
        assert config.width_of_expert(width) == wanted
        return
    with pytest.raises(ValueError, match="must be a multiple of 8") as error:
        config.width_of_expert(width)
    said = str(error.value)
    assert f"moe.granularity ({granularity:g})" in said
    assert f"model.width ({width})" in said
    offered = [int(part.split(" ")[0]) for part in said.split("moe.expert_width=")[1:]]
    assert offered
    for legal in offered:
        assert MoEConfig(experts=4, active=1, expert_width=legal).width_of_expert(width) == legal
        assert abs(legal - wanted) < 16


def test_which_layers_are_mixtures() -> None:
    def mixtures(**keys: int) -> list[int]:
        config = MoEConfig(experts=4, active=1, granularity=4, **keys)
        return [layer for layer in range(6) if config.is_mixture(layer)]

    assert mixtures() == [0, 1, 2, 3, 4, 5]
    assert mixtures(first_dense=2) == [2, 3, 4, 5]
    assert mixtures(every=2) == [1, 3, 5]
    assert mixtures(every=2, first_dense=1) == [2, 4]
    assert mixtures(every=3) == [2, 5]


def test_unknown_key_is_guessed() -> None:
    assert "did you mean granularity?" in refusal(experts=4, active=1, granularty=4)


@given(st.integers(1, 64), st.integers(1, 4096))
def test_sparsity_names_experts(active: int, experts: int) -> None:
    if active > experts:
        active, experts = experts, active
    config = MoEConfig(active=active, sparsity=1 - active / experts, granularity=4)
    assert config == MoEConfig(active=active, experts=experts, granularity=4)
    assert "sparsity" not in config.model_dump()


def test_sparsity_as_people_write_it() -> None:
    for sparsity, experts in ((0, 4), (0.875, 32), (0.984375, 256), (0.996, 1000)):
        assert MoEConfig(active=4, sparsity=sparsity, granularity=4).experts == experts
    assert MoEConfig(active=4, experts=8, sparsity=None, granularity=4).experts == 8


def test_illegal_sparsity_names_legal_ones() -> None:
    said = refusal(active=3, sparsity=0.87, granularity=4)
    assert "moe.sparsity (0.87) with moe.active (3) asks for 23.0769 experts" in said
    for sparsity, experts in re.findall(r"(0\.\d+) \(moe\.experts (\d+)\)", said):
        assert MoEConfig(active=3, sparsity=float(sparsity), granularity=4).experts == int(experts)
    assert "give exactly one" in refusal(active=2, experts=8, sparsity=0.75, granularity=4)
    assert "needs moe.active (None)" in refusal(sparsity=0.75, granularity=4)
    for value in (1, -0.1, 1.5, "many", True):
        assert f"moe.sparsity ({value})" in refusal(active=2, sparsity=value, granularity=4)


BASE = {"experts": 8, "active": 2, "expert_width": 8}
AHEAD = {"grouping": "sequence", "allow_future_leak": True}


@pytest.mark.parametrize(
    ("router", "balance"),
    [("topk", "sequence"), ("expert_choice", "none"), ("sinkhorn", "none"), ("hash", "none"), ("forced", "none")],
)
def test_balance_is_on_where_it_means_something(router: str, balance: str) -> None:
    for keys in ({}, {"balance": None}):
        config = MoEConfig(**BASE, router=router, **keys)
        assert config.balance == balance
        assert MoEConfig(**config.model_dump()) == config


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"router": "hash", "jitter": 0.1}, "moe.jitter (0.1) means nothing with moe.router hash; it is for topk, "),
        ({"router": "forced", "score": "sigmoid"}, "moe.score (sigmoid) means nothing with moe.router forced"),
        ({"router": "sinkhorn", "groups": 2}, "moe.groups (2) means nothing with moe.router sinkhorn; it is for topk"),
        (
            {"router": "expert_choice", "capacity": 1.5},
            "moe.capacity (1.5) means nothing with moe.router expert_choice",
        ),
        ({"router": "hash", "bias_rate": 0.01}, "moe.bias_rate (0.01) means nothing with moe.router hash"),
        ({"skew": 1.0}, "moe.skew (1.0) means nothing with moe.router topk; it is for forced"),
        ({"grouping": "sequence"}, "moe.grouping (sequence) means nothing with moe.router topk"),
        ({"router": "sinkhorn", "balance": "sequence"}, "use moe.balance=none"),
        ({"router": "expert_choice", "grouping": "sequence"}, "moe.allow_future_leak=true"),
        ({"router": "sinkhorn", "grouping": "sequence"}, "use moe.grouping=position"),
        ({"groups": 3}, "moe.groups (3) must divide moe.experts (8); try 1, 2, 4, 8"),
        ({"groups": 4, "groups_active": 5}, "moe.groups_active (5) must not exceed moe.groups (4); try 1 to 4"),
        ({"groups": 8, "groups_active": 1}, "hold 1 experts; try moe.groups_active=2"),
        ({"padded": True}, "moe.padded (True) needs moe.capacity"),
        ({"drop": "probability"}, "moe.drop (probability) needs moe.capacity"),
        ({"capacity_scope": "micro_batch"}, "moe.capacity_scope (micro_batch) needs moe.capacity"),
        ({"jitter": 1.0}, "jitter (1.0): input should be less than 1"),
        ({"weight_scale": 0}, "weight_scale (0): input should be greater than 0"),
    ],
    ids=str,
)
def test_options_that_do_not_go_together(options: dict[str, object], said: str) -> None:
    assert said in refusal(**BASE, **options)


@pytest.mark.parametrize(
    ("options", "future", "inexact"),
    [
        ({}, "never", []),
        ({"jitter": 0.1, "groups": 2, "balance": "global", "bias_rate": 0.1}, "never", []),
        ({"router": "hash"}, "never", []),
        ({"router": "forced"}, "never", []),
        ({"router": "expert_choice"}, "never", ["moe.grouping=position"]),
        ({"router": "expert_choice", **AHEAD}, "always", []),
        ({"router": "sinkhorn"}, "never", ["moe.grouping=position"]),
        ({"router": "sinkhorn", **AHEAD}, "training", []),
        ({"balance": "micro_batch"}, "never", ["moe.balance=micro_batch"]),
        ({"capacity": 1.0, "drop": "probability"}, "always", []),
        ({"capacity": 1.0}, "never", []),
        ({"capacity": 1.0, "router": "hash"}, "never", []),
        (
            {"capacity": 1.0, "drop": "probability", "capacity_scope": "micro_batch", "balance": "micro_batch"},
            "always",
            ["moe.balance=micro_batch", "moe.capacity_scope=micro_batch"],
        ),
    ],
    ids=str,
)
def test_what_couples_tokens(options: dict[str, object], future: str, inexact: list[str]) -> None:
    config = MoEConfig(**BASE, **options)
    assert (config.future, config.inexact) == (future, inexact)
    assert config.causal == (future == "never")
    assert config.layout_exact == (not inexact)
